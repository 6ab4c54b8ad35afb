"""DeQAScore as a reward: a local model, a model behind an endpoint, and options that do not fit."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.judge_server import JudgeServer
from tests.rewards.fake_judge import completion, sent_image, serve
from tests.rewards.samples import batch, entry
from tests.scorers.tiny_vlm import save_vlm
from tiltflow.errors import RewardError
from tiltflow.rewards import RewardEngine, build_reward, build_reward_model, check_reward
from tiltflow.rewards.deqa import ONE_WORD
from tiltflow.scorers.checkpoints import MODELS_VARIABLE
from tiltflow.scorers.deqa import ANSWER, LEVELS, QUESTION, DeQAScorer

URL = "http://judge.test/v1"


def by_brightness(body: dict[str, Any]) -> dict[str, Any]:
    """Answer "excellent" for white images, "bad" for black ones, and a mixture in between."""
    level = sent_image(body).resize((1, 1)).convert("L").getpixel((0, 0))
    assert isinstance(level, int)
    share = min(max(level / 255, 1e-6), 1 - 1e-6)
    return completion({"Excellent": math.log(share), " bad": math.log(1 - share)})


def test_a_local_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODELS_VARIABLE, str(tmp_path))
    folder = save_vlm(tmp_path / "my-vlm")
    samples = batch([0.1, 0.4, 0.7, 1.0])
    for model in ("someone/my-vlm", str(folder)):
        table = RewardEngine([entry("deqa", "DeQAScore", batch_size=3, options={"model": model})]).score(samples)
        expected = DeQAScorer.from_folder(folder).score(samples.images, [""] * 4)
        torch.testing.assert_close(table.column("deqa"), expected, atol=1e-5, rtol=0)
        assert expected.unique().numel() == 4
        levels = torch.tensor(table.extra_info["deqa"]["levels"])
        torch.testing.assert_close(levels.sum(1), torch.ones(4))


def test_a_local_model_sees_the_upper_half_of_16_bits(tmp_path: Path) -> None:
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    reward = build_reward("DeQAScore", device="cpu", model=str(save_vlm(tmp_path)))
    images = [Image.fromarray(ramp), Image.fromarray((ramp >> 8).astype(np.uint8))]
    one, other = (torch.as_tensor(reward(prompt=[""], image=[image]).rewards) for image in images)
    assert torch.equal(one, other)


def test_a_model_behind_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = serve(monkeypatch, by_brightness)
    options = {"model": "a-judge", "base_url": URL, "max_concurrent": 2}
    table = RewardEngine([entry("deqa", "DeQAScore", batch_size=3, options=options)]).score(batch([0.0, 1.0, 0.2, 0.6]))
    assert table.column("deqa").tolist() == pytest.approx([1.0, 5.0, 1.8, 3.4], abs=1e-4)
    assert table.extra_info["deqa"]["levels"][2] == pytest.approx([0.2, 0.0, 0.0, 0.0, 0.8])
    bodies = [json.loads(request.content) for request in requests]
    assert {body["messages"][0]["content"][1]["text"] for body in bodies} == {ONE_WORD}
    assert all(word in ONE_WORD for word in LEVELS)


def test_the_endpoint_continues_the_answer_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = serve(monkeypatch, by_brightness)
    reward = build_reward("DeQAScore", device="cpu", model="a-judge", base_url=URL, continue_answer=True)
    output = reward(prompt=[], image=[Image.new("RGB", (8, 8), "white")])
    assert float(output.rewards[0]) == pytest.approx(5.0, abs=1e-4)
    messages = json.loads(requests[0].content)["messages"]
    assert messages[0]["content"][1]["text"] == QUESTION
    assert messages[1]["content"] == ANSWER


def test_the_endpoint_sees_a_square(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = serve(monkeypatch, by_brightness)
    reward = build_reward("DeQAScore", device="cpu", model="a-judge", base_url=URL)
    reward(prompt=[], image=[Image.new("RGB", (8, 4), "white")])
    sent = sent_image(json.loads(requests[0].content))
    assert (sent.size, sent.getpixel((0, 0)), sent.getpixel((0, 4))) == ((8, 8), (122, 116, 104), (255, 255, 255))


def test_an_answer_that_cannot_be_read_is_a_failure_and_never_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(body: dict[str, Any]) -> dict[str, Any]:
        black = sent_image(body).getpixel((0, 0)) == (0, 0, 0)
        return completion({"Sorry": -0.1}) if black else by_brightness(body)

    serve(monkeypatch, answer)
    options = {"model": "a-judge", "base_url": URL}
    table = RewardEngine([entry("deqa", "DeQAScore", options=options)]).score(batch([0.0, 1.0]))
    assert table.column("deqa").isnan().tolist() == [True, False]  # of one batch: a failed image fails alone
    assert table.extra_info["deqa"]["levels"][0] is None
    (failure,) = table.failures
    assert failure.samples == (0,)
    assert failure.kind == "unparsable"
    assert "the judge's first word is none of excellent, good, fair, poor, bad" in failure.message
    with pytest.raises(RewardError, match=r"failed on 1 samples, the first of prompt 'prompt 0'.*first word is none"):
        RewardEngine([entry("deqa", "DeQAScore", on_error="raise", options=options)]).score(batch([0.0, 1.0]))


def test_only_with_an_endpoint_it_is_remote(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    serve(monkeypatch, by_brightness)
    reward = build_reward_model(entry("d", "DeQAScore", timeout=5, options={"model": "a-judge", "base_url": URL}))
    assert reward.remote and reward.times_itself
    assert not build_reward("DeQAScore", device="cpu", model=str(save_vlm(tmp_path))).remote


def test_a_real_server(judge: JudgeServer) -> None:
    options = {"model": "tiny", "base_url": judge.url, "max_retries": 0, "min_mass": 0.0}
    judge.behave(logprobs=False)
    engine = RewardEngine([entry("deqa", "DeQAScore", options=options)])
    (failure,) = engine.score(batch([0.2, 0.8])).failures
    assert failure.samples == (0, 1) and "answered without log-probabilities" in failure.message
    judge.behave()
    (failure,) = engine.score(batch([0.2, 0.8])).failures[:1]
    assert "the judge's first word is none of excellent, good, fair, poor, bad" in failure.message
    assert judge.asked()["body"]["messages"] == [{"role": "user", "content": ONE_WORD}]


def test_a_local_model_in_the_main_thread_has_no_timeout(tmp_path: Path) -> None:
    arguments = entry("d", "DeQAScore", timeout=5, options={"model": str(save_vlm(tmp_path))})
    with pytest.raises(RewardError, match="reward 'd': timeout=5 needs async_reward: true or base_url"):
        build_reward_model(arguments)
    assert not build_reward_model(arguments.model_copy(update={"async_reward": True})).times_itself


def test_pickling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    serve(monkeypatch, by_brightness)
    images = [Image.new("RGB", (8, 8), (60, 60, 60))]
    folder = save_vlm(tmp_path)
    for options in ({"model": "a-judge", "base_url": URL}, {"model": str(folder)}):
        reward = build_reward_model(entry("deqa", "DeQAScore", options=options))
        copy = pickle.loads(pickle.dumps(reward))
        scores = [torch.as_tensor(model(prompt=[], image=images).rewards) for model in (reward, copy)]
        torch.testing.assert_close(*scores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            "reward 'DeQAScore': model=None; name a vision-language model: .*DeQA-Score-Mix3 .*, is never run",
        ),
        ({"model": "zhiyuanyou/DeQA-Score-Mix3"}, "cannot be used here: .*code that comes with weights.* is never run"),
        ({"model": "someone/absent-vlm"}, "the model someone/absent-vlm was not found; download it"),
        ({"model": "m", "max_concurrent": 2}, "max_concurrent is for an endpoint; give base_url, or leave it out"),
        ({"model": "m", "cache_dir": "x"}, "cache_dir is for an endpoint; give base_url, or leave it out"),
        ({"model": "m", "base_url": "localhost"}, "base_url: .*must begin with http:// or https://"),
        ({"model": "m", "base_url": URL, "prompt": "x"}, "prompt is for a local model; leave out prompt or base_url"),
    ],
)
def test_options_that_cannot_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv(MODELS_VARIABLE, str(tmp_path))
    with pytest.raises(RewardError, match=message):
        build_reward("DeQAScore", device="cpu", **options)


def test_a_mistyped_option_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(RewardError, match="reward 'd': unknown key 'base_ulr'; did you mean 'base_url'"):
        check_reward(entry("d", "DeQAScore", options={"model": "m", "base_ulr": URL}))
