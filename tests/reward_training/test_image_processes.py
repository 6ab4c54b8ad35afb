"""An image-text reward model trained by one process and by two, with DDP and with FSDP2: the same numbers."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.invariant.runs import launch
from tests.reward_training.processes import command


def start(
    folder: Path, *, processes: int, kind: str, negatives: float
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Run the program and return the metrics of its steps, without times, and the weights that it saved."""
    folder.mkdir()
    program = ["-m", "tests.reward_training.image_processes", str(folder), kind, str(negatives)]
    launch([*command(processes, kind), *program])
    steps = json.loads((folder / "steps.json").read_text())
    kept = [{key: value for key, value in step.items() if not key.endswith("seconds")} for step in steps]
    return kept, load_file(folder / "model" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("negatives", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_make_the_run_of_one(tmp_path: Path, kind: str, negatives: float) -> None:
    steps, weights = start(tmp_path / "one", processes=1, kind="ddp", negatives=negatives)
    found, shared = start(tmp_path / "two", processes=2, kind=kind, negatives=negatives)
    told = [re.findall(r"-?[\d.]+", (tmp_path / count / "shown.json").read_text()) for count in ("one", "two")]
    ours, theirs = ([float(number) for number in numbers] for numbers in told)
    assert len(ours) == 4 * 2 * 3 and theirs == pytest.approx(ours, abs=0.011)
    units = json.loads((tmp_path / "two" / "units.json").read_text())
    assert units.count("CLIPEncoderLayer") == (2 if kind == "fsdp" else 0)  # one layer of each tower
    assert len(steps) == 6
    assert {"train/loss", "train/acc", "validation/loss"} <= steps[1].keys()
    assert found[0] == pytest.approx(steps[0], rel=1e-6, abs=1e-6)  # what is summed over processes is exact
    for one, two in zip(steps, found, strict=True):
        # From then on Adam scales up gradients that are 0 but for rounding. The loss, which sees only differences of
        # rewards, does not see what that moves: the level of all of them.
        for name, value in one.items():
            blind = name.endswith(("reward_mean", "reward_std", "grad_norm"))
            assert two[name] == pytest.approx(value, abs=5e-5 if blind else 2e-6, rel=2e-6), name
    assert weights.keys() == shared.keys()
    for name, weight in weights.items():
        # This one shifts all logits alike: its gradient is rounding, which Adam scales up.
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(shared[name], weight, atol=2e-4, rtol=0, msg=lambda text, n=name: f"{n}: {text}")
