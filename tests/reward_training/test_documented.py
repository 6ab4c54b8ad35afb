"""The documented configs can be trained as they are: their schedules fit the data that the pages name."""

import re

import pytest
import yaml

from tests.invariant.runs import ROOT
from tiltflow.commands.reward_config import find_kind
from tiltflow.reward_training.fit_config import check_schedule


def documented() -> dict[str, str]:
    """Return every config of a whole run, by page."""
    found: dict[str, str] = {}
    for page in sorted((ROOT / "docs").glob("train_reward*.md")):
        for index, block in enumerate(re.findall(r"```ya?ml\n(.*?)```", page.read_text(), re.DOTALL)):
            if "reward_model_type:" in block:
                found[f"{page.stem}-{index}"] = block
    return found


@pytest.mark.parametrize("name", documented())
def test_a_documented_config_has_steps_for_its_schedule(name: str) -> None:
    block = documented()[name]
    values = yaml.safe_load(block)
    config = find_kind(values["model"]["reward_model_type"]).config.model_validate(values)
    told = re.search(r"# (?:about )?([\d,]+) rows(?:: ([\d,]+) steps)?", block)
    assert told is not None, "say in a comment how many rows the training data has"
    rows, steps = (number and int(number.replace(",", "")) for number in told.groups())
    total = config.train.total_steps(-(-rows // config.train.batch_size))
    check_schedule(config.train, total)
    assert steps is None or total == steps


def test_there_are_documented_configs_of_every_kind() -> None:
    kinds = {yaml.safe_load(block)["model"]["reward_model_type"] for block in documented().values()}
    assert kinds == {"binary_ranking", "regression", "image_text"}
