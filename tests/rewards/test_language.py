"""A language reward model as a reward, alone and behind a server."""

import pytest
import torch

from tests.scorers.tiny_language import save_causal, save_classifier
from tests.serving.http.servers import running
from tiltflow.errors import RewardError
from tiltflow.rewards import build_reward
from tiltflow.scorers import LanguageRewardModel, RewardHead

TEXTS = ["w1 w2 good", "w5", "bad w3 w3 w9"]


def test_reward_is_the_score_of_the_folder(tmp_path):
    folder = save_classifier(tmp_path / "model")
    expected = LanguageRewardModel.from_pretrained(folder).eval().score(TEXTS)
    reward = build_reward("LanguageReward", model=str(folder))
    torch.testing.assert_close(reward(prompt=TEXTS).rewards, expected)
    scaled = build_reward("LanguageReward", model=str(folder), mean=1.0, std=2.0)
    torch.testing.assert_close(scaled(prompt=TEXTS).rewards, (expected - 1) / 2)


def test_attributes_are_told_beside_their_weighted_sum(tmp_path):
    head = RewardHead(num_attributes=2, attribute_names=("kind", "long"), attribute_weights=(1.0, -2.0))
    model = LanguageRewardModel.from_pretrained(save_causal(tmp_path / "base"), head=head).eval()
    model.save_pretrained(tmp_path / "model")
    output = build_reward("LanguageReward", model=str(tmp_path / "model"))(prompt=TEXTS)
    attributes = model.score(TEXTS)
    torch.testing.assert_close(output.rewards, attributes @ torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(torch.tensor(output.extra_info["kind"]), attributes[:, 0])
    torch.testing.assert_close(torch.tensor(output.extra_info["long"]), attributes[:, 1])


def test_texts_that_cannot_be_scored_fail_alone(tmp_path):
    folder = save_classifier(tmp_path / "model", start=False)
    reward = build_reward("LanguageReward", model=str(folder), max_length=5)
    output = reward(prompt=["w1", "", "w2 " * 6, "w3"])
    assert output.rewards.isnan().tolist() == [False, True, True, False]
    assert {place: str(error) for place, error in output.failures.items()} == {
        1: "the text '' has no tokens; there is nothing to score",
        2: "the text has 6 tokens, more than 5; shorten it, or raise max_length",
    }
    long = build_reward("LanguageReward", model=str(folder))(prompt=["w1 " * 257])
    assert "257 tokens, more than 256" in str(long.failures[0])


def test_a_model_must_be_named_and_be_there():
    with pytest.raises(RewardError, match="model=None; name a folder that `tiltflow train-reward` wrote"):
        build_reward("LanguageReward")
    with pytest.raises(RewardError, match="the model no/where was not found"):
        build_reward("LanguageReward", model="no/where")


def test_folder_is_a_model_of_a_server(tmp_path):
    folder = save_classifier(tmp_path / "model")
    expected = LanguageRewardModel.from_pretrained(folder).eval().score(TEXTS).tolist()
    with running(
        "-m", "tiltflow", "serve", f"{{reward_model: LanguageReward, model: {folder}}}", "--port", "0"
    ) as server:
        answer = server.post("/get_reward", {"query": TEXTS})
        assert answer.status == 200
        assert answer.json["rewards"] == pytest.approx(expected, abs=1e-5)
        refused = server.post("/get_reward", {"query": ["w1 " * 257]})
        assert refused.status >= 400 and "258 tokens, more than 256" in refused.json["detail"]
