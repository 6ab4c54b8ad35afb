"""Names of built-in rewards, and building one from its configuration."""

import difflib
import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from pydantic import ValidationError

from tiltflow.errors import RewardError
from tiltflow.rewards.base import FIELDS, GroupwiseRewardModel, PointwiseRewardModel, RewardArguments, RewardModel

# name -> "module:Class"; third parties write "package.module.Class" in their config instead.
REWARDS: Mapping[str, str] = {
    "Geneval": "tiltflow.rewards.geneval_reward:GenevalReward",
}
# Named by the packaged configs, not yet part of the package: such a config loads, running it tells so.
UPCOMING = ("OCR", "PickScore")


def reward_class(name: str) -> type[RewardModel]:
    """Return the class of a built-in reward, or of a full Python path such as `my_package.rewards.MyReward`.

    Raises:
        RewardError: No such built-in, module or class, or the class is not a reward.
    """
    if name in UPCOMING:
        raise RewardError(
            f"reward_model={name!r} is not part of this version; built-ins: {', '.join(sorted(REWARDS))}; "
            "or give the full Python path of your own (package.module.Class)"
        )
    if name in REWARDS:
        module, _, attribute = REWARDS[name].partition(":")
    elif "." in name:
        module, _, attribute = name.rpartition(".")
    else:
        near = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RewardError(
            f"reward_model={name!r} is not a built-in reward; {hint}built-ins: {', '.join(sorted(REWARDS))}; "
            "or give a full Python path (package.module.Class)"
        )
    try:
        found = vars(import_module(module)).get(attribute)
    except ImportError as error:
        raise RewardError(f"reward_model={name!r}: {module} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, PointwiseRewardModel | GroupwiseRewardModel)):
        raise RewardError(
            f"reward_model={name!r}: {attribute} in {module} is not a subclass of PointwiseRewardModel or "
            "GroupwiseRewardModel"
        )
    return found


def check_reward(arguments: RewardArguments) -> type[RewardModel]:
    """Return the reward's class after checking its options and fields, before any model is loaded.

    Raises:
        RewardError: An option is unknown or wrong, or a required field does not exist.
    """
    cls = reward_class(arguments.reward_model)
    try:
        cls.Options.model_validate(dict(arguments.options))
    except ValidationError as error:
        raise RewardError(_options_message(arguments, cls, error)) from error
    unknown = [name for name in cls.required_fields if name not in FIELDS]
    if unknown:
        raise RewardError(
            f"reward {arguments.name!r}: required_fields names {unknown[0]!r}; legal fields: {', '.join(FIELDS)}"
        )
    return cls


def build_reward_model(arguments: RewardArguments, accelerator: Any = None) -> RewardModel:
    """Build one reward from its entry in `rewards:`."""
    return check_reward(arguments)(arguments, accelerator)


def build_reward(
    name_or_python_path: str, *, device: str = "auto", dtype: str = "float32", batch_size: int = 16, **options: Any
) -> RewardModel:
    """Build a reward by name or Python path, ready to be called.

    Args:
        name_or_python_path: A built-in name or `package.module.Class`.
        device: Where it computes; "auto" takes a GPU when there is one.
        dtype: `float32`, `bfloat16` or `float16`.
        batch_size: Samples per call of a pointwise reward.
        **options: The reward's own options, checked against its `Options`.
    """
    entry = {
        "name": name_or_python_path.rpartition(".")[2],
        "reward_model": name_or_python_path,
        "device": device,
        "dtype": dtype,
        "batch_size": batch_size,
        "options": options,
    }
    return build_reward_model(RewardArguments.model_validate(entry))


def identity(arguments: RewardArguments) -> str:
    """Return a key that is equal for entries which one model and one pass can serve."""
    same = arguments.model_dump(exclude={"name", "weight", "batch_size", "on_error"})
    return json.dumps(same, sort_keys=True, default=str)


def _options_message(arguments: RewardArguments, cls: type[RewardModel], error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    legal = sorted(cls.Options.model_fields)
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, [*legal, *RewardArguments.model_fields], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"reward {arguments.name!r}: unknown key {key!r}{hint} Own options: {', '.join(legal) or 'none'}"
    return f"reward {arguments.name!r}: {key}: {problem['msg']}; got {problem.get('input')!r}"
