"""A server whose model does what the prompts say; started by the tests with settings as JSON."""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

from tiltflow.serving import RewardServer
from tiltflow.serving.wire import Limits, WireError


class Faulty(RewardServer):
    """Scores a sample by the number in its prompt, or else by the prompt's length and the picture's first level."""

    required_fields = ("prompt",)
    optional_fields = ("image", "video", "condition_images", "metadata")
    log: str | None = None

    def __init__(self, *, log=None, setup_error=None, limits=None, **kwargs):
        super().__init__(limits=Limits(**(limits or {})), **kwargs)
        self.log = log
        self.setup_error = setup_error

    def setup(self):
        if self.setup_error is not None:
            raise RuntimeError(self.setup_error)

    def compute_reward(self, prompts, images=None, videos=None, condition_images=None, metadata=None):
        if self.log is not None:
            with Path(self.log).open("a") as file:
                file.write(json.dumps(prompts) + "\n")
        scores = [self.obey(prompt, len(prompts)) for prompt in prompts]
        if images is not None:
            scores = [
                score + image.getpixel((0, 0))[0] / 255 for score, image in zip(scores, images, strict=True) if image
            ]
        return scores[1:] if "short" in prompts else scores

    def obey(self, prompt, size):
        word, _, value = prompt.partition("=")
        match word:
            case "nan" | "inf" | "-inf":
                return float(word)
            case "poison":
                raise ValueError("this one cannot be scored")
            case "judge":
                raise WireError("upstream_judge", "the judge is out")
            case "sleep":
                time.sleep(float(value))
            case "until":
                end = time.monotonic() + 30
                while not Path(value).exists():
                    if time.monotonic() > end:
                        raise TimeoutError(f"nobody made {value}")
                    time.sleep(0.005)
            case "hang":
                time.sleep(1000)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "segfault":
                ctypes.string_at(0)
            case "memory" if size > int(value):
                raise MemoryError(f"no room for {size} samples")
        try:
            return float(value or word)
        except ValueError:
            return float(len(prompt))


class Ranks(Faulty):
    """Compares the samples of a group by the length of their prompts."""

    groupwise = True

    def compute_reward(self, prompts, images=None, videos=None, condition_images=None, metadata=None):
        order = sorted(prompts, key=len)
        return [order.index(prompt) / len(prompts) for prompt in prompts]


if __name__ == "__main__":
    name, settings = sys.argv[1], json.loads(sys.argv[2])
    {"Faulty": Faulty, "Ranks": Ranks}[name](**settings).run()
