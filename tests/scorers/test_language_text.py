"""Texts as tokens: special tokens once, conversations as in training, what cannot be encoded."""

import datetime

import pytest

from tests.scorers.tiny_language import CHAT, END, START, save_causal, save_classifier
from tiltflow.errors import ConfigError, RewardError
from tiltflow.scorers import LanguageRewardModel
from tiltflow.scorers.language_text import check_length

TALK = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "good"}]
WITH_START = f"{START} {CHAT}"
DATED = "{% if not date is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}{{ date }} " + CHAT


def load(folder, *, as_conversation: bool | None = None, **options) -> LanguageRewardModel:
    model = LanguageRewardModel.from_pretrained(folder, **options).eval()
    model.head = model.head.model_copy(update={"as_conversation": as_conversation})
    return model


@pytest.mark.parametrize("as_conversation", [None, True])
def test_template_that_begins_with_the_start_has_one(tmp_path, as_conversation):
    model = load(save_causal(tmp_path / "base", chat=WITH_START), as_conversation=as_conversation)
    tokens = model.encode(TALK)
    assert tokens[0] == 0 and tokens.count(0) == 1
    assert model.encode(model.render(TALK)) == tokens


def test_rendered_conversation_is_encoded_as_in_training_though_its_template_has_no_start(tmp_path):
    base = save_causal(tmp_path / "base")
    trained = load(base, as_conversation=True, append_eos=True)
    assert trained.encode(trained.render(TALK)) == trained.encode(TALK)
    unknown = load(base)
    assert unknown.encode("w1 w2")[0] == 0
    trained.save_pretrained(tmp_path / "saved")
    again = LanguageRewardModel.from_pretrained(tmp_path / "saved")
    assert again.head.as_conversation is True
    assert again.encode(trained.render(TALK)) == trained.encode(TALK)


def test_special_tokens_of_a_text_are_not_put_twice(tmp_path):
    model = load(save_causal(tmp_path / "base"), append_eos=True)
    plain = model.encode("w1 w2")
    assert plain[0] == 0 and plain[-1] == 1
    for text in (f"{START} w1 w2", f"w1 w2 {END}", f"{START} w1 w2 {END}"):
        assert model.encode(text) == plain
    assert model.encode("w1 w2".replace("w2", START)) == [0, plain[1], 0, 1]


def test_what_ends_texts_stays_where_they_are_cut(tmp_path):
    base = save_causal(tmp_path / "base")
    ended, plain = load(base, append_eos=True), load(base)
    ids = ended.encode("w1 w2 w3 w4")
    assert ended.shortened(ids, 4) == [*ids[:3], 1]
    assert ended.shortened(ids, 6) == ids
    assert plain.shortened(plain.encode("w1 w2 w3 w4"), 4) == ids[:4]


def test_pair_is_what_training_made_of_it(tmp_path):
    base = save_causal(tmp_path / "base")
    assert load(base, as_conversation=False).pair("w1 w2", " good") == "w1 w2 good"
    for known in (True, None):
        assert list(load(base, as_conversation=known).pair("w1 w2", "good")) == TALK
    assert load(save_causal(tmp_path / "mute", chat=None)).pair("w1", " good") == "w1 good"


def test_half_a_character_is_an_error_of_its_text(tmp_path):
    model = load(save_classifier(tmp_path / "model"))
    for text in ("w1 \ud83d", [{"role": "user", "content": "\ud83d"}]):
        with pytest.raises(RewardError, match="is no Unicode text"):
            model.encode(text)
    assert model.encode("w1 \U0001f600")


def test_clock_of_a_template_is_noticed_and_can_be_stopped(tmp_path):
    model = load(save_causal(tmp_path / "base", chat=DATED))
    days = [datetime.datetime.now().strftime("%d")]
    rendered = model.render(TALK)
    days.append(datetime.datetime.now().strftime("%d"))  # it may be midnight just now
    assert rendered.startswith(tuple(days))
    assert model.texts.reads_clock([TALK], {})
    assert not model.texts.reads_clock([TALK], {"date": "26 Jul 2024"})
    assert not load(save_causal(tmp_path / "plain")).texts.reads_clock([TALK], {})
    model.head = model.head.model_copy(update={"chat_template_kwargs": {"date": "w3"}})
    assert model.render(TALK).startswith("w3 user")
    model.save_pretrained(tmp_path / "saved")
    again = LanguageRewardModel.from_pretrained(tmp_path / "saved")
    assert again.encode(TALK) == model.encode(TALK)


def test_length_is_held_against_the_positions_that_there_are():
    check_length(5000, None, option="max_length")
    check_length(None, 256, option="max_length")
    check_length(256, 256, option="max_length")
    with pytest.raises(ConfigError, match="max_length=257: the network reads at most 256 tokens; set that, or less"):
        check_length(257, 256, option="max_length")


def test_messages_without_content_go_through_the_template(tmp_path):
    chat = "{% for m in messages %}{{ m['role'] }} {{ m['tool_calls'][0]['name'] if m['tool_calls'] }} {% endfor %}"
    model = load(save_causal(tmp_path / "base", chat=chat))
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "w7"}]}
    assert model.render([TALK[0], call]).split() == ["user", "assistant", "w7"]
