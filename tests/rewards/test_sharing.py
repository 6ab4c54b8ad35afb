"""Which entries are one reward: what they are decides, not how they are written."""

from typing import Any

import pytest
import torch

from tests.rewards.samples import batch, entry
from tiltflow.rewards import (
    PointwiseRewardModel,
    RewardEngine,
    RewardModelOutput,
    build_reward,
    identity,
    shared_entries,
)

HERE = "tests.rewards.test_sharing"
JUDGE = {"api_base_url": "http://localhost:8000/v1"}
SERVER = {"server_url": "http://localhost:8000"}


class Counted(PointwiseRewardModel):
    required_fields = ("image",)
    calls = 0

    def __call__(self, prompt=None, image=None, **fields: Any):
        self.calls += 1
        return RewardModelOutput(torch.zeros(len(image or [])))


def test_one_reward_is_loaded_and_asked_once_however_it_is_written() -> None:
    entries = [
        entry("a", "ImageReward"),
        entry("b", "ImageReward", options={"divisor": 1.0}),
        entry("c", "ImageReward", options={"divisor": 1}),
        entry("d", "tiltflow.rewards.image_reward.ImageRewardReward", options={"divisor": "1"}),
    ]
    made: list[Counted] = []

    def factory(arguments: Any) -> Counted:
        made.append(Counted(arguments))
        return made[-1]

    table = RewardEngine(entries, factory=factory).score(batch([0.1, 0.2]))
    assert [each.calls for each in made] == [1]
    assert table.names == ("a", "b", "c", "d")
    assert not table.scores.isnan().any()


@pytest.mark.parametrize(
    "other",
    [
        entry("b", "ImageReward", options={"divisor": 2}),
        entry("b", "ImageReward", dtype="bfloat16"),
        entry("b", "AestheticScore"),
        entry("b", "ImageReward", options={"no_such_option": 1}),
        entry("b", "no_such_package.ImageReward"),
    ],
)
def test_another_reward_is_another_one(other: Any) -> None:
    assert identity(entry("a", "ImageReward")) != identity(other)


@pytest.mark.parametrize(
    ("name", "options", "timeouts", "expected"),
    [
        ("RemotePointwiseRewardModel", SERVER, [300.0, None], 300.0),
        ("RemotePointwiseRewardModel", SERVER, [None, 5.0], 60.0),  # its own default is the most patient
        ("RemoteGroupwiseRewardModel", SERVER, [5.0, 20.0], 20.0),
        ("vllm_evaluate", JUDGE, [300.0, None], 300.0),
        ("rational_rewards_t2i", JUDGE, [100.0, None], 180.0),
        ("DeQAScore", {"model": "m", "base_url": "http://localhost:8000/v1"}, [300.0, None], 300.0),
        ("DeQAScore", {"model": "m"}, [300.0, None], None),  # in lanes: for ever
        (f"{HERE}.Counted", {}, [300.0, None], None),
    ],
)
def test_shared_entries_wait_as_long_as_the_most_patient_one(
    name: str, options: dict[str, Any], timeouts: list[float | None], expected: float | None
) -> None:
    entries = [
        entry(f"r{index}", name, options=options, timeout=timeout, async_reward=True)
        for index, timeout in enumerate(timeouts)
    ]
    (shared,) = shared_entries(entries).values()
    assert shared.timeout == expected


def test_a_reward_built_in_python_takes_the_keys_of_an_entry() -> None:
    model = build_reward(
        f"{HERE}.Counted", device="cpu", name="mine", timeout=5, async_reward=True, num_workers=2, on_error="mask"
    )
    config = model.config
    assert (config.name, config.timeout, config.num_workers, config.on_error) == ("mine", 5.0, 2, "mask")
