"""The run schema: every room's own config class, composed; reading YAML, overrides and packaged configs."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field

from tiltflow.algorithms import RAMConfig
from tiltflow.errors import ConfigError
from tiltflow.evaluation import EvaluationConfig, held_out
from tiltflow.policies.sd3 import SD3Config
from tiltflow.rewards.base import PROVIDED_FIELDS, GroupwiseRewardModel, RewardArguments
from tiltflow.rewards.registry import check_reward, reward_class, sealed_reward
from tiltflow.runtime.overrides import matching_keys, override, resolve_key
from tiltflow.runtime.tracking import TrackingConfig
from tiltflow.runtime.validation import shown, validate
from tiltflow.runtime.yaml_values import parse_value, read_yaml
from tiltflow.training.pretrain import PretrainConfig
from tiltflow.training.rollout import SamplerConfig
from tiltflow.training.trainer import TrainConfig
from tiltflow.types import Config, PathText, in_home

REWARD_KEYS = ("rewards", "eval_rewards")
PACKAGED = Path(__file__).parent / "configs"
_COMMANDS = {
    "train-reward": "a config for training a reward model",
    "train": "the config of a training run",
    "pretrain": "a pretraining config",
}


class DataConfig(Config):
    """Which prompts are trained and evaluated on."""

    prompts: PathText
    eval_prompts: PathText
    tag_shares: dict[str, Annotated[float, Field(ge=0)]] | None = None
    blocklist: tuple[str, ...] = ()


class CheckpointConfig(Config):
    """How many checkpoints are kept."""

    keep: int = Field(default=2, ge=1)


class RunConfig(Config):
    """Everything that decides a post-training run."""

    seed: int = 0
    output_dir: Annotated[str | None, Field(min_length=1), AfterValidator(in_home)] = None
    policy: SD3Config
    data: DataConfig
    algorithm: RAMConfig = RAMConfig()
    train: TrainConfig = TrainConfig()
    sampler: SamplerConfig = SamplerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    rewards: tuple[RewardArguments, ...] = Field(min_length=1)
    eval_rewards: tuple[RewardArguments, ...] = ()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()


class EvaluateConfig(Config):
    """What `tiltflow evaluate` can set beside its arguments."""

    policy: SD3Config
    evaluation: EvaluationConfig = EvaluationConfig()


class SampleConfig(Config):
    """What `tiltflow sample` can set beside its arguments."""

    policy: SD3Config
    sampler: SamplerConfig


def load_run_config(source: str, overrides: Sequence[tuple[str, str]] = ()) -> RunConfig:
    """Load a run config by path or packaged name, apply overrides and check everything.

    Args:
        source: A path to a YAML file, or the name of a packaged config such as `shapes_ram`.
        overrides: (key, value) pairs; the key is dotted or the last part of exactly one key, the value is YAML.

    Returns:
        The checked config, with `output_dir` filled in.

    Raises:
        ConfigError: Something is missing, unknown, ambiguous or wrong; names the field, the value and the remedy.
    """
    path = find_config(source)
    own = read_yaml(path)
    check_command(own, "train", path=path, source=source)
    values = override(own, overrides, RunConfig)
    known = [entry for key in REWARD_KEYS for entry in normalise_rewards(own.get(key) or (), key=key)]
    for key, text in overrides:
        full = resolve_key(key, RunConfig)
        if full in REWARD_KEYS:
            values[full] = override_rewards(full, text, known)
    if values.get("output_dir") is None:
        values["output_dir"] = f"outputs/{path.stem}"
    return run_config(values, source=str(path), overrides=overrides)


def load_pretrain_config(source: str, overrides: Sequence[tuple[str, str]] = ()) -> PretrainConfig:
    """Load a pretraining config by path or packaged name and apply overrides.

    Raises:
        ConfigError: As `load_run_config`.
    """
    path = find_config(source)
    own = read_yaml(path)
    check_command(own, "pretrain", path=path, source=source)
    return configure(PretrainConfig, own, overrides, source=str(path))


def check_command(values: Mapping[str, Any], command: str, *, path: Path, source: str) -> None:
    """Raise a ConfigError that names the right command if a config file is not one for this command."""
    pretrain = values.keys() & PretrainConfig.model_fields.keys() - {"seed", "output_dir", "model"}
    found = [is_reward_config(values), "policy" in values, bool(pretrain)]
    right = next((name for name, is_it in zip(_COMMANDS, found, strict=True) if is_it), command)
    if right != command:
        raise ConfigError(f"{path} is {_COMMANDS[right]}; use it with: tiltflow {right} {source}")


def is_reward_config(values: Mapping[str, Any]) -> bool:
    """Tell whether the content of a config file is for training a reward model."""
    model = values.get("model")
    return isinstance(model, Mapping) and "reward_model_type" in model


def configure(
    schema: type[Any], values: Mapping[str, Any], overrides: Sequence[tuple[str, str]], *, source: str
) -> Any:
    """Return an instance of a config class from values and overrides.

    Raises:
        ConfigError: As `load_run_config`.
    """
    return validate(schema, override(values, overrides, schema), source=source, overrides=overrides)


def configure_command(
    schema: type[Any], values: Mapping[str, Any], overrides: Sequence[tuple[str, str]], *, command: str
) -> Any:
    """Return what a command takes of a run's config, such as an EvaluateConfig, from values and overrides.

    Raises:
        ConfigError: As `configure`; of another section's key, names those that the command takes.
    """
    for key, _ in overrides:
        if matching_keys(key, RunConfig) and not matching_keys(key, schema):
            raise ConfigError(f"--{key}: {command} takes keys of {' and '.join(schema.model_fields)} only")
    return configure(schema, values, overrides, source=command)


def run_config(
    values: Mapping[str, Any],
    *,
    source: str,
    overrides: Sequence[tuple[str, str]] = (),
    check_rewards: bool = True,
) -> RunConfig:
    """Check a nested mapping against the schema.

    Args:
        values: The content of a config file.
        source: Named in messages.
        overrides: What has been set over the source; named instead where it is wrong.
        check_rewards: Import every reward's class and check its options too; their secrets are shown nowhere then.

    Raises:
        ConfigError: A key is missing, unknown or wrong.
        RewardError: A reward cannot be imported, or an option of it is wrong.
    """
    normal = {key: value for key, value in values.items()}
    for key in REWARD_KEYS:
        if key in normal:
            normal[key] = normalise_rewards(normal[key], key=key)
    config: RunConfig = validate(RunConfig, normal, source=source, overrides=overrides)
    if not check_rewards:
        return config
    checked: dict[str, tuple[RewardArguments, ...]] = {}
    for key, rewards in (("rewards", config.rewards), ("eval_rewards", config.eval_rewards)):
        for reward in rewards:
            check_reward(reward, provided=PROVIDED_FIELDS)
        checked[key] = tuple(map(sealed_reward, rewards))
    size = config.evaluation.images_per_prompt
    measured = config.eval_rewards or config.rewards
    check_group_size(measured, size, key="evaluation.images_per_prompt")
    if config.train.early_stop is not None and not (config.train.evaluate_every and held_out(measured, config.rewards)):
        raise ConfigError(
            f"{source}: train.early_stop={config.train.early_stop} compares evaluations of held-out rewards: set "
            "train.evaluate_every, and eval_rewards that are not trained on, or leave it out"
        )
    return config.model_copy(update=checked)


def groupwise_names(rewards: Sequence[RewardArguments]) -> list[str]:
    """Return the names of the rewards that compare the images of a prompt with each other."""
    return [each.name for each in rewards if issubclass(reward_class(each.reward_model), GroupwiseRewardModel)]


def check_group_size(rewards: Sequence[RewardArguments], size: int, *, key: str) -> None:
    """Check that groupwise rewards have something to compare.

    Args:
        rewards: That will score the groups.
        size: Images of each group.
        key: What decides it.

    Raises:
        ConfigError: One is groupwise, and groups are of one image.
    """
    groupwise = groupwise_names(rewards)
    if groupwise and size < 2:
        raise ConfigError(
            f"{key}={size}: reward {groupwise[0]!r} compares the images of a prompt with each other, and of one "
            "image its score says nothing; use at least 2"
        )


def normalise_rewards(value: Any, *, key: str = "rewards") -> list[dict[str, Any]]:
    """Bring `rewards:` into its full form: a list of entries whose own options are under `options`.

    A single mapping is a list of one; a bare string is a reward with its defaults.
    """
    entries = [value] if isinstance(value, str | Mapping) else value
    if not isinstance(entries, list | tuple):
        raise ConfigError(f"{key}={shown(value)}: write a list of rewards, one mapping, or names such as '[Geneval]'")
    return [_normalise_reward(entry, key=key) for entry in entries]


def override_rewards(key: str, text: str, known: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Read an override of a list of rewards; a bare name stands for the config's own entry of it, if there is one.

    Args:
        key: `rewards` or `eval_rewards`.
        text: YAML, such as `[Geneval]`.
        known: The config's own entries, in their full form.
    """
    value = parse_value(key, text)
    entries = normalise_rewards(value, key=f"--{key}")
    written = [value] if isinstance(value, str | Mapping) else value
    own = {name: dict(entry) for entry in reversed(known) for name in (entry["reward_model"], entry["name"])}
    return [
        own.get(word, entry) if isinstance(word, str) else entry for word, entry in zip(written, entries, strict=True)
    ]


def _normalise_reward(entry: Any, *, key: str) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"name": entry.rpartition(".")[2], "reward_model": entry}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("reward_model"), str):
        got = f"the keys {', '.join(map(str, entry))}" if isinstance(entry, Mapping) else shown(entry)
        raise ConfigError(f"{key}: an entry needs `reward_model` (a built-in name or a Python path); got {got}")
    known = {name: value for name, value in entry.items() if name in RewardArguments.model_fields}
    own = {str(name): value for name, value in entry.items() if name not in RewardArguments.model_fields}
    known.setdefault("name", entry["reward_model"].rpartition(".")[2])
    options = known.get("options") or {}
    if not isinstance(options, Mapping):
        raise ConfigError(
            f"{key}: options={shown(options)} of {known['name']!r} must be a mapping of the reward's own keys"
        )
    twice = sorted(set(own) & set(options))
    if twice:
        raise ConfigError(f"{key}: {known['name']!r} gives {twice[0]!r} both directly and under options; keep one")
    known["options"] = {**options, **own}
    return known


def find_config(source: str) -> Path:
    """Return the file of a config given by path or packaged name.

    Raises:
        ConfigError: There is neither; names the packaged configs and the nearest one.
    """
    path, packaged = Path(source).expanduser(), PACKAGED / f"{source}.yaml"
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise ConfigError(f"config {source!r}: no such file{_packaged_hint(path.stem)}")
    if packaged.is_file():
        return packaged
    raise ConfigError(f"config {source!r}: no such file or packaged config{_packaged_hint(source)}")


def packaged_configs() -> list[str]:
    """Return the names of the configs that come with the package."""
    return sorted(path.stem for path in PACKAGED.glob("*.yaml"))


def _packaged_hint(name: str) -> str:
    names = packaged_configs()
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return (f"; did you mean {near[0]!r}?" if near else "") + f"; packaged: {', '.join(names)}"


def dump(config: Config) -> str:
    """Return a config as YAML that loads to the same config, but for secrets of rewards, which it does not show."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
