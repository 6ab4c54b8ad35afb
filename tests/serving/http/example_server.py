"""The server that a user of Flow-Factory has, with only the import of RewardServer changed."""

import argparse
from typing import List, Optional  # noqa: UP035

from PIL import Image

from tiltflow.serving import RewardServer


class Brightness:
    def score(self, prompt, image):
        return len(prompt) + image.getpixel((0, 0))[0] / 255


def load_your_model():
    return Brightness()


class MyRewardServer(RewardServer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.model = load_your_model()

    def compute_reward(
        self,
        prompts: List[str],  # noqa: UP006
        images: Optional[List[Image.Image]] = None,  # noqa: UP006, UP045
        videos: Optional[List[List[Image.Image]]] = None,  # noqa: UP006, UP045
    ) -> List[float]:  # noqa: UP006
        return [self.model.score(p, i) for p, i in zip(prompts, images)]  # noqa: B905


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Reward Server")
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()

    server = MyRewardServer(host=args.host, port=args.port)
    server.run()
