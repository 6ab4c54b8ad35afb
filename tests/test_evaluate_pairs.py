"""`tiltflow evaluate-reward` on image-text models: accuracy, the score with ties, and what stands beside them."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.test_image_preferences import write_lines
from tests.scorers.tiny_clip import save_clip
from tiltflow.cli import main
from tiltflow.data.image_preferences import PairFilter, read_image_preferences
from tiltflow.errors import DataError
from tiltflow.evaluation.pair_bench import PairRewards, pair_bench, pair_content, pair_table
from tiltflow.reward_training import CLIPRewardModel, get_reward_model
from tiltflow.reward_training.thresholds import THRESHOLDS, pair_rewards, probabilities, tie_scores
from tiltflow.runtime.intervals import wilson

TIE = {"label_0": 0.5, "label_1": 0.5}
TURNED = {"label_0": 0, "label_1": 1}
LINES = [{"image_0": f"images/{n}.png", "image_1": f"images/{7 - n}.png", **[{}, TIE, TURNED][n % 3]} for n in range(8)]


def rewards(seed: int, count: int = 60, noise: float = 1.0) -> PairRewards:
    """Pairs of which every third is a tie, and of a model that knows it roughly."""
    rng = np.random.default_rng(seed)
    labels = np.tile([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], (count // 3, 1))
    first, second = (labels[:, side] * 4 + rng.normal(0, noise, len(labels)) for side in (0, 1))
    return PairRewards(first, second, labels, np.arange(count))


def test_the_threshold_is_that_of_the_validation_pairs():
    held, test = rewards(0), rewards(1)
    found = pair_bench({"a": test, "b": held}, held)
    probs = {name: probabilities(each.first, each.second) for name, each in (("held", held), ("test", test))}
    by_hand = [tie_scores(probs["held"], held.labels, threshold).mean() for threshold in THRESHOLDS]
    assert found.threshold is not None
    assert found.threshold == THRESHOLDS[int(np.argmax(by_hand))] and 0 < found.threshold < 1
    assert found.validation is not None and found.validation.at_thresholds == pytest.approx(by_hand)
    scores = found.tests["a"]
    assert scores.at_threshold is not None and scores.chance is not None
    assert scores.at_threshold.value == pytest.approx(tie_scores(probs["test"], test.labels, found.threshold).mean())
    assert (scores.at_threshold.low, scores.at_threshold.high) == wilson(scores.at_threshold.value, 60)
    # A third are ties: all called ties 1/3 + 2/3 / 2; coin flips (t + (1 - t) / 2) / 3 + 2/3 / 2.
    assert scores.all_ties == pytest.approx(2 / 3)
    assert scores.chance == pytest.approx((found.threshold + (1 - found.threshold) / 2) / 3 + 1 / 3)
    assert scores.without_threshold.value == pytest.approx(tie_scores(probs["test"], test.labels, 0.0).mean())
    assert scores.at_threshold.value > max(scores.without_threshold.value, scores.all_ties)
    assert (scores.pairs, scores.ties, scores.accuracy.count) == (60, 20, 40)
    assert found.tests["b"].at_threshold == found.validation.at_threshold
    for word in (
        f"threshold {found.threshold:g}",
        str(scores.at_threshold),
        f"{scores.chance:.3f}",
        str(scores.accuracy),
    ):
        assert word in pair_table(found)


def test_rewards_that_are_not_finite_count_nowhere():
    good = rewards(2)
    first, second = np.append(good.first, [math.nan, 5.0]), np.append(good.second, [0.0, math.inf])
    spoilt = PairRewards(first, second, np.concatenate([good.labels, [[1.0, 0.0]] * 2]), np.arange(62))
    assert spoilt.failures == 2
    assert pair_bench({"a": spoilt}, spoilt) == pair_bench({"a": good}, good)
    nothing = PairRewards(np.array([math.nan]), np.array([0.0]), np.array([[1.0, 0.0]]), np.arange(1))
    with pytest.raises(DataError, match="b: none of 1 pairs has two finite rewards"):
        pair_bench({"a": good, "b": nothing})


def test_pairs_of_one_prompt_make_wider_intervals():
    once = rewards(3, noise=3.0)
    tenfold = PairRewards(
        *(np.repeat(column, 10, axis=0) for column in (once.first, once.second, once.labels)), once.prompts
    )
    alone = pair_bench({"a": dataclasses.replace(tenfold, prompts=np.arange(600))}).tests["a"]
    together = pair_bench({"a": dataclasses.replace(tenfold, prompts=np.repeat(once.prompts, 10))}).tests["a"]
    true = pair_bench({"a": once}).tests["a"]
    for name in ("accuracy", "without_threshold"):
        widths = [vars(each)[name].high - vars(each)[name].low for each in (alone, together, true)]
        assert vars(together)[name].value == pytest.approx(vars(alone)[name].value)
        assert widths[1] > 2 * widths[0] and widths[1] == pytest.approx(widths[2], rel=0.25)
    right = PairRewards(np.ones(8), np.zeros(8), np.tile([1.0, 0.0], (8, 1)), np.repeat(["a", "b"], 4))
    accuracy = pair_bench({"a": right}).tests["a"].accuracy
    assert (accuracy.value, accuracy.low, accuracy.count) == (1.0, wilson(1.0, 2)[0], 8)


def test_a_set_of_ties_has_no_accuracy_and_its_json_is_legal():
    ties = PairRewards(np.array([1.0, 2.0]), np.array([1.0, 0.0]), np.full((2, 2), 0.5), np.arange(2))
    found = pair_bench({"a": ties})
    content = json.loads(json.dumps(pair_content(found), allow_nan=False))
    assert content["sets"]["a"]["accuracy"] == {"accuracy": None, "low": None, "high": None, "pairs": 0}
    assert content["sets"]["a"]["with_ties"]["without_threshold"]["score"] == 0.75
    assert content["threshold"] is None and content["validation"] is None
    assert "no threshold for ties: --validation" in pair_table(found)


def test_a_pair_is_a_tie_or_counts_in_the_accuracy_but_never_both():
    labels = np.array([[0.504, 0.496], [1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    found = pair_bench({"a": PairRewards(np.array([0.0, 1.0, 0.0, 1.0]), np.full(4, 0.5), labels, np.arange(4))})
    assert (found.tests["a"].ties, found.tests["a"].accuracy.count) == (2, 2)
    assert found.tests["a"].accuracy.value == 0.5
    assert str(found.tests["a"].accuracy) == "0.500 [0.095, 0.905]"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP as a run leaves it."""
    return save_clip(tmp_path_factory.mktemp("clip") / "model")


def test_the_command_measures_an_image_text_model(tmp_path, capsys, clip):
    validation = write_lines(tmp_path / "held", *LINES[:4])
    test = write_lines(tmp_path / "test", *LINES, {"image_0": "images/gone.png"}, "broken")
    output = tmp_path / "r.json"
    words = [str(test), "--validation", f"{{source: {validation}}}", "--output", str(output)]
    assert main(["evaluate-reward", str(clip), *words]) == 2
    assert re.search("line 10: .*not valid JSON.* with --on_bad_record skip \\(in a config: ", capsys.readouterr().err)
    assert main(["evaluate-reward", str(clip), *words, "--on_bad_record", "skip", "--on_bad_image", "skip"]) == 0
    told = capsys.readouterr()
    assert "1 pairs: pairs: unreadable image, left out" in told.err
    assert re.search("1 pairs: pairs: (bad record|broken JSON), left out", told.err)
    result = json.loads(output.read_text())

    model = get_reward_model({"pretrained": str(clip)}, mbs=4, gbs=4)
    skip = PairFilter(on_bad_record="skip", on_bad_image="skip")
    sets = {"--validation": validation, "pairs": test}
    found = {name: pair_rewards(model, read_image_preferences(str(path), skip)) for name, path in sets.items()}
    expected = {name: PairRewards(*each, np.full(len(each[0]), "a cat")) for name, each in found.items()}
    by_hand = pair_bench({"pairs": expected["pairs"]}, expected["--validation"])
    assert result["sets"] == json.loads(json.dumps(pair_content(by_hand)["sets"]))
    assert result["threshold"] == by_hand.threshold and result["validation"]["pairs"] == 4
    assert (result["sets"]["pairs"]["pairs"], result["sets"]["pairs"]["ties"]) == (8, 3)
    assert f"threshold {by_hand.threshold:g}" in told.out and str(by_hand.tests["pairs"].accuracy) in told.out
    rows = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    assert [row["set"] for row in rows] == ["--validation"] * 4 + ["pairs"] * 8
    assert [row["reward_0"] for row in rows[4:]] == pytest.approx(expected["pairs"].first.tolist(), abs=1e-4)


def test_drawn_pairs_and_no_validation(tmp_path, capsys, clip, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = "{drawn: {pairs: 6, prompts: test, ties: 0.5, seed: 3}}"
    assert main(["evaluate-reward", str(clip), drawn]) == 0
    assert "no threshold for ties: --validation" in capsys.readouterr().out
    (path,) = (tmp_path / "outputs" / "reward_evaluation").glob("*.json")
    result = json.loads(path.read_text())
    assert result["sets"]["drawn"]["pairs"] == 6 and result["sets"]["drawn"]["with_ties"]["at_threshold"] is None


def test_a_model_that_fails_on_a_pair_is_told(tmp_path, capsys, clip, monkeypatch):
    whole = CLIPRewardModel.pair_rewards

    def broken(self, batch):
        first, second = whole(self, batch)
        return torch.where(torch.arange(len(first)) == 1, torch.nan, first), second

    monkeypatch.setattr(CLIPRewardModel, "pair_rewards", broken)
    source, output = write_lines(tmp_path, *LINES), tmp_path / "r.json"
    assert main(["evaluate-reward", str(clip), str(source), "--output", str(output)]) == 0
    assert "1 pairs: pairs: a reward that is not finite, left out" in capsys.readouterr().err
    assert json.loads(output.read_text())["sets"]["pairs"]["pairs"] == 7
    assert "NaN" not in output.with_suffix(".jsonl").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--validation", "pairs.jsonl"], "--validation pairs.jsonl is measured too; choose the threshold on other"),
        (["--as_conversation", "no"], "--as_conversation is not for the kind of reward model in "),
        (["{sauce: a}"], "sauce"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, capsys, monkeypatch, clip, more, message):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path, *LINES)
    assert main(["evaluate-reward", str(clip), "pairs.jsonl", *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "holds ViTModel, which is no reward model"),
        ({}, "which is no reward model that can be evaluated: a language reward model"),
        ([], "cannot be read"),
        (None, "has no config.json; give a model's own folder, such as outputs/<run>/model"),
    ],
)
def test_folders_that_hold_no_reward_model_are_refused_in_a_line(tmp_path, capsys, config, message):
    folder = tmp_path / "model"
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    assert main(["evaluate-reward", str(folder), "pairs.jsonl"]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
