import io
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from tiltflow.errors import CheckpointError, ConfigError, DataError
from tiltflow.runtime.progress import ProgressBar, format_duration
from tiltflow.runtime.tracking import (
    JsonlTracker,
    TensorBoardTracker,
    TrackerGroup,
    TrackingConfig,
    build_trackers,
    read_jsonl,
)

RED = Image.new("RGB", (4, 2), (255, 0, 0))
BLUE = Image.new("RGB", (4, 2), (0, 0, 255))


def log_steps(path: Path, steps: range, *, resume_step: int | None = None) -> None:
    tracker = JsonlTracker(path, resume_step=resume_step)
    for step in steps:
        tracker.log({"reward": step / 10}, step=step)
    tracker.close()


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(path)]


def build(config: TrackingConfig, directory: Path, *, resume_step: int | None = None) -> TrackerGroup:
    return build_trackers(config, directory, run_name="folder", run_config={"lr": 0.1}, resume_step=resume_step)


class TestJsonl:
    def test_rows(self, tmp_path: Path) -> None:
        tracker = JsonlTracker(tmp_path / "new" / "metrics.jsonl", resume_step=None)
        values = {"a": 0.5, "b": float("nan"), "c": -float("inf"), "d": torch.tensor(2.5), "e": 3}
        tracker.log(values, step=4)  # pyright: ignore[reportArgumentType]
        # Read before close: every row is flushed.
        text = (tmp_path / "new" / "metrics.jsonl").read_text()
        row = json.loads(text, parse_constant=pytest.fail)
        assert text.count("\n") == 1
        assert row.pop("time") > 1.7e9
        assert row == {"step": 4, "a": 0.5, "b": None, "c": None, "d": 2.5, "e": 3.0}
        tracker.close()

    def test_reserved_names(self, tmp_path: Path) -> None:
        tracker = JsonlTracker(tmp_path / "m.jsonl", resume_step=None)
        with pytest.raises(ValueError, match=r"metrics=\['time'\]: the names step and time are taken"):
            tracker.log({"time": 1.0}, step=0)
        tracker.close()

    def test_resume_repeats_no_step(self, tmp_path: Path) -> None:
        path = tmp_path / "m.jsonl"
        log_steps(path, range(5))
        before = path.read_text().splitlines()
        log_steps(path, range(3, 6), resume_step=3)
        assert steps(path) == [0, 1, 2, 3, 4, 5]
        assert path.read_text().splitlines()[:3] == before[:3]
        assert [file.name for file in tmp_path.iterdir()] == ["m.jsonl"]

    @pytest.mark.parametrize("cut", [1, 2, 10, 40])
    def test_half_written_last_line(self, tmp_path: Path, cut: int) -> None:
        path = tmp_path / "m.jsonl"
        log_steps(path, range(3))
        path.write_bytes(path.read_bytes()[:-cut])
        survivors = [0, 1, 2] if cut == 1 else [0, 1]  # only the newline is lost: the row is whole
        assert steps(path) == survivors
        log_steps(path, range(5, 7), resume_step=5)
        assert steps(path) == [*survivors, 5, 6]

    def test_zeros_after_a_power_cut(self, tmp_path: Path) -> None:
        path = tmp_path / "m.jsonl"
        log_steps(path, range(3))
        with path.open("ab") as file:
            file.write(bytes(30) + b"\xff")
        log_steps(path, range(3, 4), resume_step=3)
        assert steps(path) == [0, 1, 2, 3]

    def test_a_new_run_keeps_the_old_file_aside(self, tmp_path: Path) -> None:
        log_steps(tmp_path / "m.jsonl", range(3))
        log_steps(tmp_path / "m.jsonl", range(1))
        assert steps(tmp_path / "m.jsonl") == [0]
        assert steps(tmp_path / "m.jsonl.old") == [0, 1, 2]

    def test_resume_without_a_file(self, tmp_path: Path) -> None:
        log_steps(tmp_path / "m.jsonl", range(3, 5), resume_step=3)
        assert steps(tmp_path / "m.jsonl") == [3, 4]

    @pytest.mark.parametrize("damage", ["{nonsense", "[1]", '{"reward": 1}'])
    def test_damage_in_the_middle(self, tmp_path: Path, damage: str) -> None:
        path = tmp_path / "m.jsonl"
        path.write_text(f'{{"step": 0}}\n{damage}\n{{"step": 1}}\n')
        with pytest.raises(DataError, match=r"m\.jsonl, line 2: .* is no JSON object with a step"):
            read_jsonl(path)
        with pytest.raises(DataError):
            JsonlTracker(path, resume_step=1)
        assert path.read_text().count("\n") == 3

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"cannot read .*m\.jsonl: No such file"):
            read_jsonl(tmp_path / "m.jsonl")

    def test_a_full_disk_leaves_a_readable_file(self, tmp_path: Path) -> None:
        path = tmp_path / "m.jsonl"
        code = f"""
import resource
from pathlib import Path
from tiltflow.errors import CheckpointError
from tiltflow.runtime.tracking import JsonlTracker
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
tracker = JsonlTracker(Path({str(path)!r}), resume_step=None)
try:
    for step in range(9):
        tracker.log({{"reward": 0.5}}, step=step)
except CheckpointError as error:
    print(step, error)
tracker.close()
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        failed, message = done.stdout.split(" ", 1)
        assert message.startswith(f"cannot write {path}: ")
        assert steps(path) == list(range(int(failed)))
        log_steps(path, range(2, 4), resume_step=2)
        assert steps(path) == [0, 1, 2, 3]

    def test_images_are_left_to_the_run(self, tmp_path: Path) -> None:
        tracker = JsonlTracker(tmp_path / "m.jsonl", resume_step=None)
        tracker.log_images("eval/samples", [RED], ["a red one"], step=12)
        tracker.close()
        assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]
        assert (tmp_path / "m.jsonl").read_text() == ""

    def test_a_folder_in_the_place_of_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "m.jsonl").mkdir()
        with pytest.raises(DataError, match=r"cannot read .*m\.jsonl: Is a directory"):
            JsonlTracker(tmp_path / "m.jsonl", resume_step=1)
        (tmp_path / "m.jsonl.old").write_text("")
        with pytest.raises(CheckpointError, match=r"cannot write .*m\.jsonl: Not a directory"):
            JsonlTracker(tmp_path / "m.jsonl", resume_step=None)


class TestTensorBoard:
    def test_values_come_back(self, tmp_path: Path) -> None:
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        for resume_step, logged in [(None, [0, 1, 2]), (2, [2, 3])]:
            tracker = TensorBoardTracker(tmp_path, run_config={"lr": 0.1}, resume_step=resume_step)
            for step in logged:
                tracker.log({"reward": step / 4, "absent": float("nan")}, step=step)
            tracker.log_images("samples", [RED, BLUE], ["a", "b"], step=logged[-1])
            tracker.close()
        events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        assert [(event.step, event.value) for event in events.Scalars("reward")] == [
            (0, 0.0),
            (1, 0.25),
            (2, 0.5),
            (3, 0.75),
        ]
        assert events.Tags()["scalars"] == ["reward"]
        assert sorted(events.Tags()["images"]) == ["samples/00", "samples/01"]
        with Image.open(io.BytesIO(events.Images("samples/01")[-1].encoded_image_string)) as image:
            assert image.convert("RGB").tobytes() == BLUE.tobytes()
        assert b"00. a  \n01. b" in events.Tensors("samples/captions/text_summary")[-1].tensor_proto.string_val[0]
        assert b'"lr": 0.1' in events.Tensors("config/text_summary")[-1].tensor_proto.string_val[0]


class FakeError(Exception):
    pass


def fake_package(name: str, calls: list[Any], *, run_id: str = "abc") -> types.ModuleType:
    """A stand-in for wandb or trackio that records what it is asked."""
    run = types.SimpleNamespace(
        id=run_id,
        log=lambda row: calls.append(("log", row)),
        define_metric=lambda name, step_metric=None: calls.append(("define_metric", name, step_metric)),
        finish=lambda: calls.append(("finish",)),
    )

    def init(**arguments: Any) -> Any:
        calls.append(("init", arguments))
        if arguments["project"] == "forbidden":
            raise FakeError("no API key configured")
        return run

    module: Any = types.ModuleType(name)
    module.init = init
    module.Error = FakeError
    module.Image = lambda image, caption: ("image", image.size, caption)
    module.log = lambda row, step: calls.append(("log", row, step))
    module.finish = run.finish
    return module


class TestWandb:
    def test_what_is_logged(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[Any] = []
        monkeypatch.setitem(sys.modules, "wandb", fake_package("wandb", calls))
        with build(TrackingConfig(wandb_project="p", wandb_mode="offline"), tmp_path) as trackers:
            trackers.log({"reward": 0.5}, step=3)
            trackers.log_images("samples", [RED], ["a red one"], step=3)
        assert calls == [
            (
                "init",
                {
                    "project": "p",
                    "name": "folder",
                    "mode": "offline",
                    "config": {"lr": 0.1},
                    "dir": str(tmp_path),
                    "id": None,
                    "resume": None,
                },
            ),
            ("define_metric", "step", None),
            ("define_metric", "*", "step"),
            ("log", {"reward": 0.5, "step": 3}),
            ("log", {"samples": [("image", (4, 2), "a red one")], "step": 3}),
            ("finish",),
        ]
        assert (tmp_path / "wandb_run_id.txt").read_text() == "abc\n"
        assert steps(tmp_path / "metrics.jsonl") == [3]

    def test_resume_takes_the_same_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[Any] = []
        config = TrackingConfig(wandb_project="p", run_name="named")
        monkeypatch.setitem(sys.modules, "wandb", fake_package("wandb", calls))
        build(config, tmp_path).close()
        build(config, tmp_path, resume_step=4).close()
        build(config, tmp_path).close()
        starts = [call[1] for call in calls if call[0] == "init"]
        assert [(start["id"], start["resume"]) for start in starts] == [(None, None), ("abc", "allow"), (None, None)]
        assert {start["name"] for start in starts} == {"named"}

    def test_a_refusal_names_the_remedy(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "wandb", fake_package("wandb", []))
        with pytest.raises(ConfigError, match=r"no API key configured; run `wandb login`, or set tracking\.wandb_mode"):
            build(TrackingConfig(wandb_project="forbidden"), tmp_path)


class TestTrackio:
    @pytest.mark.parametrize(("resume_step", "resume"), [(None, "never"), (3, "allow")])
    def test_what_is_logged(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume_step: int | None, resume: str
    ) -> None:
        calls: list[Any] = []
        monkeypatch.setitem(sys.modules, "trackio", fake_package("trackio", calls))
        with build(TrackingConfig(trackio_project="p"), tmp_path, resume_step=resume_step) as trackers:
            trackers.log({"reward": 0.5}, step=3)
            trackers.log_images("samples", [RED, BLUE], ["a", "b"], step=3)
        assert calls == [
            ("init", {"project": "p", "name": "folder", "config": {"lr": 0.1}, "resume": resume}),
            ("log", {"reward": 0.5}, 3),
            ("log", {"samples/00": ("image", (4, 2), "a"), "samples/01": ("image", (4, 2), "b")}, 3),
            ("finish",),
        ]


class TestBuild:
    @pytest.mark.parametrize(
        ("package", "config"),
        [
            ("tensorboard", TrackingConfig(tensorboard=True)),
            ("wandb", TrackingConfig(wandb_project="p")),
            ("trackio", TrackingConfig(trackio_project="p")),
        ],
    )
    def test_a_missing_package_names_its_extra(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, config: TrackingConfig
    ) -> None:
        log_steps(tmp_path / "metrics.jsonl", range(3))
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ConfigError) as caught:
            build(config, tmp_path)
        assert f"tracking.{package}" in str(caught.value)
        assert f"pip install 'tiltflow[{package}]'" in str(caught.value)
        assert steps(tmp_path / "metrics.jsonl") == [0, 1, 2]

    def test_a_late_failure_closes_the_earlier_trackers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[Any] = []
        monkeypatch.setitem(sys.modules, "wandb", fake_package("wandb", calls))
        monkeypatch.setitem(sys.modules, "trackio", None)
        with pytest.raises(ConfigError, match="trackio"):
            build(TrackingConfig(wandb_project="p", trackio_project="p"), tmp_path)
        assert calls[-1] == ("finish",)

    def test_default_is_the_jsonl_file_alone(self, tmp_path: Path) -> None:
        with build(TrackingConfig(), tmp_path / "run") as trackers:
            assert [type(tracker) for tracker in trackers.trackers] == [JsonlTracker]
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]

    def test_config_is_strict(self) -> None:
        with pytest.raises(ValidationError, match="wandb_mode"):
            TrackingConfig(wandb_mode="live")  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValidationError, match="project"):
            TrackingConfig.model_validate({"project": "p"})

    def test_closing_closes_all(self) -> None:
        closed: list[str] = []

        class Fake:
            def __init__(self, name: str) -> None:
                self.name = name

            def log(self, metrics: Any, *, step: int) -> None: ...

            def log_images(self, name: str, images: Any, captions: Any, *, step: int) -> None: ...

            def close(self) -> None:
                closed.append(self.name)
                if self.name == "b":
                    raise CheckpointError("b failed")

        with pytest.raises(CheckpointError, match="b failed"):
            TrackerGroup([Fake("a"), Fake("b"), Fake("c")]).close()
        assert closed == ["a", "b", "c"]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestProgress:
    def test_plain_lines(self, capsys: pytest.CaptureFixture[str]) -> None:
        clock = Clock()
        with ProgressBar(30, start=2, title="ram", clock=clock) as bar:
            bar.status("rollout 1/6")
            clock.now += 10
            bar.advance(reward=0.61, rate=24.08)
            clock.now += 20
            bar.advance(reward=float("nan"))
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err == "epoch 3/30  reward 0.61  24.1 samples/s  left 4:30\nepoch 4/30  left 6:30\n"

    def test_steps_and_other_numbers(self, capsys: pytest.CaptureFixture[str]) -> None:
        clock = Clock()
        with ProgressBar(5, title="fit", unit="step", line_every=2, clock=clock) as bar:
            for loss in (3.0, 2.0, float("nan"), 0.5, 0.25):
                clock.now += 1
                bar.advance(loss=loss, acc=0.5)
        assert capsys.readouterr().err.splitlines() == [
            "step 2/5  loss 2  acc 0.5  left 0:03",
            "step 4/5  loss 0.5  acc 0.5  left 0:01",
            "step 5/5  loss 0.25  acc 0.5  left 0:00",
        ]

    def test_disabled(self, capsys: pytest.CaptureFixture[str]) -> None:
        with ProgressBar(3, enabled=False) as bar:
            bar.status("x")
            bar.advance(reward=1.0, rate=1.0)
        assert capsys.readouterr() == ("", "")
        assert bar.done == 1

    def test_lines_are_flushed(self) -> None:
        code = """
import os
from tiltflow.runtime.tracking import ProgressBar
with ProgressBar(2) as bar:
    bar.advance(reward=1.0, rate=2.0)
    os._exit(0)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stderr == "epoch 1/2  reward 1  2.0 samples/s  left 0:00\n"

    def test_on_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "160")
        clock = Clock()
        with ProgressBar(3, start=1, title="ram [x]", clock=clock) as bar:
            bar.status("rollout 3/6")
            assert bar._progress is not None
            bar._progress.refresh()
            assert "rollout 3/6" in terminal.getvalue()
            clock.now += 65
            bar.advance(reward=0.614, rate=24.1)
        last = terminal.getvalue().rsplit("ram [x]", 1)[1]
        assert "epoch 2/3" in last
        assert "reward 0.614  24.1 samples/s" in last
        assert "left 1:05" in last
        assert "rollout" not in last

    def test_time_left(self) -> None:
        clock = Clock()
        with ProgressBar(100, enabled=False, clock=clock) as bar:
            assert bar.seconds_left() is None
            clock.now += 500
            bar.advance()
            for _ in range(10):
                clock.now += 2
                bar.advance()
            assert bar.seconds_left() == pytest.approx(89 * 2)  # the slow first epoch is forgotten
            clock.now += 1.5
            assert bar.seconds_left() == pytest.approx(89 * 2 - 1.5)
            clock.now += 1e6
            assert bar.seconds_left() == 0

    def test_durations(self) -> None:
        assert [format_duration(seconds) for seconds in (None, 0, 59.6, 250, 3850.2)] == [
            "?",
            "0:00",
            "1:00",
            "4:10",
            "1:04:10",
        ]
