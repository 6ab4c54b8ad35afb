"""How long a call of a served reward may take: as long as those that it asks are waited for."""

from collections.abc import Sequence
from typing import Any

import pytest

from tiltflow import cli
from tiltflow.rewards import PointwiseRewardModel, RewardArguments, RewardModelOutput, reward_class
from tiltflow.serving import running
from tiltflow.serving.running import ModelSpec

URL = "http://localhost:1"


class Asking(PointwiseRewardModel):
    """Asks somebody, and does not tell for how long."""

    required_fields = ("prompt",)
    remote = True

    def __call__(self, prompt: list[str], *media: Any, **more: Any) -> RewardModelOutput:
        return RewardModelOutput([0.0] * len(prompt))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ModelSpec]:
    """Return the list that the models will be in, none of which is made."""
    found: list[ModelSpec] = []

    def take(specs: Sequence[ModelSpec], settings: Any) -> None:
        found.extend(specs)

    monkeypatch.setattr(running, "run_server", take)
    return found


RUBRIC = "{reward_model: rational_rewards_t2i, name: j"
YES_NO = "{reward_model: vllm_evaluate, name: j, timeout: 100, max_concurrent: 8"
LEVELS = "{reward_model: DeQAScore, name: j, model: m, timeout: 50, max_concurrent: 4"
FAR = f"name: j, server_url: '{URL}', timeout: 30"


@pytest.mark.parametrize(
    ("reward", "seconds", "remote"),
    [
        ("JPEGCompressibility", 60.0, False),
        (RUBRIC + "}", 2 * 180.0 + 30, True),  # 16 images, 8 at once
        (RUBRIC + ", max_concurrent: 100, batch_size: 40, timeout: 7}", 60.0, True),
        (RUBRIC + ", batch_size: 17}", 3 * 180.0 + 30, True),
        (YES_NO + ", label_tokens: off}", 2 * 100.0 + 30, True),
        (YES_NO + ", yes_token_ids: [1], no_token_ids: [2]}", 2 * 100.0 + 30, True),
        (YES_NO + "}", 13 * 5.0 + 2 * 200.0 + 30, True),  # twelve spellings and what stands for none are asked for
        (YES_NO + ", canonicalize: false}", 3 * 5.0 + 2 * 200.0 + 30, True),
        (LEVELS + f", base_url: '{URL}'}}", 4 * 50.0 + 30, True),
        ("{reward_model: DeQAScore, name: j, model: m}", 60.0, False),
        ("{reward_model: RemotePointwiseRewardModel, " + FAR + "}", 16 * 30.0 + 30, True),
        ("{reward_model: RemoteGroupwiseRewardModel, " + FAR + "}", 60.0, True),
        (f"{__name__}.Asking", 3600.0, True),
    ],
)
def test_a_call_may_take_as_long_as_its_own_timeouts(
    served: list[ModelSpec], reward: str, seconds: float, remote: bool
) -> None:
    assert cli.main(["serve", reward]) == 0
    (spec,) = served
    assert spec.batch_seconds == seconds
    assert spec.source.remote is remote


def test_less_than_that_is_refused_with_the_number(served: list[ModelSpec], capsys: pytest.CaptureFixture[str]) -> None:
    judge = RUBRIC + ", timeout: 9}"
    assert cli.main(["serve", judge, "--batch_seconds", "18"]) == 2
    assert (
        "--batch_seconds 18: a call of 'j' may wait 18 s for those it asks (batch_size=16)" in capsys.readouterr().err
    )
    assert served == []
    assert cli.main(["serve", judge, "JPEGCompressibility", f"{__name__}.Asking", "--batch_seconds", "19"]) == 0
    assert [spec.batch_seconds for spec in served] == [19.0] * 3  # and where nobody knows, the user does


def test_an_entry_s_options_decide() -> None:
    cls = reward_class("DeQAScore")
    config = RewardArguments(name="d", reward_model="DeQAScore", batch_size=9, options={"model": "m"})
    assert cls.call_seconds(config) is None
    there = config.model_copy(update={"options": {"model": "m", "base_url": URL}})
    assert cls.call_seconds(there) == 2 * 60.0
