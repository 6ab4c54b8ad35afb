"""A server whose model goes wrong when a file tells it to; whichever call finds the file first obeys, once."""

import json
import os
import signal
import sys
import time
import zlib
from pathlib import Path

from tiltflow.serving import RewardServer

FAULTS = ("raise", "hang", "kill")


class Fingerprint(RewardServer):
    """A number that every other prompt, bit or size would change, exact in float32."""

    required_fields = ("prompt",)
    use_array_inputs = True

    def __init__(self, *, faults, **kwargs):
        super().__init__(**kwargs)
        self.faults = Path(faults)

    def compute_reward(self, prompts, images=None):
        for fault in FAULTS:
            if self.told(fault):
                self.misbehave(fault)
        if any(prompt.startswith("poison") for prompt in prompts):
            raise ValueError("this one cannot be scored")
        images = images or [None] * len(prompts)
        return [fingerprint(prompt, image) for prompt, image in zip(prompts, images, strict=True)]

    def told(self, fault):
        try:
            (self.faults / fault).unlink()
        except FileNotFoundError:
            return False
        return True

    def misbehave(self, fault):
        if fault == "raise":
            raise RuntimeError("bad luck")
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1000)


def fingerprint(prompt, image):
    if prompt.startswith("nan"):
        return float("nan")
    seen = zlib.crc32(prompt.encode())
    return float((seen if image is None else zlib.crc32(repr(image.shape).encode() + image.tobytes(), seen)) >> 8)


if __name__ == "__main__":
    Fingerprint(**json.loads(sys.argv[1])).run()
