"""Post-training algorithms: one file each, a pure loss beside the class that applies it."""

from tiltflow.algorithms.base import Algorithm, NoisedBatch, Snapshot, Velocities
from tiltflow.algorithms.ram import RAM, RAMConfig, ram_loss, ram_target

# name -> (algorithm, its config)
ALGORITHMS = {"ram": (RAM, RAMConfig)}

__all__ = [
    "ALGORITHMS",
    "RAM",
    "Algorithm",
    "NoisedBatch",
    "RAMConfig",
    "Snapshot",
    "Velocities",
    "ram_loss",
    "ram_target",
]
