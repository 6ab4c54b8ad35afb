"""The rubric judges: against a server that says what it is told to, as rewards and with options."""

import json
from typing import Any

import pytest
import torch
from PIL import Image

from tests.judge_server import BRIGHTNESS, JudgeServer
from tests.rewards.fake_judge import said, sent_images, serve
from tests.rewards.samples import batch, entry
from tests.tiny import run_values
from tiltflow.config import run_config
from tiltflow.errors import JudgeError, RewardError
from tiltflow.rewards import (
    RewardEngine,
    RewardModel,
    RewardModelOutput,
    build_reward,
    build_reward_model,
    check_prompts,
    check_reward,
)
from tiltflow.rewards.rational_rewards import RationalRewardEdit, RationalRewardT2I
from tiltflow.types import Prompt

GREY, WHITE, RED = (Image.new("RGB", (6, 6), colour) for colour in ((51, 51, 51), "white", "red"))
URL = "http://judge.test/v1"


def answer(text: Any = 3, physical: Any = 2.5, rendering: Any = "N/A", image: Any = None) -> str:
    sections = [("Text Faithfulness", text)] + ([("Image Faithfulness", image)] if image is not None else [])
    sections += [("Physical and Visual Quality", physical), ("Text Rendering", rendering)]
    lines = ["# Detailed Judgement"]
    for number, (title, score) in enumerate(sections, 1):
        lines += [f"{number}. {title}:", "## Justification: ...", f"## Score: {score}"]
    return "\n".join([*lines, "# Summary: Score: 1"])


def t2i(url: str = URL, **options: Any) -> RewardModel:
    return build_reward("rational_rewards_t2i", device="cpu", **{"api_base_url": url, "max_retries": 0, **options})


def edit(url: str = URL, **options: Any) -> RewardModel:
    return build_reward("rational_rewards_edit", device="cpu", **{"api_base_url": url, "max_retries": 0, **options})


def values(output: RewardModelOutput) -> list[float]:
    return torch.as_tensor(output.rewards).tolist()


# --- end to end ------------------------------------------------------------------------------------------------------


def test_images_from_text_end_to_end(judge: JudgeServer) -> None:
    judge.behave(reply=answer(text=BRIGHTNESS))
    options = {"api_base_url": judge.url}
    table = RewardEngine([entry("rubric", "rational_rewards_t2i", options=options)]).score(batch([0.2, 1.0]))
    assert table.failures == ()
    assert table.column("rubric").tolist() == pytest.approx([(1.6 + 2.5 - 2) / 6, (4 + 2.5 - 2) / 6], abs=1e-3)
    info = table.extra_info["rubric"]
    assert info["text_faithfulness"] == pytest.approx([1.6, 4.0], abs=1e-3)
    assert (info["physical_quality"], info["text_rendering"]) == ([2.5, 2.5], [None, None])
    body = judge.asked()["body"]
    assert (body["model"], body["temperature"], body["max_completion_tokens"]) == ("RationalRewards-8B-T2I", 0.1, 2048)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert "\nprompt 1\n" in body["messages"][1]["content"] or "\nprompt 0\n" in body["messages"][1]["content"]


def test_edited_images_end_to_end(judge: JudgeServer) -> None:
    judge.behave(reply=answer(text=4, image=1, physical=BRIGHTNESS, rendering=2))
    engine = RewardEngine([entry("edit", "rational_rewards_edit", options={"api_base_url": judge.url})])
    red, blue, grey = (
        torch.tensor(colour)[:, None, None].expand(3, 4, 4) for colour in ([1.0, 0, 0], [0, 0, 1.0], [0.2] * 3)
    )
    with engine.begin() as scoring:
        scoring.add([Prompt("make it grey")], [0], images=[grey], condition_images=[[red, blue]])
        table = scoring.finish()
    assert table.failures == ()
    assert table.scores[0, 0].item() == pytest.approx(((4 + 1 + 1.6 + 2) / 4 - 1) / 3, abs=1e-3)
    told = judge.asked()
    source, edited = told["images"]  # the first condition image, then what was made of it
    assert (source, edited) == ([1, 0, 0], pytest.approx([0.2] * 3))
    assert told["body"]["model"] == "RationalRewards-8B-Edit"


def test_one_bad_answer_is_one_failure(judge: JudgeServer) -> None:
    judge.behave(reply=answer(), status=400, darker_than=0.3)
    table = RewardEngine([entry("rubric", "rational_rewards_t2i", options={"api_base_url": judge.url})]).score(
        batch([0.1, 0.9, 0.5])
    )
    assert table.column("rubric").isnan().tolist() == [True, False, False]
    (failure,) = table.failures
    assert failure.samples == (0,) and "BadRequestError" in failure.message
    assert judge.asked()["requests"] == 3  # what is refused for good is not asked again


def test_a_passing_failure_is_tried_again_after_the_pause_that_the_server_asks_for(judge: JudgeServer) -> None:
    judge.behave(reply=answer(), status=429, times=2, headers={"retry-after": "0.05"})
    output = t2i(judge.url, max_retries=2)(prompt=["p"], image=[WHITE])
    assert output.failures == {}
    assert judge.asked()["requests"] == 3


# --- what is no rating -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (said("A fine picture."), "unparsable: it does not mention 'Text Faithfulness'"),
        (said(answer().replace("Text Rendering", "Letters")), "unparsable: it does not mention 'Text Rendering'"),
        (said(answer(text=5)), "unparsable: the score of 'Text Faithfulness' is '5'; legal are 1 to 4, and N/A"),
        (said(answer(physical=0)), "unparsable: the score of 'Physical and Visual Quality' is '0'; legal are 1 to 4"),
        (said(""), r"gave an empty answer \(finish_reason='stop'\)"),
        (said(" \n"), "gave an empty answer"),
        (
            said(answer("N/A", "N/A", "N/A")),
            "rates none of text_faithfulness, physical_quality, text_rendering: it says",
        ),
        (said(answer("good")), "unparsable: the score of 'Text Faithfulness' cannot be read: 'good'"),
        (said(answer()[:60], finish_reason="length"), "was cut off; raise max_tokens=2048"),
        ({**said(""), "choices": []}, "gave an empty answer"),
        ({**said(""), "choices": [{"index": 0}]}, "answered with a malformed chat completion"),
    ],
)
def test_what_is_no_rating_is_a_failure_and_never_a_score(
    monkeypatch: pytest.MonkeyPatch, reply: Any, message: str
) -> None:
    def reply_to(body: dict[str, Any]) -> Any:
        return said(answer()) if sent_images(body)[0].getpixel((0, 0)) == (255, 255, 255) else reply

    serve(monkeypatch, reply_to)
    output = t2i()(prompt=["a", "b", "c"], image=[WHITE, GREY, WHITE])
    assert values(output)[::2] == pytest.approx([1.75 / 3] * 2)
    assert torch.as_tensor(output.rewards).isnan().tolist() == [False, True, False]
    with pytest.raises(JudgeError, match=message):
        raise output.failures[1]
    assert output.extra_info["physical_quality"] == [2.5, None, 2.5]


def test_an_unparsable_answer_is_recorded_as_such(judge: JudgeServer) -> None:
    judge.behave(reply=answer(text=BRIGHTNESS, physical="7 of 4"))
    table = RewardEngine([entry("rubric", "rational_rewards_t2i", options={"api_base_url": judge.url})]).score(
        batch([0.2, 0.7])
    )
    assert table.column("rubric").isnan().all()
    (failure,) = table.failures
    assert (failure.samples, failure.kind) == ((0, 1), "unparsable")
    assert "the score of 'Physical and Visual Quality' is '7 of 4'; legal are 1 to 4" in failure.message
    assert table.extra_info["rubric"]["text_faithfulness"] == [None, None]


def test_only_the_aspects_that_count_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, lambda body: said("Physical Quality:\nScore: 4"))
    output = t2i(aspects=["physical_quality"])(prompt=["p"], image=[WHITE])
    assert (values(output), output.failures) == ([1.0], {})


def test_an_edit_without_its_source_is_a_failure_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, lambda body: said(answer(image=4)))
    output = edit()(prompt=["a", "b"], image=[GREY, WHITE], condition_images=[[], [RED]])
    assert list(output.failures) == [0]
    assert "this sample has no condition image" in str(output.failures[0])
    assert values(output)[1] == pytest.approx((9.5 / 3 - 1) / 3)


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aspects", "expected"),
    [(None, 1.75 / 3), (["physical_quality"], 0.5), (["text_rendering", "text_faithfulness"], 2 / 3)],
)
def test_aspects_that_count(monkeypatch: pytest.MonkeyPatch, aspects: list[str] | None, expected: float) -> None:
    requests = serve(monkeypatch, lambda body: said(answer()))
    output = t2i(aspects=aspects)(prompt=["p"], image=[WHITE])
    assert values(output) == pytest.approx([expected])
    assert list(output.extra_info) == (aspects or list(RationalRewardT2I.supported_aspects))
    question = json.loads(requests[0].content)["messages"][1]["content"][1]["text"]
    assert question == RationalRewardT2I.default_rubric.replace("{prompt}", "p")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "t2i",
            {"aspects": ["text_fidelity"]},
            "aspects.0: Input should be 'text_faithfulness', 'physical_quality' or",
        ),
        ("t2i", {"aspects": ["image_faithfulness"]}, "aspects.0: Input should be 'text_faithfulness', 'physical_"),
        ("t2i", {"aspects": []}, "aspects: Tuple should have at least 1 item"),
        ("edit", {"aspects": "all"}, "aspects: Input should be a valid tuple"),
        ("t2i", {"rubric": "Rate it."}, r"rubric: .*it has no \{prompt\}: the judge would not know what was asked for"),
        ("t2i", {"rubric": "Rate {it}: {prompt}"}, r"rubric: .*\{it\} stands for nothing"),
        ("t2i", {"temprature": 1}, "unknown key 'temprature'; did you mean 'temperature'"),
    ],
)
def test_options_that_cannot_work(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        check_reward(entry("r", f"rational_rewards_{name}", options=options))


def test_the_judge_s_text_and_another_rubric(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = serve(monkeypatch, lambda body: said(answer()))
    output = t2i(keep_reply=True, rubric="{{Rate}} this: {prompt}")(prompt=["{a} cat"], image=[WHITE])
    assert output.extra_info["reply"] == [answer()]
    assert json.loads(requests[0].content)["messages"][1]["content"][1]["text"] == "{Rate} this: {a} cat"


def test_defaults() -> None:
    for reward, model in ((t2i(), "RationalRewards-8B-T2I"), (edit(), "RationalRewards-8B-Edit")):
        own = build_reward_model(reward.config.model_copy(update={"options": {}})).options
        assert (own.api_base_url, own.api_key.get_secret_value(), own.vlm_model) == (
            "http://localhost:8000/v1",
            "EMPTY",
            model,
        )
        assert (own.max_concurrent, own.max_retries, own.temperature, own.max_tokens) == (8, 5, 0.1, 2048)
        assert reward.remote
    assert set(RationalRewardEdit.supported_aspects) - set(RationalRewardT2I.supported_aspects) == {
        "image_faithfulness"
    }


class Strictest(RationalRewardT2I):
    """Counts the worst aspect."""

    def aggregate_aspect_scores(self, scores):
        return min(score for score in scores.values() if score is not None)


def test_a_subclass_aggregates_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, lambda body: said(answer()))
    path = "tests.rewards.test_rational_rewards.Strictest"
    reward = build_reward(path, device="cpu", api_base_url=URL)
    assert values(reward(prompt=["p"], image=[WHITE])) == [2.5]


# --- fields that samples do not have ----------------------------------------------------------------------------------

NEEDS_CONDITIONS = "reward 'e' requires 'condition_images', which these samples do not have"


def test_an_edit_reward_can_be_built_but_not_trained_with() -> None:
    arguments = entry("e", "rational_rewards_edit")
    assert check_reward(arguments) is RationalRewardEdit
    RewardEngine([arguments])
    with pytest.raises(RewardError, match=NEEDS_CONDITIONS):
        check_prompts([arguments], [Prompt("p")], source="prompts")


@pytest.mark.parametrize("key", ["rewards", "eval_rewards"])
def test_a_config_with_an_edit_reward_is_refused(tmp_path: Any, key: str) -> None:
    config = {**run_values(tmp_path, tmp_path), key: [{"name": "e", "reward_model": "rational_rewards_edit"}]}
    with pytest.raises(RewardError, match=NEEDS_CONDITIONS):
        run_config(config, source="my.yaml")


def test_samples_without_conditions_are_refused_by_the_engine() -> None:
    engine = RewardEngine([entry("e", "rational_rewards_edit")])
    with engine.begin() as scoring, pytest.raises(RewardError, match="reward 'e' requires 'condition_images', which"):
        scoring.add([Prompt("p")], [0], images=[torch.zeros(3, 4, 4)])
