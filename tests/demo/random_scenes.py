"""Scenes for the tests, of any shapes and colours."""

import numpy as np

from tiltflow.demo.scenes import SceneObject, sample_scene
from tiltflow.demo.vocabulary import SHAPES


def random_scene(rng: np.random.Generator, *, count: int | None = None) -> list[SceneObject]:
    """Sample 1-4 objects of random shapes and colours, placed without overlap."""
    count = count or int(rng.integers(1, 5))
    include = [{"class": SHAPES[int(rng.integers(len(SHAPES)))], "count": 1} for _ in range(count)]
    return sample_scene({"include": include}, rng)
