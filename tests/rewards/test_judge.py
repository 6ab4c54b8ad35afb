"""Judges behind an endpoint, over a fake transport: what is sent, what is read, and what is a failure."""

import json
import math
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import SecretStr

from tests.rewards.fake_judge import completion, sent_image, serve
from tiltflow.errors import JudgeError, RewardError, UnparsableError
from tiltflow.rewards import build_reward
from tiltflow.rewards.judge import ChatEndpoint, EndpointSettings
from tiltflow.rewards.labels import weigh_words

SETTINGS = EndpointSettings(base_url="http://judge.test/v1", model="a-judge", max_retries=0)
WORDS = ("good", "bad")
IMAGE = Image.new("RGB", (4, 4))


def ended(finish_reason: str) -> dict[str, Any]:
    """Return an answer that ended for a reason."""
    answer = completion({"good": -0.1})
    answer["choices"][0]["finish_reason"] = finish_reason
    return answer


def first_token(settings: EndpointSettings, *content: Any, **options: Any) -> dict[str, float]:
    return dict(ChatEndpoint(settings).first_token(content, lambda logprobs: logprobs, **options))


def test_what_is_sent_and_read(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = serve(monkeypatch, lambda body: completion({" Good": -0.5, "bad": -2.0}))
    monkeypatch.setenv("JUDGE_KEY", "secret")
    settings = SETTINGS.model_copy(update={"api_key_env": "JUDGE_KEY"})
    image = Image.new("RGB", (5, 4), (10, 20, 30))
    assert first_token(settings, image, "Good or bad?") == {" Good": -0.5, "bad": -2.0}
    (request,) = requests
    assert str(request.url) == "http://judge.test/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer secret"
    body = json.loads(request.content)
    content = body.pop("messages")
    assert [part["type"] for part in content[0]["content"]] == ["image_url", "text"]
    assert content[0]["content"][1]["text"] == "Good or bad?"
    assert len(content) == 1
    assert body == {
        "model": "a-judge",
        "temperature": 0.0,
        "max_completion_tokens": 1,
        "logprobs": True,
        "top_logprobs": 20,
    }
    assert sent_image(json.loads(request.content)).tobytes() == image.tobytes()


def test_an_answer_can_be_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = serve(monkeypatch, lambda body: completion({"good": 0.0}))
    first_token(SETTINGS, IMAGE, "How is it?", answer="It is")
    body = json.loads(requests[0].content)
    assert body["messages"][1] == {"role": "assistant", "content": "It is"}
    assert (body["add_generation_prompt"], body["continue_final_message"]) == (False, True)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            (500, {"error": {"message": "out of memory"}}),
            r"'a-judge' at http://judge.test/v1 failed: InternalServerError",
        ),
        ((404, {"error": {"message": "no such model"}}), r"failed: NotFoundError: .*no such model"),
        ((200, "<html>Hello</html>"), r"answered with no chat completion; base_url usually ends with /v1"),
        (completion(None), "answered without log-probabilities"),
        (completion({}), "answered without log-probabilities"),
        ({**completion(None), "choices": []}, "answered without log-probabilities"),
        ({**completion(None), "choices": [{"index": 0}]}, "answered with a malformed chat completion"),
        (completion({"good": float("nan")}), "answered with a malformed chat completion: a log-probability is NaN"),
        (completion({"good": float("inf")}), "answered with a malformed chat completion: a log-probability is inf"),
        (completion({"good": 0.5}), "answered with a malformed chat completion: a log-probability is 0.5"),
        (ended("abort"), r"broke its answer off \(finish_reason='abort'\)"),
        (ended("content_filter"), "broke its answer off"),
    ],
)
def test_no_answer_is_an_error(monkeypatch: pytest.MonkeyPatch, reply: Any, message: str) -> None:
    serve(monkeypatch, lambda body: reply)
    with pytest.raises(RewardError, match=message):
        first_token(SETTINGS, IMAGE, "?")


def test_a_passing_failure_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    replies = iter([(500, {}), completion({"good": 0.0})])
    requests = serve(monkeypatch, lambda body: next(replies))
    assert first_token(SETTINGS.model_copy(update={"max_retries": 1}), IMAGE, "?") == {"good": 0.0}
    assert len(requests) == 2


def test_pickling_keeps_the_settings_and_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, lambda body: completion({"good": 0.0}))
    monkeypatch.setenv("JUDGE_KEY", "k3y-of-the-judge")
    text = pickle.dumps(ChatEndpoint(SETTINGS.model_copy(update={"api_key_env": "JUDGE_KEY"})))
    assert b"k3y-of-the-judge" not in text
    assert pickle.loads(text).first_token([IMAGE, "?"], dict) == {"good": 0.0}


@pytest.mark.parametrize("value", [None, ""])
def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    pytest.importorskip("openai")
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(RewardError, match="api_key_env='JUDGE_KEY': this environment variable is not set or empty"):
        ChatEndpoint(SETTINGS.model_copy(update={"api_key_env": "JUDGE_KEY"}))


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(RewardError, match=r"base_url='http://x/v1' needs the package openai: .*'tiltflow\[judge\]'"):
        build_reward("DeQAScore", device="cpu", model="m", base_url="http://x/v1")


def test_two_keys_are_one_too_many() -> None:
    pytest.importorskip("openai")
    with pytest.raises(RewardError, match="api_key and api_key_env='JUDGE_KEY' are both given; leave one out"):
        ChatEndpoint(SETTINGS.model_copy(update={"api_key_env": "JUDGE_KEY", "api_key": SecretStr("k")}))


def test_minus_infinity_is_no_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, lambda body: completion({"good": -0.1, "bad": -9999.0}))
    assert weigh_words(first_token(SETTINGS, IMAGE, "?"), WORDS, min_mass=0.01) == [1.0, 0.0]


def test_label_tokens_and_other_keys_are_sent_along(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = serve(monkeypatch, lambda body: completion({"token_id:7": -0.1}))
    settings = SETTINGS.model_copy(update={"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}})
    assert first_token(settings, IMAGE, "?", token_ids=(7, 8)) == {"token_id:7": -0.1}
    body = json.loads(requests[0].content)
    assert body["logprob_token_ids"] == [7, 8] and body["return_tokens_as_token_ids"] is True
    assert body["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize(
    "change",
    [{"model": "b"}, {"extra_body": {"seed": 3}}, {"api_key": SecretStr("k")}, {"base_url": "http://other.test/v1"}],
)
def test_what_is_kept_on_disk_belongs_to_the_request_and_not_to_the_endpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, Any]
) -> None:
    requests = serve(monkeypatch, lambda body: completion({"good": -0.1}))
    settings = SETTINGS.model_copy(update={"cache_dir": str(tmp_path / "replies")})
    for _ in range(2):
        first_token(settings, IMAGE, "?")
    assert len(requests) == 1
    first_token(settings, Image.new("RGB", (4, 4), "red"), "?")
    assert len(requests) == 2
    first_token(settings.model_copy(update=change), IMAGE, "?")
    assert len(requests) == (2 if {"api_key", "base_url"} & set(change) else 3)
    assert all("secret" not in path.read_text() for path in tmp_path.rglob("*.json"))


def test_the_connections_close_with_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, lambda body: completion({"good": -0.1}))
    endpoint = ChatEndpoint(SETTINGS)
    endpoint.first_token([IMAGE, "?"], dict)
    client, thread = endpoint._line.get().client, endpoint._line.get().loop._thread
    assert thread is not None and thread.is_alive() and not client.is_closed()
    del endpoint
    thread.join(timeout=5)
    assert client.is_closed() and not thread.is_alive()


def test_a_closed_endpoint_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, lambda body: completion({"good": -0.1}))
    endpoint = ChatEndpoint(SETTINGS)
    endpoint.close()
    with pytest.raises(JudgeError, match=r"the judge 'a-judge' at .* is asked no more: judge-a-judge is closed"):
        endpoint.first_token([IMAGE, "?"], dict)


def test_words_are_weighed_among_themselves_and_spellings_together() -> None:
    logprobs = {token: math.log(p) for token, p in {"Good": 0.3, " good": 0.2, "▁BAD\n": 0.1, "goodness": 0.4}.items()}
    assert weigh_words(logprobs, WORDS, min_mass=0.01) == pytest.approx([5 / 6, 1 / 6])
    assert weigh_words({"good": -0.1, "what": -3.0}, WORDS, min_mass=0.01) == [1.0, 0.0]


def test_tokens_that_are_spelt_alike_count_together_and_none_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers write tokens with and without a leading space alike where the tokenizer's decoder drops that space."""
    answer = completion({"good": math.log(0.5), "bad": math.log(0.2)})
    (listed,) = answer["choices"][0]["logprobs"]["content"]
    listed["top_logprobs"] += [
        {"token": "good", "logprob": math.log(0.1), "bytes": None},
        {"token": "bad", "logprob": math.log(0.2), "bytes": None},  # the one that was chosen, once more
        {"token": "so", "logprob": -9999.0, "bytes": None},
        {"token": "so", "logprob": -math.inf, "bytes": None},
    ]
    serve(monkeypatch, lambda body: answer)
    found = first_token(SETTINGS, IMAGE, "?")
    assert found == {"good": pytest.approx(math.log(0.6)), "bad": math.log(0.2), "so": -9999.0}
    assert weigh_words(found, WORDS, min_mass=0.01) == pytest.approx([0.75, 0.25])


def test_more_than_certain_is_no_probability() -> None:
    with pytest.raises(JudgeError, match=r"the judge's log-probabilities are none: good, bad have probability 1\.8"):
        weigh_words({"good": math.log(0.9), "bad": math.log(0.9)}, WORDS, min_mass=0.01)
    assert weigh_words({"good": 1e-3, " good": math.log(0.02)}, WORDS, min_mass=0.01) == [1.0, 0.0]


@pytest.mark.parametrize("piece", ["ex", " Exc", "▁excellen"])
def test_a_word_that_is_split_into_tokens_is_an_error_where_it_matters(piece: str) -> None:
    levels = ("excellent", "good", "bad")
    told = {piece: math.log(0.8), "good": math.log(0.1), "bad": math.log(0.05)}
    with pytest.raises(
        UnparsableError, match=r"the judge's first token is 'ex.*' with probability 0.8, which only begin"
    ):
        weigh_words(told, levels, min_mass=0.01)
    told[piece] = math.log(0.005)
    assert weigh_words(told, levels, min_mass=0.01) == pytest.approx([0.0, 2 / 3, 1 / 3])


@pytest.mark.parametrize("logprobs", [{"I": -0.01, "Sorry": -5.0}, {"I": -0.001, "good": -9.0}, {}])
def test_another_answer_is_an_error(logprobs: dict[str, float]) -> None:
    with pytest.raises(
        RewardError, match="the judge's first word is none of good, bad: together they have probability"
    ):
        weigh_words(logprobs, WORDS, min_mass=0.01)


def test_words_that_were_not_given_are_no_answer_even_when_anything_counts() -> None:
    with pytest.raises(RewardError, match=r"the likeliest are \['I'\]"):
        weigh_words({"I": 0.0}, WORDS, min_mass=0.0)
