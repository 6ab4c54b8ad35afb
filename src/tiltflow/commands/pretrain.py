"""`tiltflow pretrain`: a small model from nothing."""

import sys
import time
from pathlib import Path

from tiltflow.training.pretrain import PretrainConfig, pretrain


def run_pretraining(config: PretrainConfig) -> Path:
    """Make a model from scratch, telling every fifty steps how far it is."""
    began = time.perf_counter()

    def log(stage: str, step: int, loss: float) -> None:
        if step % 50 == 0:
            print(f"{stage} {step}  loss {loss:.4f}  {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)

    return pretrain(config, log=log)
