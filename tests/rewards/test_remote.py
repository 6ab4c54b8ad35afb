"""Remote rewards: what is sent, what replies mean, and what is told before training begins."""

import json
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.rewards.reward_server import MODELS, Script, fingerprint, serving
from tests.rewards.samples import batch, entry
from tests.rewards.user_made import ContrastRank, Warmth
from tests.sockets import dead_port
from tests.tiny import run_values
from tiltflow.config import dump, run_config
from tiltflow.errors import RewardError
from tiltflow.rewards import (
    RemotePointwiseRewardModel,
    RewardEngine,
    RewardModel,
    build_reward_model,
    check_prompts,
    check_reward,
)
from tiltflow.rewards import remote as remote_module
from tiltflow.rewards import retries as retries_module
from tiltflow.rewards.base import PROVIDED_FIELDS
from tiltflow.rewards.endpoints import RetryBudget
from tiltflow.rewards.retries import RemoteRewardError, RemoteTimeoutError
from tiltflow.serving import wire
from tiltflow.types import Prompt

POINTWISE, GROUPWISE = "RemotePointwiseRewardModel", "RemoteGroupwiseRewardModel"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries_module, "FIRST_BACKOFF", 0.02)
    monkeypatch.setattr(remote_module, "ANSWER_SECONDS", 3.0)
    monkeypatch.setattr(remote_module, "PAUSE", 0.02)


@pytest.fixture(scope="module")
def warm() -> Iterator[tuple[Script, str]]:
    script = Script("warmth")
    with serving(script) as url:
        yield script, url


@pytest.fixture
def script(warm: tuple[Script, str]) -> Script:
    """Return the script of the server at `url`, as good as new."""
    script, _ = warm
    script.faults, script.seen = [], []
    script.always, script.token, script.state = "", "", "READY"
    return script


@pytest.fixture
def url(warm: tuple[Script, str], script: Script) -> str:
    return warm[1]


def build(url: Any, kind: str = POINTWISE, **fields: Any) -> Any:
    """Build a remote reward; what `rewards:` itself does not know are its options."""
    known = {name: fields.pop(name) for name in ("timeout", "batch_size", "on_error") if name in fields}
    return build_reward_model(entry("far", kind, options={"server_url": url, **fields}, **known))


def mocked(answer: Callable[[httpx2.Request], tuple[int, bytes]], **options: Any) -> Any:
    """Build a remote reward whose server is a function."""

    def handle(request: httpx2.Request) -> httpx2.Response:
        status, content = answer(request)
        return httpx2.Response(status, stream=httpx2.ByteStream(content))

    timeout = options.pop("timeout", None)
    far = entry("far", POINTWISE, options={"server_url": "http://a", **options}, timeout=timeout)
    return RemotePointwiseRewardModel(far, transport=httpx2.MockTransport(handle))


def of_fields(url: str, *names: str) -> Any:
    """Build a remote reward that requires what samples made from prompts do not have."""
    return RemotePointwiseRewardModel(entry("far", POINTWISE, options={"server_url": url, "required_fields": names}))


def pictures(count: int = 3) -> list[Image.Image]:
    generator = np.random.default_rng(1)
    return [Image.fromarray(generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)) for _ in range(count)]


def ask(reward: RewardModel, count: int = 3) -> Any:
    return reward(prompt=[f"p{index}" for index in range(count)], image=pictures(count))


# --- scores -----------------------------------------------------------------------------------------------------------


def test_scores_components_and_headers(url: str, script: Script) -> None:
    output = ask(build(url, timeout=30))
    expected = Warmth(entry())(prompt=["a"] * 3, image=pictures()).rewards
    assert torch.equal(torch.as_tensor(output.rewards), torch.as_tensor(expected))
    assert output.extra_info == {"letters": [2, 2, 2]}
    assert output.failures == {}
    (seen,) = script.seen
    assert seen.headers["content-type"] == wire.SAFETENSORS
    assert 20_000 < int(seen.headers["x-request-timeout-ms"]) <= 30_000
    assert "authorization" not in seen.headers
    assert seen.request.models == ["warmth"]
    assert [item.prompt for item in seen.request.items] == ["p0", "p1", "p2"]
    assert len({item.id for item in seen.request.items}) == 3
    assert {item.group_id for item in seen.request.items} == {None}


@pytest.mark.parametrize(("model", "tensors"), [("fingerprint32", True), ("fingerprint8", False)])
def test_pixels_arrive_bit_for_bit_as_rewards_of_one_process_get_them(model: str, tensors: bool) -> None:
    images = torch.rand(3, 3, 9, 11, generator=torch.Generator().manual_seed(2))
    images[0, 0, 0, :3] = torch.tensor([0.5 / 255, 1.5 / 255, 2.5 / 255])  # halves, which rounding treats apart

    class Local(RemotePointwiseRewardModel):
        """Sees what the engine shows a reward of this process."""

        def __init__(self, config: Any):
            RewardModel.__init__(self, config)
            self.use_tensor_inputs = tensors
            self.required_fields = ("image",)

        def __call__(self, prompt=None, image=None, *rest: Any, **more: Any) -> Any:
            arrays = [each.numpy() if isinstance(each, Tensor) else np.asarray(each) for each in image or []]
            return remote_module.RewardModelOutput([fingerprint(array) for array in arrays])

    with serving(Script(model)) as url:
        remote = build(url, required_fields=["image"])
        assert remote.use_tensor_inputs is tensors
        engine = RewardEngine(
            [entry("far"), entry("near", "other")], factory=lambda each: remote if each.name == "far" else Local(each)
        )
        samples = batch([0.0] * 3)
        table = engine.score(type(samples)(samples.prompts, samples.groups, samples.latents, images))
    assert table.failures == ()
    assert torch.equal(table.column("far"), table.column("near"))
    assert table.column("far").unique().numel() == 3


def test_pixels_can_be_chosen(url: str, script: Script) -> None:
    reward = build(url, pixels="float32")
    assert reward.use_tensor_inputs is True
    reward(prompt=["a"], image=[torch.rand(3, 4, 5)])
    assert script.seen[0].tensors["t0"].dtype == np.float32
    assert script.seen[0].tensors["t0"].shape == (3, 4, 5)


def test_a_group_is_sent_whole_and_under_one_name() -> None:
    script = Script("rank")
    with serving(script) as url:
        reward = build(url, GROUPWISE, batch_size=2)
        table = RewardEngine([reward.config], factory=lambda _: reward).score(
            batch([0.1, 0.5, 0.2, 0.9, 0.3], groups=[4, 4, 4, 4, 9])
        )
        expected = ContrastRank(entry())(prompt=["a"] * 4, image=pictures(4)).rewards
        assert torch.as_tensor(ask(reward, 4).rewards).tolist() == torch.as_tensor(expected).tolist()
    assert table.failures == ()
    assert [len(seen.request.items) for seen in script.seen] == [4, 1, 4]
    names = [{item.group_id for item in seen.request.items} for seen in script.seen]
    assert all(len(each) == 1 for each in names) and len(set.union(*names)) == 3


def test_required_fields_alone_decide_what_is_sent() -> None:
    script = Script("length")
    with serving(script) as url:
        fields = ["prompt", "metadata", "video", "condition_images", "condition_videos"]
        reward = of_fields(url, *fields)
        shared = torch.rand(3, 4, 4)
        clips = [[torch.rand(2, 3, 4, 4)], []]
        engine = RewardEngine([reward.config], factory=lambda _: reward)
        with engine.begin() as scoring:
            scoring.add(
                [Prompt("ab", {"tag": "x", "n": [1, None]}), Prompt("abc", {"tag": "é"})],
                [0, 1],
                images=torch.rand(2, 3, 4, 4),
                videos=torch.rand(2, 5, 3, 4, 6),
                condition_images=[[shared, torch.rand(3, 8, 4)], [shared]],
                condition_videos=clips,
            )
            table = scoring.finish()
    assert table.column("far").tolist() == [2.0, 3.0]
    (seen,) = script.seen
    first, second = seen.request.items
    assert first.meta == {"tag": "x", "n": [1, None]} and second.meta == {"tag": "é"}
    assert first.image is None
    assert isinstance(first.video, wire.Media) and seen.tensors[str(first.video.ref)].shape == (5, 4, 6, 3)
    assert [seen.tensors[str(each.ref)].shape for each in first.condition_images or []] == [(4, 4, 3), (8, 4, 3)]
    (clip,) = first.condition_videos or []
    assert isinstance(clip, wire.Media) and seen.tensors[str(clip.ref)].shape == (2, 4, 4, 3)
    assert second.condition_videos == []


def test_text_alone_goes_as_json_and_no_samples_go_nowhere() -> None:
    script = Script("length")
    with serving(script) as url:
        reward = build(url, required_fields=["prompt"])
        assert reward(prompt=["abc", "é"]).rewards.tolist() == [3.0, 1.0]
        assert script.seen[0].headers["content-type"] == wire.JSON
        assert len(reward(prompt=[]).rewards) == 0
    assert len(script.seen) == 1


def test_a_medium_that_several_samples_share_is_sent_once(url: str, script: Script) -> None:
    (same,) = pictures(1)
    reward = build(url)
    reward(prompt=["a"] * 4, image=[same] * 4)
    assert set(script.seen[0].tensors) == {"t0"}


def test_frames_of_several_sizes_go_one_by_one() -> None:
    script = Script("length")
    with serving(script) as url:
        frames = [Image.new("RGB", (4, 4)), Image.new("L", (6, 4), 255)]
        of_fields(url, "prompt", "video")(prompt=["a"], video=[frames])
    (item,) = script.seen[0].request.items
    assert isinstance(item.video, list)
    assert [script.seen[0].tensors[str(frame.ref)].shape for frame in item.video] == [(4, 4, 3), (4, 6, 3)]


# --- what the server takes --------------------------------------------------------------------------------------------


def with_limits(model: str, **limits: int) -> Script:
    return Script(model, info=MODELS[model][1].model_copy(update={"limits": wire.Limits.model_validate(limits)}))


@pytest.mark.parametrize("limits", [{"items": 4}, {"queue_items": 4}, {"body_bytes": 3600}])
def test_a_batch_is_split_as_the_server_demands(limits: dict[str, int]) -> None:
    script = with_limits("warmth", **limits)
    with serving(script) as url:
        output = ask(build(url), 10)
    assert [len(seen.request.items) for seen in script.seen] == [4, 4, 2]
    expected = Warmth(entry())(prompt=["a"] * 10, image=pictures(10)).rewards
    assert torch.equal(torch.as_tensor(output.rewards), torch.as_tensor(expected))
    assert output.extra_info == {"letters": [2] * 10}
    assert len({seen.headers["idempotency-key"] for seen in script.seen}) == 3


def test_a_sample_that_cannot_be_sent_fails_alone() -> None:
    script = with_limits("warmth", body_bytes=4000)
    with serving(script) as url:
        large = Image.new("RGB", (64, 64))
        reward = build(url, required_fields=["image", "metadata"])
        output = reward(image=[*pictures(2), large, *pictures(1)], metadata=[{}, {"x": float("nan")}, {}, {}])
    assert output.rewards.isnan().tolist() == [False, True, True, False]
    assert "metadata cannot be sent as JSON: Out of range float values" in str(output.failures[1])
    assert "a sample has 129" in str(output.failures[2]) and "takes 4000 bytes and 256 items" in str(output.failures[2])


def test_a_group_larger_than_a_request_is_never_split() -> None:
    script = with_limits("rank", items=3)
    with serving(script) as url:
        reward = build(url, GROUPWISE)
        with pytest.raises(RewardError, match=r"a group of 4 samples has \d+ bytes; the server of 'rank' takes"):
            ask(reward, 4)
    assert script.seen == []


def with_pixels(model: str, most: int | None) -> Script:
    return Script(model, info=MODELS[model][1].model_copy(update={"batch_pixels": most}))


def test_a_sample_with_more_pixels_than_one_call_takes_fails_alone() -> None:
    with serving(with_pixels("warmth", 35)) as url:  # what each of the pictures has
        output = build(url)(prompt=["a"] * 3, image=[*pictures(1), Image.new("RGB", (6, 6)), *pictures(1)])
        assert output.rewards.isnan().tolist() == [False, True, False]
        assert str(output.failures[1]) == (
            "a sample has 36 pixels; the server of 'warmth' takes 35 in one call; start it with a larger batch_pixels, "
            "or send less"
        )


def test_every_use_of_a_medium_counts_as_pixels() -> None:
    script = with_pixels("length", 2 * 6 + 3 * 4 * 6)
    with serving(script) as url:
        reward = of_fields(url, "prompt", "video", "condition_images")
        (same,) = pictures(1)
        small = same.crop((0, 0, 2, 3))
        video = torch.rand(3, 3, 4, 6)
        output = reward(prompt=["a", "b"], video=[video, video], condition_images=[[small, small], [small] * 3])
    assert output.rewards.isnan().tolist() == [False, True]
    assert "a sample has 90 pixels; the server of 'length' takes 84 in one call" in str(output.failures[1])


def test_a_group_with_more_pixels_than_one_call_takes_is_refused_whole() -> None:
    script = with_pixels("rank", 3 * 35)
    with serving(script) as url:
        reward = build(url, GROUPWISE)
        assert len(ask(reward, 3).rewards) == 3
        with pytest.raises(
            RewardError,
            match=r"a group of 4 samples has 140 pixels; the server of 'rank' takes 105 in one call; .* smaller groups",
        ):
            ask(reward, 4)
    assert len(script.seen) == 1


def test_the_least_of_what_several_servers_take_counts() -> None:
    with (
        serving(with_pixels("warmth", 50)) as one,
        serving(with_pixels("warmth", 40)) as two,
        serving(with_pixels("warmth", None)) as three,
    ):
        assert build([one, two, three]).info.batch_pixels == 40
        assert build([three]).info.batch_pixels is None


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(1, 4, 4), r"image is a tensor \[1, 4, 4\] of torch.float32; give PIL images or float tensors"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "of torch.uint8; give PIL"),
        ("a.png", "image is a str; give PIL"),
    ],
)
def test_what_is_no_picture_is_told(url: str, image: Any, message: str) -> None:
    output = build(url)(prompt=["a"], image=[image])
    with pytest.raises(RewardError, match=message):
        raise output.failures[0]


def test_fields_of_different_lengths_are_refused(url: str) -> None:
    with pytest.raises(RewardError, match=r"fields of one batch have different lengths: \{'prompt': 2, 'image': 1\}"):
        build(url)(prompt=["a", "b"], image=pictures(1))


# --- replies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        "nan",
        "short",
        "twice",
        "swapped",
        "foreign",
        "unscored",
        "revised",
        "cut",
        "html:500",
        "html:502",
        "code:internal_error",
        "code:deadline_exceeded",
    ],
)
def test_bad_luck_is_tried_again_with_the_same_key(url: str, script: Script, fault: str) -> None:
    reward = build(url)
    script.faults = [fault]
    output = ask(reward)
    assert torch.as_tensor(output.rewards).isfinite().all() and output.failures == {}
    first, second = script.seen
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]
    assert first.request == second.request
    assert int(second.headers["x-request-timeout-ms"]) < int(first.headers["x-request-timeout-ms"])


@pytest.mark.parametrize("attempts", [1, 3])
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("html:500", "answered HTTP 500: <h1>Bad Gateway</h1>"),
        ("nan", "cannot be used: NaN is no JSON number"),
        ("short", "cannot be used: the reply answers items [0, 1]; 3 were sent"),
        ("cut", "hung up: RemoteProtocolError"),
        ("revised", "cannot be used: 'warmth' is now r2; its scores so far are of r1"),
    ],
)
def test_tries_are_limited_and_the_last_cause_is_told(
    url: str, script: Script, fault: str, cause: str, attempts: int
) -> None:
    reward = build(url, retry_attempts=attempts)
    script.always = fault
    with pytest.raises(RemoteRewardError) as raised:
        ask(reward)
    assert len(script.seen) == attempts
    assert cause in str(raised.value)
    assert f"(tried {attempts} times in " in str(raised.value)


REFUSALS = [code for code, (status, _) in wire.CODES.items() if 400 <= status < 500 and status != 429]
FINAL = ["scorer_error", "nonfinite_score", "wrong_count", "not_implemented", "model_failed"]


@pytest.mark.parametrize("code", [*REFUSALS, *FINAL])
def test_what_cannot_succeed_is_tried_once(url: str, script: Script, code: str) -> None:
    reward = build(url)
    script.always = f"code:{code}"
    with pytest.raises(RemoteRewardError, match=rf"{url} answered HTTP {wire.CODES[code][0]} {code}: told"):
        ask(reward)
    assert len(script.seen) == 1


def test_a_body_that_was_too_slow_is_not_sent_again(url: str, script: Script) -> None:
    reward = build([url, url.replace("127.0.0.1", "localhost")])
    script.always = "code:body_timeout"
    remedy = r"send less at a time \(batch_size, pixels: uint8\), or raise the server's limit body_seconds"
    with pytest.raises(RemoteRewardError, match=f"HTTP 408 body_timeout: told; {remedy}"):
        ask(reward)
    assert len(script.seen) == 1
    assert wire.WireError("body_timeout", "late").body()["retryable"] is False


@pytest.mark.parametrize("status", [301, 403, 404, 418, 501])
def test_an_error_of_whatever_stands_in_front_of_a_server_is_tried_once(url: str, script: Script, status: int) -> None:
    reward = build(url)
    script.always = f"html:{status}"
    with pytest.raises(RemoteRewardError, match=f"answered HTTP {status}: <h1>Bad Gateway</h1>"):
        ask(reward)
    assert len(script.seen) == 1


@pytest.mark.parametrize("fault", ["patience:0.5", "patience_ms:500", "patience_date"])
def test_patience_is_honoured_and_is_no_try(url: str, script: Script, fault: str) -> None:
    reward = build(url, retry_attempts=1)
    if fault == "patience_date":
        fault = f"patience:{formatdate(time.time() + 2, usegmt=True)}"
    script.faults = [fault, fault] if "GMT" not in fault else [fault]
    ask(reward)
    gaps = [later.at - earlier.at for earlier, later in zip(script.seen, script.seen[1:], strict=False)]
    assert len(gaps) == len(script.seen) - 1 > 0
    assert all(gap >= 0.5 for gap in gaps)


@pytest.mark.parametrize(
    "fault", ["patience:Mon, 01 Jan 2024 00:00:00 +99999999999999", f"patience_ms:{10**400}", f"patience_ms:-{10**400}"]
)
def test_patience_that_no_clock_can_tell_is_as_none(url: str, script: Script, fault: str) -> None:
    script.faults = [fault]
    assert torch.as_tensor(ask(build(url, retry_attempts=1)).rewards).isfinite().all()
    assert len({seen.headers[wire.KEY_HEADER.lower()] for seen in script.seen}) == len(script.seen) - 1


def test_patience_beyond_the_deadline_ends_the_request_at_once(url: str, script: Script) -> None:
    reward = build(url, timeout=30)
    script.always = "patience:60"
    began = time.monotonic()
    with pytest.raises(
        RemoteTimeoutError, match=r"no answer can be had within 30 s; last: .* HTTP 429 overloaded: told"
    ):
        ask(reward)
    assert time.monotonic() - began < 20
    assert len(script.seen) == 1


def test_a_server_that_is_loading_is_waited_for_until_the_deadline(url: str, script: Script) -> None:
    script.faults = ["code:loading"]
    assert torch.as_tensor(ask(build(url, retry_attempts=1)).rewards).isfinite().all()
    reward = build(url, timeout=1.5, retry_attempts=1)
    script.always = "code:loading"
    began = time.monotonic()
    with pytest.raises(RemoteTimeoutError, match=r"within 1.5 s; last: .* HTTP 503 loading: told"):
        ask(reward)
    assert time.monotonic() - began < 10
    assert len(script.seen) < 12


def test_a_server_that_hangs_ends_at_the_deadline(url: str, script: Script) -> None:
    reward = build(url, timeout=0.5)
    script.always = "hang:30"
    began = time.monotonic()
    with pytest.raises(
        TimeoutError, match=r"no answer can be had within 0\.5 s; last: .* did not answer within 0\.\d+ s: ReadTimeout"
    ):
        ask(reward)
    assert 0.4 < time.monotonic() - began < 20


def test_a_reply_without_end_is_cut_off(url: str, script: Script) -> None:
    reward = build(url)
    script.always = "huge"
    with pytest.raises(RemoteRewardError, match="answered with more than 1245184 bytes"):
        ask(reward)


def test_single_failures_are_passed_on_with_code_and_message(url: str, script: Script) -> None:
    reward = build(url)
    script.faults = ["poison:1"]
    output = ask(reward)
    assert output.rewards.isnan().tolist() == [False, True, False]
    assert {place: str(error) for place, error in output.failures.items()} == {1: "scorer_error: told"}
    assert output.extra_info == {"letters": [2, None, 2]}


# --- samples that failed in passing -----------------------------------------------------------------------------------


def test_a_judge_that_was_out_for_a_moment_costs_no_score(url: str, script: Script) -> None:
    expected = ask(build(url), 4)
    script.seen = []
    script.faults = ["judge:1,3"]
    output = ask(build(url, timeout=20), 4)
    assert output.failures == {}
    assert torch.equal(output.rewards, expected.rewards)
    assert output.extra_info == {"letters": [2] * 4}
    first, again = script.seen
    assert [item.prompt for item in again.request.items] == ["p1", "p3"]
    assert set(again.tensors) == {"t0", "t1"}
    assert again.headers["idempotency-key"] != first.headers["idempotency-key"]
    left = [int(seen.headers["x-request-timeout-ms"]) for seen in script.seen]
    assert left[1] < left[0] - 900  # the same deadline
    assert again.at - first.at >= 0.9


def test_samples_are_sent_once_more_and_then_no_more(url: str, script: Script) -> None:
    script.faults = ["judge:0,1,2", "judge:0,2"]
    output = ask(build(url))
    assert output.rewards.isnan().tolist() == [True, False, True]
    assert {place: str(error) for place, error in output.failures.items()} == dict.fromkeys(
        (0, 2), "upstream_judge: told"
    )
    assert output.extra_info == {"letters": [None, 2, None]}
    assert len(script.seen) == 2


@pytest.mark.parametrize("options", [{"retry_attempts": 1}, {"timeout": 20}])
def test_samples_are_not_sent_again_without_tries_or_time_for_it(
    url: str, script: Script, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries_module, "ITEM_PAUSE", 30.0)
    script.faults = ["judge:0"]
    began = time.monotonic()
    output = ask(build(url, **options))
    assert output.rewards.isnan().tolist() == [True, False, False]
    assert len(script.seen) == 1 and time.monotonic() - began < 15


@pytest.mark.parametrize("fault", ["code:invalid_request", "judge:0"])
def test_the_first_reply_stands_where_the_second_is_no_better(url: str, script: Script, fault: str) -> None:
    script.faults = ["judge:2", fault]
    output = ask(build(url))
    assert output.rewards.isnan().tolist() == [False, False, True]
    assert str(output.failures[2]) == "upstream_judge: told"
    assert len(script.seen) == 2


@pytest.mark.parametrize(("faults", "lost"), [(["judge:1"], []), (["judge:1", "judge:0,1,2"], [1])])
def test_a_group_is_sent_again_as_a_whole(faults: list[str], lost: list[int]) -> None:
    script = Script("rank", faults=faults)
    with serving(script) as url:
        output = ask(build(url, GROUPWISE), 4)
    assert [len(seen.request.items) for seen in script.seen] == [4, 4]
    assert len({item.group_id for seen in script.seen for item in seen.request.items}) == 2
    assert output.rewards.isnan().nonzero().flatten().tolist() == lost == sorted(output.failures)


def test_single_failures_count_where_all_failed_and_the_reply_is_an_error(url: str, script: Script) -> None:
    reward = build(url)
    script.faults = ["poison:0"]
    output = ask(reward, 1)
    assert {place: str(error) for place, error in output.failures.items()} == {0: "scorer_error: told"}
    assert len(script.seen) == 1


def test_partial_forbid_makes_one_failure_that_of_its_request(url: str, script: Script) -> None:
    reward = build(url, partial="forbid")
    script.faults = ["poison:0"]
    with pytest.raises(RemoteRewardError, match="HTTP 500 scorer_error: told"):
        ask(reward, 1)
    assert script.seen[0].request.partial == "forbid"


# --- calls of several requests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["code:invalid_item", "html:500"])
def test_a_request_that_fails_costs_the_others_of_its_call_no_score(fault: str) -> None:
    script = with_limits("warmth", items=4)
    with serving(script) as url:
        reward = build(url, retry_attempts=1)
        script.faults = ["poison:1", fault]
        output = ask(reward, 10)
        assert [len(seen.request.items) for seen in script.seen] == [4, 4, 2]
        assert output.rewards.isnan().tolist() == [place in (1, 4, 5, 6, 7) for place in range(10)]
        expected = torch.as_tensor(Warmth(entry())(prompt=["a"] * 10, image=pictures(10)).rewards)
        there = ~output.rewards.isnan()
        assert torch.equal(output.rewards[there], expected[there])
        assert sorted(output.failures) == [1, 4, 5, 6, 7]
        assert str(output.failures[1]) == "scorer_error: told"
        reasons = {str(output.failures[place]) for place in (4, 5, 6, 7)}
        assert len(reasons) == 1 and reasons.pop().startswith(f"{url} answered HTTP ")
        assert output.extra_info["letters"][3:5] == [2, None]
        script.faults = [fault]
        with pytest.raises(RemoteRewardError, match="answered HTTP"):  # a call of one request
            ask(reward, 4)


@pytest.mark.parametrize("attempts", [1, 3])
@pytest.mark.parametrize("fault", ["hang:30", "patience:60"])
def test_when_no_server_can_be_had_in_time_the_others_do_not_wait_for_it_again(fault: str, attempts: int) -> None:
    script = with_limits("warmth", items=2)
    with serving(script) as url:
        reward = build(url, timeout=0.8, retry_attempts=attempts)
        script.faults, script.always = [""], fault
        began = time.monotonic()
        output = ask(reward, 12)
        assert time.monotonic() - began < 3.5  # each of the five on its own: 4 s
    assert len(script.seen) == 2
    assert output.rewards.isnan().tolist() == [False] * 2 + [True] * 10
    assert {type(error) for error in output.failures.values()} <= {RemoteRewardError, RemoteTimeoutError}
    assert all(url in str(error) for error in output.failures.values())


def test_the_engine_sees_requests_that_failed_as_failures_of_their_samples() -> None:
    script = with_limits("warmth", items=2)
    with serving(script) as url:
        reward = build(url, batch_size=6)
        engine = RewardEngine([reward.config], factory=lambda _: reward)
        script.faults = ["", "code:invalid_item"]
        table = engine.score(batch([0.1] * 8))
        assert [(failure.samples, failure.kind) for failure in table.failures] == [((2, 3), "RemoteRewardError")]
        assert table.column("far").isnan().tolist() == [False, False, True, True, False, False, False, False]
        script.faults = ["", "code:invalid_item"]
        strict = build(url, batch_size=6, on_error="raise")
        with pytest.raises(RewardError, match=r"reward 'far' failed on 2 samples, .* HTTP 422 invalid_item: told"):
            RewardEngine([strict.config], factory=lambda _: strict).score(batch([0.1] * 6))


def test_a_failed_request_fails_its_group() -> None:
    script = Script("rank")
    with serving(script) as url:
        reward = build(url, GROUPWISE)
        script.faults = ["code:scorer_error"]
        table = RewardEngine([reward.config], factory=lambda _: reward).score(
            batch([0.1, 0.5, 0.2, 0.9], groups=[1, 1, 2, 2])
        )
    assert [failure.samples for failure in table.failures] == [(0, 1)]
    assert table.column("far").isnan().tolist() == [True, True, False, False]


def test_the_engine_masks_failures_of_remote_rewards(url: str, script: Script) -> None:
    reward = build(url, batch_size=2)
    engine = RewardEngine([reward.config], factory=lambda _: reward)
    script.faults = ["poison:1", "code:invalid_item"]
    table = engine.score(batch([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))
    assert table.column("far").isnan().tolist() == [False, True, True, True, False, False]
    assert [(failure.samples, failure.kind) for failure in table.failures] == [
        ((1,), "RemoteRewardError"),
        ((2, 3), "RemoteRewardError"),
    ]
    assert table.failures[0].message == "scorer_error: told"
    script.faults = ["hang:30"]
    quick = build(url, timeout=0.2)
    table = RewardEngine([quick.config], factory=lambda _: quick).score(batch([0.1]))
    assert table.failures[0].kind == "timeout"


# --- when it is built -------------------------------------------------------------------------------------------------


@pytest.fixture
def dead_url() -> Iterator[str]:
    """Return an address where nothing answers."""
    with dead_port() as port:
        yield f"http://127.0.0.1:{port}"


def test_without_a_server_training_does_not_begin(dead_url: str) -> None:
    url = dead_url
    began = time.monotonic()
    with pytest.raises(RewardError) as raised:
        build(url)
    assert time.monotonic() - began < 10
    assert str(raised.value).startswith(
        f"reward 'far': no reward server answers: {url} cannot be reached: ConnectError: "
    )
    assert str(raised.value).endswith("; start it, or correct server_url")


def test_a_server_that_comes_a_moment_later_is_waited_for(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "ANSWER_SECONDS", 5)
    script.state = "LOADING"
    with serving(script) as url:
        timer = threading.Timer(0.3, lambda: setattr(script, "state", "READY"))
        began = time.monotonic()
        timer.start()
        build(url)
        assert time.monotonic() - began > 0.25
        timer.join()


def test_a_model_that_is_never_loaded_or_failed(url: str, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "LOADING_SECONDS", 0.1)
    script.state = "LOADING"
    with pytest.raises(RewardError, match=f"no server is ready after .*: 'warmth' at {url} is LOADING"):
        build(url)
    script.state = "FAILED"
    with pytest.raises(RewardError, match=f"reward 'far': {url} could not load 'warmth'; what its server printed"):
        build(url)


def test_one_of_several_servers_may_be_down(url: str, dead_url: str, caplog: pytest.LogCaptureFixture) -> None:
    reward = build([dead_url, url])
    assert torch.as_tensor(ask(reward).rewards).isfinite().all()
    assert f"reward 'far' goes on without one of its servers: {dead_url} cannot be reached" in caplog.messages[0]


def test_servers_that_disagree_are_refused(url: str, script: Script) -> None:
    other = Script("warmth", info=MODELS["warmth"][1].model_copy(update={"revision": "r2"}))
    with (
        serving(other) as second,
        pytest.raises(
            RewardError, match=f"disagree about 'warmth': revision is 'r1' at {url} and 'r2' at {second}; their scores"
        ),
    ):
        build([url, second])


def test_the_model_must_be_there(url: str) -> None:
    with pytest.raises(RewardError, match=f"model='cold': {url} does not serve it; it serves: warmth"):
        build(url, model="cold")
    assert build(url, model="warmth@r1")._form.asked == "warmth@r1"


def test_a_model_must_be_named_where_there_are_several() -> None:
    both = [MODELS[name][1].model_dump(mode="json") for name in ("warmth", "rank")]
    text = json.dumps({"data": both}).encode()
    with pytest.raises(RewardError, match="http://a serves rank, warmth; name one with model"):
        mocked(lambda request: (200, text))


@pytest.mark.parametrize("content", [b"<html>", b"[]", b'{"data": [{"name": 1}]}', b"[" * 100_000])
def test_what_is_no_reward_server_is_told(content: bytes) -> None:
    with pytest.raises(RewardError, match="reward 'far': http://a is no reward server: "):
        mocked(lambda request: (200, content))


def test_the_kind_must_be_the_model_s(url: str) -> None:
    with pytest.raises(RewardError, match=r"'warmth' at .* scores each sample on its own; use reward_model: RemoteP"):
        build(url, GROUPWISE)
    with (
        serving(Script("rank")) as other,
        pytest.raises(
            RewardError,
            match=r"'rank' at .* compares the samples of a group; use reward_model: RemoteGroupwiseRewardModel",
        ),
    ):
        build(other)


def test_a_field_that_the_model_needs_must_be_sent() -> None:
    info = MODELS["warmth"][1].model_copy(update={"required_fields": ("image", "metadata")})
    with serving(Script("warmth", info=info)) as url:
        with pytest.raises(
            RewardError, match=r"requires 'metadata'; write required_fields: \[prompt, image, metadata\]"
        ):
            build(url)
        assert build(url, required_fields=["image", "metadata"]).required_fields == ("image", "metadata")


# --- options ----------------------------------------------------------------------------------------------------------

FAR = {"server_url": "http://localhost:8000"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "server_url: Field required"),
        (FAR | {"server_urls": "x"}, r"unknown key 'server_urls'; did you mean 'server_url'\?"),
        (FAR | {"retry_attempt": 2}, r"unknown key 'retry_attempt'; did you mean 'retry_attempts'\?"),
        (FAR | {"time_out": 2}, r"unknown key 'time_out'; did you mean 'timeout'\?"),
        (FAR | {"retry_attempts": 0}, "retry_attempts: Input should be greater than or equal to 1; got 0"),
        ({"server_url": []}, "server_url: .*at least 1"),
        ({"server_url": "localhost:8000"}, "server_url: .*give addresses such as http://localhost:8000"),
        ({"server_url": ["http://a", "ftp://b"]}, "server_url: .*give addresses such as http://localhost:8000"),
        ({"server_url": "http://me:secret@host"}, "server_url: .*a token has keys of its own"),
        (FAR | {"pixels": "float16"}, "pixels: Input should be 'auto', 'uint8' or 'float32'; got 'float16'"),
        (FAR | {"required_fields": ["image", "depth"]}, "required_fields names 'depth'; legal fields: prompt, image"),
        (FAR | {"required_fields": []}, "required_fields: .*name what the server needs, of: prompt, image"),
        (FAR | {"required_fields": ["video"]}, "requires 'video', which these samples do not have"),
        (FAR | {"token": "t", "token_env": "T"}, "token_env: .*give token or token_env, not both"),
    ],
)
def test_wrong_options_are_told_before_anything_is_asked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=f"^reward 'far'.*{message}"):
        check_reward(entry("far", POINTWISE, options=options), provided=PROVIDED_FIELDS)


def test_the_documented_keys_load_in_a_config() -> None:
    written = {
        "name": "far",
        "reward_model": "tiltflow.rewards.RemotePointwiseRewardModel",
        "server_url": ["http://localhost:8000/", "http://localhost:8001"],
        "batch_size": 16,
        "async_reward": True,
        "num_workers": 4,
        "timeout": 60.0,
        "retry_attempts": 3,
    }
    values = {**run_values(Path("model"), Path("out")), "rewards": [written]}
    (reward,) = run_config(values, source="my.yaml").rewards
    options = remote_module.RemoteOptions.model_validate(dict(reward.options))
    assert options.server_url == ("http://localhost:8000", "http://localhost:8001")
    assert (options.retry_attempts, reward.timeout, reward.num_workers) == (3, 60.0, 4)


def test_metadata_that_prompts_lack_is_told_before_a_server_is_asked() -> None:
    far = entry("far", POINTWISE, options=FAR | {"required_fields": ["image", "metadata"]})
    with pytest.raises(RewardError, match="reward 'far' requires 'metadata', but 1 of 1 prompts"):
        check_prompts([far], [Prompt("a cat")], source="a.txt")
    check_prompts([entry("far", POINTWISE, options=FAR)], [Prompt("a cat")], source="a.txt")


@pytest.mark.parametrize("package", ["httpx2", "stamina"])
def test_a_missing_package_names_the_extra(url: str, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        RewardError, match=rf"reward 'far' needs the package {package}: pip install 'tiltflow\[remote\]'"
    ):
        build(url)


# --- tokens -----------------------------------------------------------------------------------------------------------

SECRET = "s3cret-of-the-server"


def test_a_token_opens_the_server_and_is_shown_nowhere(
    url: str, script: Script, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script.token = SECRET
    with pytest.raises(
        RewardError, match=r"reward 'far': .* HTTP 401 unauthorized: told; give the server's token with"
    ):
        build(url)
    monkeypatch.setenv("FAR_TOKEN", f"{SECRET}\n")
    with caplog.at_level("DEBUG"):
        reward = build(url, token_env="FAR_TOKEN")
        assert torch.as_tensor(ask(reward).rewards).isfinite().all()
        script.faults = ["code:loading", "html:500"]
        ask(reward)
    assert script.seen[0].headers["authorization"] == f"Bearer {SECRET}"
    assert SECRET not in caplog.text + repr(vars(reward)) + repr(reward.options) + repr(reward._client.settings)
    assert SECRET.encode() not in pickle.dumps(reward)
    values = {**run_values(Path("model"), Path("out")), "rewards": [reward.config.model_dump()]}
    assert SECRET not in dump(run_config(values, source="my.yaml"))


def test_a_server_that_repeats_the_token_is_not_quoted() -> None:
    with pytest.raises(RewardError) as raised:
        mocked(lambda request: (400, f"what is {request.headers['authorization']}?\x1b[31m".encode()), token=SECRET)
    assert "HTTP 400: what is Bearer ***? [31m" in str(raised.value)
    assert SECRET not in repr(remote_module.RemoteOptions.model_validate(FAR | {"token": SECRET}))


@pytest.mark.parametrize("value", [None, "", "two words", "é"])
def test_what_can_be_no_token_is_told_without_showing_it(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is not None:
        monkeypatch.setenv("FAR_TOKEN", value)
    with pytest.raises(
        RewardError, match=r"^reward 'far': token_env='FAR_TOKEN': (this env|a token is ASCII)"
    ) as raised:
        build("http://localhost:1", token_env="FAR_TOKEN")
    assert not value or value not in str(raised.value)


def test_a_token_of_digits_is_text(url: str, script: Script) -> None:
    script.token = "12345"
    assert torch.as_tensor(ask(build(url, token=12345)).rewards).isfinite().all()


# --- connections ------------------------------------------------------------------------------------------------------


def test_a_copy_through_bytes_asks_the_same_server_without_asking_who_it_is(url: str, script: Script) -> None:
    reward = build(url)
    expected = ask(reward)
    script.state = "FAILED"  # a new reward would not be built
    copy = pickle.loads(pickle.dumps(reward))
    assert torch.equal(ask(copy).rewards, expected.rewards)
    assert copy.required_fields == reward.required_fields and copy.info == reward.info


def test_connections_are_kept_and_closing_is_not_final(url: str, script: Script) -> None:
    reward = build(url)
    for _ in range(4):
        ask(reward)
    assert len({seen.peer for seen in script.seen}) == 1
    reward.close()
    ask(reward)
    assert len({seen.peer for seen in script.seen}) == 2


def test_retries_are_a_tenth_of_the_requests_however_often_single_ones_fail() -> None:
    """The first try of every fourth request fails: too few in a row for a breaker, so that the budget alone counts."""
    tries: dict[str, int] = {}

    def answer(request: httpx2.Request) -> tuple[int, bytes]:
        if request.url.path == wire.MODELS_PATH:
            return 200, json.dumps({"data": [MODELS["length"][1].model_dump(mode="json")]}).encode()
        key = request.headers[wire.KEY_HEADER]
        tries[key] = tries.get(key, 0) + 1
        if tries[key] == 1 and len(tries) % 4 == 0:
            return 500, b"no"
        item = wire.read_request(request.content).items[0]
        told = {"index": 0, "id": item.id, "status": "ok", "scores": {"length": 1.0}}
        return 200, json.dumps({"results": [told]}).encode()

    reward = mocked(answer, required_fields=["prompt"], timeout=5.0)
    reward._client._budget = RetryBudget(window=3600)  # however slow the machine
    failed = 0
    for _ in range(200):
        try:
            assert reward(prompt=["a"]).rewards.tolist() == [1.0]
        except RemoteTimeoutError as error:
            assert "no answer can be had within 5 s; last: http://a answered HTTP 500: no" in str(error)
            failed += 1
    retries = sum(tries.values()) - len(tries)
    assert 10 <= retries <= 20
    assert failed == 50 - retries


@pytest.mark.parametrize("code", ["worker_lost", "model_failed"])
def test_what_may_have_killed_its_worker_is_tried_only_so_often(url: str, script: Script, code: str) -> None:
    script.always = f"code:{code}"
    with pytest.raises(RemoteRewardError, match=code):
        ask(build([url, url.replace("127.0.0.1", "localhost")], retry_attempts=2, timeout=20))
    assert 1 <= len(script.seen) <= 3
