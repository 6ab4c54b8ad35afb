"""The JPEG reward: how few bytes the image needs. Cheap, without a model, and good for trying a run out."""

from io import BytesIO
from typing import Any, Final

from PIL import Image

from tiltflow.rewards.base import PointwiseRewardModel, RewardModelOutput
from tiltflow.runtime.pixels import to_rgb

QUALITY: Final = 95  # of Pillow's JPEG encoder
REFERENCE_BYTES: Final = 500_000  # an image of this size has the reward -1


class JPEGCompressibilityReward(PointwiseRewardModel):
    """Rewards images that compress well: r = -(bytes / 1000) / 500, of the image as a JPEG of quality 95.

    Source: `jpeg_compressibility` of flow_grpo. A negative `weight` rewards detail instead.
    """

    required_fields = ("image",)
    cpu_only = True

    def __call__(
        self,
        prompt: list[str] | None = None,
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> RewardModelOutput:
        """Score PIL images; `extra_info` carries their sizes in bytes."""
        sizes = [jpeg_bytes(item) for item in image]
        return RewardModelOutput([-size / REFERENCE_BYTES for size in sizes], {"bytes": sizes})


def jpeg_bytes(image: Image.Image) -> int:
    """Return the size of an image as a JPEG file of quality 95, in bytes."""
    buffer = BytesIO()
    to_rgb(image).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.getbuffer().nbytes
