"""`rewards:` of a config: its short and full forms, a reward's own keys, and what is checked when it is loaded."""

from pathlib import Path
from typing import Any

import pytest

from tests.tiny import run_values
from tiltflow.config import run_config
from tiltflow.errors import ConfigError, RewardError


def rewards_of(value: Any, **more: Any) -> Any:
    return run_config({**run_values(Path("model"), Path("out")), "rewards": value, **more}, source="my.yaml").rewards


def test_a_single_mapping_is_a_list_of_one() -> None:
    entry = {"name": "aesthetic", "reward_model": "PickScore", "batch_size": 16}
    assert rewards_of(entry) == rewards_of([entry])
    assert rewards_of(entry)[0].batch_size == 16


def test_a_bare_name_is_a_reward_with_its_defaults() -> None:
    assert rewards_of("Geneval") == rewards_of(["Geneval"]) == rewards_of([{"reward_model": "Geneval"}])


def test_the_name_defaults_to_the_class() -> None:
    assert rewards_of([{"reward_model": "tests.rewards_for_tests.Brightness"}])[0].name == "Brightness"


def test_a_reward_s_own_keys_become_its_options() -> None:
    entry = {"name": "g", "reward_model": "Geneval", "weight": 2, "detector": "shapes", "options": {"score": "strict"}}
    (reward,) = rewards_of([entry])
    assert reward.options == {"detector": "shapes", "score": "strict"}
    assert reward.weight == 2.0


def test_an_option_given_twice() -> None:
    entry = {"reward_model": "Geneval", "detector": "shapes", "options": {"detector": "mask2former"}}
    with pytest.raises(ConfigError, match="rewards: 'Geneval' gives 'detector' both directly and under options"):
        rewards_of([entry])


def test_options_that_are_no_mapping() -> None:
    with pytest.raises(ConfigError, match="rewards: options=3 of 'Geneval' must be a mapping"):
        rewards_of([{"reward_model": "Geneval", "options": 3}])


def test_an_unknown_option_suggests_the_nearest() -> None:
    with pytest.raises(RewardError, match="reward 'g': unknown key 'detecter'; did you mean 'detector'"):
        rewards_of([{"name": "g", "reward_model": "Geneval", "detecter": "shapes"}])


def test_a_wrong_value_of_a_reward_names_its_place() -> None:
    with pytest.raises(ConfigError, match=r"my\.yaml: rewards\.1\.weight='heavy': Input should be a valid number"):
        rewards_of(["Geneval", {"reward_model": "OCR", "weight": "heavy"}])


def test_evaluation_rewards_are_checked_too() -> None:
    with pytest.raises(RewardError, match="reward 'Geneval': unknown key 'detecter'"):
        rewards_of("Geneval", eval_rewards=[{"reward_model": "Geneval", "detecter": "shapes"}])


@pytest.mark.parametrize("name", ["OCR", "PickScore"])
def test_rewards_load_in_configs_without_their_weights(name: str) -> None:
    assert rewards_of(name)[0].reward_model == name


def test_a_groupwise_reward_is_not_evaluated_on_one_image_of_a_prompt() -> None:
    rank = "tests.rewards_for_tests.Rank"
    message = "evaluation.images_per_prompt=1: reward 'Rank' compares the images of a prompt with each other"
    with pytest.raises(ConfigError, match=message):
        rewards_of([rank])
    with pytest.raises(ConfigError, match=message):
        rewards_of(["tests.rewards_for_tests.Redness"], eval_rewards=[rank])
    assert rewards_of([rank], eval_rewards=["tests.rewards_for_tests.Redness"])[0].name == "Rank"
    assert rewards_of([rank], evaluation={"images_per_prompt": 2})[0].name == "Rank"
