"""Three rewards as users write them, named by their Python path: pointwise, groupwise, and over tensors."""

import torch
from PIL import Image, ImageStat
from torch import Tensor, nn

from tiltflow.rewards import GroupwiseRewardModel, PointwiseRewardModel, RewardArguments, RewardModelOutput
from tiltflow.scorers import Scorer


class Warmth(PointwiseRewardModel):
    """How much redder than blue a picture is."""

    required_fields = ("prompt", "image")

    def __init__(self, config: RewardArguments, accelerator=None):
        super().__init__(config, accelerator)

    @torch.no_grad()
    def __call__(self, prompt, image=None, video=None, condition_images=None, condition_videos=None):
        means = [ImageStat.Stat(picture).mean for picture in image]
        return RewardModelOutput(rewards=torch.tensor([red - blue for red, _, blue in means], device=self.device))


class ContrastRank(GroupwiseRewardModel):
    """Rank by contrast within the group, 0 the lowest, divided by its size; pictures are read in batches."""

    required_fields = ("prompt", "image")

    @torch.no_grad()
    def __call__(self, prompt, image=None, video=None, condition_images=None, condition_videos=None):
        size = self.config.batch_size
        parts = [self._contrast(image[start : start + size]) for start in range(0, len(prompt), size)]
        ranks = torch.cat(parts).argsort().argsort()
        return RewardModelOutput(rewards=ranks.float() / len(prompt))

    def _contrast(self, pictures: list[Image.Image]) -> Tensor:
        return torch.tensor([ImageStat.Stat(picture.convert("L")).stddev[0] for picture in pictures])


class TinyNetwork(Scorer):
    """A small random convolution network."""

    differentiable = True

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=3), nn.Tanh(), nn.Conv2d(8, 1, 3, stride=2), nn.AdaptiveAvgPool2d(1)
        )
        with torch.random.fork_rng():
            torch.manual_seed(3)
            for weight in self.layers.parameters():
                weight.data.normal_(std=0.5)
        self.freeze()

    def score(self, images, prompts):
        return self.layers(torch.stack(list(images)).to(self.device, self.dtype)).flatten().float()


class NetworkTaste(PointwiseRewardModel):
    """What a network says about tensors."""

    required_fields = ("prompt", "image")
    use_tensor_inputs = True

    def __init__(self, config: RewardArguments, accelerator=None):
        super().__init__(config, accelerator)
        self.scorer = TinyNetwork().to(self.device, self.dtype)

    @torch.no_grad()
    def __call__(self, prompt, image=None, video=None, condition_images=None, condition_videos=None):
        return RewardModelOutput(rewards=self.scorer.score(image, prompt))
