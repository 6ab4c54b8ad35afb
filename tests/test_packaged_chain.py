"""The two packaged configs one after the other: pairs, a reward model, a generator that is tilted towards it."""

import math
from pathlib import Path

import pytest

from tiltflow import cli
from tiltflow.evaluation import EvaluationResult, paired_difference
from tiltflow.runtime.tracking import read_jsonl


@pytest.mark.slow
def test_pairs_become_a_reward_and_the_reward_a_better_generator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user types it, in some 25 minutes of two cores."""
    monkeypatch.chdir(tmp_path)  # shapes_pickscore names the other's model by its path
    assert cli.main(["train-reward", "shapes_preference", "--tracking.console", "false"]) == 0
    rows = read_jsonl(Path("outputs/shapes_preference/metrics.jsonl"))
    assert max(row.get("validation/acc", 0.0) for row in rows) >= 0.85  # of held-out prompts; measured: 0.862

    assert cli.main(["train", "shapes_pickscore", "--tracking.console", "false"]) == 0
    folder = Path("outputs/shapes_pickscore/evaluations")
    before, after = (EvaluationResult.load(folder / f"{name}.json") for name in ("before", "after"))
    assert paired_difference(before, after, "shapes_pickscore").low > 0.5  # measured: +1.37 [0.91, 1.90]
    tilted = paired_difference(before, after, "geneval_strict")
    assert math.isfinite(tilted.value) and tilted.count == 360
    assert tilted.low > 0  # what the pairs were made from has risen too; measured: +0.159 [0.088, 0.234]
