"""The rewards of the examples, in the process that trains."""

import numpy as np

from examples.remote_reward.server import share
from tiltflow.rewards import PointwiseRewardModel, RewardModelOutput


class ColourShare(PointwiseRewardModel):
    """What the server of `examples/remote_reward` computes."""

    def __call__(self, prompt, image=None, video=None, condition_images=None, condition_videos=None):
        return RewardModelOutput([share(p, np.asarray(i, np.float64)) for p, i in zip(prompt, image, strict=True)])
