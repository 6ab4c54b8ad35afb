"""Language reward models through the command line and on two processes, from text to a reward."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.invariant.runs import launch
from tests.reward_training.processes import command
from tests.reward_training.real_text import save_model, write_pairs
from tests.scorers.tiny_language import save_causal
from tiltflow.cli import main
from tiltflow.reward_training import REWARD_MODEL_CLASS_DICT, RewardModelType
from tiltflow.rewards import build_reward
from tiltflow.scorers import LanguageRewardModel


def write_config(folder: Path, **sections) -> str:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(folder / "run"), **sections}))
    return str(path)


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_real_text_from_pairs_to_a_reward(tmp_path, capsys):
    train, test, texts = write_pairs(tmp_path)
    torch.manual_seed(0)
    base = save_model(tmp_path / "base", texts)
    config = write_config(
        tmp_path,
        model={"reward_model_type": "binary_ranking", "pretrained": str(base), "append_eos": True},
        data={"train": str(train), "validation": {"held_out": str(test), "seen": str(train)}},
        train={
            "batch_size": 32,
            "lr": 4e-3,
            "min_lr": 4e-4,
            "warmup_steps": 10,
            "constant_steps": 0,
            "max_steps": 60,
            "max_epochs": None,
            "validate_every": 20,
            "limit_validation_batches": 6,
            "keep_best": {"metric": "validation_held_out/acc", "mode": "max"},
        },
    )
    assert main(["train-reward", config]) == 0
    last = rows_of(tmp_path)[-1]
    assert last["validation_held_out/acc"] >= 0.95 and last["validation_seen/acc"] >= 0.95
    folder = tmp_path / "run" / "model"

    pairs = [json.loads(line) for line in test.read_text().splitlines()]
    texts = [pair[side] for pair in pairs[:50] for side in ("chosen", "rejected")]
    reward = build_reward("LanguageReward", model=str(folder))
    scores = torch.as_tensor(reward(prompt=texts).rewards)
    assert (scores[0::2] > scores[1::2]).float().mean() >= 0.94
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = AutoModelForSequenceClassification.from_pretrained(folder).eval()(**batch).logits[:, 0]
    torch.testing.assert_close(scores, logits, atol=1e-5, rtol=1e-5)

    capsys.readouterr()
    output = tmp_path / "result.json"
    assert main(["evaluate-reward", str(folder), str(test), "--output", str(output)]) == 0
    assert json.loads(output.read_text())["overall"]["accuracy"] >= 0.95


@pytest.mark.parametrize("kind", ["binary_ranking", "regression"])
def test_a_run_by_the_command_line_is_resumed_and_leaves_a_classifier(tmp_path, capsys, kind):
    base = save_causal(tmp_path / "base")
    if kind == "regression":
        records = [{"text": f"w{n} " * (n % 4 + 1), "label": [n % 5, -100 if n % 2 else 1]} for n in range(16)]
        head = {"num_attributes": 2, "attribute_names": ["kind", "long"]}
    else:
        records = [{"chosen": f"w{n} good", "rejected": "bad " * (n % 3 + 1)} for n in range(16)]
        head = {}
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(record) for record in [*records, {"text": 3}]))
    config = write_config(
        tmp_path,
        model={"reward_model_type": kind, "pretrained": str(base), "head": head, "lora": {"rank": 2}},
        data={"train": str(tmp_path / "data.jsonl"), "validation": str(tmp_path / "data.jsonl")},
        train={"batch_size": 4, "schedule": "constant", "constant_steps": 0, "gradient_checkpointing": True},
    )
    assert main(["train-reward", config]) == 2
    assert f"{tmp_path / 'data.jsonl'}, line 17: missing key" in capsys.readouterr().err
    assert main(["train-reward", config, "--on_bad_record", "skip", "--max_steps", "2"]) == 0
    assert "; train: missing key, left out: 1; " in capsys.readouterr().err
    assert main(["train-reward", config, "--on_bad_record", "skip", "--max_epochs", "2"]) == 0
    assert "resuming" in capsys.readouterr().err
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert {"train/loss", "validation/loss", "lr", "grad_norm"} <= rows[-1].keys()
    found = LanguageRewardModel.from_pretrained(tmp_path / "run" / "model").eval()
    assert found.score(["w1"]).shape == ((1, 2) if kind == "regression" else (1,))
    adapted = LanguageRewardModel.from_pretrained(tmp_path / "run" / "model" / "adapter").eval()
    torch.testing.assert_close(adapted.score(["w1 w2"]), found.score(["w1 w2"]), atol=1e-5, rtol=1e-5)


def start(folder: Path, *, kind: str, base: str, data: Path, processes: int, parallel: str) -> list[dict[str, Any]]:
    """Run the program and return what each process found."""
    folder.mkdir()
    program = ["-m", "tests.reward_training.language_processes", kind, base, data, folder, parallel]
    launch([*command(processes, parallel), *program])
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


def write_data(folder: Path, kind: str) -> Path:
    """Write 21 records of very unequal lengths; of ratings, every second lacks one of its two."""
    if kind == "regression":
        records = [{"text": f"w{n} " * (n % 7 + 1), "label": [n % 5, -100 if n % 3 else 1]} for n in range(21)]
    else:
        records = [{"chosen": f"w{n} good " * (n % 7 + 1), "rejected": f"w{n} bad " * (n % 3 + 1)} for n in range(21)]
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"), [(each.value, REWARD_MODEL_CLASS_DICT[each].__name__) for each in RewardModelType]
)
def test_two_processes_make_the_run_of_one(tmp_path, kind, name):
    base, data = save_causal(tmp_path / "base"), write_data(tmp_path, kind)
    run = partial(start, kind=kind, base=base, data=data)
    (alone,) = run(tmp_path / "alone", processes=1, parallel="ddp")
    for parallel in ("ddp", "fsdp"):
        first, second = run(tmp_path / parallel, processes=2, parallel=parallel)
        assert first["loss"] == second["loss"] == pytest.approx(alone["loss"], abs=1e-6)
        assert first["metrics"] == second["metrics"] == pytest.approx(alone["metrics"], abs=1e-6)
        for one, other in zip(first["steps"], alone["steps"], strict=True):
            one, other = ({k: v for k, v in step.items() if not k.endswith("seconds")} for step in (one, other))
            assert one == pytest.approx(other, abs=1e-6, rel=1e-6)
        texts = ["w1 good", "bad w3 w3"]
        folders = (tmp_path / each / "model" for each in ("alone", parallel))
        scores = [LanguageRewardModel.from_pretrained(folder).eval().score(texts) for folder in folders]
        torch.testing.assert_close(*scores, atol=1e-6, rtol=1e-6)
        if parallel == "fsdp":  # weights are gathered layer by layer, and as often on every process
            assert sorted(first["units"]) == sorted([name, "LlamaDecoderLayer", "LlamaDecoderLayer"])
            assert len(first["calls"]) == len(second["calls"])
        else:
            assert first["units"] == []
            # Buckets follow from each process's own lengths; DDP minds no unequal number of calls.
            assert kind == "regression" or len(first["calls"]) != len(second["calls"])
