"""`make demo`: tilt the embedded model towards its prompts and show what changed."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tiltflow.cli import main as cli_main
from tiltflow.evaluation import EvaluationResult, compare_table, paired_difference
from tiltflow.report import before_after_picture
from tiltflow.runtime.tracking import read_jsonl

CONFIG = "shapes_ram"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train `shapes_ram` from scratch into `--output_dir` (or continue there), then print before and after."""
    parser = argparse.ArgumentParser(prog="python -m tiltflow.demo.run", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", default="outputs/demo")
    known, rest = parser.parse_known_args(arguments)
    began = time.perf_counter()
    status = cli_main(["train", CONFIG, "--output_dir", known.output_dir, *rest])
    if status != 0:
        sys.exit(status)
    run_dir = Path(known.output_dir)
    print(f"\n{summary(run_dir)}")
    print(f"RESULT demo_seconds={time.perf_counter() - began:.0f}")
    print(f"RESULT report={run_dir / 'report.html'}")


def summary(run_dir: Path) -> str:
    """Return the before/after table and RESULT lines of a finished demo run, and draw `before_after.png` in it."""
    before, after = (EvaluationResult.load(run_dir / "evaluations" / f"{name}.json") for name in ("before", "after"))
    before_after_picture(run_dir, run_dir / "before_after.png")
    difference = paired_difference(before, after, "geneval_strict")
    lines = [compare_table([before, after]), "", f"strict GenEval on held-out prompts changed by {difference}", ""]
    for key in ("geneval_strict", "geneval_partial"):
        for result in (before, after):
            lines.append(f"RESULT {key}_{result.name}={result.summary[key].value:.4f}")
    lines.append(f"RESULT train_seconds={train_seconds(run_dir):.0f}")
    return "\n".join(lines)


def train_seconds(run_dir: Path) -> float:
    """Return the seconds that all epochs of a run took, without evaluation."""
    return sum(row.get("seconds/epoch", 0.0) for row in read_jsonl(run_dir / "metrics.jsonl"))


if __name__ == "__main__":
    main()
