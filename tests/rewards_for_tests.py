"""Rewards that tests name by their Python path."""

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import SecretStr

from tiltflow.rewards import GroupwiseRewardModel, PointwiseRewardModel, RewardModelOutput
from tiltflow.types import Config


class Brightness(PointwiseRewardModel):
    """Mean of the red channel: differs from image to image, needs no model."""

    use_tensor_inputs = True

    @torch.no_grad()
    def __call__(self, prompt, image=None, video=None, condition_images=None, condition_videos=None):
        return RewardModelOutput(torch.stack([item[0].mean() for item in image]) * 10)


class Redness(Brightness):
    """Brightness that reads no prompt."""

    required_fields = ("image",)

    def __call__(self, prompt=None, image=None, **media: Any):
        return super().__call__(prompt, image=image)


class BreaksWithoutPrompt(Redness):
    def __call__(self, prompt=None, image=None, **media: Any):
        raise ValueError("the judge is out")


class Talkative(Redness):
    """Redness that tells something of every kind beside it."""

    def __call__(self, prompt=None, image=None, **media: Any):
        count = len(image)
        told = {
            "distance": [math.nan] * count,
            "levels": [torch.tensor([0.25, 0.75])] * count,
            "reasons": [["too dark", "too small"] if index % 2 else [] for index in range(count)],
            "mixed": ["none" if index % 2 else index for index in range(count)],
            "boxes": [{"star": [1, 2]}] * count,
        }
        return RewardModelOutput(super().__call__(image=image).rewards, told)


class Rising(Brightness):
    """Grows with every call, whatever the images."""

    slope = 1.0

    def __init__(self, config: Any, accelerator: Any = None):
        super().__init__(config, accelerator)
        self.calls = 0

    def __call__(self, prompt, image=None, **media: Any):
        self.calls += 1
        values = torch.stack([item[0].mean() for item in image])
        return RewardModelOutput(values + self.slope * self.calls)


class Falling(Rising):
    """Falls with every call, whatever the images."""

    slope = -1.0


class NaNForFirst(Brightness):
    """Cannot score the first sample of each batch."""

    def __call__(self, prompt, image=None, **media: Any):
        values = torch.stack([item[0].mean() for item in image])
        values[0] = math.nan
        return RewardModelOutput(values)


class NaNForStars(Brightness):
    """Cannot score any sample of a prompt with a star in it."""

    required_fields = ("prompt", "image")

    def __call__(self, prompt, image=None, **media: Any):
        values = [
            math.nan if "star" in text else item[0].mean().item() for text, item in zip(prompt, image, strict=True)
        ]
        return RewardModelOutput(values)


class AllNaN(Brightness):
    def __call__(self, prompt, image=None, **media: Any):
        return RewardModelOutput(torch.full((len(prompt),), math.nan))


class OneShort(Brightness):
    """Returns a reward too few."""

    def __call__(self, prompt, image=None, **media: Any):
        return RewardModelOutput(torch.zeros(len(prompt) - 1))


class Broken(Brightness):
    def __call__(self, prompt, image=None, **media: Any):
        raise ValueError("the judge is out")


class BreaksLater(Brightness):
    """Scores its first call and none after it."""

    lasts = 1
    calls = 0

    def __call__(self, prompt, image=None, **media: Any):
        self.calls += 1
        if self.calls > self.lasts:
            raise ValueError("the judge went home")
        return super().__call__(prompt, image=image)


class BreaksAfterFour(BreaksLater):
    """Scores its first four calls."""

    lasts = 4


class AwayWhile(Brightness):
    """Answers only while a file is not there."""

    def __call__(self, prompt, image=None, **media: Any):
        if Path(os.environ["TILTFLOW_TEST_AWAY"]).exists():
            raise ConnectionError("nobody answers")
        return super().__call__(prompt, image=image)


class CannotBeBuilt(Brightness):
    def __init__(self, config: Any, accelerator: Any = None):
        raise MemoryError("no room")


class FailsOnTheSecondProcess(Brightness):
    def __call__(self, prompt, image=None, **media: Any):
        if os.environ["RANK"] == "1":
            raise ValueError("the judge is out")
        return super().__call__(prompt, image=image)


class BreaksLaterOnTheSecondProcess(BreaksLater):
    def __call__(self, prompt, image=None, **media: Any):
        scores = Brightness.__call__ if os.environ["RANK"] == "0" else BreaksLater.__call__
        return scores(self, prompt, image=image, **media)


class CannotBeBuiltOnTheSecondProcess(Brightness):
    def __init__(self, config: Any, accelerator: Any = None):
        super().__init__(config, accelerator)
        if os.environ["RANK"] == "1":
            raise MemoryError("no room")


class Rank(GroupwiseRewardModel):
    """Rank of the brightness within the group; reads no prompt."""

    required_fields = ("image",)
    use_tensor_inputs = True

    def __call__(self, prompt=None, image=None, video=None, condition_images=None, condition_videos=None):
        values = torch.stack([item.mean() for item in image])
        return RewardModelOutput(values.argsort().argsort().float() / len(image), {"size": [len(image)] * len(image)})


class MetadataSize(PointwiseRewardModel):
    """How many keys the metadata has."""

    required_fields = ("metadata",)

    def __call__(self, prompt=None, image=None, video=None, condition_images=None, condition_videos=None, metadata=()):
        return RewardModelOutput([float(len(each)) for each in metadata])


class KeyedOptions(Config):
    """Options with secrets, as a reward of one's own may have them."""

    key: SecretStr | None = None
    key_env: str | None = None
    password: SecretStr = SecretStr("none")
    stops: int = 1


class Keyed(Brightness):
    """Brightness that needs the right key."""

    Options = KeyedOptions

    def __init__(self, config: Any, accelerator: Any = None):
        super().__init__(config, accelerator)
        assert self.options.key is None or self.options.key.get_secret_value().startswith("right-")


class SlowBrightness(Brightness):
    """Brightness that marks every epoch in a file and takes its time, so that a test can kill the run midway.

    It does not answer any more where the file has as many marks as `TILTFLOW_TEST_LAST` says.
    """

    def __call__(self, prompt, image=None, **media: Any):
        with Path(os.environ["TILTFLOW_TEST_MARKS"]).open("a") as marks:
            marks.write("scored\n")
        last = os.environ.get("TILTFLOW_TEST_LAST")
        scored = len(Path(os.environ["TILTFLOW_TEST_MARKS"]).read_text().splitlines())
        time.sleep(0.1 if last is None or scored < int(last) else 60.0)
        return super().__call__(prompt, image=image)
