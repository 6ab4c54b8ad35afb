"""`tiltflow evaluate-reward`: accuracies by subset and section, and what is told of them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.scorers.tiny_language import save_causal, save_classifier
from tiltflow.cli import main
from tiltflow.errors import DataError
from tiltflow.evaluation.reward_bench import CODE, SECTIONS, ScoredPair, accuracies
from tiltflow.evaluation.statistics import weighted_mean
from tiltflow.runtime.intervals import mean_of_independent, wilson
from tiltflow.scorers import LanguageRewardModel, RewardHead

PAIRS = [
    {"prompt": "w1 w2", "chosen": f"w{n} good", "rejected": f"bad w{n + 1}", "subset": "hep-go" if n % 2 else "odd"}
    for n in range(12)
]


def scored(subset: str, right: int, wrong: int) -> list[ScoredPair]:
    return [ScoredPair("p", subset, float(n < right), 0.0) for n in range(right + wrong)]


def write(path: Path, *records: dict) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def evaluate(*words: str, output: Path) -> dict:
    """Run the command and return what it wrote."""
    assert main(["evaluate-reward", *words, "--output", str(output)]) == 0
    return json.loads(output.read_text())


def rows_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]


def test_there_are_four_sections_of_23_subsets():
    assert list(SECTIONS) == ["Chat", "Chat Hard", "Safety", "Reasoning"]
    assert len({name for names in SECTIONS.values() for name in names}) == 23


def test_sections_weigh_pairs_but_mathematics_as_much_as_code():
    pairs = [
        *scored("alpacaeval-easy", 9, 1),
        *scored("mt-bench-easy", 1, 3),
        *scored("math-prm", 3, 1),
        *(pair for name in CODE for pair in scored(name, 2, 8)),
        *scored("my own", 5, 5),
    ]
    found = accuracies(pairs)
    assert found.subsets["my own"].value == 0.5 and found.subsets["my own"].count == 10
    assert math.isclose(found.sections["Chat"].value, 10 / 14)
    assert math.isclose(found.sections["Reasoning"].value, (0.75 + 0.2) / 2)
    assert set(found.sections) == {"Chat", "Reasoning"}
    assert math.isclose(found.overall.value, (10 / 14 + 0.475) / 2)
    for each in [*found.subsets.values(), *found.sections.values(), found.overall]:
        assert 0 <= each.low < each.value < each.high <= 1


def test_equal_rewards_are_wrong_and_without_sections_all_pairs_count_alike():
    found = accuracies([ScoredPair("p", "a", 1.0, 1.0), *scored("b", 3, 0)])
    assert found.subsets["a"].value == 0.0
    assert found.sections == {} and found.overall.value == 0.75


def test_a_subset_has_the_interval_of_independent_pairs():
    found = accuracies(scored("a", 15_000, 5_000))
    assert (found.overall.low, found.overall.high) == wilson(0.75, 20_000)
    assert found.subsets["a"] == found.overall
    section = accuracies(scored("alpacaeval-easy", 7, 0))  # seven in seven promise no certainty
    assert section.sections["Chat"].high == 1.0 and math.isclose(section.overall.low, wilson(1.0, 7)[0])


def test_a_weighted_mean_of_rates_has_the_interval_that_it_promises():
    one = mean_of_independent([1, 1, 0, 1])
    assert weighted_mean([one], [3.0]) == one
    even = weighted_mean([one, one], [1.0, 1.0])
    assert math.isclose(even.value - even.low, (one.value - one.low) / math.sqrt(2)) and even.count == 8
    sure = weighted_mean([mean_of_independent([1] * 9), mean_of_independent([1] * 30)], [5.0, 1.0])
    assert sure.high == 1.0 and wilson(1.0, 9)[0] < sure.low < 1.0
    rng = np.random.default_rng(0)
    rates, counts, weights = (0.97, 0.8, 0.6), (20, 40, 12), (30.0, 40.0, 12.0)
    truth, inside = float(np.average(rates, weights=weights)), 0
    for _ in range(1000):
        parts = [
            mean_of_independent((rng.random(n) < rate).astype(np.float64))
            for n, rate in zip(counts, rates, strict=True)
        ]
        found = weighted_mean(parts, weights)
        inside += found.low <= truth <= found.high
    assert 0.93 <= inside / 1000 <= 0.99


def test_labels_turn_pairs_around_and_ties_and_failures_are_left_out():
    pairs = [
        ScoredPair("turned", "a", 0.0, 1.0, label=0.0),
        ScoredPair("rather", "a", 1.0, 0.0, label=0.8),
        ScoredPair("rather the other", "a", 1.0, 0.0, label=0.2),
        ScoredPair("equal", "a", 1.0, 1.0, label=0.0),
        ScoredPair("tie", "a", 1.0, 0.0, label=0.5),
        ScoredPair("failed", "a", math.nan, 0.0),
        ScoredPair("infinite", "b", math.inf, 0.0),
    ]
    found = accuracies(pairs)
    assert (found.overall.value, found.overall.count) == (0.5, 4)
    assert list(found.subsets) == ["a"]
    assert found.ties == 1 and found.failures == ("failed", "infinite")
    with pytest.raises(DataError, match=r"no pair of 3 tells .*: 1 are ties, and of 2 a reward is not finite"):
        accuracies(pairs[4:])


def test_command_writes_accuracies_and_scores(tmp_path, capsys):
    folder = save_classifier(tmp_path / "model")
    bare = [{"chosen": "w1 good", "rejected": "w2"}, {"chosen": "a", "rejected": "a"}, {"chosen": "w1 " * 90}]
    sources = [write(tmp_path / "bench.jsonl", *PAIRS), write(tmp_path / "bare.jsonl", *bare)]
    output = tmp_path / "results" / "r.json"
    result = evaluate(str(folder), *sources, "--on_bad_record", "skip", output=output)
    told = capsys.readouterr()
    assert "hep-go" in told.out and "Reasoning" in told.out and str(output) in told.out
    assert "1 pairs: identical chosen and rejected, left out" in told.err
    assert "1 pairs: missing key, left out" in told.err
    assert {name: each["pairs"] for name, each in result["subsets"].items()} == {"odd": 6, "hep-go": 6, "bare": 1}
    model = LanguageRewardModel.from_pretrained(folder).eval()
    rows = rows_of(output)
    assert len(rows) == result["pairs"] == 13
    for row, pair in zip(rows, [*PAIRS, bare[0]], strict=True):
        for side in ("chosen", "rejected"):
            talk = [{"role": "user", "content": pair.get("prompt")}, {"role": "assistant", "content": pair[side]}]
            expected = model.score([talk if "prompt" in pair else pair[side]]).item()
            assert math.isclose(row[side], expected, abs_tol=1e-4)
    hits = [row["chosen"] > row["rejected"] for row in rows if row["subset"] == "hep-go"]
    assert math.isclose(result["sections"]["Reasoning"]["accuracy"], sum(hits) / 6)


def test_labels_of_the_data_count_as_in_training(tmp_path, capsys):
    folder = save_classifier(tmp_path / "model")
    model = LanguageRewardModel.from_pretrained(folder).eval()
    records = []
    for n in range(8):
        texts = [f"w{n} good", f"bad w{n + 1}"]
        better = model.score(texts).argmax().item()
        label = 0.5 if n % 4 == 3 else 1.0 - better  # people agree with the model, or call it a tie
        records.append({"chosen": texts[0], "rejected": texts[1], "label": label})
    assert any(record["label"] == 0.0 for record in records)
    result = evaluate(str(folder), write(tmp_path / "a.jsonl", *records), output=tmp_path / "r.json")
    assert result["overall"] == {"accuracy": 1.0, "low": wilson(1.0, 6)[0], "high": 1.0, "pairs": 6}
    assert result["ties"] == 2 and "2 pairs: ties, left out" in capsys.readouterr().err
    assert [row["label"] for row in rows_of(tmp_path / "r.json")] == [record["label"] for record in records]


def test_texts_that_are_equal_once_truncated_are_wrong_and_told(tmp_path, capsys):
    folder = save_classifier(tmp_path / "model")
    source = write(
        tmp_path / "a.jsonl",
        {"chosen": "w1 w2 w3 w4 w5 good", "rejected": "w1 w2 w3 w4 w5 bad"},
        {"chosen": "w1  good", "rejected": "w1 good"},
    )
    result = evaluate(str(folder), source, "--max_length", "4", output=tmp_path / "r.json")
    assert (result["overall"]["accuracy"], result["overall"]["pairs"]) == (0.0, 2)
    told = capsys.readouterr().err
    assert "1 pairs: identical after both were truncated, so equal rewards" in told
    assert "1 pairs: identical once they are tokens, so equal rewards" in told
    for row in rows_of(tmp_path / "r.json"):
        assert row["chosen"] == row["rejected"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rewards_that_are_not_finite_are_left_out_and_told(tmp_path, capsys, monkeypatch, bad):
    folder = save_classifier(tmp_path / "model")
    score = LanguageRewardModel.score_encoded

    def broken(self, rows, **options):
        found = score(self, rows, **options)
        return torch.where(torch.tensor([len(row) > 4 for row in rows]), torch.tensor(bad), found)

    monkeypatch.setattr(LanguageRewardModel, "score_encoded", broken)
    records = [{"chosen": "w1", "rejected": "w2"}, {"chosen": "w1 " * 9, "rejected": "w2"}]
    source = write(tmp_path / "a.jsonl", *records)
    result = evaluate(str(folder), source, output=tmp_path / "r.json")
    assert result["overall"]["pairs"] == 1 and result["failures"] == [f"{source}, line 2"]
    assert "1 pairs: a reward that is not finite, left out" in capsys.readouterr().err
    text = (tmp_path / "r.jsonl").read_text() + (tmp_path / "r.json").read_text()
    assert "NaN" not in text and "Infinity" not in text and rows_of(tmp_path / "r.json")[1]["chosen"] is None
    only = write(tmp_path / "b.jsonl", records[1])
    assert main(["evaluate-reward", str(folder), only, "--output", str(tmp_path / "b.json")]) == 2
    assert "no pair of 1 tells how good the model is" in capsys.readouterr().err


def test_a_prompt_that_the_messages_hold_is_not_there_twice(tmp_path):
    folder = save_classifier(tmp_path / "model")
    ask = {"role": "user", "content": "w1 w2"}
    sides = {side: [ask, {"role": "assistant", "content": side}] for side in ("good", "bad")}
    record = {"prompt": "w1 w2", "chosen": sides["good"], "rejected": sides["bad"], "other": "w7"}
    evaluate(str(folder), write(tmp_path / "a.jsonl", record), output=tmp_path / "r.json")
    (row,) = rows_of(tmp_path / "r.json")
    model = LanguageRewardModel.from_pretrained(folder).eval()
    expected = model.score([sides["good"], sides["bad"]]).tolist()
    assert [row["chosen"], row["rejected"]] == pytest.approx(expected, abs=1e-5)
    source = write(tmp_path / "b.jsonl", {**record, "prompt": "w9", "better": "w1", "worse": "w2"})
    columns = "{chosen: better, rejected: worse, prompt: ''}"
    evaluate(str(folder), source, "--columns", columns, output=tmp_path / "b.json")
    (row,) = rows_of(tmp_path / "b.json")
    assert [row["chosen"], row["rejected"]] == pytest.approx(model.score(["w1", "w2"]).tolist(), abs=1e-5)


def save_several(folder: Path, **head) -> Path:
    model = LanguageRewardModel.from_pretrained(
        save_causal(folder / "base", chat=None), head=RewardHead(num_attributes=2, **head)
    )
    model.eval().save_pretrained(folder / "model")
    return folder / "model"


def test_command_truncates_and_says_so_and_merges_attributes_by_their_weights(tmp_path, capsys):
    folder = save_several(tmp_path, attribute_weights=(1.0, -1.0))
    source = write(tmp_path / "bench.jsonl", {"chosen": "w1 w2 w3 w4 w5", "rejected": "w2"})
    evaluate(str(folder), source, "--max_length", "4", output=tmp_path / "r.json")
    assert "1 pairs: longer than 4 tokens, truncated" in capsys.readouterr().err
    (row,) = rows_of(tmp_path / "r.json")
    kind, length = LanguageRewardModel.from_pretrained(folder).eval().score(["w1 w2 w3"])[0].tolist()
    assert math.isclose(row["chosen"], kind - length, abs_tol=1e-5)


def test_one_of_several_attributes_must_be_named(tmp_path, capsys):
    folder = save_several(tmp_path, attribute_names=("kind", "long"))
    source = write(tmp_path / "bench.jsonl", {"chosen": "w1", "rejected": "w2"})
    assert main(["evaluate-reward", str(folder), source, "--output", str(tmp_path / "r.json")]) == 2
    assert "the model gives 2 numbers (kind, long): say which is the reward with --attribute" in capsys.readouterr().err
    expected = LanguageRewardModel.from_pretrained(folder).eval().score(["w1", "w2"])
    for place, name in enumerate(["kind", "1"]):
        evaluate(str(folder), source, "--attribute", name, output=tmp_path / "r.json")
        (row,) = rows_of(tmp_path / "r.json")
        assert [row["chosen"], row["rejected"]] == pytest.approx(expected[:, place].tolist(), abs=1e-5)


def test_results_of_runs_and_of_data_do_not_overwrite_each_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pair = {"chosen": "w1 w3", "rejected": "w2"}
    data = [write(tmp_path / name / "test.jsonl", *[pair] * count) for count, name in enumerate("ab", start=1)]
    models = []
    for seed, run in enumerate(["one", "two"]):
        models.append(str(save_classifier(tmp_path / "outputs" / run / "model", seed=seed)))
        (tmp_path / "outputs" / run / "config.yaml").write_text("seed: 0\n")
    for model in models:
        for source in data:
            assert main(["evaluate-reward", model, source]) == 0
            assert main(["evaluate-reward", model, source]) == 0  # the same once more
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("evaluation/*.json")}
    assert found == {f"outputs/{run}/evaluation/model-{name}-test.json" for run in ("one", "two") for name in "ab"}
    assert main(["evaluate-reward", models[0], *data]) == 0
    result = json.loads((tmp_path / "outputs/one/evaluation/model-a-test-and-1-more.json").read_text())
    assert {name: each["pairs"] for name, each in result["subsets"].items()} == {"a/test": 1, "b/test": 2}

    assert main(["evaluate-reward", "outputs/one/model", "b/test.jsonl"]) == 0  # the same in other words
    write(tmp_path / "here.jsonl", pair)
    assert main(["evaluate-reward", "outputs/one/model", "here.jsonl"]) == 0
    assert (tmp_path / "outputs/one/evaluation/model-here.json").is_file()

    alone = str(save_classifier(tmp_path / "elsewhere" / "x" / "model"))
    assert main(["evaluate-reward", alone, data[0]]) == 0
    assert (tmp_path / "outputs/reward_evaluation/x-model-a-test.json").is_file()
    other = str(save_classifier(tmp_path / "nowhere" / "x" / "model"))
    capsys.readouterr()
    assert main(["evaluate-reward", other, data[0]]) == 2
    assert "holds the result of another model or other data; name another file" in capsys.readouterr().err
    assert main(["evaluate-reward", other, data[0], data[0]]) == 2
    assert "is given twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output", "r.txt"], "the result is JSON; end the name in .json"),
        (["--max_length", "999"], "--max_length=999: the network reads at most 256 tokens"),
        (["--over_length", "filter", "--max_length", "1"], "no pair is left"),
        (["--as_conversation", "yes"], "line 1: missing key: 'prompt'"),
        (["--attribute", "kind"], "--attribute kind: the model gives LABEL_0; give a name or a number"),
        (["--columns", "better"], "evaluate-reward: columns='better'"),
        (["--validation", "v.jsonl"], "--validation is not for the kind of reward model in "),
        (["--speed", "high"], "--speed is no option of evaluate-reward"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, capsys, more, message):
    folder = save_classifier(tmp_path / "model")
    (tmp_path / "bench.jsonl").write_text(json.dumps({"chosen": "w1 w3", "rejected": "w2"}))
    assert main(["evaluate-reward", str(folder), str(tmp_path / "bench.jsonl"), *more]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_head_is_refused(tmp_path, capsys):
    folder = save_causal(tmp_path / "base")
    (tmp_path / "bench.jsonl").write_text(json.dumps({"chosen": "w1 w3", "rejected": "w2"}))
    assert main(["evaluate-reward", str(folder), str(tmp_path / "bench.jsonl")]) == 2
    assert "make a reward model of it with `tiltflow train-reward`" in capsys.readouterr().err
