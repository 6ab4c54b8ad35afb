"""`tiltflow evaluate-reward`: accuracies by subset and section, and what is told of them."""

import json
import math

import pytest

from tests.scorers.tiny_language import save_causal, save_classifier
from tiltflow.cli import main
from tiltflow.evaluation.reward_bench import CODE, SECTIONS, ScoredPair, accuracies
from tiltflow.scorers import LanguageRewardModel, RewardHead

PAIRS = [
    {"prompt": "w1 w2", "chosen": f"w{n} good", "rejected": f"bad w{n + 1}", "subset": "hep-go" if n % 2 else "odd"}
    for n in range(12)
]


def scored(subset: str, right: int, wrong: int) -> list[ScoredPair]:
    return [ScoredPair("p", subset, float(n < right), 0.0) for n in range(right + wrong)]


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


def test_command_writes_accuracies_and_scores(tmp_path, capsys):
    folder = save_classifier(tmp_path / "model")
    (tmp_path / "bench.jsonl").write_text("\n".join(json.dumps(pair) for pair in PAIRS))
    bare = [{"chosen": "w1 good", "rejected": "w2"}, {"chosen": "a", "rejected": "a"}, {"chosen": "w1 " * 90}]
    (tmp_path / "bare.jsonl").write_text("\n".join(json.dumps(pair) for pair in bare))
    output = tmp_path / "results" / "r.json"
    sources = [str(tmp_path / name) for name in ("bench.jsonl", "bare.jsonl")]
    assert main(["evaluate-reward", str(folder), *sources, "--output", str(output), "--on_bad_record", "skip"]) == 0
    told = capsys.readouterr()
    assert "hep-go" in told.out and "Reasoning" in told.out and str(output) in told.out
    assert "1 pairs: identical chosen and rejected, left out" in told.err
    assert "1 pairs: missing key, left out" in told.err
    result = json.loads(output.read_text())
    assert {name: each["pairs"] for name, each in result["subsets"].items()} == {"odd": 6, "hep-go": 6, "bare": 1}
    model = LanguageRewardModel.from_pretrained(folder).eval()
    rows = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    assert len(rows) == result["pairs"] == 13
    for row, pair in zip(rows, [*PAIRS, bare[0]], strict=True):
        for side in ("chosen", "rejected"):
            talk = [{"role": "user", "content": pair.get("prompt")}, {"role": "assistant", "content": pair[side]}]
            expected = model.score([talk if "prompt" in pair else pair[side]]).item()
            assert math.isclose(row[side], expected, abs_tol=1e-4)
    hits = [row["chosen"] > row["rejected"] for row in rows if row["subset"] == "hep-go"]
    assert math.isclose(result["sections"]["Reasoning"]["accuracy"], sum(hits) / 6)


def test_command_truncates_and_says_so_and_merges_attributes(tmp_path, capsys):
    head = RewardHead(num_attributes=2, attribute_weights=(1.0, -1.0))
    model = LanguageRewardModel.from_pretrained(save_causal(tmp_path / "base", chat=None), head=head).eval()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "bench.jsonl").write_text(json.dumps({"chosen": "w1 w2 w3 w4 w5", "rejected": "w2"}))
    output = tmp_path / "r.json"
    command = ["evaluate-reward", str(tmp_path / "model"), str(tmp_path / "bench.jsonl"), "--output", str(output)]
    assert main([*command, "--max_length", "4"]) == 0
    assert "1 pairs: longer than 4 tokens, truncated" in capsys.readouterr().err
    row = json.loads(output.with_suffix(".jsonl").read_text())
    kind, length = model.score(["w1 w2 w3"])[0].tolist()
    assert math.isclose(row["chosen"], kind - length, abs_tol=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output", "r.txt"], "the result is JSON; end the name in .json"),
        (["--max_length", "999"], "max_length=999: the network reads at most 256 tokens"),
        (["--over_length", "filter", "--max_length", "1"], "no pair is left"),
        (["--as_conversation", "yes"], "line 1: missing key: 'prompt'"),
        (["--speed", "high"], "--speed is no option of it"),
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
