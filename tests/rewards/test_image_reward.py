"""ImageReward as a reward: built by name from the models folder, called by the engine."""

from pathlib import Path

import pytest
import torch

from tests.rewards.samples import batch, entry
from tests.scorers.tiny_image_reward import random_state, write_models
from tiltflow.errors import RewardError
from tiltflow.rewards import RewardEngine, build_reward
from tiltflow.rewards.image_reward import ImageRewardReward
from tiltflow.scorers.checkpoints import MODELS_VARIABLE
from tiltflow.types import Prompt

PROMPTS = [Prompt("w7 w9"), Prompt("w8"), Prompt("w7 w9")]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(MODELS_VARIABLE, str(tmp_path))
    return write_models(tmp_path, random_state())


def test_the_engine_scores_like_the_scorer(models: Path) -> None:
    samples = batch([0.1, 0.5, 0.9], prompts=PROMPTS)
    table = RewardEngine([entry("taste", "ImageReward", batch_size=2)]).score(samples)
    reward = build_reward("ImageReward", device="cpu")
    assert isinstance(reward, ImageRewardReward)
    expected = reward.scorer.score(samples.images, [prompt.text for prompt in PROMPTS])
    torch.testing.assert_close(table.column("taste"), expected, atol=1e-5, rtol=0)
    assert expected.unique().numel() == 3
    assert table.failures == ()


def test_a_reward_gives_no_gradient_and_its_scorer_does(models: Path) -> None:
    reward = build_reward("ImageReward", device="cpu", dtype="bfloat16")
    assert isinstance(reward, ImageRewardReward)
    assert reward.scorer.dtype == torch.bfloat16
    image = torch.rand(3, 32, 32, requires_grad=True)
    output = reward(prompt=["w1"], image=[image])
    assert isinstance(output.rewards, torch.Tensor)
    assert output.rewards.requires_grad is False
    assert reward.scorer.score([image], ["w1"]).requires_grad


def test_missing_weights_say_what_to_get_and_where_to_put_it(models: Path) -> None:
    (models / "ImageReward.pt").unlink()
    with pytest.raises(RewardError, match=r"ImageReward.pt were not found; get them from .*THUDM/ImageReward and put"):
        build_reward("ImageReward", device="cpu")
