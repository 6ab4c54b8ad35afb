"""The command line: argument parsing only."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from os.path import expanduser
from pathlib import Path
from typing import Any

from tiltflow.errors import ConfigError, TiltflowError
from tiltflow.runtime.malloc import keep_memory

Overrides = list[tuple[str, str]]
WITH_CONFIG = {  # command -> the packaged configs that are for it
    "train": ("shapes_ram", "words_ram", "shapes_pickscore", "geneval_sd3", "ocr_sd3", "pickscore_sd3"),
    "train-reward": ("shapes_preference",),
    "pretrain": ("tiny_sd3", "tiny_sd3_phase2", "tiny_words"),
}
RESUMED = ("train", "train-reward", "pretrain", "score")  # started again they go on from what is on disk
FLAGS = ("--help", "--print-config", "--print_config")  # the only words with dashes that may come before the config
SCALING = ("min_replicas", "max_replicas", "target_ongoing_requests", "num_cpus", "num_gpus", "address")  # of serve
KEPT_BYTES = 2**30  # of freed memory: what one step on a CPU frees, the next one needs
# Set before the libraries are imported: their advice on loading is for people who call them directly.
QUIET = {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Returns:
        0, 1 if a reward scored nothing, 2 after a user's error, 130 after Ctrl+C.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    keep_memory(KEPT_BYTES)
    sys.path.append(os.getcwd())  # rewards of the user's own live beside the config
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    if words[:1] and words[0] in WITH_CONFIG and len(words) > 2 and words[1].startswith("--") and words[1] not in FLAGS:
        parser.error(f"{words[1]}: the config comes first: tiltflow {words[0]} CONFIG {words[1]} ...")
    known, rest = parser.parse_known_args(words)
    try:
        return int(known.run(known, _overrides(rest)) or 0)
    except TiltflowError as error:
        print(f"tiltflow {known.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # of several processes one says so
            again = "; run the same command again to go on" if known.command in RESUMED else ""
            print(f"\ntiltflow {known.command}: interrupted{again}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tiltflow",
        description="Train reward models, post-train image generators towards rewards, and measure what it did.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    _run_arguments(commands)
    _checkpoint_commands(commands)

    score = commands.add_parser("score", help="score image files", allow_abbrev=False)
    score.add_argument(
        "--rewards",
        nargs="+",
        required=True,
        help="names, Python paths, or '{reward_model: Geneval, detector: shapes}'",
    )
    score.add_argument(
        "--images",
        type=expanduser,
        required=True,
        help="a folder, a glob pattern, or a .jsonl file",
    )
    score.add_argument("--prompts", type=expanduser, help="a prompt file with a line per image")
    score.add_argument("--output", type=_path, default=Path("outputs/scores.jsonl"), help=".jsonl, .csv or .parquet")
    score.add_argument("--batch_size", type=_positive, default=16, help="of rewards that do not set their own")
    score.add_argument("--group_size", type=_positive, default=1, help="images in a row that belong to one group")
    score.set_defaults(run=_score, parser=score)

    _evaluate_reward_arguments(commands)

    serve = commands.add_parser("serve", help="score over HTTP", allow_abbrev=False)
    serve.add_argument(
        "rewards", nargs="+", help="names, Python paths, or '{reward_model: Geneval, detector: shapes, name: shapes}'"
    )
    _serve_arguments(serve)
    serve.set_defaults(run=_serve, parser=serve)

    doctor = commands.add_parser(
        "doctor", help="list every reward: importable? weights found? device", allow_abbrev=False
    )
    doctor.set_defaults(run=_doctor, parser=doctor)
    return parser


def _run_arguments(commands: Any) -> None:
    """Add the commands that make a run of a config."""
    kinds = {
        "train": ("post-train a generator", "--lr 1e-4 or --train.lr 1e-4", _train),
        "train-reward": ("train a reward model", "--lr 1e-4 or --train.lr 1e-4", _train_reward),
        "pretrain": ("make a small model from scratch", "--warmup_steps 8 or --autoencoder.lr 1e-3", _pretrain),
    }
    for name, (does, example, run) in kinds.items():
        command = commands.add_parser(
            name,
            help=does,
            epilog=f"Any key of the config can be set too: {example}; --print-config shows them all.",
            allow_abbrev=False,
        )
        packaged = ", ".join(WITH_CONFIG[name])
        command.add_argument("config", help=f"path of a YAML file, or the name of a packaged config: {packaged}")
        command.add_argument(
            "--print-config", "--print_config", action="store_true", help="print the resolved config and stop"
        )
        command.set_defaults(run=run)


def _checkpoint_commands(commands: Any) -> None:
    """Add the commands that put a checkpoint or a model to work."""
    evaluate = commands.add_parser(
        "evaluate",
        help="score a checkpoint's or a model's images",
        epilog="Any key of the run's policy and evaluation can be set too, such as --evaluation.num_steps 20.",
        allow_abbrev=False,
    )
    _policy_arguments(evaluate)
    evaluate.add_argument("--prompts", type=expanduser, help="a named set (shapes, geneval, ocr, drawbench) or a file")
    evaluate.add_argument(
        "--rewards", help="YAML, for example '[Geneval]' or '[{reward_model: Geneval, detector: shapes}]'"
    )
    evaluate.add_argument("--output_dir", type=_path, help="where the results go; beside the checkpoint by default")
    evaluate.add_argument("--name", help="of the result; the checkpoint's or the model's by default")
    evaluate.set_defaults(run=_evaluate)

    sample = commands.add_parser(
        "sample",
        help="write images of prompts",
        epilog="Any key of the run's policy and sampler can be set too, such as --sampler.num_steps 20.",
        allow_abbrev=False,
    )
    _policy_arguments(sample)
    sample.add_argument("--prompt", action="append", required=True, help="what to draw; give it once per prompt")
    sample.add_argument("--count", type=int, default=4, help="images per prompt")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--output_dir", type=_path, default=Path("outputs/samples"))
    sample.set_defaults(run=_sample)


def _evaluate_reward_arguments(commands: Any) -> None:
    judge = commands.add_parser(
        "evaluate-reward", help="how often a reward model prefers what people prefer", allow_abbrev=False
    )
    judge.add_argument("model", type=expanduser, help="a folder such as outputs/<run>/model, or a hub name")
    judge.add_argument(
        "data",
        nargs="+",
        help="sets of pairs: files, folders, hub names as owner/name@split; of images also '{source: ..., split: ...}'",
    )
    judge.add_argument(
        "--output", type=_path, help=".json, in the model's run by default; every pair's scores beside it"
    )
    judge.add_argument("--on_bad_record", choices=("error", "skip"), default="error")
    judge.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    language = judge.add_argument_group("of language models")
    language.add_argument(
        "--as_conversation",
        choices=("auto", "yes", "no"),
        help="prompt and answer through the chat template; auto, the default: as in training",
    )
    language.add_argument("--columns", help="what the data calls them otherwise: '{chosen: better}'")
    language.add_argument("--max_length", type=_positive, help="tokens of a text; what the network can read by default")
    language.add_argument("--over_length", choices=("truncate", "filter", "error"), help="truncate by default")
    language.add_argument("--attribute", help="which of several numbers is the reward: a name or a number")
    pairs = judge.add_argument_group("of image-text models")
    pairs.add_argument("--validation", help="pairs that choose the threshold below which a pair is called a tie")
    pairs.add_argument("--on_bad_image", choices=("error", "skip"), help="error by default")
    judge.set_defaults(run=_evaluate_reward, parser=judge)


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _positive(text: str) -> int:
    """Read a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: use a whole number from 1")
    return int(text)


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="another one needs a token, or --insecure")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--token", help="what clients must send; by default TILTFLOW_SERVER_TOKEN of the environment")
    parser.add_argument("--insecure", action="store_true", help="answer anyone who can reach the address")
    parser.add_argument("--replicas", type=_positive, default=1, help="worker processes of each reward")
    parser.add_argument("--batch_size", type=_positive, default=16, help="of rewards that do not set their own")
    parser.add_argument("--batch_pixels", type=_positive, help="of one call; an item, or a group, with more is refused")
    parser.add_argument("--batch_tokens", type=_positive, help="of the prompts of one call, likewise")
    parser.add_argument(
        "--batch_seconds", type=float, help="after so long a call counts as hung: 60, or what a judge's timeouts allow"
    )
    parser.add_argument("--load_seconds", type=float, default=1800.0, help="for a model to be ready")
    parser.add_argument(
        "--limit", action="append", default=[], help="name=value, such as items=512; as often as needed"
    )
    parser.add_argument("--drain_seconds", type=float, default=30.0, help="after SIGTERM, for what is in flight")
    _ray_arguments(parser)


def _ray_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=("http", "ray"), default="http", help="ray: the same on Ray Serve")
    ray = parser.add_argument_group("with --engine ray")
    ray.add_argument("--min_replicas", type=int, help="servers that are always there: 1")
    ray.add_argument("--max_replicas", type=int, help="servers at the highest load: as many as min_replicas")
    ray.add_argument("--target_ongoing_requests", type=float, help="of one server; more start another one: 8")
    ray.add_argument("--num_cpus", type=float, help="that Ray sets aside for each server: 1")
    ray.add_argument("--num_gpus", type=float, help="the same, and what it can see: 0")
    ray.add_argument("--address", help="of a Ray cluster, host:port or auto; by default one is started here")


def _policy_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=_path, help="a checkpoint folder such as outputs/<run>/latest")
    parser.add_argument("--model_name", help="a pretrained model: folder, hub name, tiny_sd3 or tiny_words")


def _train(arguments: argparse.Namespace, overrides: Overrides) -> None:
    if arguments.print_config:
        from tiltflow.config import dump, load_run_config

        print(dump(load_run_config(arguments.config, overrides)), end="")
        return
    from tiltflow.commands import run_training

    run_training(arguments.config, overrides)


def _train_reward(arguments: argparse.Namespace, overrides: Overrides) -> None:
    if arguments.print_config:
        from tiltflow.commands import load_reward_config
        from tiltflow.config import dump

        print(dump(load_reward_config(arguments.config, overrides)[1]), end="")
        return
    from tiltflow.commands import run_reward_training

    run_reward_training(arguments.config, overrides)


def _pretrain(arguments: argparse.Namespace, overrides: Overrides) -> None:
    from tiltflow.config import dump, load_pretrain_config

    config = load_pretrain_config(arguments.config, overrides)
    if arguments.print_config:
        print(dump(config), end="")
        return
    from tiltflow.commands import run_pretraining

    print(f"checkpoint: {run_pretraining(config)}")


def _evaluate(arguments: argparse.Namespace, overrides: Overrides) -> int:
    from tiltflow.commands import run_evaluation

    result = run_evaluation(
        checkpoint=arguments.checkpoint,
        model_name=arguments.model_name,
        prompts=arguments.prompts,
        rewards=arguments.rewards,
        overrides=overrides,
        output_dir=arguments.output_dir,
        name=arguments.name,
    )
    return 1 if result.without_score() else 0


def _evaluate_reward(arguments: argparse.Namespace, overrides: Overrides) -> None:
    _no_overrides(arguments, overrides)
    from tiltflow.commands import run_reward_evaluation
    from tiltflow.config import parse_value

    named = ("as_conversation", "columns", "max_length", "over_length", "attribute", "validation", "on_bad_image")
    options = {name: given for name in named if (given := vars(arguments)[name]) is not None}
    if "columns" in options:
        options["columns"] = parse_value("columns", options["columns"])
    outcome, path = run_reward_evaluation(
        arguments.model,
        arguments.data,
        output=arguments.output,
        on_bad_record=arguments.on_bad_record,
        dtype=arguments.dtype,
        options=options,
    )
    print(outcome.text)
    for kind, count in outcome.notes.items():
        print(f"{count} pairs: {kind}", file=sys.stderr)
    print(f"result: {path}")


def _sample(arguments: argparse.Namespace, overrides: Overrides) -> None:
    from tiltflow.commands import run_sampling

    files = run_sampling(
        checkpoint=arguments.checkpoint,
        model_name=arguments.model_name,
        prompts=arguments.prompt,
        count=arguments.count,
        seed=arguments.seed,
        overrides=overrides,
        output_dir=arguments.output_dir,
    )
    print("\n".join(str(path) for path in files))


def _score(arguments: argparse.Namespace, overrides: Overrides) -> int:
    _no_overrides(arguments, overrides)
    from tiltflow.commands import failure_causes, run_scoring, summary_table, without_score

    rows = run_scoring(
        images=arguments.images,
        rewards=arguments.rewards,
        prompts=arguments.prompts,
        output=arguments.output,
        batch_size=arguments.batch_size,
        group_size=arguments.group_size,
    )
    print(summary_table(rows))
    print(f"rows: {arguments.output}")
    causes, useless = failure_causes(rows), without_score(rows)
    if causes:
        print(causes, file=sys.stderr)
    if useless:
        print(f"tiltflow score: no image has a score from: {', '.join(useless)}", file=sys.stderr)
    return 1 if useless else 0


def _serve(arguments: argparse.Namespace, overrides: Overrides) -> None:
    _no_overrides(arguments, overrides, "; a reward's own options go into its mapping")
    from tiltflow.commands import CallSettings, run_serving

    run_serving(
        arguments.rewards,
        host=arguments.host,
        port=arguments.port,
        token=arguments.token,
        insecure=arguments.insecure,
        batch_size=arguments.batch_size,
        calls=CallSettings(**{each.name: vars(arguments)[each.name] for each in fields(CallSettings)}),
        limits=arguments.limit,
        drain_seconds=arguments.drain_seconds,
        engine=arguments.engine,
        scaling={name: given for name in SCALING if (given := vars(arguments)[name]) is not None},
    )


def _doctor(arguments: argparse.Namespace, overrides: Overrides) -> None:
    _no_overrides(arguments, overrides)
    try:
        from tiltflow.commands import doctor_report
    except (ImportError, OSError, RuntimeError) as error:  # a package that is missing, or broken in one of these ways
        raise ConfigError(
            f"a package that tiltflow needs cannot be imported: {error}; install it anew: make install, or pip install "
            "--force-reinstall PACKAGE"
        ) from error

    print(doctor_report())


def _overrides(words: Sequence[str]) -> Overrides:
    if not words:
        return []  # without the packages that reading takes: doctor may have to say that they are missing
    from tiltflow.runtime.overrides import read_overrides

    return read_overrides(words)


def _no_overrides(arguments: argparse.Namespace, overrides: Overrides, more: str = "") -> None:
    """Check that a command which takes no keys of a config was given none.

    Raises:
        ConfigError: It was; names the nearest of its options.
    """
    if not overrides:
        return
    key, command = overrides[0][0], arguments.command
    own = re.findall(r"--(\w+)", arguments.parser.format_usage())
    near = difflib.get_close_matches(key, own, n=1, cutoff=0.6)
    hint = f"; did you mean --{near[0]}?" if near else ";"
    raise ConfigError(f"--{key} is no option of {command}{hint} `tiltflow {command} --help` lists them{more}")
