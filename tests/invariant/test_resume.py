"""A run killed at any moment and started again ends with the weights of a run that was left alone, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.invariant.runs import ROOT, environment, final_weights, train, write_config

SLOW_REWARD = [{"name": "brightness", "reward_model": "tests.rewards_for_tests.SlowBrightness"}]


def killed_run(config, marks, *, after_marks, delay):
    """Start a run, wait until it has scored `after_marks` batches, wait `delay` seconds more, and kill -9 it.

    However late that comes, the run does not get beyond its second batch from then.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "tiltflow", "train", str(config)],
        env=environment(TILTFLOW_TEST_MARKS=str(marks), TILTFLOW_TEST_LAST=str(after_marks + 2)),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if marks.exists() and len(marks.read_text().splitlines()) >= after_marks:
            break
        time.sleep(0.02)
    time.sleep(delay)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return alive


# Prompts that come again in later epochs: a resumed run must not meet other bits of their embeddings.
RECURRING = {"tag_shares": {"single_object": 1, "counting": 1}}


@pytest.mark.parametrize(("finetune", "data"), [("lora", RECURRING), ("full", {})])
def test_kill_and_resume_equals_uninterrupted(random_sd3, tmp_path, finetune, data):
    options = {"policy": {"finetune": finetune}, "rewards": SLOW_REWARD, "train": {"epochs": 5}, "data": data}
    marks = tmp_path / "marks"
    whole = write_config(tmp_path / "whole.yaml", random_sd3, tmp_path / "whole", **options)
    train(whole, TILTFLOW_TEST_MARKS=str(tmp_path / "whole_marks"))

    broken = write_config(tmp_path / "broken.yaml", random_sd3, tmp_path / "broken", **options)
    moment = random.Random(os.getpid())
    # one batch scores the evaluation before training; every epoch scores one more
    after_marks, delay = moment.randint(3, 4), moment.uniform(0, 0.2)
    print(f"killed {delay:.3f} s after batch {after_marks}")  # shown when the test fails
    assert killed_run(broken, marks, after_marks=after_marks, delay=delay)
    told = train(broken, TILTFLOW_TEST_MARKS=str(marks))
    assert "resuming" in told

    expected, resumed = final_weights(tmp_path / "whole"), final_weights(tmp_path / "broken")
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    rows = [json.loads(line) for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in rows if "eval/brightness" in row] == [0, 5]


def test_a_damaged_latest_is_noticed_and_the_checkpoint_before_is_used(random_sd3, tmp_path):
    config = write_config(tmp_path / "run.yaml", random_sd3, tmp_path / "run", train={"epochs": 3})
    train(config)
    expected = final_weights(tmp_path / "run")
    damaged = (tmp_path / "run" / "latest").resolve() / "weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    told = train(config)
    assert "epoch_000003" in told and "truncated" in told and "epoch_000002" in told
    assert "resuming" in told and "after epoch 2" in told
    repaired = final_weights(tmp_path / "run")
    assert all(torch.equal(expected[name], repaired[name]) for name in expected)
