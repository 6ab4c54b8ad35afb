"""Access to the reference material that lies beside a development checkout; tests skip by name when it is absent."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

SHARED = Path(os.environ.get("TILTFLOW_SHARED", Path(__file__).resolve().parents[2] / "shared"))
requires_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the golden reference folder is not beside this checkout (set TILTFLOW_SHARED)"
)


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description and the tensors of one golden fixture, such as "algorithms/ram_target"."""
    path = SHARED / "golden" / name
    tensors = path.with_suffix(".safetensors")
    meta = json.loads(path.with_suffix(".json").read_text())
    return meta, load_file(tensors) if tensors.exists() else {}


def case_tensors(tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """Return the tensors of case `index` without their number."""
    return {key.split(".", 1)[1]: value for key, value in tensors.items() if key.startswith(f"{index}.")}
