"""The custom rewards of the guide, executed as printed there: only the import lines are changed.

Two of them cannot be called as printed: one calls `self._score_batch`, which the guide leaves to the reader, and one
calls `torch.zeros_like` on a list of strings. A test supplies the first and replaces the second.
"""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.rewards.samples import batch, entry
from tests.shared import SHARED, requires_shared
from tiltflow.rewards import RewardEngine

IMPORTS = """
from typing import List, Optional, Union
import torch
from accelerate import Accelerator
from PIL import Image
from tiltflow.rewards import GroupwiseRewardModel, PointwiseRewardModel, RewardArguments, RewardModelOutput
"""
MODULE = "rewards_of_the_guide"

pytestmark = requires_shared


def printed(name: str) -> str:
    """Return the text of a class as the guide prints it: from its first line to the next one that is not indented."""
    (guide,) = (SHARED / "seeds").glob("001*.txt")
    lines = guide.read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(f"class {name}("))
    last = first + 1
    while not lines[last].strip() or lines[last].startswith(" "):
        last += 1
    return "\n".join(lines[first:last])


@pytest.fixture
def guide(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return a module with the three classes."""
    module = ModuleType(MODULE)
    names = ("MyPointwiseReward", "MyGroupwiseReward", "TensorBasedReward")
    text = IMPORTS + "\n\n".join(printed(name) for name in names)
    run: Any = compile(text, MODULE, "exec")
    exec(run, vars(module))
    monkeypatch.setitem(sys.modules, MODULE, module)
    return module


def score(name: str, **fields: Any) -> list[float]:
    samples = batch([0.1, 0.9, 0.5], groups=[4, 4, 4])
    return RewardEngine([entry("mine", f"{MODULE}.{name}", **fields)]).score(samples).column("mine").tolist()


def test_the_pointwise_example_runs_as_printed(guide: ModuleType) -> None:
    assert score("MyPointwiseReward", batch_size=2) == [0.0, 0.0, 0.0]


def test_the_groupwise_example_runs_with_the_method_that_it_leaves_out(guide: ModuleType) -> None:
    sizes: list[int] = []

    def score_batch(self: Any, prompt: list[str], image: list[Any]) -> torch.Tensor:
        sizes.append(len(prompt))
        return torch.tensor([float(item.getpixel((0, 0))[0]) for item in image])

    guide.MyGroupwiseReward._score_batch = score_batch
    assert score("MyGroupwiseReward", batch_size=2) == pytest.approx([0, 2 / 3, 1 / 3])
    assert sizes == [2, 1]


def test_the_tensor_example_is_given_tensors(guide: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "zeros_like", lambda prompt, *, dtype: torch.zeros(len(prompt), dtype=dtype))
    assert score("TensorBasedReward") == [0.0, 0.0, 0.0]
