"""vllm_evaluate against a real model behind a real server: its probabilities, its failures, many callers at once."""

import asyncio
import json
import math
import pickle
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from tests.judge_server import JudgeServer, judge_server
from tests.rewards.fake_judge import completion, sent_image, serve
from tests.rewards.samples import batch, entry
from tests.sockets import dead_port, wait_until
from tiltflow.errors import JudgeError, RewardError, UnparsableError
from tiltflow.rewards import RewardEngine, RewardModel, RewardModelOutput, build_reward, check_reward
from tiltflow.rewards.labels import spellings
from tiltflow.rewards.vllm_evaluate import DEFAULT_QUESTION, VllmEvaluateOptions, VllmEvaluateReward
from tiltflow.types import Prompt

COLOURS = [(230, 30, 20), (20, 200, 60), (10, 20, 240), (240, 240, 240), (5, 5, 5)]
IMAGES = [Image.new("RGB", (32, 24), colour) for colour in COLOURS]
PROMPTS = [f"a cat of {index} {{colours}}" for index in range(5)]
SPELLINGS = {"yes": ("Yes", " Yes", "yes", " yes"), "no": ("No", " No", "no", " no")}  # one token each


class InProcess:
    """The same model, asked without a server."""

    def __init__(self, folder: Path):
        from transformers import LlavaForConditionalGeneration, LlavaProcessor

        self.model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
        self.processor: Any = LlavaProcessor.from_pretrained(folder)

    def ids(self, words: tuple[str, ...]) -> list[int]:
        """Return the tokens of words that are one token each."""
        encoded = [self.processor.tokenizer.encode(word, add_special_tokens=False) for word in words]
        assert {len(tokens) for tokens in encoded} == {1}
        return [tokens[0] for tokens in encoded]

    @torch.inference_mode()
    def probabilities(self, image: Image.Image, question: str, *, bias: dict[int, float] | None = None) -> torch.Tensor:
        """Return the probabilities of the first token of the answer, `[V]`."""
        text = f"user: <image>\n{question}\nassistant: "
        inputs = self.processor(text=[text], images=[image], return_tensors="pt")
        logits = self.model(**inputs).logits[0, -1].double()
        for token, value in (bias or {}).items():
            logits[token] += value
        return logits.softmax(0)


@pytest.fixture(scope="module")
def local(judge_folder: Path) -> InProcess:
    return InProcess(judge_folder)


def labels(local: InProcess) -> dict[str, list[int]]:
    return {label: local.ids(words) for label, words in SPELLINGS.items()}


def asking_for(tokens: dict[str, list[int]]) -> dict[str, Any]:
    """Return the options that ask for labels directly, however improbable they are."""
    return {"yes_token_ids": tokens["yes"], "no_token_ids": tokens["no"], "min_mass": 0.0}


def reward_of(url: str, **options: Any) -> RewardModel:
    given = {"vlm_model": "tiny", "max_retries": 0, **options}
    return build_reward("vllm_evaluate", device="cpu", api_base_url=url, **given)


def rewards_of(output: RewardModelOutput) -> torch.Tensor:
    return torch.as_tensor(output.rewards)


def test_only_a_question_with_a_place_for_the_prompt_requires_it() -> None:
    assert reward_of("http://judge.test/v1").required_fields == ("image",)
    assert reward_of("http://judge.test/v1", question="Is it {prompt}?").required_fields == ("prompt", "image")


# --- what the reward is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", [None, "A picture of {prompt}, {{really}}? Yes or No."])
def test_label_tokens_asked_for_directly_give_the_model_s_own_probability(
    judge: JudgeServer, local: InProcess, question: str | None
) -> None:
    tokens = labels(local)
    options = {} if question is None else {"question": question}
    reward = reward_of(judge.url, **asking_for(tokens), **options)
    output = reward(prompt=PROMPTS, image=IMAGES)
    assert output.failures == {}
    asked = (
        [DEFAULT_QUESTION] * 5 if question is None else [f"A picture of {p}, {{really}}? Yes or No." for p in PROMPTS]
    )
    for index in range(5):
        probabilities = local.probabilities(IMAGES[index], asked[index])
        yes, no = (probabilities[tokens[label]].sum().item() for label in ("yes", "no"))
        assert rewards_of(output)[index].item() == pytest.approx(yes / (yes + no), abs=1e-5)
        assert output.extra_info["mass"][index] == pytest.approx(yes + no, abs=1e-5)
    assert rewards_of(output).std() > 0.005  # the model tells the images apart


def test_yes_and_no_that_are_not_among_the_likeliest_are_a_failure(judge: JudgeServer, local: InProcess) -> None:
    for image in IMAGES:
        likeliest = set(local.probabilities(image, DEFAULT_QUESTION).topk(20).indices.tolist())
        assert not likeliest & {token for ids in labels(local).values() for token in ids}
    output = reward_of(judge.url, min_mass=0.0, label_tokens="off")(prompt=PROMPTS, image=IMAGES)
    assert rewards_of(output).isnan().all()
    assert judge.asked()["tokenized"] == []
    assert sorted(output.failures) == [0, 1, 2, 3, 4]
    assert "the judge's first word is none of yes, no: together they have probability 0" in str(output.failures[3])
    assert output.extra_info == {"mass": [None] * 5}


@pytest.mark.parametrize("canonicalize", [True, False])
def test_spellings_count_together_or_not(judge: JudgeServer, local: InProcess, canonicalize: bool) -> None:
    tokens = labels(local)
    bias = {token: 9.0 for ids in tokens.values() for token in ids}  # into the twenty likeliest
    body = {"logit_bias": {str(token): value for token, value in bias.items()}}
    reward = reward_of(judge.url, canonicalize=canonicalize, min_mass=0.001, extra_body=body, label_tokens="off")
    output = reward(prompt=PROMPTS, image=IMAGES)
    assert output.failures == {}
    counted = slice(None) if canonicalize else slice(1)
    for index, image in enumerate(IMAGES):
        probabilities = local.probabilities(image, DEFAULT_QUESTION, bias=bias)
        yes, no = (probabilities[tokens[label][counted]].sum().item() for label in ("yes", "no"))
        assert rewards_of(output)[index].item() == pytest.approx(yes / (yes + no), abs=1e-5)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ({"Yes": 0.5, " yes": 0.1, "YES": 0.1, "No": 0.3}, 0.7),
        ({"▁Yes": 0.2, "Ġno\n": 0.6}, 0.25),
        ({"Yes": 0.9, "Maybe": 0.1}, 1.0),
        ({"No": 0.02, "I": 0.98}, 0.0),
    ],
)
def test_the_formula(monkeypatch: pytest.MonkeyPatch, tokens: dict[str, float], expected: float) -> None:
    serve(monkeypatch, lambda body: completion({token: math.log(p) for token, p in tokens.items()}))
    output = reward_of("http://judge.test/v1")(prompt=["p"], image=IMAGES[:1])
    assert rewards_of(output)[0].item() == pytest.approx(expected)


def test_a_label_that_may_be_just_below_the_likeliest_tokens_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = {"Yes": math.log(0.03)} | {f"word{index}": math.log(0.03) for index in range(19)}
    serve(monkeypatch, lambda body: completion(tokens))
    output = reward_of("http://judge.test/v1")(prompt=["p"], image=IMAGES[:1])
    assert rewards_of(output).isnan().all()
    assert isinstance(output.failures[0], UnparsableError)
    assert (
        "the judge's 20 likeliest tokens do not have 'no', which may have probability up to 0.18: that would move the "
        "shares of yes, no by 0.86, more than max_uncertainty=0.05; raise top_logprobs"
    ) in str(output.failures[0])


@pytest.mark.parametrize(
    ("tokens", "options", "sure"),
    [
        ({"Yes": 0.9, "I": 0.05, "A": 0.004}, {}, True),  # six spellings of 0.004 would move it by 0.026
        ({"Yes": 0.9, "I": 0.05, "A": 0.01}, {}, True),  # the rest is 0.04
        ({"No": 0.8, "I": 0.05, "A": 0.01}, {}, False),  # six of 0.01 move it by 0.07
        ({"No": 0.8, "I": 0.05, "A": 0.01}, {"max_uncertainty": 0.08}, True),
        ({"No": 0.8, "I": 0.05, "A": 0.01}, {"canonicalize": False}, True),  # one of 0.01
        ({"No": 0.05, "I": 0.95}, {"max_uncertainty": 0.0}, True),  # there is nothing besides
        ({"Yes": 0.03, "No": 0.03, "I": 0.03}, {}, True),  # both are there
    ],
)
def test_an_absent_label_is_as_probable_as_it_can_be_at_most(
    monkeypatch: pytest.MonkeyPatch, tokens: dict[str, float], options: dict[str, Any], sure: bool
) -> None:
    serve(monkeypatch, lambda body: completion({token: math.log(p) for token, p in tokens.items()}))
    output = reward_of("http://judge.test/v1", **options)(prompt=["p"], image=IMAGES[:1])
    yes, no = tokens.get("Yes", 0.0), tokens.get("No", 0.0)
    assert rewards_of(output)[0].item() == (
        pytest.approx(yes / (yes + no)) if sure else pytest.approx(math.nan, nan_ok=True)
    )
    assert sorted(output.failures) == ([] if sure else [0])


def test_exact_words_only(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = {"Yes": math.log(0.1), " Yes": math.log(0.5), "No": math.log(0.3)}
    serve(monkeypatch, lambda body: completion(tokens))
    output = reward_of("http://judge.test/v1", canonicalize=False)(prompt=["p"], image=IMAGES[:1])
    assert rewards_of(output)[0].item() == pytest.approx(0.25)
    assert output.extra_info["mass"] == [pytest.approx(0.4)]


def test_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = serve(monkeypatch, lambda body: completion({"Yes": -0.01}))
    reward = build_reward("vllm_evaluate", device="cpu", question="Is it {prompt}?")
    image = Image.new("RGB", (5, 4), (10, 20, 30))
    assert rewards_of(reward(prompt=["{prompt} {x} {"], image=[image])).tolist() == [1.0]
    body = json.loads(requests[0].content)
    (message,) = body.pop("messages")
    assert message["content"][1] == {"type": "text", "text": "Is it {prompt} {x} {?"}
    assert body == {
        "model": "Qwen3-VL",
        "temperature": 0.0,
        "max_completion_tokens": 1,
        "logprobs": True,
        "top_logprobs": 20,
    }
    assert sent_image(json.loads(requests[0].content)).tobytes() == image.tobytes()
    assert str(requests[0].url) == "http://localhost:8000/v1/chat/completions"
    assert requests[0].headers["authorization"] == "Bearer EMPTY"


def test_defaults() -> None:
    options = build_reward("vllm_evaluate", device="cpu").options
    assert (options.max_concurrent, options.max_retries, options.top_logprobs, options.max_cache_size) == (
        100,
        10,
        20,
        1024,
    )
    assert (options.api_base_url, options.api_key.get_secret_value()) == ("http://localhost:8000/v1", "EMPTY")
    assert options.label_tokens == "auto"


@pytest.mark.parametrize(("written", "meant"), [("off", "off"), ("auto", "auto"), ("on", "auto"), ("'off'", "off")])
def test_label_tokens_in_yaml(written: str, meant: str) -> None:
    given = yaml.safe_load(f"label_tokens: {written}")
    assert VllmEvaluateOptions.model_validate(given).label_tokens == meant


# --- label tokens that are found by themselves ------------------------------------------------------------------------


def single_tokens(local: InProcess, words: tuple[str, ...]) -> list[int]:
    """Return the tokens of those of some words that are one token each."""
    encoded = [local.processor.tokenizer.encode(word, add_special_tokens=False) for word in words]
    return sorted({tokens[0] for tokens in encoded if len(tokens) == 1})


def assert_own_probabilities(output: RewardModelOutput, local: InProcess, tokens: dict[str, list[int]]) -> None:
    assert output.failures == {}
    for index, image in enumerate(IMAGES):
        probabilities = local.probabilities(image, DEFAULT_QUESTION)
        yes, no = (probabilities[tokens[label]].sum().item() for label in ("yes", "no"))
        assert rewards_of(output)[index].item() == pytest.approx(yes / (yes + no), abs=1e-5)
        assert output.extra_info["mass"][index] == pytest.approx(yes + no, abs=1e-5)


@pytest.mark.parametrize("canonicalize", [True, False])
def test_label_tokens_are_found_and_asked_for(judge: JudgeServer, local: InProcess, canonicalize: bool) -> None:
    words = {label: spellings(label) if canonicalize else (label.capitalize(),) for label in ("yes", "no")}
    tokens = {label: single_tokens(local, words[label]) for label in words}
    assert all(len(each) >= (4 if canonicalize else 1) for each in tokens.values())
    reward = reward_of(judge.url, min_mass=0.0, canonicalize=canonicalize)
    for copy in (reward, pickle.loads(pickle.dumps(reward))):
        judge.behave()
        assert_own_probabilities(copy(prompt=PROMPTS, image=IMAGES), local, tokens)
        told = judge.asked()
        assert (told["body"]["logprob_token_ids"], told["requests"]) == ([*tokens["yes"], *tokens["no"]], 5)
        assert told["tokenized"] == ["\ue000", *words["yes"], *words["no"]]  # once, by whichever image came first
        copy(prompt=["p"], image=[Image.new("RGB", (9, 9))])
        assert judge.asked()["requests"] == 6 and len(judge.asked()["tokenized"]) == len(told["tokenized"])


# So biased, yes and no are among the twenty likeliest.
def biased(local: InProcess) -> dict[str, Any]:
    return {"logit_bias": {str(token): 9.0 for ids in labels(local).values() for token in ids}}


@pytest.mark.parametrize("status", [403, 404, 405, 501])
def test_a_server_without_tokenize_is_asked_for_the_likeliest_tokens(
    judge: JudgeServer, local: InProcess, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    options = {"min_mass": 0.001, "extra_body": biased(local)}
    expected = rewards_of(reward_of(judge.url, label_tokens="off", **options)(prompt=PROMPTS, image=IMAGES))
    judge.behave(tokenize=status)
    reward = reward_of(judge.url, **options)
    with caplog.at_level("INFO", "tiltflow"):
        for _ in range(2):
            output = reward(prompt=PROMPTS, image=IMAGES)
            assert torch.equal(rewards_of(output), expected)
    assert "logprob_token_ids" not in judge.asked()["body"]
    assert judge.asked()["tokenized"] == ["\ue000"]
    (line,) = [record for record in caplog.records if record.name.startswith("tiltflow")]
    assert line.levelname == "INFO"
    assert line.getMessage().startswith(
        "the probabilities of yes, no are read from the likeliest tokens, as these cannot be asked for directly: "
        f"the judge 'tiny' at {judge.url} failed: "
    )


def test_a_server_that_fails_to_tokenize_is_asked_again_later(
    judge: JudgeServer, local: InProcess, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiltflow.rewards.judge.TOKENIZE_TIMEOUT", 1.0)
    reward = reward_of(judge.url, min_mass=0.001, extra_body=biased(local), max_cache_size=0, max_concurrent=2)
    assert isinstance(reward, VllmEvaluateReward)
    known = reward._labels._known.get()
    known.wait = 0.4
    with caplog.at_level("INFO", "tiltflow"):
        for broken in ({"tokenize": 500}, {"tokenize": 503}, {"tokenize_delay": 1.5}):
            judge.behave(**broken)
            output = reward(prompt=PROMPTS, image=IMAGES)
            assert output.failures == {}
            assert judge.asked()["tokenized"] == ["\ue000"]
            assert "logprob_token_ids" not in judge.asked()["body"]
            known.again, known.wait = 0.0, 5.0
    assert len([record for record in caplog.records if record.name.startswith("tiltflow")]) == 1
    judge.behave()
    reward(prompt=["p"], image=IMAGES[:1])
    assert "logprob_token_ids" in judge.asked()["body"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("refused", "failed: BadRequestError: .*logprob_token_ids: extra inputs are not permitted"),
        ("ignored", r"the judge did not tell the log-probability of token \d+ but those of \['"),
        ("written", r"the judge did not tell the log-probability of token \d+ but those of \['token_id:"),
    ],
)
def test_a_server_that_does_not_know_label_tokens_is_asked_without_from_then_on(
    judge: JudgeServer, local: InProcess, caplog: pytest.LogCaptureFixture, how: str, message: str
) -> None:
    options = {"min_mass": 0.001, "extra_body": biased(local), "max_concurrent": 1}
    expected = rewards_of(reward_of(judge.url, label_tokens="off", **options)(prompt=PROMPTS, image=IMAGES))
    judge.behave(label_tokens=how)
    reward = reward_of(judge.url, **options)
    with caplog.at_level("INFO", "tiltflow"):
        output = reward(prompt=PROMPTS, image=IMAGES)
    assert output.failures == {}
    assert torch.equal(rewards_of(output), expected)
    assert judge.asked()["requests"] == 6  # the first one twice
    assert "logprob_token_ids" not in judge.asked()["body"]
    (line,) = [record for record in caplog.records if record.name.startswith("tiltflow")]
    assert re.search(message, line.getMessage())
    given = reward_of(judge.url, **asking_for(labels(local)))(
        prompt=["p"], image=IMAGES[:1]
    )  # by the user: no other way
    assert isinstance(given.failures[0], JudgeError) and re.search(message, str(given.failures[0]))


def test_many_threads_find_label_tokens_once_and_give_them_up_once(judge: JudgeServer, local: InProcess) -> None:
    judge.behave(label_tokens="refused", delay=0.05, tokenize_delay=0.01)
    reward = reward_of(judge.url, min_mass=0.001, extra_body=biased(local))
    outputs: list[RewardModelOutput] = []
    threads = [threading.Thread(target=lambda: outputs.append(reward(prompt=PROMPTS, image=IMAGES))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(outputs) == 6
    assert all(output.failures == {} and torch.equal(rewards_of(output), rewards_of(outputs[0])) for output in outputs)
    assert len(judge.asked()["tokenized"]) == 13


TOKENIZERS: dict[str, tuple[dict[str, list[int]], dict[str, tuple[int, ...]] | None]] = {
    # one token each, and one of several
    "plain": (
        {"Yes": [1], " Yes": [2], "yes": [3], "No": [4], " No": [5], "no": [6], " NO": [7, 8]},
        {"yes": (1, 2, 3), "no": (4, 5, 6)},
    ),
    "without case": (
        {each: [1] for each in spellings("yes")} | {each: [2] for each in spellings("no")},
        {"yes": (1,), "no": (2,)},
    ),
    "words of two tokens": ({"yes": [1]} | {each: [2, 3] for each in spellings("no")}, None),
    "unknown words": ({"Yes": [1], "No": [2], "YES": [0], "no": [0]}, {"yes": (1,), "no": (2,)}),
    "one token for both": ({"Yes": [1], "YES": [5], "No": [2], "NO": [5]}, {"yes": (1,), "no": (2,)}),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    words, expected = TOKENIZERS[name]
    unknown = [0] if name == "unknown words" else [90, 91, 92]
    requests = serve(
        monkeypatch,
        lambda body: (
            completion({f"token_id:{each}": -2.0 for each in body["logprob_token_ids"]})
            if expected
            else completion({"Yes": -1.0, "No": -1.0})
        ),
        tokenize=lambda body: {"tokens": words.get(body["prompt"], unknown)},
    )
    output = reward_of("http://judge.test:8000/some/v1")(prompt=["p"], image=IMAGES[:1])
    assert output.failures == {}
    assert str(requests[0].url) == "http://judge.test:8000/some/tokenize"
    assert requests[0].headers["authorization"] == "Bearer EMPTY"
    assert json.loads(requests[0].content) == {"model": "tiny", "prompt": "\ue000", "add_special_tokens": False}
    asked = json.loads(requests[-1].content)
    assert asked.get("logprob_token_ids") == (None if expected is None else [*expected["yes"], *expected["no"]])


@pytest.mark.parametrize(
    "told", [{"ids": [1]}, {"tokens": "Yes"}, {"tokens": [1.5]}, {"tokens": [-1]}, [1], "ok", None]
)
def test_what_is_no_list_of_tokens_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch, told: Any) -> None:
    requests = serve(monkeypatch, lambda body: completion({"Yes": -0.1, "No": -2.4}), tokenize=lambda body: told)
    output = reward_of("http://judge.test/v1")(prompt=["p"] * 2, image=IMAGES[:2])
    assert output.failures == {}
    assert [request.url.path for request in requests] == ["/tokenize"] + ["/v1/chat/completions"] * 2


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_reply_without_logprobs_is_a_failure(judge: JudgeServer) -> None:
    judge.behave(logprobs=False)
    output = reward_of(judge.url)(prompt=PROMPTS[:2], image=IMAGES[:2])
    assert rewards_of(output).isnan().all()
    assert {str(error) for error in output.failures.values()} == {
        f"the judge 'tiny' at {judge.url} answered without log-probabilities; use a server and a model that give "
        "top_logprobs"
    }


def test_labels_below_the_least_mass_are_a_failure(judge: JudgeServer, local: InProcess) -> None:
    output = reward_of(judge.url, **asking_for(labels(local)) | {"min_mass": 0.9})(prompt=["p"], image=IMAGES[:1])
    assert "less than 0.9" in str(output.failures[0])


def test_a_server_that_does_not_know_label_tokens_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, lambda body: completion({"Yes": -0.1, "No": -2.0}))
    tokens = asking_for({"yes": [9], "no": [8]})
    output = reward_of("http://judge.test/v1", **tokens)(prompt=["p"], image=IMAGES[:1])
    assert "did not tell the log-probability of token 9 but those of ['Yes', 'No']" in str(output.failures[0])


def test_one_refused_image_fails_alone_and_a_remote_reward_masks_it(judge: JudgeServer, local: InProcess) -> None:
    judge.behave(status=500, darker_than=0.2)
    options = {
        "api_base_url": judge.url,
        "vlm_model": "tiny",
        "max_retries": 0,
        **asking_for(labels(local)),
    }
    table = RewardEngine([entry("yes", "vllm_evaluate", options=options)]).score(batch([0.9, 0.05, 0.5, 0.1]))
    assert table.column("yes").isnan().tolist() == [False, True, False, True]
    (failure,) = table.failures
    assert (failure.samples, failure.kind) == ((1, 3), "JudgeError")
    assert "InternalServerError" in failure.message and "it was told to refuse" in failure.message
    assert [cell is None for cell in table.extra_info["yes"]["mass"]] == [False, True, False, True]


def test_a_server_that_hangs_is_given_up_request_by_request(judge: JudgeServer, local: InProcess) -> None:
    judge.behave(delay=30.0)
    options = {"api_base_url": judge.url, "vlm_model": "tiny", "max_retries": 0, **asking_for(labels(local))}
    engine = RewardEngine([entry("yes", "vllm_evaluate", timeout=0.2, options=options)])
    (failure,) = engine.score(batch([0.2, 0.7])).failures
    assert failure.samples == (0, 1)
    assert failure.kind == "timeout"
    assert failure.message == f"the judge 'tiny' at {judge.url} gave no answer within 0.2 s"


def test_a_server_that_dies_is_a_failure_and_the_next_call_succeeds_when_it_is_back() -> None:
    with dead_port() as port, judge_server(port=port) as server:
        reward = reward_of(server.url, max_retries=1, max_concurrent=2)
        server.behave(reply="Yes", delay=30.0)
        outputs: list[RewardModelOutput] = []
        asking = threading.Thread(target=lambda: outputs.append(reward(prompt=PROMPTS, image=IMAGES)))
        asking.start()
        wait_until(lambda: server.asked()["now"] == 2)
        server.kill()
        asking.join(timeout=60)
        assert len(outputs) == 1
        assert rewards_of(outputs[0]).isnan().all()
        assert sorted(outputs[0].failures) == [0, 1, 2, 3, 4]
        assert "failed: APIConnectionError: Connection error." in str(outputs[0].failures[4])
        back = JudgeServer(None, port)
        try:
            # This server has no model: that it is reached shows in the other failure.
            output = reward(prompt=PROMPTS, image=IMAGES)
            assert all("answered without log-probabilities" in str(error) for error in output.failures.values())
            assert back.asked()["requests"] == 5
        finally:
            back.close()


def test_recovery_with_the_model(judge: JudgeServer, local: InProcess) -> None:
    reward = reward_of(judge.url, **asking_for(labels(local)))
    judge.behave(status=503)
    assert rewards_of(reward(prompt=PROMPTS, image=IMAGES)).isnan().all()
    judge.behave()
    output = reward(prompt=PROMPTS, image=IMAGES)
    assert output.failures == {} and not rewards_of(output).isnan().any()  # no failure was remembered


# --- many callers ----------------------------------------------------------------------------------------------------


def test_many_threads_share_one_bound_and_one_pool(judge: JudgeServer, local: InProcess) -> None:
    reward = reward_of(judge.url, **asking_for(labels(local)), max_concurrent=3, max_cache_size=0)
    expected = rewards_of(reward(prompt=PROMPTS, image=IMAGES))
    judge.behave(delay=0.02)
    outputs: list[torch.Tensor] = []

    def ask(number: int) -> None:
        images = [Image.new("RGB", (32, 24), (red, green, blue + number)) for red, green, blue in COLOURS]
        outputs.append(rewards_of(reward(prompt=PROMPTS, image=images)))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = judge.asked()
    assert told["requests"] == 40
    assert 1 < told["most"] <= 3
    assert len(outputs) == 8
    for output in outputs:
        torch.testing.assert_close(output, expected, atol=0.02, rtol=0)


def test_it_works_in_a_running_event_loop_more_than_once(judge: JudgeServer, local: InProcess) -> None:
    reward = reward_of(judge.url, **asking_for(labels(local)), max_concurrent=2, max_cache_size=0)
    expected = rewards_of(reward(prompt=PROMPTS, image=IMAGES))

    async def ask() -> list[torch.Tensor]:
        here = reward(prompt=PROMPTS, image=IMAGES)  # holds the loop up
        there = await asyncio.gather(*[asyncio.to_thread(reward, prompt=PROMPTS, image=IMAGES) for _ in range(3)])
        return [rewards_of(output) for output in (here, *there)]

    for _ in range(2):  # each with an event loop of its own
        for found in asyncio.run(ask()):
            assert torch.equal(found, expected)


def test_lanes_of_an_asynchronous_reward(judge: JudgeServer, local: InProcess) -> None:
    judge.behave(delay=1.5)  # in which even a machine that pauses sends the others
    options = {"api_base_url": judge.url, "vlm_model": "tiny", **asking_for(labels(local))}
    arguments = entry(
        "yes", "vllm_evaluate", batch_size=2, async_reward=True, num_workers=3, timeout=10, options=options
    )
    prompts = [Prompt(f"prompt {index}") for index in range(6)]
    table = RewardEngine([arguments]).score(batch([index / 8 for index in range(6)], prompts=prompts))
    assert table.failures == ()
    assert judge.asked()["most"] == 6  # three lanes of two images each


def test_equal_images_in_flight_are_asked_once(judge: JudgeServer, local: InProcess) -> None:
    judge.behave(delay=0.1)
    reward = reward_of(judge.url, **asking_for(labels(local)))
    output = reward(prompt=["p"] * 6, image=[IMAGES[0]] * 6)
    assert len(set(rewards_of(output).tolist())) == 1
    assert judge.asked()["requests"] == 1
    reward(prompt=["p"], image=[IMAGES[0].copy()])
    assert judge.asked()["requests"] == 1


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_tokens": "on"}, "label_tokens: Input should be 'auto' or 'off'"),
        ({"question": "Is it {promt}?"}, r"question: .*\{promt\} stands for nothing; legal is \{prompt\}"),
        ({"question": "Is it {prompt!r}?"}, r"\{prompt!r\} stands for nothing"),
        ({"question": "Is it {prompt:>9}?"}, r"\{prompt:>9\} stands for nothing"),
        ({"question": "Is it {}?"}, r"\{\} stands for nothing"),
        ({"question": "Is it {?"}, r"question: .*write \{\{ or \}\} for a brace"),
        ({"question": "Is it }?"}, r"question: .*write \{\{ or \}\} for a brace"),
        ({"question": " "}, "question: .*it is empty; write the question to the judge"),
        ({"api_base_url": "localhost:8000"}, "api_base_url: .*must begin with http:// or https://"),
        ({"yes_token_ids": [5], "no_token_ids": [5]}, "no_token_ids: .*yes and no must be different ids"),
        ({"yes_token_ids": [5], "no_token_ids": [-1]}, "no_token_ids: .*none of them negative"),
        ({"yes_token_ids": [5]}, "no_token_ids: .*give both yes_token_ids and no_token_ids, or neither"),
        ({"no_token_ids": [5]}, "no_token_ids: .*give both yes_token_ids and no_token_ids, or neither"),
        ({"max_concurrent": 0}, "max_concurrent: Input should be greater than or equal to 1; got 0"),
        ({"min_mas": 0.1}, "unknown key 'min_mas'; did you mean 'min_mass'"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=f"reward 'r': .*{message}" if "unknown" not in message else message):
        check_reward(entry("r", "vllm_evaluate", options=options))
