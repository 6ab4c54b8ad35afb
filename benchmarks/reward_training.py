"""Pairs per second of reward training beside TRL's `RewardTrainer`: one JSON line.

    python -m benchmarks.reward_training             # a tiny Llama, 1,600 pairs, three rounds
    python -m benchmarks.reward_training --rounds 1 --pairs 128

Both sides train the same classifier from the same weights on the same tokens with the same optimiser (AdamW, same
rate, decay and clipping), the same number of pairs a step, in micro-batches of the same number, in float32.
`speedup_over_trl` compares with TRL as it comes, in random order; `speedup_over_trl_grouped` with its
`train_sampling_strategy="group_by_length"`, which puts examples of like lengths together within as many batches as
this package is told to (transformers: a quarter of the epoch, at most 50).

Every run is a process of its own. It first takes some steps on one batch, the same for all sides: they warm up, and
their losses and gradients must agree, or there is no result. Then it trains one whole epoch with a new model and a new
trainer, and that is what is timed: every pair once, whatever its length, tokenising and setting up excepted. The sides
take turns, and the medians over the rounds count. Memory is the peak of the whole process, imports and all: on the CPU
the resident set, on a GPU what torch allocated.

The lengths are spread like those of preference data, though shorter: a prompt that both texts share, and answers of
their own, log-normal with sigma 0.7 and 0.9; the words are those of Python's manual.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.reward_training.real_text import misspelt, passages, save_model
from tiltflow.reward_training import LanguageDataConfig, LanguageModelConfig, build_language
from tiltflow.reward_training.fit_config import LanguageFitConfig
from tiltflow.reward_training.trainer import RewardTrainer
from tiltflow.runtime.distributed import Distributed
from tiltflow.scorers import LanguageRewardModel

SIDES = ("tiltflow", "trl", "trl_grouped")
MAX_LENGTH = 256  # tokens
BATCH, MICRO_BATCH = 32, 8  # pairs
WIDTH, LAYERS = 128, 4
WARM_STEPS = 3  # on one batch
SAME_STEPS = 1e-3  # how far losses and gradients of those may be apart, as a share
OPTIMISER = {"lr": 5e-4, "weight_decay": 0.01, "max_grad_norm": 1.0, "betas": (0.9, 0.999)}


# --- what both sides are given ---------------------------------------------------------------------------------------


def write_task(folder: Path, pairs: int) -> None:
    """Write the classifier that both start from, and the pairs as text and as tokens; the first batch also alone."""
    texts = passages()
    torch.manual_seed(0)
    base = save_model(folder / "base", texts, width=WIDTH, layers=LAYERS)
    model = LanguageRewardModel.from_pretrained(base, append_eos=True)
    model.save_pretrained(folder / "model")
    words = " ".join(texts).split()
    generator, choose = np.random.default_rng(0), random.Random(0)

    def part(median: float, sigma: float, at_most: int) -> str:
        count = int(np.clip(generator.lognormal(np.log(median), sigma), 3, at_most))
        start = int(generator.integers(0, len(words) - count))
        return " ".join(words[start : start + count])

    lines = []
    for _ in range(pairs):
        prompt = part(8, 0.7, 35)
        chosen, rejected = part(13, 0.9, 90), misspelt(part(13, 0.9, 90), choose)
        lines.append({"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}"})
    for name, some in (("all", lines), ("warm", lines[:BATCH])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(line) for line in some))
        tokens = [{f"{side}_ids": model.encode(line[side])[:MAX_LENGTH] for side in line} for line in some]
        (folder / f"{name}.json").write_text(json.dumps(tokens))


def window(pairs: int) -> int:
    """Return within how many batches transformers puts examples of like lengths together."""
    return max(1, min(pairs // (4 * BATCH), 50))


def memory() -> float:
    """Return the most memory so far, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def now() -> float:
    """Return the time when all that was asked of the device is done, in seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# --- the sides -------------------------------------------------------------------------------------------------------


@dataclass
class Epochs:
    """What one side did: how long its epochs took, and the loss and the gradient's norm of every step."""

    seconds: float
    losses: list[float]
    norms: list[float]


def train_ours(folder: Path, data: str, epochs: int) -> Epochs:
    """Train with this package."""
    fitting = build_language(
        LanguageModelConfig(reward_model_type="binary_ranking", pretrained=str(folder / "model")),
        LanguageDataConfig(train=str(folder / f"{data}.jsonl"), max_length=MAX_LENGTH, over_length="truncate"),
    )
    config = LanguageFitConfig(
        max_epochs=epochs,
        batch_size=BATCH,
        micro_batch_size=MICRO_BATCH,
        length_window=window(len(fitting.train)),
        schedule="constant",
        warmup_steps=0,
        constant_steps=0,
        min_lr=0.0,
        **OPTIMISER,
    )
    trainer = RewardTrainer(fitting, config, seed=0, distributed=Distributed())
    began = now()
    found = [step.metrics for step in trainer.run()]
    seconds = now() - began
    return Epochs(seconds, [each["train/loss"] for each in found], [each["grad_norm"] for each in found])


def train_theirs(folder: Path, data: str, epochs: int, *, grouped: bool) -> Epochs:
    """Train with TRL."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    rows = json.loads((folder / f"{data}.json").read_text())
    for row in rows:
        row["length"] = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    arguments = RewardConfig(
        output_dir=str(folder / "trl"),
        num_train_epochs=epochs,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=BATCH // MICRO_BATCH,
        learning_rate=OPTIMISER["lr"],
        weight_decay=OPTIMISER["weight_decay"],
        max_grad_norm=OPTIMISER["max_grad_norm"],
        lr_scheduler_type="constant",
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
        train_sampling_strategy="group_by_length" if grouped else "random",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,  # or the lengths would be lost before they are needed
        use_cpu=not torch.cuda.is_available(),
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    trainer = RewardTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    times: list[float] = []

    class Times(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            times.append(now())

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            times.append(now())

    trainer.add_callback(Times())
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Epochs(times[-1] - times[0], [each["loss"] for each in steps], [each["grad_norm"] for each in steps])


TRAINERS: dict[str, Callable[[Path, str, int], Epochs]] = {
    "tiltflow": train_ours,
    "trl": partial(train_theirs, grouped=False),
    "trl_grouped": partial(train_theirs, grouped=True),
}


def measure(side: str, folder: Path) -> dict[str, Any]:
    """Warm one side up and time one epoch, in this process."""
    if torch.cuda.device_count() > 1:
        raise SystemExit("transformers would split batches among several GPUs: set CUDA_VISIBLE_DEVICES to one")
    warm = TRAINERS[side](folder, "warm", WARM_STEPS)
    found = TRAINERS[side](folder, "all", 1)
    pairs = len(json.loads((folder / "all.json").read_text()))
    return {
        "pairs_per_second": pairs / found.seconds,
        "memory_mib": memory(),
        "first_loss": found.losses[0],
        "last_loss": statistics.mean(found.losses[-3:]),
        "warm": [*warm.losses, *warm.norms],
    }


# --- the comparison --------------------------------------------------------------------------------------------------


def run_side(side: str, folder: Path) -> dict[str, Any]:
    """Train one side in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.reward_training", "--side", side, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def check_same_steps(found: Mapping[str, Mapping[str, Any]]) -> float:
    """Return by how much the first steps of the sides differ at most; by more than a thousandth is an error."""
    ours = np.array(found["tiltflow"]["warm"])
    apart = [np.abs(np.array(each["warm"]) - ours) / np.maximum(np.abs(ours), 1e-3) for each in found.values()]
    worst = float(np.max(apart))  # NaN if there is one
    if not worst < SAME_STEPS:
        raise SystemExit(
            f"the sides do not take the same steps: { {side: each['warm'] for side, each in found.items()} }"
        )
    return worst


def compare(folder: Path, *, pairs: int, rounds: int) -> dict[str, Any]:
    """Let the sides take turns and compare their medians."""
    if pairs % BATCH:
        raise SystemExit(
            f"--pairs {pairs}: use a multiple of {BATCH}, for transformers weighs a part of a batch otherwise"
        )
    write_task(folder, pairs)
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    differ = 0.0
    for number in range(rounds):
        for side in (*SIDES[number % len(SIDES) :], *SIDES[: number % len(SIDES)]):
            found[side].append(run_side(side, folder))
        differ = max(differ, check_same_steps({side: runs[-1] for side, runs in found.items()}))
    keys = ("pairs_per_second", "memory_mib", "first_loss", "last_loss")
    medians = {
        side: {key: statistics.median(each[key] for each in runs) for key in keys} for side, runs in found.items()
    }
    ours = medians["tiltflow"]

    def over(side: str, key: str) -> float:
        return round(ours[key] / medians[side][key], 3)

    return {
        "benchmark": "reward_training",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "pairs": pairs,
        "rounds": rounds,
        "batch": BATCH,
        "micro_batch": MICRO_BATCH,
        "length_window": window(pairs),
        "speedup_over_trl": over("trl", "pairs_per_second"),
        "speedup_over_trl_grouped": over("trl_grouped", "pairs_per_second"),
        "memory_over_trl": over("trl", "memory_mib"),
        "memory_over_trl_grouped": over("trl_grouped", "memory_mib"),
        "first_steps_differ_by": round(differ, 6),
        **{side: {key: round(value, 4) for key, value in each.items()} for side, each in medians.items()},
        "rates": {side: [round(each["pairs_per_second"], 2) for each in runs] for side, runs in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is not None:
        print(json.dumps(measure(arguments.side, arguments.folder)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(compare(Path(folder), pairs=arguments.pairs, rounds=arguments.rounds)))


if __name__ == "__main__":
    main()
