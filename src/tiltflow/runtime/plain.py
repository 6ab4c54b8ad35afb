"""Values of any kind as JSON can hold them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor


def finite_or_none(value: float) -> float | None:
    """Return the value, or None for NaN and infinities."""
    return value if math.isfinite(value) else None


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it; a number that is not finite becomes None, an unknown object its text."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return finite_or_none(value)
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [plain(item) for item in value]
    return str(value)
