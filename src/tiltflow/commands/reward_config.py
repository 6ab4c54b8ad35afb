"""The config of `tiltflow train-reward`: `model.reward_model_type` chooses its schema."""

import difflib
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from tiltflow.config import check_command, configure, find_config, parse_value, read_yaml
from tiltflow.errors import ConfigError
from tiltflow.reward_training.fit_config import FitRunConfig, RewardModelKind

# type -> "module:KIND"; third parties write the full Python path of a RewardModelKind in their config instead.
REWARD_MODEL_TYPES: Mapping[str, str] = {
    "binary_ranking": "tiltflow.reward_training.language_build:BINARY_RANKING",
    "image_text": "tiltflow.reward_training.image_text_fit:IMAGE_TEXT",
    "regression": "tiltflow.reward_training.language_build:REGRESSION",
}
_KEYS = ("model.reward_model_type", "reward_model_type")  # of overrides


def load_reward_config(source: str, overrides: Sequence[tuple[str, str]] = ()) -> tuple[RewardModelKind, FitRunConfig]:
    """Load the config of a reward-training run by path or packaged name, apply overrides and check everything.

    Args:
        source: A path to a YAML file, or the name of a packaged config.
        overrides: (key, value) pairs, as for `load_run_config`.

    Returns:
        What the config's `model.reward_model_type` names, and the checked config with `output_dir` filled in.

    Raises:
        ConfigError: Something is missing, unknown, ambiguous or wrong; names the field, the value and the remedy.
    """
    path = find_config(source)
    own = read_yaml(path)
    check_command(own, "train-reward", path=path, source=source)
    kind = find_kind(_type_of(own, overrides, source=str(path)))
    if own.get("output_dir") is None:
        own["output_dir"] = f"outputs/{path.stem}"
    config: FitRunConfig = configure(kind.config, own, overrides, source=str(path))
    if config.output_dir is None:
        config = config.model_copy(update={"output_dir": f"outputs/{path.stem}"})
    return kind, config


def find_kind(name: str) -> RewardModelKind:
    """Return what a `reward_model_type` names: a built-in type, or the path of an object such as `my_module.MY_KIND`.

    Raises:
        ConfigError: There is no such type, module or object, or it is no RewardModelKind; lists the types.
    """
    if name in REWARD_MODEL_TYPES:
        module, _, attribute = REWARD_MODEL_TYPES[name].partition(":")
    elif "." in name:
        module, _, attribute = name.rpartition(".")
    else:
        near = difflib.get_close_matches(name, REWARD_MODEL_TYPES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"model.reward_model_type={name!r} is no type of reward model; {hint}{_legal()}")
    try:
        contents = vars(import_module(module))
    except Exception as error:  # the user's module may fail in any way while it is imported
        raise ConfigError(
            f"model.reward_model_type={name!r}: {module} cannot be imported: {type(error).__name__}: {error}; "
            f"{_legal()}"
        ) from error
    found = contents.get(attribute)
    if not isinstance(found, RewardModelKind):
        problem = "is no RewardModelKind" if attribute in contents else "does not exist"
        raise ConfigError(f"model.reward_model_type={name!r}: {attribute} in {module} {problem}; {_legal()}")
    return found


def _type_of(values: Mapping[str, Any], overrides: Sequence[tuple[str, str]], *, source: str) -> str:
    """Return the type that a config file names, or the last override of it."""
    model = values.get("model")
    named = model.get("reward_model_type") if isinstance(model, Mapping) else None
    for key, text in overrides:
        if key in _KEYS:
            named = parse_value(key, text, as_text=True)
    if not isinstance(named, str):
        raise ConfigError(f"{source}: model.reward_model_type={named!r}: it says what is trained; {_legal()}")
    return named


def _legal() -> str:
    return f"legal: {', '.join(REWARD_MODEL_TYPES)}, or the Python path of a RewardModelKind (package.module.NAME)"
