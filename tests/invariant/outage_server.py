"""A reward server that takes its time and writes down what it scores, so that a test can kill it midway."""

import sys
import time
from pathlib import Path

from tiltflow.serving import RewardServer


class SlowRedness(RewardServer):
    """Mean level of red, in 0.1 s per call."""

    use_array_inputs = True

    def __init__(self, *, log, **kwargs):
        super().__init__(**kwargs)
        self.log = log

    def compute_reward(self, prompts, images=None):
        with Path(self.log).open("a") as log:
            log.write(f"{len(prompts)}\n")
        time.sleep(0.1)
        return [float(image[..., 0].mean()) / 255 * 10 for image in images]


if __name__ == "__main__":
    SlowRedness(log=sys.argv[1], port=int(sys.argv[2])).run()
