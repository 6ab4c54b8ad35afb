"""What makes a reward the one that it is, and what is only how it is run: so a run goes on after a reward is mended."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from tiltflow.rewards import RewardArguments, RewardModel, reward_class
from tiltflow.rewards.secrets import secret_keys

WHAT: Final = ("name", "reward_model", "weight", "dtype")  # beside its own options; all else is how it is run

Classes = Mapping[str, type[RewardModel]]
Entry = Mapping[str, Any]


def reward_classes(rewards: Iterable[RewardArguments]) -> Classes:
    """Return the class of each reward under its `reward_model`."""
    return {reward.reward_model: reward_class(reward.reward_model) for reward in rewards}


def split_reward(entry: Entry, classes: Classes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what makes a saved entry the reward that it is, and how that is run, both without its secrets.

    Args:
        entry: Of `rewards:` in its full form.
        classes: Those that are known; all own options of another one count.

    Returns:
        The first with `options` in it; the second flat, an own option called `options.<name>`.
    """
    options = without_secrets(entry, classes)["options"]
    cls = classes.get(entry["reward_model"])
    running = () if cls is None else cls.how_run(options)
    what = {key: entry.get(key) for key in WHAT}
    what["options"] = {name: value for name, value in options.items() if name not in running}
    how = {key: value for key, value in entry.items() if key not in (*WHAT, "options")}
    return what, how | {f"options.{name}": value for name, value in options.items() if name in running}


def without_secrets(entry: Entry, classes: Classes) -> dict[str, Any]:
    """Return a saved entry without its secrets and the names of variables that hold them."""
    cls = classes.get(entry["reward_model"])
    names = () if cls is None else secret_keys(cls.Options)
    return {**entry, "options": {name: value for name, value in entry["options"].items() if name not in names}}
