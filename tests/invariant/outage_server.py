"""A reward server that takes its time and writes down what it scores, so that a test can kill it midway."""

import sys
import time
from pathlib import Path

from tiltflow.serving import RewardServer


class SlowRedness(RewardServer):
    """Mean level of red, in 0.1 s per call; the call that comes to sample `last` takes minutes."""

    use_array_inputs = True

    def __init__(self, *, log, last, **kwargs):
        super().__init__(**kwargs)
        self.log = log
        self.last = last
        self.scored = 0

    def compute_reward(self, prompts, images=None):
        with Path(self.log).open("a") as log:
            log.write(f"{len(prompts)}\n")
        self.scored += len(prompts)
        time.sleep(0.1 if self.last is None or self.scored < self.last else 600)
        return [float(image[..., 0].mean()) / 255 * 10 for image in images]


if __name__ == "__main__":
    last = int(sys.argv[3]) if len(sys.argv) > 3 else None
    SlowRedness(log=sys.argv[1], last=last, port=int(sys.argv[2])).run()
