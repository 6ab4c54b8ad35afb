"""Which evaluated rewards of a run are held out, by the rule of the watch for reward hacking."""

from pydantic import ValidationError

from tiltflow import evaluation
from tiltflow.report.contents import Run, reward_entries
from tiltflow.rewards import RewardArguments


def held_out(run: Run) -> dict[str, bool]:
    """Tell for each evaluated reward of the config (its name in lower case) whether it is not trained on.

    Empty where the config's entries cannot be read.
    """
    try:
        trained = _entries(run, "rewards")
        measured = _entries(run, "eval_rewards") or trained
    except ValidationError:
        return {}
    names = evaluation.held_out(measured, trained)
    return {entry.name.lower(): entry.name in names for entry in measured}


def _entries(run: Run, key: str) -> list[RewardArguments]:
    return [RewardArguments.model_validate(entry) for entry in reward_entries(run, key)]
