"""Pairs per second of reward training beside TRL's `RewardTrainer`: one JSON line.

    python -m benchmarks.reward_training             # a tiny Llama, 256 pairs, three rounds
    python -m benchmarks.reward_training --rounds 1 --pairs 128

Both sides train the same classifier from the same weights on the same tokens with the same optimiser (AdamW, same rate,
decay and clipping), the same global batch in micro-batches of the same number of pairs, in float32, each in a process
of its own; the sides take turns, and the medians over the rounds count. Tokenising comes before the clock, and so does
the first step. `speedup_over_trl` compares with TRL as it comes, in random order; `speedup_over_trl_grouped` with its
`train_sampling_strategy="group_by_length"`. Memory is what the process needed at most above what it had when training
began: on a GPU what torch allocated at most, on the CPU the resident set.

The lengths are made like those of preference data: a prompt that both texts share, and answers of their own, log-normal
with sigma 0.7 and 0.9; the words are those of Python's manual.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.reward_training.real_text import misspelt, passages, save_model
from tiltflow.reward_training import LanguageDataConfig, LanguageModelConfig, build_language
from tiltflow.reward_training.fit_config import LanguageFitConfig
from tiltflow.reward_training.trainer import RewardTrainer
from tiltflow.runtime.distributed import Distributed
from tiltflow.scorers import LanguageRewardModel

SIDES = ("tiltflow", "trl", "trl_grouped")
MAX_LENGTH = 512  # tokens
BATCH, MICRO_BATCH = 32, 8  # pairs
OPTIMISER = {"lr": 5e-4, "weight_decay": 0.01, "max_grad_norm": 1.0, "betas": (0.9, 0.999)}


# --- what both sides are given ---------------------------------------------------------------------------------------


def write_task(folder: Path, pairs: int) -> None:
    """Write the classifier that both start from, and the pairs as text and as tokens."""
    texts = passages()
    torch.manual_seed(0)
    base = save_model(folder / "base", texts, width=128, layers=4)
    model = LanguageRewardModel.from_pretrained(base, append_eos=True)
    model.save_pretrained(folder / "model")
    words = " ".join(texts).split()
    generator, choose = np.random.default_rng(0), random.Random(0)

    def part(median: float, sigma: float, at_most: int) -> str:
        count = int(np.clip(generator.lognormal(np.log(median), sigma), 4, at_most))
        start = int(generator.integers(0, len(words) - count))
        return " ".join(words[start : start + count])

    lines = []
    for _ in range(pairs):
        prompt = part(25, 0.7, 110)
        chosen, rejected = part(40, 0.9, 190), misspelt(part(40, 0.9, 190), choose, words=8)
        lines.append({"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}"})
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    tokens = [{f"{side}_ids": model.encode(line[side])[:MAX_LENGTH] for side in line} for line in lines]
    (folder / "tokens.json").write_text(json.dumps(tokens))


def memory() -> float:
    """Return the most memory so far, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Clock:
    """Notes when steps end; the first one warms up."""

    def __init__(self) -> None:
        self._ends: list[float] = []
        self._before = memory()

    def tick(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._ends.append(time.perf_counter())

    def told(self, **more: float) -> dict[str, float]:
        """Return the rate in pairs per second and the memory in MiB."""
        seconds = self._ends[-1] - self._ends[0]
        rate = (len(self._ends) - 1) * BATCH / seconds
        return {"pairs_per_second": rate, "memory_mib": memory() - self._before, **more}


# --- the sides -------------------------------------------------------------------------------------------------------


def train_ours(folder: Path) -> dict[str, float]:
    fitting = build_language(
        LanguageModelConfig(reward_model_type="binary_ranking", pretrained=str(folder / "model")),
        LanguageDataConfig(train=str(folder / "pairs.jsonl"), max_length=MAX_LENGTH, over_length="truncate"),
    )
    config = LanguageFitConfig(
        max_epochs=1,
        batch_size=BATCH,
        micro_batch_size=MICRO_BATCH,
        schedule="constant",
        warmup_steps=0,
        constant_steps=0,
        min_lr=0.0,
        **OPTIMISER,
    )
    trainer = RewardTrainer(fitting, config, seed=0, distributed=Distributed())
    clock, losses = Clock(), []
    for step in trainer.run():
        clock.tick()
        losses.append(step.metrics["train/loss"])
    return clock.told(first_loss=losses[0], last_loss=statistics.mean(losses[-3:]))


def train_theirs(folder: Path, *, grouped: bool) -> dict[str, float]:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    rows = json.loads((folder / "tokens.json").read_text())
    for row in rows:
        row["length"] = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    arguments = RewardConfig(
        output_dir=str(folder / "trl"),
        num_train_epochs=1,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=BATCH // MICRO_BATCH,
        learning_rate=OPTIMISER["lr"],
        weight_decay=OPTIMISER["weight_decay"],
        max_grad_norm=OPTIMISER["max_grad_norm"],
        lr_scheduler_type="constant",
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
        train_sampling_strategy="group_by_length" if grouped else "random",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,  # or the lengths would be lost before they are needed
        use_cpu=not torch.cuda.is_available(),
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    trainer = RewardTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    clock = Clock()

    class Ticks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            clock.tick()

    trainer.add_callback(Ticks())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return clock.told(first_loss=losses[0], last_loss=statistics.mean(losses[-3:]))


# --- the comparison --------------------------------------------------------------------------------------------------


def run_side(side: str, folder: Path) -> dict[str, float]:
    """Train one side in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.reward_training", "--side", side, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(folder: Path, *, pairs: int, rounds: int) -> dict[str, Any]:
    write_task(folder, pairs)
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            found[side].append(run_side(side, folder))
    medians = {
        side: {key: statistics.median(each[key] for each in runs) for key in runs[0]} for side, runs in found.items()
    }
    ours = medians["tiltflow"]
    return {
        "benchmark": "reward_training",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "pairs": pairs,
        "batch": BATCH,
        "micro_batch": MICRO_BATCH,
        "speedup_over_trl": round(ours["pairs_per_second"] / medians["trl"]["pairs_per_second"], 3),
        "speedup_over_trl_grouped": round(ours["pairs_per_second"] / medians["trl_grouped"]["pairs_per_second"], 3),
        "memory_over_trl": round(ours["memory_mib"] / medians["trl"]["memory_mib"], 3),
        **{side: {key: round(value, 4) for key, value in each.items()} for side, each in medians.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side == "tiltflow":
        print(json.dumps(train_ours(arguments.folder)))
    elif arguments.side is not None:
        print(json.dumps(train_theirs(arguments.folder, grouped=arguments.side == "trl_grouped")))
    else:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(compare(Path(folder), pairs=arguments.pairs, rounds=arguments.rounds)))


if __name__ == "__main__":
    main()
