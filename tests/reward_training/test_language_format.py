"""What a trained model keeps of how its texts were made, and that measuring and serving make them alike."""

import json
import math

import pytest
import torch

from tests.scorers.tiny_language import CHAT, START, save_causal
from tiltflow.cli import main
from tiltflow.commands import REWARD_MODEL_TYPES
from tiltflow.data.ratings import read_ratings
from tiltflow.data.records import LeftOut
from tiltflow.errors import ConfigError, DataError
from tiltflow.reward_training import LanguageDataConfig, LanguageModelConfig, RewardModelType, build_language
from tiltflow.reward_training.language_config import HeadConfig
from tiltflow.rewards import build_reward
from tiltflow.scorers import LanguageRewardModel, RewardHead

PAIRS = [{"prompt": f"w{n} w1", "chosen": "good", "rejected": "bad w3", "margin": n} for n in range(4)]
RATED = [{"prompt": f"w{n} w1", "response": "good", "kind": n, "long": 1} for n in range(4)]
DATED = "{% if not date is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}{{ date }} " + CHAT


def write(path, records) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def fitted(tmp_path, records=PAIRS, *, kind="binary_ranking", chat: str | None = CHAT, model=None, **data):
    base = tmp_path / "base"
    if not base.is_dir():
        save_causal(base, chat=chat)
    config = LanguageModelConfig(reward_model_type=kind, pretrained=str(base), **(model or {}))
    return build_language(config, LanguageDataConfig(train=write(tmp_path / "train.jsonl", records), **data))


def talk(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def tokens_of(fitting, name="chosen") -> list[int]:
    batch = fitting.train.batch([0], [1.0])
    return batch[name][0].tolist()


@pytest.mark.parametrize("as_conversation", [False, True])
def test_pairs_are_measured_and_served_as_they_were_trained(tmp_path, as_conversation):
    fitting = fitted(tmp_path, as_conversation=as_conversation)
    fitting.model.save_pretrained(tmp_path / "model")
    model = LanguageRewardModel.from_pretrained(tmp_path / "model").eval()
    assert model.head.as_conversation is as_conversation
    trained = tokens_of(fitting)
    assert model.encode(model.pair("w0 w1", "good")) == trained
    expected = model.score_encoded([trained]).item()
    output = tmp_path / "r.json"
    command = ["evaluate-reward", str(tmp_path / "model"), str(tmp_path / "train.jsonl"), "--output", str(output)]
    assert main(command) == 0
    row = json.loads(output.with_suffix(".jsonl").read_text().splitlines()[0])
    assert math.isclose(row["chosen"], expected, abs_tol=1e-5)
    reward = build_reward("LanguageReward", model=str(tmp_path / "model"))
    texts = [json.dumps({"prompt": "w0 w1", "response": "good"})]
    texts += [json.dumps(talk("w0 w1", "good")), model.render(talk("w0 w1", "good"))] if as_conversation else []
    torch.testing.assert_close(torch.as_tensor(reward(prompt=texts).rewards), torch.full((len(texts),), expected))


def test_another_stage_keeps_how_its_own_texts_were_made(tmp_path):
    fitted(tmp_path, as_conversation=True).model.save_pretrained(tmp_path / "model")
    second = build_language(
        LanguageModelConfig(reward_model_type="binary_ranking", pretrained=str(tmp_path / "model")),
        LanguageDataConfig(train=str(tmp_path / "train.jsonl")),
    )
    assert second.model.model.head.as_conversation is False
    assert tokens_of(second)[0] == 0  # the start, which a rendered conversation of this template does not have


def test_ratings_go_through_the_chat_template_as_pairs_do(tmp_path):
    head = {"attribute_names": ("kind", "long"), "num_attributes": 2}
    fitting = fitted(tmp_path, RATED, kind="regression", model={"head": head}, as_conversation=True)
    model = fitting.model.model
    assert model.head.as_conversation is True
    assert tokens_of(fitting, "inputs") == model.encode(talk("w0 w1", "good"))
    glued = fitted(tmp_path, RATED, kind="regression", model={"head": head})
    assert tokens_of(glued, "inputs") == glued.model.model.encode("w0 w1good")
    with pytest.raises(DataError, match="missing key: 'prompt': a conversation is made of a prompt and a response"):
        fitted(tmp_path, [{"text": "w1", "label": 1}], kind="regression", as_conversation=True)


def test_keys_of_the_other_kind_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data.layout is for reward_model_type: binary_ranking; leave it out"):
        fitted(tmp_path, RATED, kind="regression", layout="adjacent")
    with pytest.raises(ConfigError, match=r"data.label_range is for reward_model_type: regression; leave it out"):
        fitted(tmp_path, label_range=(0, 4))


def test_misspelt_attribute_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"data.train: nothing is rated as kindd; correct model.head.attribute_names"):
        fitted(
            tmp_path,
            RATED,
            kind="regression",
            model={
                "head": {"attribute_names": ("kindd", "long"), "num_attributes": 2},
            },
        )
    # A list that leaves an attribute out on purpose is none of this.
    lists = [{"text": "w1", "label": [1, -100]}]
    fitted(tmp_path, lists, kind="regression", model={"head": {"attribute_names": ("a", "b"), "num_attributes": 2}})
    path = write(tmp_path / "r.jsonl", [*RATED, {"text": "w", "label": [1, None]}])
    found = read_ratings(path, left_out=LeftOut("error"), attributes=2, names=("kind", "long"))
    assert [rating.named for rating in found] == [True] * 4 + [False]


def test_what_the_user_may_not_have_meant_is_remarked(tmp_path):
    remarks = fitted(
        tmp_path,
        validation=write(tmp_path / "v.jsonl", [{"chosen": talk("w1", "good"), "rejected": talk("w1", "bad")}]),
    ).remarks
    assert len(remarks) == 3
    assert "has a chat template, and its texts do not go through it" in remarks[0]
    assert "3 pairs have a margin, which loss: bradley_terry leaves out" in remarks[1]
    assert remarks[2].startswith("validation: texts, or conversations")
    assert not fitted(tmp_path, as_conversation=True, model={"loss": "margin"}).remarks
    mixed = fitted(tmp_path, [*PAIRS, {"chosen": talk("w1", "good"), "rejected": talk("w1", "bad")}])
    assert mixed.remarks[0].startswith("train: both texts and conversations")
    assert mixed.model.model.head.as_conversation is None


def test_date_of_a_template_is_remarked_and_can_be_kept(tmp_path):
    records = [{"chosen": talk("w1", "good"), "rejected": talk("w1", "bad")}]
    live = fitted(tmp_path, records, chat=DATED)
    assert len(live.remarks) == 1 and "writes today's date" in live.remarks[0]
    still = fitted(tmp_path, records, chat_template_kwargs={"date": "w7"})
    assert not still.remarks
    still.model.save_pretrained(tmp_path / "model")
    model = LanguageRewardModel.from_pretrained(tmp_path / "model")
    assert model.render(talk("w1", "good")).startswith("w7 user")
    assert model.encode(talk("w1", "good")) == tokens_of(still)


def test_calls_of_tools_are_rendered(tmp_path):
    chat = "{% for m in messages %}{{ m['role'] }} {{ m['content'] or m['tool_calls'][0]['name'] }} {% endfor %}"
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "w7"}]}
    record = {"chosen": [*talk("w1", "good")[:1], call], "rejected": talk("w1", "bad")}
    fitting = fitted(tmp_path, [record], chat=chat)
    assert fitting.model.model.tokenizer.decode(tokens_of(fitting)) == "user w1 assistant w7"
    with pytest.raises(DataError, match="'chosen' must be a text, or messages"):
        fitted(tmp_path, [{**record, "chosen": [{"role": "assistant", "content": None}]}])


def test_training_texts_of_a_template_with_a_start_have_one(tmp_path):
    fitting = fitted(tmp_path, as_conversation=True, chat=f"{START} {CHAT}")
    assert tokens_of(fitting).count(0) == 1


def test_clock_is_asked_of_a_record_that_the_template_takes(tmp_path):
    refuses = "{% if messages[0]['content'] == 'w0 w1' %}{{ raise_exception('not this') }}{% endif %}"
    fitting = fitted(tmp_path, as_conversation=True, chat=refuses + DATED, on_bad_record="skip")
    assert len(fitting.train) == len(PAIRS) - 1
    assert any("writes today's date" in remark for remark in fitting.remarks)
    with pytest.raises(DataError, match=r"line 1: .*the chat template refuses"):
        fitted(tmp_path, as_conversation=True)


def test_adapter_that_is_trained_on_leaves_an_adapter(tmp_path):
    first = fitted(tmp_path, as_conversation=True, model={"lora": {"rank": 2}})
    first.model.save_pretrained(tmp_path / "first")
    adapter = str(tmp_path / "first" / "adapter")
    config = LanguageModelConfig(reward_model_type="binary_ranking", pretrained=adapter)
    data = LanguageDataConfig(train=str(tmp_path / "train.jsonl"), as_conversation=True)
    second = build_language(config, data)
    assert torch.equal(second.model.model.score(["w1 w2"]), first.model.model.score(["w1 w2"]))
    with torch.no_grad():
        for weight in second.model.parameters():
            if weight.requires_grad:
                weight.add_(0.1)
    second.model.save_pretrained(tmp_path / "second")
    again = LanguageRewardModel.from_pretrained(tmp_path / "second" / "adapter")
    assert torch.equal(again.score(["w1 w2"]), second.model.model.score(["w1 w2"]))
    assert again.head.as_conversation is True
    merged = LanguageRewardModel.from_pretrained(tmp_path / "second")
    torch.testing.assert_close(merged.score(["w1 w2"]), again.score(["w1 w2"]), atol=1e-4, rtol=1e-5)


def test_lists_that_say_the_same_agree():
    assert {kind.value for kind in RewardModelType} == REWARD_MODEL_TYPES.keys() - {"image_text"}
    assert HeadConfig.model_fields.keys() == RewardHead.model_fields.keys() - {
        "as_conversation",
        "chat_template_kwargs",
    }
