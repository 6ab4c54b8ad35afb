"""Names of built-in rewards, and building one from its configuration."""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from pydantic import SecretStr, ValidationError

from tiltflow.errors import RewardError, TiltflowError, exit_is_error
from tiltflow.rewards.base import (
    PROVIDED_FIELDS,
    GroupwiseRewardModel,
    PointwiseRewardModel,
    RewardArguments,
    RewardModel,
)
from tiltflow.rewards.places import with_place
from tiltflow.rewards.secrets import STARS, sealed, secret_keys, secret_names, starred
from tiltflow.serving.wire import FIELDS
from tiltflow.types import Config, Prompt

# name -> "module:Class"; third parties write "package.module.Class" in their config instead.
REWARDS: Mapping[str, str] = {
    "AestheticScore": "tiltflow.rewards.aesthetic:AestheticReward",
    "CLIP": "tiltflow.rewards.clip_rewards:ClipReward",
    "DeQAScore": "tiltflow.rewards.deqa:DeQAReward",
    "Geneval": "tiltflow.rewards.geneval_reward:GenevalReward",
    "HPSv2": "tiltflow.rewards.clip_rewards:HPSv2Reward",
    "ImageReward": "tiltflow.rewards.image_reward:ImageRewardReward",
    "JPEGCompressibility": "tiltflow.rewards.jpeg:JPEGCompressibilityReward",
    "LanguageReward": "tiltflow.rewards.language:LanguageReward",
    "OCR": "tiltflow.rewards.ocr:OCRReward",
    "PickScore": "tiltflow.rewards.clip_rewards:PickScoreReward",
    "PickScore_Rank": "tiltflow.rewards.clip_rewards:PickScoreRankReward",
    "RemoteGroupwiseRewardModel": "tiltflow.rewards.remote:RemoteGroupwiseRewardModel",
    "RemotePointwiseRewardModel": "tiltflow.rewards.remote:RemotePointwiseRewardModel",
    "rational_rewards_edit": "tiltflow.rewards.rational_rewards:RationalRewardEdit",
    "rational_rewards_t2i": "tiltflow.rewards.rational_rewards:RationalRewardT2I",
    "vllm_evaluate": "tiltflow.rewards.vllm_evaluate:VllmEvaluateReward",
}


def reward_class(name: str) -> type[RewardModel]:
    """Return the class of a built-in reward, or of a full Python path such as `my_package.rewards.MyReward`.

    Raises:
        RewardError: No such built-in, module or class, or the class is not a reward.
    """
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
        with exit_is_error():
            contents = vars(import_module(module))
    except Exception as error:  # the user's module may fail in any way while it is imported
        raise RewardError(
            f"reward_model={name!r}: {module or '(no module)'} cannot be imported: {type(error).__name__}: "
            f"{with_place(error)}; the folder that holds it must be the one that the command is called in, installed, "
            "or on PYTHONPATH"
        ) from error
    if attribute not in contents:
        near = difflib.get_close_matches(attribute, [key for key in contents if isinstance(contents[key], type)], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RewardError(f"reward_model={name!r}: {module} has no {attribute!r}{hint}")
    found = contents[attribute]
    if not (isinstance(found, type) and issubclass(found, PointwiseRewardModel | GroupwiseRewardModel)):
        raise RewardError(
            f"reward_model={name!r}: {attribute} in {module} is not a subclass of PointwiseRewardModel or "
            "GroupwiseRewardModel"
        )
    return found


def check_reward(arguments: RewardArguments, *, provided: Sequence[str] = FIELDS) -> type[RewardModel]:
    """Return the reward's class after checking its options and fields, before any model is loaded.

    Args:
        arguments: The reward's entry.
        provided: The fields that its samples will have.

    Raises:
        RewardError: An option is unknown or wrong, or a required field does not exist or is not provided.
    """
    cls = reward_class(arguments.reward_model)
    fields = _fields(arguments, cls)
    if arguments.timeout is not None and not arguments.async_reward and not cls.times_itself:
        raise RewardError(
            f"reward {arguments.name!r}: timeout={arguments.timeout:g} needs async_reward: true; a call in the main "
            "thread cannot be given up"
        )
    unknown = [name for name in fields if name not in FIELDS]
    if unknown:
        raise RewardError(
            f"reward {arguments.name!r}: required_fields names {unknown[0]!r}; legal fields: {', '.join(FIELDS)}"
        )
    absent = [name for name in fields if name not in provided]
    if absent:
        raise RewardError(
            f"reward {arguments.name!r} requires {absent[0]!r}, which these samples do not have; they have: "
            f"{', '.join(provided)}"
        )
    return cls


def sealed_reward(arguments: RewardArguments) -> RewardArguments:
    """Return an entry whose secrets are shown in nothing that is saved, printed or tracked.

    Raises:
        RewardError: As `check_reward`.
    """
    options = _options(arguments, reward_class(arguments.reward_model))
    return arguments.model_copy(update={"options": sealed(options, arguments.options)})


def check_prompts(rewards: Sequence[RewardArguments], prompts: Sequence[Prompt], *, source: str) -> None:
    """Check that every reward can score every prompt, before any model is loaded.

    Args:
        rewards: The rewards that will score samples of these prompts.
        prompts: All prompts of one set.
        source: What the config calls the set.

    Raises:
        RewardError: A reward requires metadata that a prompt does not have or a field that no sample has, or finds
            fault with a prompt; or as `check_reward`.
    """
    bare = [prompt.text for prompt in prompts if not prompt.metadata]
    for reward in rewards:
        cls = check_reward(reward, provided=PROVIDED_FIELDS)
        if "metadata" in _fields(reward, cls) and bare:
            raise RewardError(
                f"reward {reward.name!r} requires 'metadata', but {len(bare)} of {len(prompts)} prompts of {source!r} "
                f'have none, the first being {bare[0]!r}; use a .jsonl file that gives it beside "prompt"'
            )
        check = cls.prompt_check(_options(reward, cls))
        for prompt in prompts:
            try:
                check(prompt)
            except TiltflowError as error:
                raise RewardError(
                    f"reward {reward.name!r} cannot score the prompt {prompt.text!r} of {source!r}: {error}"
                ) from error


def build_reward_model(arguments: RewardArguments, accelerator: Any = None) -> RewardModel:
    """Build one reward from its entry in `rewards:`.

    Raises:
        RewardError: The entry is wrong, or the reward's constructor failed.
    """
    cls = check_reward(arguments)
    try:
        with exit_is_error():
            return cls(arguments, accelerator)
    except TiltflowError:
        raise
    except Exception as error:  # a constructor may fail in any way: no memory, no file, no network, a mistake
        raise RewardError(
            f"reward {arguments.name!r} cannot be built: {type(error).__name__}: {with_place(error)}"
        ) from error


_FURTHER_KEYS = RewardArguments.model_fields.keys() - {"reward_model", "options"}


def build_reward(
    name_or_python_path: str, *, device: str = "auto", dtype: str = "float32", batch_size: int = 16, **options: Any
) -> RewardModel:
    """Build a reward by name or Python path, ready to be called.

    Args:
        name_or_python_path: A built-in name or `package.module.Class`.
        device: Where it computes; "auto" takes a GPU when there is one.
        dtype: `float32`, `bfloat16` or `float16`.
        batch_size: Samples per call of a pointwise reward.
        **options: The reward's own options, checked against its `Options`, and other keys of `rewards:` such as
            `timeout`.

    Raises:
        RewardError: There is no such reward, an argument is wrong, or the reward's constructor failed.
    """
    entry = {
        "name": name_or_python_path.rpartition(".")[2],
        "reward_model": name_or_python_path,
        "device": device,
        "dtype": dtype,
        "batch_size": batch_size,
        **{key: options.pop(key) for key in _FURTHER_KEYS if key in options},
        "options": options,
    }
    try:
        arguments = RewardArguments.model_validate(entry)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise RewardError(f"reward {entry['name']!r}: {key}={problem['input']!r}: {problem['msg']}") from error
    return build_reward_model(arguments)


def identity(arguments: RewardArguments) -> str:
    """Return a key that is equal for entries which one model and one pass can serve, however they are written."""
    found = _resolved(arguments)
    if found is None:
        what, options = arguments.reward_model, dict(arguments.options)
    else:
        what, options = _path(found[0]), found[1].model_dump()
    same = {"reward": what, "options": options, "dtype": arguments.dtype, "device": arguments.device}
    return json.dumps(same, sort_keys=True, default=_distinct)


def subject(arguments: RewardArguments) -> str:
    """Return a key that is equal for entries which measure the same.

    They may do so on other scales, as ranks, less exactly, or be run in another way.
    """
    found = _resolved(arguments)
    if found is None:
        what, options = arguments.reward_model, dict(arguments.options)
    else:
        cls, own = found
        unlike = {*cls.scale_options, *cls.how_run(arguments.options), *secret_keys(cls.Options)}
        what, options = cls.measures or _path(cls), own.model_dump(exclude=unlike)
    return json.dumps({"reward": what, "options": options}, sort_keys=True, default=_distinct)


def _resolved(arguments: RewardArguments) -> tuple[type[RewardModel], Config] | None:
    """Return an entry's class and its options with their defaults.

    None where there is no such class here or an option is wrong: whoever builds the reward is told, and the entry is
    then known by what is written.
    """
    try:
        cls = reward_class(arguments.reward_model)
        return cls, cls.Options.model_validate(dict(arguments.options))
    except (RewardError, ValidationError):
        return None


def _path(cls: type[RewardModel]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _distinct(value: Any) -> str:
    """Return a text that is another one for another value; one that does not tell a secret."""
    if isinstance(value, SecretStr):
        return hashlib.sha256(value.get_secret_value().encode()).hexdigest()
    return str(value)


def shared_entries(rewards: Sequence[RewardArguments]) -> dict[str, RewardArguments]:
    """Return one entry for each distinct reward, under its `identity`, that serves all entries which share it.

    It takes their largest batch size and number of workers, is asynchronous if one is, waits as long as the most
    patient one (one without `timeout` for ever, or as long as its class does), and is as strict about failures as the
    strictest.
    """
    groups: dict[str, list[RewardArguments]] = {}
    for reward in rewards:
        groups.setdefault(identity(reward), []).append(reward)
    return {key: _merged(entries) for key, entries in groups.items()}


def _merged(entries: Sequence[RewardArguments]) -> RewardArguments:
    timeouts = [entry.timeout or _default_timeout(entry) for entry in entries]
    strictest = min(entries, key=lambda entry: ("raise", None, "mask").index(entry.on_error))
    return strictest.model_copy(
        update={
            "batch_size": max(entry.batch_size for entry in entries),
            "async_reward": any(entry.async_reward for entry in entries),
            "num_workers": max(entry.num_workers for entry in entries),
            "timeout": None if None in timeouts else max(timeout for timeout in timeouts if timeout is not None),
        }
    )


def _default_timeout(arguments: RewardArguments) -> float | None:
    """Return how long one call, or request, of an entry without `timeout` may take, seconds; None: for ever."""
    found = _resolved(arguments)
    if found is None or not found[0].times_itself or found[0].call_seconds(arguments) is None:  # None: nobody is asked
        return None
    return found[0].default_timeout


def _fields(arguments: RewardArguments, cls: type[RewardModel]) -> tuple[str, ...]:
    """Return the fields that an entry's reward requires, after checking its options."""
    return cls.fields_for(_options(arguments, cls))


def _options(arguments: RewardArguments, cls: type[RewardModel]) -> Config:
    """Return an entry's own options, checked."""
    try:
        options = cls.Options.model_validate(dict(arguments.options))
    except ValidationError as error:
        # Without what caused it, which would show the options and a secret among them.
        raise RewardError(_options_message(arguments, cls, error)) from None
    name = starred(options)
    if name is not None:
        env = f", or name an environment variable with {name}_env" if f"{name}_env" in cls.Options.model_fields else ""
        raise RewardError(
            f"reward {arguments.name!r}: {name}={STARS!r} is what a saved config shows in place of a secret; give the "
            f"secret anew{env}"
        )
    return options


def _options_message(arguments: RewardArguments, cls: type[RewardModel], error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    legal = sorted(cls.Options.model_fields)
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, [*legal, *RewardArguments.model_fields], n=1)
        hint = f"; did you mean {near[0]!r}?" if near and near[0] != key else ""
        return f"reward {arguments.name!r}: unknown key {key!r}{hint}; its own options: {', '.join(legal) or 'none'}"
    # What is missing, or wrong about the options as a whole, would show all of them.
    shown = problem["type"] != "missing" and problem["loc"] and problem["loc"][0] not in secret_names(cls.Options)
    got = f"; got {problem.get('input')!r}" if shown else ""
    return f"reward {arguments.name!r}: {key}: {problem['msg']}{got}"
