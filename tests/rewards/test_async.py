"""Asynchronous rewards: when they begin, that they overlap, and that what fails or hangs becomes a record."""

import gc
import threading
import time
import weakref
from typing import Any

import pytest
import torch

from tests.rewards.samples import batch, engine_of, entry
from tiltflow.errors import RewardError
from tiltflow.rewards import GroupwiseRewardModel, PointwiseRewardModel, RewardEngine, RewardModelOutput, media
from tiltflow.types import Prompt

SECONDS = 1.5  # in which a call that is not held up answers, even if the machine pauses for a second


class Watched(PointwiseRewardModel):
    """Returns the red level after a pause, and remembers when and where each call ran."""

    use_tensor_inputs = True
    pause = 0.0

    def __init__(self, config: Any, accelerator: Any = None):
        super().__init__(config, accelerator)
        self.calls: list[tuple[str, int]] = []
        self.running = self.most = 0
        self._lock = threading.Lock()

    def __call__(self, prompt, image=None, **fields: Any):
        with self._lock:
            self.calls.append((threading.current_thread().name, len(prompt)))
            self.running += 1
            self.most = max(self.most, self.running)
        self.work(image)
        with self._lock:
            self.running -= 1
        return RewardModelOutput(torch.stack([item[0, 0, 0] for item in image]))

    def work(self, image: Any) -> None:
        time.sleep(self.pause)


class Hanging(Watched):
    """Does not answer for batches that begin with a bright image until it is released."""

    def __init__(self, config: Any, accelerator: Any = None):
        super().__init__(config, accelerator)
        self.released = threading.Event()

    def work(self, image: Any) -> None:
        if image[0][0, 0, 0] > 0.5:
            self.released.wait(30)


class WatchedGroup(GroupwiseRewardModel):
    use_tensor_inputs = True

    def __init__(self, config: Any, accelerator: Any = None):
        super().__init__(config, accelerator)
        self.groups: list[list[str]] = []

    def __call__(self, prompt, image=None, **fields: Any):
        self.groups.append(list(prompt))
        levels = torch.stack([item.mean() for item in image])
        return RewardModelOutput(levels - levels.mean())


def watched(**fields: Any) -> tuple[RewardEngine, Any]:
    """Return an engine with one watched reward, and that reward."""
    cls = type("Mine", (Watched,), {"pause": fields.pop("pause", 0.0)})
    engine = engine_of(cls, **fields)
    return engine, next(iter(engine.models.values()))


def hanging(**fields: Any) -> tuple[RewardEngine, Hanging]:
    """Return an engine with one hanging reward of one picture a call, and that reward."""
    engine = engine_of(Hanging, async_reward=True, batch_size=1, on_error="mask", **fields)
    (model,) = engine.models.values()
    assert isinstance(model, Hanging)
    return engine, model


def wait_for(condition: Any) -> None:
    """Wait until a condition holds, at most twenty seconds."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_pointwise_calls_begin_when_a_batch_is_full_and_the_rest_at_the_end() -> None:
    engine, model = watched(async_reward=True, batch_size=3)
    with engine.begin() as scoring:
        scoring.add_batch(batch([0.1, 0.2]))
        time.sleep(0.05)
        assert model.calls == []
        scoring.add_batch(batch([0.3, 0.4]))
        wait_for(lambda: len(model.calls) == 1)
        assert model.calls[0][1] == 3
        table = scoring.finish()
    assert [count for _, count in model.calls] == [3, 1]
    assert {name for name, _ in model.calls} == {"reward-r"}
    assert table.column("r").tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_groupwise_calls_begin_when_their_group_is_complete() -> None:
    engine = engine_of(WatchedGroup, async_reward=True)
    (model,) = engine.models.values()
    assert isinstance(model, WatchedGroup)
    with engine.begin(group_size=2) as scoring:
        scoring.add_batch(batch([0.1, 0.5, 0.2], groups=[1, 2, 1]))
        wait_for(lambda: model.groups == [["prompt 1", "prompt 1"]])
        scoring.add_batch(batch([0.9], groups=[2]))
        wait_for(lambda: len(model.groups) == 2)
        table = scoring.finish()
    assert table.column("r").tolist() == pytest.approx([-0.05, -0.2, 0.05, 0.2])


@pytest.mark.parametrize("workers", [1, 4])
def test_a_reward_runs_in_as_many_lanes_as_it_has(workers: int) -> None:
    together = threading.Barrier(workers, timeout=20)

    class Meeting(Watched):
        def work(self, image: Any) -> None:
            together.wait()
            time.sleep(0.05)  # for one lane too many to begin

    engine = engine_of(Meeting, async_reward=True, num_workers=workers, batch_size=1)
    (model,) = engine.models.values()
    assert isinstance(model, Meeting)
    engine.score(batch([0.0] * 8))
    assert model.most == workers


def test_a_slow_reward_does_not_hold_up_another_and_sync_rewards_run_meanwhile() -> None:
    meanwhile = threading.Event()

    class Slow(Watched):
        def work(self, image: Any) -> None:
            assert meanwhile.wait(20)

    class Here(Watched):
        def work(self, image: Any) -> None:
            meanwhile.set()

    classes = {"slow": Slow, "quick": Watched, "here": Here}
    rewards = [entry(name, name, async_reward=name != "here", batch_size=4) for name in classes]
    engine = RewardEngine(rewards, factory=lambda arguments: classes[arguments.reward_model](arguments))
    models: dict[str, Any] = {model.config.name: model for model in engine.models.values()}
    with engine.begin() as scoring:
        scoring.add_batch(batch([0.1] * 4))
        wait_for(lambda: models["quick"].calls != [] and models["quick"].running == 0)
        wait_for(lambda: models["slow"].running == 1)
        table = scoring.finish()
    assert models["here"].calls == [("MainThread", 4)]
    assert not table.scores.isnan().any()


def test_answers_are_merged_by_sample_in_whatever_order_they_come() -> None:
    class Uneven(Watched):
        def __call__(self, prompt, image=None, **fields: Any):
            time.sleep(0.1 * image[0][0, 0, 0].item())
            return super().__call__(prompt, image=image)

    levels = [0.9, 0.1, 0.6, 0.3, 0.0, 0.7]
    table = engine_of(Uneven, async_reward=True, num_workers=6, batch_size=1).score(batch(levels))
    assert table.column("r").tolist() == pytest.approx(levels)


def test_a_call_that_takes_too_long_is_a_recorded_failure_and_the_others_count() -> None:
    engine, model = hanging(num_workers=2, timeout=SECONDS)
    table = engine.score(batch([0.1, 0.9, 0.2]))
    assert model.running == 1  # nobody waited for it
    model.released.set()
    assert table.column("r").isnan().tolist() == [False, True, False]
    (failure,) = table.failures
    assert (failure.samples, failure.kind, failure.message) == ((1,), "timeout", "no answer within 1.5 s")


def test_a_call_that_hangs_does_not_hold_its_lane() -> None:
    engine, model = hanging(timeout=SECONDS)
    table = engine.score(batch([0.9, 0.1, 0.8, 0.2]))
    assert model.running == 2
    model.released.set()
    assert table.column("r").isnan().tolist() == [True, False, True, False]
    assert [failure.kind for failure in table.failures] == ["timeout"] * 2


def test_an_answer_that_came_too_late_is_none_whenever_it_is_looked_at() -> None:
    engine, model = watched(async_reward=True, batch_size=1, pause=0.2, timeout=0.05, on_error="mask")
    with engine.begin() as scoring:
        scoring.add_batch(batch([0.1]))
        wait_for(lambda: model.calls != [] and model.running == 0)
        time.sleep(0.1)  # the answer is there by now
        table = scoring.finish()
    assert [failure.kind for failure in table.failures] == ["timeout"]


def test_a_hanging_call_keeps_only_its_own_samples_in_memory() -> None:
    engine, model = hanging(timeout=0.1)
    samples = batch([0.9, 0.1])
    images = [image.clone() for image in samples.images]
    kept, free = (weakref.ref(image) for image in images)
    with engine.begin() as scoring:
        scoring.add(samples.prompts, [0, 1], images=images)
        del images
        scoring.finish()
    del scoring
    wait_for(lambda: len(model.calls) == 2 and model.running == 1)  # a machine that paused may have given up both
    gc.collect()
    assert kept() is not None
    wait_for(lambda: free() is None)
    model.released.set()


def test_a_library_that_ends_its_thread_is_a_failure_and_not_a_hang() -> None:
    class Quitting(Watched):
        def __call__(self, prompt, image=None, **fields: Any):
            raise SystemExit("no licence")

    table = engine_of(Quitting, async_reward=True, on_error="mask").score(batch([0.1]))
    assert [failure.kind for failure in table.failures] == ["RuntimeError"]
    assert table.failures[0].message.startswith("SystemExit: no licence (at test_async.py:")


def test_a_failure_that_ends_the_scoring_is_told_while_samples_still_come() -> None:
    class Broken(Watched):
        def __call__(self, prompt, image=None, **fields: Any):
            self.calls.append(("", len(prompt)))
            raise ConnectionError("refused")

    engine = engine_of(Broken, async_reward=True, batch_size=1)
    (model,) = engine.models.values()
    assert isinstance(model, Broken)
    with pytest.raises(RewardError, match="ConnectionError: refused"), engine.begin() as scoring:
        for _ in range(100):
            scoring.add_batch(batch([0.1]))
            time.sleep(0.01)
    assert len(model.calls) < 50


def test_two_asynchronous_rewards_convert_each_picture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    convert = media._pictures

    def slowly(value: Any) -> Any:
        made.append(1)
        time.sleep(0.02)
        return convert(value)

    monkeypatch.setattr(media, "_pictures", slowly)

    class Pictures(PointwiseRewardModel):
        def __call__(self, prompt, image=None, **fields: Any):
            return RewardModelOutput([float(item.getpixel((0, 0))[0]) for item in image])

    rewards = [entry(name, name, async_reward=True, batch_size=2, num_workers=2) for name in ("a", "b")]
    table = RewardEngine(rewards, factory=Pictures).score(batch([0.1] * 8))
    assert not table.scores.isnan().any()
    assert len(made) == 8


def test_an_exception_in_a_lane_is_raised_or_recorded_as_the_entry_says() -> None:
    class Broken(Watched):
        def __call__(self, prompt, image=None, **fields: Any):
            raise ConnectionError("refused")

    with pytest.raises(RewardError, match=r"reward 'r' failed on 2 samples.*ConnectionError: refused"):
        engine_of(Broken, async_reward=True).score(batch([0.1, 0.2]))
    table = engine_of(Broken, async_reward=True, on_error="mask").score(batch([0.1, 0.2]))
    assert [failure.kind for failure in table.failures] == ["ConnectionError"]

    class Remote(Broken):
        remote = True

    assert engine_of(Remote).score(batch([0.1])).scores.isnan().all()
    with pytest.raises(RewardError, match="refused"):
        engine_of(Remote, on_error="raise").score(batch([0.1]))


def test_leaving_early_ends_the_threads() -> None:
    engine, _ = watched(async_reward=True, num_workers=3, batch_size=1, pause=0.05)
    with pytest.raises(KeyboardInterrupt), engine.begin() as scoring:
        scoring.add_batch(batch([0.1] * 30))
        raise KeyboardInterrupt
    wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("reward-r")])


def test_entries_of_one_reward_share_the_pass_whatever_their_lanes() -> None:
    made: list[Watched] = []

    def factory(arguments: Any) -> Watched:
        made.append(Watched(arguments))
        return made[-1]

    rewards = [entry("a", "x", batch_size=2), entry("b", "x", batch_size=4, async_reward=True, num_workers=2)]
    table = RewardEngine(rewards, factory=factory).score(batch([0.1, 0.2, 0.3, 0.4]))
    assert [count for _, count in made[0].calls] == [4]
    assert torch.equal(table.column("a"), table.column("b"))
    assert len(made) == 1


# --- fields -----------------------------------------------------------------------------------------------------------


class Seen(PointwiseRewardModel):
    """Remembers its fields."""

    required_fields = ("prompt", "video", "condition_images", "condition_videos")

    def __call__(self, prompt, image=None, video=None, condition_images=None, condition_videos=None):
        self.seen = {"video": video, "condition_images": condition_images, "condition_videos": condition_videos}
        assert image is None
        return RewardModelOutput([0.0] * len(prompt))


class SeenTensors(Seen):
    use_tensor_inputs = True


def feed(cls: type[Seen]) -> dict[str, Any]:
    """Score two samples with every kind of medium and return what the reward saw."""
    engine = engine_of(cls)
    with engine.begin() as scoring:
        scoring.add(
            [Prompt("a"), Prompt("b")],
            [0, 1],
            videos=torch.rand(2, 5, 3, 4, 6),
            condition_images=[[torch.rand(3, 4, 4), torch.rand(3, 4, 4)], [torch.rand(3, 4, 4), torch.rand(3, 8, 4)]],
            condition_videos=[[torch.rand(2, 3, 4, 4)], []],
        )
        scoring.finish()
    (model,) = engine.models.values()
    assert isinstance(model, Seen)
    return model.seen


def test_tensor_media_have_the_documented_shapes() -> None:
    seen = feed(SeenTensors)
    assert [tuple(video.shape) for video in seen["video"]] == [(5, 3, 4, 6)] * 2
    stacked, listed = seen["condition_images"]
    assert tuple(stacked.shape) == (2, 3, 4, 4)
    assert [tuple(item.shape) for item in listed] == [(3, 4, 4), (3, 8, 4)]
    assert tuple(seen["condition_videos"][0].shape) == (1, 2, 3, 4, 4)
    assert seen["condition_videos"][1] == []


def test_pil_media_are_nested_lists_of_pictures() -> None:
    seen = feed(Seen)
    assert [[frame.size for frame in video] for video in seen["video"]] == [[(6, 4)] * 5] * 2
    assert [[item.size for item in items] for items in seen["condition_images"]] == [[(4, 4)] * 2, [(4, 4), (4, 8)]]
    assert [[len(clip) for clip in clips] for clips in seen["condition_videos"]] == [[2], []]


def test_a_field_that_the_samples_do_not_have_names_reward_and_field() -> None:
    with engine_of(Seen).begin() as scoring, pytest.raises(RewardError, match="reward 'r' requires 'video', which"):
        scoring.add_batch(batch([0.1]))


def test_fields_of_the_wrong_length_are_refused() -> None:
    with engine_of(Watched).begin() as scoring, pytest.raises(ValueError, match="images has 1 entries for 2 prompts"):
        scoring.add([Prompt("a"), Prompt("b")], [0, 1], images=torch.rand(1, 3, 4, 4))


def test_a_medium_that_is_not_finite_is_never_shown_and_its_sample_fails() -> None:
    class Counts(Seen):
        required_fields = ("video", "condition_images")

        def __call__(self, video=None, condition_images=None, **rest: Any):
            self.shown = len(video or [])
            return RewardModelOutput([1.0] * self.shown)

    engine = engine_of(Counts, async_reward=True, on_error="mask")
    videos, conditions = torch.rand(4, 2, 3, 4, 4), [[torch.rand(3, 4, 4), torch.rand(3, 8, 4)] for _ in range(4)]
    videos[1, 1, 0, 0, 0] = float("nan")
    conditions[2][1][0, 0, 0] = float("inf")
    with engine.begin() as scoring:
        scoring.add([Prompt("a")] * 4, [0, 1, 2, 3], videos=videos, condition_images=conditions)
        table = scoring.finish()
    (model,) = engine.models.values()
    assert isinstance(model, Counts) and model.shown == 2
    assert table.column("r").isnan().tolist() == [False, True, True, False]
    assert {(failure.samples, failure.kind, failure.message) for failure in table.failures} == {
        ((1,), "not finite", "NaN or infinite values in video"),
        ((2,), "not finite", "NaN or infinite values in condition_images"),
    }


def test_a_broken_image_does_not_concern_a_reward_that_reads_text_and_stops_others() -> None:
    class Text(PointwiseRewardModel):
        required_fields = ("prompt",)

        def __call__(self, prompt, **rest: Any):
            return RewardModelOutput([float(len(text)) for text in prompt])

    samples = batch([0.1, float("nan"), 0.3], groups=[4, 4, 4])
    assert engine_of(Text).score(samples).column("r").tolist() == [8.0] * 3
    with pytest.raises(RewardError, match="failed on 1 samples, the first of prompt 'prompt 4': not finite: NaN or"):
        engine_of(Watched).score(samples)
    table = engine_of(WatchedGroup, async_reward=True, on_error="mask").score(samples)
    assert table.column("r")[[0, 2]].tolist() == pytest.approx([-0.1, 0.1])
    assert [failure.samples for failure in table.failures] == [(1,)]


def test_no_samples_make_an_empty_table() -> None:
    for cls in (Watched, WatchedGroup):
        table = engine_of(cls).score(batch([]))
        assert (tuple(table.scores.shape), table.failures) == ((0, 1), ())
