"""A reward in an environment of its own: how much of a picture has the colour that the prompt names.

The server needs fastapi, uvicorn, pillow, numpy and safetensors; torch is not there.
"""

import argparse

import numpy as np

from tiltflow.serving import RewardServer

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (140, 60, 180),
}


class ColourShare(RewardServer):
    """Scores 0 to 1; a prompt without a colour gets the average distance of the pixels from grey."""

    use_array_inputs = True  # uint8 [H, W, 3]

    def compute_reward(self, prompts, images=None):
        return [share(prompt, image.astype(np.float64)) for prompt, image in zip(prompts, images or [], strict=True)]


def share(prompt, levels):
    """Return the score of one picture `[H, W, 3]` of levels 0 to 255."""
    named = [COLOURS[word] for word in prompt.lower().split() if word in COLOURS]
    if not named:
        return float(np.ptp(levels, axis=-1).mean() / 255)
    distances = [np.linalg.norm(levels - colour, axis=-1) for colour in named]
    return float(np.exp(-np.min(distances, axis=0) / 64).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    ColourShare(port=parser.parse_args().port, revision="1").run()
