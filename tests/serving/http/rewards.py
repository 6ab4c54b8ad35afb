"""Rewards that `tiltflow serve` is given by the tests."""

import os
import time

import torch

from tiltflow.errors import JudgeError, JudgeTimeoutError, RewardError, UnparsableError
from tiltflow.rewards import PointwiseRewardModel, RewardModelOutput


class Judged(PointwiseRewardModel):
    """Asks a judge that is out, about some samples or at all."""

    required_fields = ("prompt",)

    def __call__(self, prompt, image=None, video=None, condition_images=None, condition_videos=None):
        if "out" in prompt:
            raise JudgeError("no connection to m")
        if "config" in prompt:
            raise RewardError("the judge needs another option")
        errors = {
            "empty": UnparsableError("m gave an empty answer"),
            "late": JudgeTimeoutError("m gave no answer within 60 s"),
            "unlike": RewardError("the judge is not shown this sample"),
            "odd": ValueError("odd"),
        }
        failures = {place: errors[text] for place, text in enumerate(prompt) if text in errors}
        values = [0.5] * len(prompt)
        return RewardModelOutput(values, {"tensor": torch.arange(len(prompt)), "word": prompt}, failures)


class Conditioned(PointwiseRewardModel):
    """Looks at everything at once, as tensors."""

    required_fields = ("image", "video", "condition_images", "condition_videos", "metadata")
    use_tensor_inputs = True

    def __call__(self, image=None, video=None, condition_images=None, condition_videos=None, metadata=None, **_):
        return RewardModelOutput(
            [
                image[place].mean() + video[place].mean() + sum(each.mean() for each in condition_images[place])
                + sum(each.mean() for each in condition_videos[place]) + metadata[place]["more"]
                for place in range(len(image))
            ]
        )  # fmt: skip


class TooFew(PointwiseRewardModel):
    required_fields = ("prompt",)

    def __call__(self, prompt, **_):
        return RewardModelOutput([0.5] * (len(prompt) - 1))


class Mortal(PointwiseRewardModel):
    """Does what the prompt says: `sleep=SECONDS`, `die` or `die=NAME`."""

    required_fields = ("prompt",)

    def __call__(self, prompt, **_):
        for text in prompt:
            word, _, value = text.partition("=")
            if word == "die":
                os._exit(3)
            time.sleep(float(value or 0))
        return RewardModelOutput([float(len(text)) for text in prompt])


class Unmade(PointwiseRewardModel):
    """Cannot be built where it is served."""

    def __init__(self, config, accelerator=None):
        super().__init__(config, accelerator)
        raise RewardError("the weights are torn")

    def __call__(self, prompt, **_):
        return RewardModelOutput([0.5] * len(prompt))
