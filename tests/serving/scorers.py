"""Models that misbehave on demand, made in worker processes by the tests of the serving room."""

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tiltflow.serving.jobs import Sample
from tiltflow.serving.wire import ModelInfo, WireError

Answer = tuple[Sequence[Any], Mapping[str, Sequence[Any]], Mapping[int, str | WireError]]


def value(sample: Sample) -> float:
    """Return the mean level of the picture, or the prompt as a number, or its length."""
    if sample.image is not None:
        return float(sample.image.mean())
    try:
        return float(sample.prompt)
    except ValueError:
        return float(len(sample.prompt))


def wait_for(file: str) -> None:
    """Wait until a file is there, at most thirty seconds."""
    end = time.monotonic() + 30
    while not Path(file).exists():
        if time.monotonic() > end:
            raise TimeoutError(f"nobody made {file}")
        time.sleep(0.005)


class Plain:
    """Scores every sample by `value`; what else it does is said in the samples' prompts."""

    def __init__(self, *, batch_size: int = 64, groupwise: bool = False, log: str = "", seconds: float = 0.0):
        self.batch_size = batch_size
        self.groupwise = groupwise
        self.log = log  # a file that gets one line of prompts for each call
        self.seconds = seconds

    def describe(self) -> ModelInfo:
        return ModelInfo(name="plain", revision="r1", batch_size=self.batch_size, groupwise=self.groupwise)

    def score(self, samples: Sequence[Sample]) -> Answer:
        if self.log:
            with Path(self.log).open("a") as file:
                file.write(" ".join(sample.prompt for sample in samples) + "\n")
        time.sleep(self.seconds)
        for sample in samples:
            self.obey(sample.prompt)
        return [value(sample) for sample in samples], {}, {}

    def obey(self, prompt: str) -> None:
        match prompt.partition("=")[::2]:
            case ("poison", _):
                raise ValueError("this one cannot be scored")
            case ("judge", _):
                raise WireError("upstream_judge", "the judge is out")
            case ("sleep", seconds):
                time.sleep(float(seconds))
            case ("make", file):
                Path(file).touch()
            case ("until", file):
                wait_for(file)
            case ("hang", _):
                ctypes.PyDLL(None).sleep(60)  # keeps the interpreter locked, as a hung extension may
            case ("die", _):
                os.kill(os.getpid(), signal.SIGKILL)
            case ("exit", _):
                sys.exit(3)


class Empty:
    """Does nothing, for measurements."""

    def describe(self) -> ModelInfo:
        return ModelInfo(name="empty", batch_size=64)

    def score(self, samples: Sequence[Sample]) -> Answer:
        return [0.0] * len(samples), {}, {}


class Odd(Plain):
    """Returns what the first sample's prompt names."""

    def score(self, samples: Sequence[Sample]) -> Answer:
        count = len(samples)
        scores = [float(place) for place in range(count)]
        match samples[0].prompt:
            case "short":
                return scores[1:], {}, {}
            case "long":
                return [*scores, 0.0], {}, {}
            case "short component":
                return scores, {"length": scores[1:]}, {}
            case "failure of nobody":
                return scores, {}, {count: "who?"}
            case "not finite":
                return [float("nan"), float("inf"), 1e300, *scores[3:]], {}, {}
            case "text":
                return ["high"] * count, {}, {}
            case "failures":
                return scores, {}, {0: "no face", 1: WireError("upstream_judge", "the judge is out")}
            case "components":
                boxes = [np.full((1, 2), place, np.float32) for place in range(count)]
                return np.array(scores, np.float32), {"boxes": boxes, "odds": [float("nan")] * count}, {}
            case "strange component":
                return scores, {"object": [object()] * count}, {}
        return scores, {}, {}


class Hungry(Plain):
    """Runs out of memory above `most` samples, or with a prompt that says so."""

    def __init__(self, *, most: int, **options: Any):
        super().__init__(**options)
        self.most = most

    def score(self, samples: Sequence[Sample]) -> Answer:
        answer = super().score(samples)
        if len(samples) > self.most or any(sample.prompt == "huge" for sample in samples):
            raise MemoryError(f"{len(samples)} samples")
        return answer


class Keeper(Plain):
    """Keeps the pictures of its first call and scores the next calls by them."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []

    def score(self, samples: Sequence[Sample]) -> Answer:
        self.kept = self.kept or [sample.image for sample in samples]
        return [float(self.kept[0].mean())] * len(samples), {}, {}


class Converter(Plain):
    """Makes a picture of Pillow's of every array, as a RewardServer does; scores are the new pages that this took."""

    def score(self, samples: Sequence[Sample]) -> Answer:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        pictures = [Image.fromarray(sample.image) for sample in samples if sample.image is not None]
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        return [float(faults)] * len(pictures), {}, {}


class Writer(Plain):
    """Tries to change the pictures it gets."""

    def score(self, samples: Sequence[Sample]) -> Answer:
        for sample in samples:
            assert sample.image is not None
            sample.image[:] = 0
        return super().score(samples)


class Whole(Plain):
    """Tells everything it was given."""

    def score(self, samples: Sequence[Sample]) -> Answer:
        def told(array: Any) -> Any:
            return (
                None if array is None else [array.dtype.str, list(array.shape), float(array.astype(np.float64).sum())]
            )

        parts = [
            {
                "prompt": sample.prompt,
                "meta": None if sample.meta is None else dict(sample.meta),
                "image": told(sample.image),
                "video": told(sample.video),
                "condition_images": sample.condition_images and [told(array) for array in sample.condition_images],
                "condition_videos": sample.condition_videos and [told(array) for array in sample.condition_videos],
            }
            for sample in samples
        ]
        return [0.0] * len(samples), {"given": parts}, {}


class Parent(Plain):
    """Starts a process of its own, writes both ids to a file, and keeps its own standard output."""

    def __init__(self, *, pids: str):
        super().__init__()
        self.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
        Path(pids).write_text(f"{os.getpid()} {self.child.pid}")


class Slow(Plain):
    """Takes its time to load."""

    def __init__(self, *, load: float = 0.0, until: str = "", pids: str = ""):
        super().__init__()
        if pids:
            Path(pids).write_text(str(os.getpid()))
        time.sleep(load)
        if until:
            wait_for(until)


class Failing(Plain):
    """Cannot be made; from its second process on, if `first` names a file that the first one makes."""

    def __init__(self, *, first: str = "", how: str = "raise"):
        super().__init__()
        if first and not Path(first).exists():
            Path(first).touch()
            return
        if how == "exit":
            sys.exit(5)
        if how == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        raise FileNotFoundError("no weights at /nowhere")
