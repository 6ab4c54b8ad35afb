"""Image-text reward models by the command: config, pairs, trainer, files; and the whole chain on the drawn world."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.data.test_image_preferences import write_lines
from tests.invariant.runs import ROOT, launch
from tests.scorers.tiny_clip import save_tokenizer, tiny_model, to_open_clip
from tests.test_report import Page
from tiltflow import cli
from tiltflow.commands.reward_config import load_reward_config
from tiltflow.config import load_run_config
from tiltflow.demo.preferences import DrawnPreferences
from tiltflow.errors import ConfigError, DataError
from tiltflow.report import write_reward_report
from tiltflow.reward_training.base import Fitting
from tiltflow.reward_training.image_text_fit import (
    ImageTextDataConfig,
    ImageTextModelConfig,
    ImageTextRunConfig,
    build_image_text,
    build_model,
)
from tiltflow.rewards import build_reward
from tiltflow.runtime.tracking import JsonlTracker, read_jsonl

SMALL = {"vision_width": 16, "vision_layers": 1, "text_width": 16, "text_layers": 1, "embedding": 8, "patch_size": 16}


def write(folder: Path, **sections: Any) -> Path:
    """Write the config of a short run; it goes to `<folder>/out`."""
    values: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "model": {"reward_model_type": "image_text", "from_scratch": SMALL},
        "data": {
            "train": {"drawn": {"pairs": 40, "label_noise": 0.1}},
            "validation": {"held_out": {"drawn": {"pairs": 21, "prompts": "test"}}},
        },
        "train": {"max_steps": 4, "batch_size": 16, "micro_batch_size": 8, "warmup_steps": 1, "validate_every": 2},
        "tracking": {"console": False},
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(values.get(name), dict) else section
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_run_ends_with_a_model_that_scores(tmp_path: Path) -> None:
    best = {"keep_best": {"metric": "validation/acc", "mode": "max"}}
    assert cli.main(["train-reward", str(write(tmp_path, train={**best, "max_steps": 4}))]) == 0
    rows = list(read_jsonl(tmp_path / "out" / "metrics.jsonl"))
    measured = [row for row in rows if "validation/acc" in row]
    assert len(measured) == 2
    assert all(row["validation/pairs"] == 21 for row in measured)  # every one once, in batches that do not divide them
    assert {"train/loss", "train/acc", "train/logit_scale", "train/skipped"} <= rows[0].keys()
    reward = build_reward("PickScore", device="cpu", model_name_or_path=str(tmp_path / "out" / "model"))
    assert (
        torch.as_tensor(reward(prompt=["a photo of a star"], image=torch.rand(1, 3, 64, 64)).rewards).isfinite().all()
    )
    assert (tmp_path / "out" / "report.html").is_file()


def test_validation_pairs_are_shown_in_the_report_and_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[str, int, list[str], int]] = []

    def log_images(self: JsonlTracker, name: str, images: Any, captions: Any, *, step: int) -> None:
        logged.append((name, len(images), list(captions), step))

    monkeypatch.setattr(JsonlTracker, "log_images", log_images)
    held_out = {"drawn": {"pairs": 30, "prompts": "test"}}
    sets = {"validation": {"held_out": held_out, "few": {"drawn": {"pairs": 3}}}}
    config = write(tmp_path, data=sets)
    assert cli.main(["train-reward", str(config)]) == 0
    found = [(name, count, step) for name, count, _, step in logged]
    assert found == [
        (name, count, step) for step in (2, 4) for name, count in (("examples/few", 6), ("examples/held_out", 16))
    ]
    out = tmp_path / "out"
    shown = json.loads((out / "examples" / "examples.json").read_text())
    assert [each["set"] for each in shown] == ["few"] * 3 + ["held_out"] * 8

    # What is told is what the finished model gives, which is the last one here.
    reward = build_reward("PickScore", device="cpu", model_name_or_path=str(out / "model"), divisor=1)
    for each in shown:
        images = [to_tensor(out / "examples" / file) for file in each["images"]]
        scores = torch.as_tensor(reward(prompt=[each["caption"]] * 2, image=torch.stack(images)).rewards)
        for note, score, chance in zip(each["notes"], scores, scores.softmax(0), strict=True):
            told = re.fullmatch(r"label (0|1|0\.5), reward (-?[\d.]+), probability ([\d.]+)", note)
            assert told is not None
            assert float(told[2]) == pytest.approx(score.item(), abs=0.01)
            assert float(told[3]) == pytest.approx(chance.item(), abs=0.011)
    page = Page((out / "report.html").read_text())
    assert page.tags.count("img") == 22 and all(each.startswith("data:image/png;") for each in page.resources)
    assert all(note in page.text for each in shown for note in each["notes"])
    (out / "examples" / "examples.json").write_text("[1]")
    assert "examples/examples.json cannot be read" in write_reward_report(out).read_text()


def to_tensor(path: Path) -> torch.Tensor:
    """Return an image, `[3, H, W]` in [0, 1]."""
    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1) / 255


def test_micro_batches_change_nothing(tmp_path: Path) -> None:
    losses = []
    for size in (4, 16):
        (tmp_path / str(size)).mkdir()
        config = write(tmp_path / str(size), train={"micro_batch_size": size, "max_steps": 4, "batch_size": 16})
        assert cli.main(["train-reward", str(config)]) == 0
        rows = read_jsonl(tmp_path / str(size) / "out" / "metrics.jsonl")
        losses.append([row["train/loss"] for row in rows if "train/loss" in row])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("negatives", [0.0, 0.5])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, negatives: float) -> None:
    ends = []
    for name, stops in (("whole", [6]), ("broken", [2, 3, 6])):
        (tmp_path / name).mkdir()
        model = {"in_batch_negatives": negatives}
        config = write(tmp_path / name, model=model, train={"schedule": "constant", "save_every": 1, "max_steps": 6})
        for stop in stops:
            assert cli.main(["train-reward", str(config), "--max_steps", str(stop)]) == 0
        out = tmp_path / name / "out"
        rows = [
            {key: value for key, value in row.items() if key.startswith(("train/", "grad", "lr"))}
            for row in read_jsonl(out / "metrics.jsonl")
        ]
        files = ("latest/weights.safetensors", "latest/optimizer.safetensors", "model/model.safetensors")
        ends.append((rows, [(out / file).read_bytes() for file in files]))
    assert len(ends[0][0]) == 6 and ends[0] == ends[1]


def bad_images(folder: Path) -> dict[str, Any]:
    """Write twelve pairs, one broken line, two with a file that is no image and one of twice the same image.

    Returns:
        The sections of a config whose batches of two hold each pair twice, in the order of the lines.
    """
    places = (0, 2, 4, 5, 6, 7, 0, 2, 4, 5)
    good = [{"image_0": f"images/{place}.png", "prompt": f"image {index}"} for index, place in enumerate(places)]
    bad = {"image_0": "images/3.png", "prompt": "bad"}
    lines = [*good[:2], bad, bad, *good[2:5], {"image_0": "images/1.png"}, *good[5:], "{broken"]
    data = write_lines(folder / "data", *lines)
    (folder / "data" / "images" / "3.png").write_text("no image")
    return {
        "data": {
            "train": {"source": str(data)},
            "validation": {"same": {"source": str(data)}},
            "on_bad_record": "skip",
            "on_bad_image": "skip",
        },
        "train": {"max_steps": 13, "batch_size": 2, "micro_batch_size": 1, "warmup_steps": 0, "shuffle": False},
    }


SETS = ("train", "validation same")
LEFT_OUT = {"broken JSON": 1, "identical images": 1, "unreadable image": 2}


def test_bad_images_are_left_out_and_told(tmp_path: Path) -> None:
    sections = bad_images(tmp_path)
    assert cli.main(["train-reward", str(write(tmp_path, **sections))]) == 0
    rows = [row for row in read_jsonl(tmp_path / "out" / "metrics.jsonl") if "train/loss" in row]
    # Thirteen pairs are read twice in 14 steps of two, the last step of an epoch having one pair; the run has 13.
    assert [row["train/skipped"] for row in rows] == [0, 2, 0, 1, 0, 0, 0, 0, 2, 0, 1, 0, 0]
    assert [row["train/pairs"] for row in rows] == [2, 0, 2, 1, 2, 2, 1, 2, 0, 2, 1, 2, 2]
    assert rows[1]["train/loss"] is None
    described = json.loads((tmp_path / "out" / "data.json").read_text())
    assert described["left_out"] == {f"{name}: {why}": n for name in SETS for why, n in LEFT_OUT.items()}
    report = (tmp_path / "out" / "report.html").read_text()
    assert "Nothing was left out" not in report
    assert "train: unreadable image" in report


def test_a_run_that_a_bad_pair_has_stopped_goes_on_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its message says what to set; doing so must not be refused."""
    data = write_lines(tmp_path / "data", *({"image_0": f"images/{place}.png"} for place in (0, 2, 4, 1)))
    train = {"max_steps": 5, "batch_size": 1, "warmup_steps": 0, "shuffle": False, "save_every": 1, "workers": 0}
    config = str(write(tmp_path, data={"train": {"source": str(data)}, "validation": {}}, train=train))
    assert cli.main(["train-reward", config]) == 2
    assert (
        "line 4: the preferred image is the other one; remove the pair; or leave such pairs out with --on_bad_image "
        "skip --on_bad_record skip (keys of a config too)" in capsys.readouterr().err
    )
    assert cli.main(["train-reward", config, "--on_bad_image", "skip", "--on_bad_record", "skip"]) == 0
    told = capsys.readouterr().err
    assert "goes on with another value: data.on_bad_record: 'error' -> 'skip'" in told and "after step 3" in told
    described = json.loads((tmp_path / "out" / "data.json").read_text())
    assert described["left_out"] == {"train: identical images": 1}


@pytest.mark.slow
def test_two_processes_tell_together_what_was_left_out(tmp_path: Path) -> None:
    config = write(tmp_path, **bad_images(tmp_path))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [sys.executable, *launcher, "-m", "tiltflow", "train-reward", str(config)]
    launch(words)
    rows = [row for row in read_jsonl(tmp_path / "out" / "metrics.jsonl") if "train/loss" in row]
    assert [row["train/skipped"] for row in rows] == [0, 2, 0, 1, 0, 0, 0, 0, 2, 0, 1, 0, 0]
    described = json.loads((tmp_path / "out" / "data.json").read_text())
    assert described["left_out"] == {f"{name}: {why}": n for name in SETS for why, n in LEFT_OUT.items()}


def test_a_resumed_run_knows_what_was_left_out_before(tmp_path: Path) -> None:
    sections = bad_images(tmp_path)
    config = str(write(tmp_path, **sections))
    stop = ["--max_seconds", "0.000001", "--train.workers", "0"]
    found = []
    for _ in range(13):
        assert cli.main(["train-reward", config, *stop]) == 0
        found.append(json.loads((tmp_path / "out" / "data.json").read_text())["left_out"])
    train = [{why: count for why, count in each.items() if why.startswith("train")} for each in found]
    unreadable = [each.get("train: unreadable image", 0) for each in train]
    assert unreadable == [0, *([2] * 12)]  # each record once, however often it is read
    assert [each.get("train: identical images", 0) for each in train] == [*([0] * 3), *([1] * 10)]
    assert all(each["validation same: unreadable image"] == 2 for each in found)
    assert cli.main(["train-reward", config, *stop]) == 0  # which has no step left
    assert json.loads((tmp_path / "out" / "data.json").read_text())["left_out"] == found[-1]


def test_a_set_may_have_filters_of_its_own(tmp_path: Path) -> None:
    tie = {"label_0": 0.5, "label_1": 0.5}
    source = {"source": str(write_lines(tmp_path, {}, {}, tie, {"prompt": "a dog"}))}
    values = {
        "train": source,
        "validation": {
            "same": source,
            "ties": {**source, "filter_ties": False, "weight_by_prompt": False},
            "all": {**source, "filter_ties": False, "pairs_per_prompt": "all"},
            "one": {**source, "pairs_per_prompt": 1},
        },
        "filter_ties": True,
        "weight_by_prompt": True,
        "pairs_per_prompt": 2,
    }
    data = ImageTextDataConfig.model_validate(values)
    again = ImageTextDataConfig.model_validate(data.model_dump())  # as a run's folder keeps it
    for each in (data, again):
        model = ImageTextModelConfig.model_validate({"from_scratch": SMALL})
        fitting = build_image_text(model, each, seed=0)
        sets = {"train": fitting.train, **fitting.validation}
        assert {name: len(pairs) for name, pairs in sets.items()} == {
            "train": 3,
            "same": 3,
            "ties": 3,
            "all": 4,
            "one": 2,
        }
        weights = {name: pairs.batch([0], [1.0])["weight"].item() for name, pairs in sets.items()}
        assert weights == pytest.approx({"train": 0.5, "same": 0.5, "ties": 1, "all": 1 / 3, "one": 1})


def test_captions_that_are_too_long_are_counted(tmp_path: Path) -> None:
    long = " ".join(["a photo of a cat"] * 5)
    path = write_lines(tmp_path, {}, {"prompt": long}, {"prompt": long}, {"prompt": "a dog"})
    model = ImageTextModelConfig.model_validate({"from_scratch": {**SMALL, "text_tokens": 16}})

    def fitting(**options: Any) -> Fitting:
        data = {"train": {"source": str(path)}, "validation": {"same": {"source": str(path)}}, **options}
        return build_image_text(model, ImageTextDataConfig.model_validate(data), seed=0)

    cut = fitting()
    assert (len(cut.train), len(cut.validation["same"])) == (4, 4)
    told = "longer than 16 tokens, truncated"
    assert cut.left_out() == {f"train: {told}": 2, f"validation same: {told}": 2}
    filtered = fitting(over_length="filter")
    assert (len(filtered.train), len(filtered.validation["same"])) == (2, 2)
    assert filtered.train.batch([0, 1], [1, 1])["prompt"] == ["a cat", "a dog"]
    assert filtered.left_out()["train: longer than 16 tokens, left out"] == 2
    with pytest.raises(DataError, match=r"pairs.jsonl, line 2: 27 tokens are more than the 16 that the model reads"):
        fitting(over_length="error")
    short = write_lines(tmp_path, {"prompt": " ".join(["cat"] * 14)})  # with both ends 16 tokens, not one too many
    assert fitting(train={"source": str(short)}, validation={}, over_length="error").left_out() == {}


def test_a_run_starts_from_a_file_of_open_clip(tmp_path: Path) -> None:
    network, words = tiny_model(), save_tokenizer(tmp_path / "words")
    torch.save({"state_dict": to_open_clip(network)}, tmp_path / "HPS.pt")
    values = {"pretrained": str(tmp_path / "HPS.pt"), "hidden_act": "gelu", "tokenizer": str(words)}
    model = build_model(ImageTextModelConfig.model_validate(values), [], seed=0)
    weight = model.model.backbone.model.visual_projection.weight
    torch.testing.assert_close(weight, network.visual_projection.weight.detach())
    assert weight.requires_grad
    with pytest.raises(ValueError, match="does not say its hidden_act; set it"):
        ImageTextModelConfig.model_validate({"pretrained": values["pretrained"]})
    with pytest.raises(ValueError, match="belongs to a file of open_clip, and pretrained=None is no file"):
        ImageTextModelConfig.model_validate({"from_scratch": {}, "hidden_act": "gelu"})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.freeze_vison", "true", "freeze_vision"),
        ("model.pretrained", "x", "give either pretrained"),
        ("data.train", "{source: x, drawn: {}}", "give either source"),
        ("data.train", "{drawn: {}, split: train}", "belongs to a source"),
        ("data.on_bad_image", "ignore", "on_bad_image"),
        ("model.in_batch_negatives", "2", "in_batch_negatives"),
        ("data.train", "{drawn: {label_noise: 0.6}}", "label_noise"),
        ("data.train", "{drawn: {}, columns: {prompt: text}}", "belongs to a source"),
        ("data.over_length", "cut", "over_length"),
    ],
)
def test_wrong_configs_are_told(key: str, value: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_reward_config(str(write(tmp_path)), [(key, value)])


def test_the_defaults_are_the_published_ones(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    model = {"reward_model_type": "image_text", "pretrained": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}
    path.write_text(yaml.safe_dump({"model": model, "data": {"train": {"source": "yuvalkirstain/pickapic_v1"}}}))
    _, config = load_reward_config(str(path))
    train = config.train
    assert (train.lr, train.betas, train.weight_decay, train.schedule) == (3e-6, (0.9, 0.999), 0.01, "linear")
    assert (train.warmup_steps, train.max_steps, train.batch_size, train.max_grad_norm) == (500, 4000, 128, 1.0)
    assert isinstance(config, ImageTextRunConfig)
    assert (config.model.in_batch_negatives, config.data.filter_ties, config.data.weight_by_prompt) == (0, False, False)


def test_the_documented_configs_are_valid() -> None:
    page = (ROOT / "docs" / "train_reward_image.md").read_text()
    blocks = re.findall(r"```yml\n(.*?)```", page, re.DOTALL)
    assert blocks
    for block in blocks:
        config = ImageTextRunConfig.model_validate(yaml.safe_load(block))
        defaults = ImageTextRunConfig.model_validate({"model": {"pretrained": "x"}, "data": {"train": {"source": "x"}}})
        assert config.train.max_steps == defaults.train.max_steps == 4000


def test_the_packaged_pair_of_configs_fits_together() -> None:
    kind, config = load_reward_config("shapes_preference")
    assert isinstance(config, ImageTextRunConfig)
    assert config.output_dir == "outputs/shapes_preference"
    run = load_run_config("shapes_pickscore")
    assert run.rewards[0].options["model_name_or_path"] == f"{config.output_dir}/model"
    assert [reward.reward_model for reward in run.eval_rewards] == ["PickScore", "Geneval"]
    fitting = kind.build(config)
    assert len(fitting.validation["held_out"]) == 1000
    assert fitting.notes == {}
    drawn = config.data.validation["held_out"].drawn
    assert drawn is not None
    assert (drawn.prompts, drawn.label_noise) == ("test", 0.0)
    assert DrawnPreferences(drawn).lines != DrawnPreferences(config.data.train.drawn or drawn).lines[:1000]


@pytest.mark.slow
def test_the_chain_from_drawn_pairs_to_a_tilted_generator(tmp_path: Path) -> None:
    """A short version: pairs, a reward model that tells clean pictures from bad ones, RAM, GenEval beside."""
    words = ["--output_dir", str(tmp_path / "reward"), "--tracking.console", "false", "--max_steps", "40"]
    words += ["--model.from_scratch", str(SMALL | {"patch_size": 8}), "--batch_size", "32", "--validate_every", "20"]
    drawn = "{pairs: 600, degraded: 1.0, ties: 0.05, label_noise: 0.02}"
    held = "{held_out: {drawn: {pairs: 200, prompts: test, seed: 1, degraded: 1.0}}}"
    words += ["--data.train", f"{{drawn: {drawn}}}", "--data.validation", held, "--warmup_steps", "5"]
    words += ["--in_batch_negatives", "0", "--train.lr", "2e-3"]
    assert cli.main(["train-reward", "shapes_preference", *words]) == 0
    rows = read_jsonl(tmp_path / "reward" / "metrics.jsonl")
    accuracy = max(row["validation/acc"] for row in rows if "validation/acc" in row)
    assert accuracy >= 0.7  # chance is 0.5; the packaged run goes much further
    entry = f"reward_model: PickScore, model_name_or_path: {tmp_path / 'reward' / 'model'}, divisor: 1"
    rewards = f"[{{name: mine, {entry}}}]"
    evaluated = f"[{{name: mine, {entry}}}, {{reward_model: Geneval, detector: shapes}}]"
    words = ["--output_dir", str(tmp_path / "run"), "--rewards", rewards, "--eval_rewards", evaluated]
    words += ["--epochs", "1", "--num_prompts_per_epoch", "2", "--group_size", "2", "--train.batch_size", "4"]
    words += ["--tracking.console", "false", "--evaluation.max_prompts", "3", "--images_per_prompt", "1"]
    assert cli.main(["train", "shapes_pickscore", *words]) == 0
    measured = (tmp_path / "run" / "report.html").read_text()
    assert "mine" in measured
    assert "Geneval" in measured
