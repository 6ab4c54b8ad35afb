"""A language reward model as a reward, alone and behind a server."""

import json

import pytest
import torch

from tests.scorers.tiny_language import CHAT, save_causal, save_classifier
from tests.serving.http.servers import running
from tiltflow.errors import ConfigError, RewardError
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
        2: "the text has 6 tokens, more than 5; shorten it, raise max_length, or set over_length: truncate",
    }
    long = build_reward("LanguageReward", model=str(folder))(prompt=["w1 " * 257])
    assert "257 tokens, more than 256" in str(long.failures[0])


def test_texts_that_are_too_long_can_be_cut(tmp_path):
    base = save_causal(tmp_path / "base")
    LanguageRewardModel.from_pretrained(base, append_eos=True).save_pretrained(tmp_path / "model")
    reward = build_reward("LanguageReward", model=str(tmp_path / "model"), max_length=5, over_length="truncate")
    output = reward(prompt=["w1 w2 w3 w4 w5 w6", "w1 w2 w3"])
    assert not output.failures
    assert float(output.rewards[0]) == pytest.approx(float(output.rewards[1]), abs=1e-6)


def test_half_a_character_costs_no_other_text_its_score(tmp_path):
    folder = save_classifier(tmp_path / "model")
    output = build_reward("LanguageReward", model=str(folder))(prompt=["w1", "w2 \ud83d", "w3"])
    assert torch.as_tensor(output.rewards).isnan().tolist() == [False, True, False]
    assert "is no Unicode text" in str(output.failures[1])


def test_texts_may_be_json_of_messages_or_of_a_pair(tmp_path):
    folder = save_classifier(tmp_path / "model", chat=f"<s> {CHAT}")
    model = LanguageRewardModel.from_pretrained(folder).eval()
    talk = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "good"}]
    others = ['{"prompt": "w1"}', "[w1]", '["w1"]', "{", "[" * 9, "[" * 200_000, "[]"]
    texts = [json.dumps(talk), json.dumps({"prompt": "w1", "response": "good"}), model.render(talk), *others]
    rewards = build_reward("LanguageReward", model=str(folder))(prompt=texts).rewards
    expected = model.score([talk, talk, talk, *others])
    torch.testing.assert_close(torch.as_tensor(rewards), expected, atol=1e-5, rtol=1e-5)


def test_a_prompt_of_messages_takes_an_answer_as_in_training(tmp_path):
    folder = save_classifier(tmp_path / "model", chat=f"<s> {CHAT}")
    ask, answer = [{"role": "user", "content": "w1"}], [{"role": "assistant", "content": "good"}]
    pairs = [(ask, "good"), (ask, answer), ("w1", answer), (ask, ask + answer)]
    output = build_reward("LanguageReward", model=str(folder))(
        prompt=[json.dumps({"prompt": prompt, "response": response}) for prompt, response in pairs]
    )
    expected = LanguageRewardModel.from_pretrained(folder).eval().score([ask + answer] * 4)
    torch.testing.assert_close(torch.as_tensor(output.rewards), expected, atol=1e-5, rtol=1e-5)


NEARLY = [
    ({"prompt": "w1", "response": "good", "id": 3}, "neither messages nor a prompt with its response; other keys: id"),
    ({"prompt": 1, "response": "good"}, "'prompt' must be a text, or messages with 'role' and 'content'; it is 1"),
    ({"prompt": "w1", "response": None}, "missing key: 'response'"),
    ({"prompt": "w1", "response": [{"role": "user", "content": "w2"}]}, "mixed kinds: prompt is a text"),
    ([{"from": "human", "value": "w1"}], "must be a text, or messages with 'role' and 'content'"),
    ([{"role": "user", "content": "w1"}, {"role": "assistant"}], "must be a text, or messages with"),
]


@pytest.mark.parametrize(("value", "message"), NEARLY)
def test_json_that_is_nearly_a_conversation_fails_alone(tmp_path, value, message):
    folder = save_classifier(tmp_path / "model")
    output = build_reward("LanguageReward", model=str(folder))(prompt=["w1", json.dumps(value), "w2"])
    assert torch.as_tensor(output.rewards).isnan().tolist() == [False, True, False]
    assert isinstance(output.failures[1], RewardError) and message in str(output.failures[1])


def test_depth_of_a_message_that_the_template_refuses_costs_no_other_text_its_score(tmp_path):
    folder = save_classifier(tmp_path / "model", chat="{{ raise_exception('no') }}")
    talk = '[{"role": "user", "content": "w1", "more": %s}]'
    # Up to a depth that depends on the interpreter JSON is read; what it reads may be too deep for other functions.
    deep = [talk % ("[" * depth + "]" * depth) for depth in range(500, 1100, 3)]
    output = build_reward("LanguageReward", model=str(folder))(prompt=["w1", *deep])
    assert "the chat template refuses" in str(output.failures[1]) and not torch.as_tensor(output.rewards)[0].isnan()


@pytest.mark.parametrize(("family", "positions"), [("gpt2", 256), ("roberta", 30)])
def test_more_tokens_than_the_network_reads_are_no_limit(tmp_path, family, positions):
    folder = save_classifier(tmp_path / "model", family=family)
    with pytest.raises(ConfigError, match=f"max_length={positions + 1}: the network reads at most {positions} tokens"):
        build_reward("LanguageReward", model=str(folder), max_length=positions + 1)
    reward = build_reward("LanguageReward", model=str(folder), max_length=positions)
    output = reward(prompt=["w1", "w2 " * 400])
    assert torch.as_tensor(output.rewards).isnan().tolist() == [False, True]


def test_one_of_several_numbers_must_be_named(tmp_path):
    head = RewardHead(num_attributes=2, attribute_names=("kind", "long"))
    model = LanguageRewardModel.from_pretrained(save_causal(tmp_path / "base"), head=head).eval()
    model.save_pretrained(tmp_path / "model")
    folder = str(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"gives 2 numbers \(kind, long\): say which is the reward with attribute"):
        build_reward("LanguageReward", model=folder)
    with pytest.raises(ConfigError, match="attribute 2: the model gives kind, long"):
        build_reward("LanguageReward", model=folder, attribute="2")
    expected = model.score(TEXTS)
    for place, name in ((0, "kind"), (1, "1"), (1, 1)):
        output = build_reward("LanguageReward", model=folder, attribute=name)(prompt=TEXTS)
        torch.testing.assert_close(torch.as_tensor(output.rewards), expected[:, place])
        assert list(output.extra_info) == ["kind", "long"]


def test_template_can_be_given_what_it_asks_for(tmp_path):
    folder = save_classifier(tmp_path / "model", chat=f"{{{{ date or 'w1' }}}} {CHAT}", start=False)
    talk = json.dumps([{"role": "user", "content": "w2"}])
    model = LanguageRewardModel.from_pretrained(folder).eval()
    for options, date in (({}, "w1"), ({"chat_template_kwargs": {"date": "w9"}}, "w9")):
        rewards = build_reward("LanguageReward", model=str(folder), **options)(prompt=[talk]).rewards
        expected = model.score([f"{date} user : w2 </s>"])
        torch.testing.assert_close(torch.as_tensor(rewards), expected, atol=1e-5, rtol=1e-5)


def test_a_model_without_head_is_no_reward(tmp_path):
    with pytest.raises(RewardError, match="which has no trained head: its rewards would be random"):
        build_reward("LanguageReward", model=str(save_causal(tmp_path / "base")))


def test_a_model_must_be_named_and_be_there():
    with pytest.raises(RewardError, match="model=None; name a folder that `tiltflow train-reward` wrote"):
        build_reward("LanguageReward")
    with pytest.raises(RewardError, match="the model no/where was not found"):
        build_reward("LanguageReward", model="no/where")


def test_folder_is_a_model_of_a_server(tmp_path):
    folder = save_classifier(tmp_path / "model")
    expected = LanguageRewardModel.from_pretrained(folder).eval().score(TEXTS).tolist()
    talk = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "good"}]
    talked = LanguageRewardModel.from_pretrained(folder).eval().score([talk]).tolist()
    with running(
        "-m", "tiltflow", "serve", f"{{reward_model: LanguageReward, model: {folder}}}", "--port", "0"
    ) as server:
        answer = server.post("/get_reward", {"query": TEXTS})
        assert answer.status == 200
        assert answer.json["rewards"] == pytest.approx(expected, abs=1e-5)
        answer = server.post("/get_reward", {"query": [json.dumps(talk)]})
        assert answer.json["rewards"] == pytest.approx(talked, abs=1e-5)
        refused = server.post("/get_reward", {"query": ["w1 " * 257]})
        assert refused.status >= 400 and "258 tokens, more than 256" in refused.json["detail"]
