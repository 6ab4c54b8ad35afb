import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tiltflow.errors import CheckpointError, ConfigError, DataError, RewardError
from tiltflow.evaluation import (
    Estimate,
    EvaluationConfig,
    EvaluationResult,
    EvaluationRow,
    choose_prompts,
    compare_table,
    estimate,
    estimate_stratified,
    evaluate,
    paired_difference,
    summarise,
)
from tiltflow.evaluation.statistics import paired_score
from tiltflow.flow import sigma_schedule
from tiltflow.policies.base import Policy
from tiltflow.policies.parameters import PolicyWeights
from tiltflow.rewards import (
    GroupwiseRewardModel,
    PointwiseRewardModel,
    RewardArguments,
    RewardEngine,
    RewardModelOutput,
)
from tiltflow.types import Conditioning, Prompt

CONFIG = EvaluationConfig(num_steps=2, guidance_scale=1.0, batch_size=4, images_per_prompt=2, keep_images=3)
TAGS = ["colors", "colors", "counting", "position", "colors"]
PROMPTS = [Prompt(f"a photo of {index}", {"tag": tag}) for index, tag in enumerate(TAGS)]


class NoisePolicy(Policy):
    """Its image is its noise, shifted by a weight: x0 = eps + shift."""

    def __init__(self, shift: float = 0.0):
        super().__init__()
        self.device = torch.device("cpu")
        self.latent_shape = (3, 4, 4)
        self.shift = nn.Parameter(torch.tensor(shift))
        self.weights = PolicyWeights({"shift": self.shift})
        self.batches: list[int] = []

    def velocity(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.batches.append(len(latents))
        return torch.zeros_like(latents) - self.shift

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning({"length": torch.tensor([[float(len(prompt))] for prompt in prompts])})

    def decode(self, latents: Tensor) -> Tensor:
        return (0.5 + 0.2 * latents).clamp(0, 1)

    def sigmas(self, num_steps: int) -> Tensor:
        return sigma_schedule(num_steps, shift=1.0)

    def export(self, directory: Path) -> None:
        raise AssertionError("an evaluation exports nothing")


class Brightness(PointwiseRewardModel):
    """The mean of the image; judges as GenEval does: strict above 0.5, correct above 0.4."""

    required_fields = ("image", "metadata")
    use_tensor_inputs = True

    def __call__(self, image: Any = None, metadata: Any = None, **_: Any) -> RewardModelOutput:
        values = torch.stack([item.mean() for item in image])
        info = {
            "tag": [item["tag"] for item in metadata],
            "correct": [value > 0.4 for value in values.tolist()],
            "strict": [value > 0.5 for value in values.tolist()],
            "partial": values.tolist(),
            "reasons": [[] if value > 0.4 else ["too dark"] for value in values.tolist()],
        }
        return RewardModelOutput(values, info)


class Constant(PointwiseRewardModel):
    def __call__(self, prompt: list[str], **_: Any) -> RewardModelOutput:
        return RewardModelOutput([0.25] * len(prompt))


class Breaks(PointwiseRewardModel):
    """Fails on the whole batch that holds the fourth prompt."""

    def __call__(self, prompt: list[str], **_: Any) -> RewardModelOutput:
        if "a photo of 3" in prompt:
            raise OSError("the server is away")
        return RewardModelOutput([1.0] * len(prompt))


def engine(*models: type[PointwiseRewardModel], names: Sequence[str] = (), on_error: Any = "mask") -> RewardEngine:
    table = {model.__name__: model for model in models}
    rewards = [
        RewardArguments(name=name, reward_model=model.__name__, device="cpu", batch_size=2, on_error=on_error)
        for name, model in zip(names or table, models, strict=True)
    ]
    return RewardEngine(rewards, factory=lambda config: table[config.reward_model](config))


def row(group: int, sample: int, tag: str, strict: bool, *, score: float | None = 0.5) -> EvaluationRow:
    info = {"Geneval": {"tag": tag, "correct": True, "strict": strict, "partial": 0.5, "reasons": []}}
    return EvaluationRow(f"prompt {group}", sample, group, {"Geneval": score}, info)


# Estimates


def test_wilson_interval_of_a_degenerate_rate() -> None:
    # z^2 / (n + z^2) is the upper end for no success in n; n = 10 gives 0.27753.
    none = estimate([0.0] * 10, [i // 2 for i in range(10)])
    assert (none.value, none.low, none.count) == (0.0, 0.0, 10)
    assert none.high == pytest.approx(0.2775328, abs=1e-6)
    every = estimate([1.0] * 10, [i // 2 for i in range(10)])
    assert (every.value, every.high) == (1.0, 1.0)
    assert every.low == pytest.approx(1 - 0.2775328, abs=1e-6)


def test_wilson_interval_of_a_single_prompt() -> None:
    # Wilson, 3 of 4: centre (0.75 + z^2/8) / (1 + z^2/4), known values 0.3006 and 0.9544.
    found = estimate([1.0, 1.0, 1.0, 0.0], [7, 7, 7, 7])
    assert found.value == 0.75
    assert (found.low, found.high) == (pytest.approx(0.30064, abs=1e-4), pytest.approx(0.95441, abs=1e-4))


def test_interval_has_the_width_of_the_clusters_not_of_the_images() -> None:
    # Each prompt gives ten equal images, so only the 100 prompts inform: the standard error is s / sqrt(100).
    generator = np.random.default_rng(0)
    prompts = generator.normal(size=100)
    found = estimate(np.repeat(prompts, 10), np.repeat(np.arange(100), 10))
    expected = 1.96 * prompts.std() / 10
    assert found.value == pytest.approx(prompts.mean(), abs=1e-12)
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.06)
    assert found.low < found.value < found.high


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    clusters = np.repeat(np.arange(60), 4)
    hits, naive_hits, runs = 0, 0, 120
    for _ in range(runs):
        rates = generator.beta(0.4, 0.6, size=60)  # mean 0.4, images of one prompt strongly alike
        values = (generator.random(240) < rates[clusters]).astype(float)
        found, naive = estimate(values, clusters), estimate(values, np.arange(240))
        hits += found.low <= 0.4 <= found.high
        naive_hits += naive.low <= 0.4 <= naive.high
    assert 0.90 <= hits / runs <= 0.99
    assert naive_hits / runs < 0.85  # resampling images would promise too much


def test_missing_values_are_left_out() -> None:
    values, clusters = [0.0, 1.0, math.nan, 1.0, 0.0, math.nan], [0, 0, 1, 2, 2, 3]
    assert estimate(values, clusters) == estimate([0.0, 1.0, 1.0, 0.0], [0, 0, 2, 2])
    assert estimate(values, clusters).count == 4


def test_no_value_and_one_value() -> None:
    nothing = estimate([math.nan], [0])
    assert nothing.count == 0
    assert math.isnan(nothing.value)
    one = estimate([0.3], [0])
    assert one.value == 0.3
    assert math.isnan(one.low)
    assert math.isnan(one.high)


def test_values_of_one_prompt_that_are_no_rate_are_resampled_by_image() -> None:
    found = estimate([0.2, 0.4, 0.9], [5, 5, 5])
    assert 0.2 <= found.low < 0.5 < found.high <= 0.9


def test_stratified_mean_is_the_unweighted_mean_of_the_tag_means() -> None:
    generator = np.random.default_rng(2)
    tags = ["colors"] * 60 + ["counting"] * 12 + ["position"] * 8
    right = generator.random(80) < 0.45
    rates = [right[:60].mean(), right[60:72].mean(), right[72:].mean()]
    found = estimate_stratified(right.astype(float), [i // 4 for i in range(80)], tags)
    assert found.value == pytest.approx(np.mean(rates), abs=1e-12)
    assert found.value != pytest.approx(np.mean(right), abs=1e-3)


def test_stratified_interval_combines_the_errors_of_the_strata() -> None:
    generator = np.random.default_rng(3)
    a, b = generator.normal(0, 1, size=200), generator.normal(5, 2, size=50)
    found = estimate_stratified([*a, *b], np.arange(250), ["a"] * 200 + ["b"] * 50)
    expected = 1.96 * math.sqrt(a.var() / 200 + b.var() / 50) / 2  # the gap of 5 between the strata plays no part
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.06)


def test_a_tag_with_one_prompt_or_no_variation_widens_the_interval() -> None:
    """Strict rates of a small evaluation: one tag all wrong, one of a single prompt; the interval covers the truth."""
    truth = {"a": 0.5, "b": 0.05, "c": 0.4}
    prompts = {"a": 20, "b": 3, "c": 1}
    covered = 0
    for trial in range(200):
        generator = np.random.default_rng(trial)
        values, clusters, strata = [], [], []
        for tag, count in prompts.items():
            for prompt in range(count):
                values += (generator.random(8) < truth[tag]).astype(float).tolist()
                clusters += [hash((tag, prompt))] * 8
                strata += [tag] * 8
        found = estimate_stratified(values, clusters, strata)
        covered += found.low <= np.mean(list(truth.values())) <= found.high
    assert covered / 200 >= 0.90


def test_estimates_are_repeatable() -> None:
    values, clusters = np.random.default_rng(4).random(40), np.arange(40) // 2
    assert estimate(values, clusters) == estimate(values, clusters)


# Summaries


def test_summary_of_judged_rows() -> None:
    rows = [row(0, i, "colors", i < 3) for i in range(4)] + [row(1, i, "position", i < 1) for i in range(4)]
    rows[0] = dataclasses.replace(rows[0], scores={"Geneval": None}, info={"Geneval": {"failure": "OSError: gone"}})
    summary = summarise(rows)
    assert list(summary) == [
        "geneval",
        "geneval_partial",
        "geneval_correct",
        "geneval_correct_colors",
        "geneval_correct_position",
        "geneval_strict",
        "geneval_strict_colors",
        "geneval_strict_position",
        "geneval_failures",
    ]
    assert summary["geneval_strict_colors"].value == pytest.approx(2 / 3)
    assert summary["geneval_strict_position"].value == pytest.approx(1 / 4)
    assert summary["geneval_strict"].value == pytest.approx((2 / 3 + 1 / 4) / 2)
    assert summary["geneval_strict"].count == 7
    assert summary["geneval_failures"].value == 1
    assert summary["geneval_partial"].value == 0.5


def test_result_lines() -> None:
    summary = {
        "geneval_strict": Estimate(1 / 3, 0.25, 0.4166666666, 12),
        "geneval_failures": Estimate(2.0, math.nan, math.nan, 12),
    }
    assert EvaluationResult("before", {}, summary, []).result_lines() == [
        "RESULT geneval_strict=0.333333",
        "RESULT geneval_strict_low=0.25",
        "RESULT geneval_strict_high=0.416667",
        "RESULT geneval_failures=2",
    ]


def test_compare_table() -> None:
    first = EvaluationResult(
        "before", {}, {"a": Estimate(0.5, 0.4, 0.6, 9), "f": Estimate(3, math.nan, math.nan, 9)}, []
    )
    second = EvaluationResult("after", {}, {"a": Estimate(0.75, 0.7, 0.8, 9)}, [])
    assert compare_table([first, second]).splitlines() == [
        "   before                after",
        "-  --------------------  --------------------",
        "a  0.500 [0.400, 0.600]  0.750 [0.700, 0.800]",
        "f  3                     -",
    ]


def test_paired_difference_is_sharper_than_the_intervals() -> None:
    generator = np.random.default_rng(5)
    level = generator.normal(0, 1, size=50)
    gain = 0.3 + 0.05 * generator.normal(size=50)

    def result(name: str, values: Any) -> EvaluationResult:
        rows = [EvaluationRow(f"p{i}", 0, i, {"R": float(value)}) for i, value in enumerate(values)]
        return EvaluationResult(name, {}, summarise(rows), rows)

    before, after = result("before", level), result("after", level + gain)
    found = paired_difference(before, after, "r")
    assert found.value == pytest.approx(gain.mean(), abs=1e-12)
    assert 0.25 < found.low < found.high < 0.35
    assert before.summary["r"].high > after.summary["r"].low  # though the intervals overlap


def test_paired_difference_weighs_tags_as_the_summary_does() -> None:
    tags = ["colors", "colors", "colors", "position"]
    before = [row(i, 0, tag, False) for i, tag in enumerate(tags)]
    after = [row(i, 0, tag, tag == "position") for i, tag in enumerate(tags)]
    results = [
        EvaluationResult(name, {}, summarise(rows), rows) for name, rows in (("before", before), ("after", after))
    ]
    assert paired_difference(*results, "geneval_strict").value == 0.5


@pytest.mark.parametrize("prompts", [1, 2, 3, 6])
def test_few_prompts_seldom_make_chance_look_certain(prompts: int) -> None:
    """Without any true change 5 of 100 may; the intervals alone let 14 (6 prompts) to 49 (2) pass."""
    generator = np.random.default_rng(prompts)
    certain = 0
    for _ in range(200):
        changes = generator.normal(size=(prompts, 1)) + generator.normal(size=(prompts, 4))
        results = []
        for values in (np.zeros_like(changes), changes):
            rows = [EvaluationRow("p", sample, group, {"R": v}) for (group, sample), v in np.ndenumerate(values)]
            results.append(EvaluationResult("r", {}, {}, rows))
        certain += paired_difference(*results, "r").is_certain
    assert certain <= 23  # of 200 at 5%: more happens once in 2,000 tries


def test_certainty_weighs_tags_as_the_difference_does() -> None:
    """Six prompts of one tag fall a little, two of another rise by much: the mean over tags rises."""
    tags, rise = ["colors"] * 6 + ["position"] * 2, [-0.1] * 6 + [1.0, 1.0]
    results = []
    for name, scores in (("before", [0.0] * 8), ("after", rise)):
        rows = [
            EvaluationRow("p", 0, group, {"G": score}, {"G": {"tag": tag, "correct": 0, "strict": score, "partial": 0}})
            for group, (tag, score) in enumerate(zip(tags, scores, strict=True))
        ]
        results.append(EvaluationResult(name, {}, {}, rows))
    by_tag, plain = paired_difference(*results, "g_strict"), paired_difference(*results, "g")
    assert by_tag.value == pytest.approx(0.45) and plain.value == pytest.approx(0.175)
    weighed = np.array([-0.1] * 6 + [1.0] * 2) * np.array([8 / 12] * 6 + [8 / 4] * 2)
    assert by_tag.score == pytest.approx(paired_score(weighed, range(8))[1])
    assert plain.score == pytest.approx(paired_score(rise, range(8))[1])


def test_paired_difference_refuses_other_prompts_and_keys() -> None:
    rows = [row(i, 0, "colors", True) for i in range(3)]
    whole, part = EvaluationResult("before", {}, {}, rows), EvaluationResult("after", {}, {}, rows[:2])
    with pytest.raises(DataError, match=r"'before' \(3 images\) and 'after' \(2 images\)"):
        paired_difference(whole, part, "geneval")
    with pytest.raises(DataError, match="'geneval_failures' has no value per image"):
        paired_difference(whole, whole, "geneval_failures")


# Files


def test_json_round_trip(tmp_path: Path) -> None:
    rows = [row(0, 0, "colors", True), row(1, 0, "colors", False, score=None)]
    result = EvaluationResult("before", {"seed": 3, "max_prompts": None}, summarise(rows), rows)
    path = result.save(tmp_path / "evaluations")
    assert path == tmp_path / "evaluations" / "before.json"
    text = path.read_text()
    assert "NaN" not in text
    assert json.loads(text)["summary"]["geneval_failures"] == {"value": 1.0, "low": None, "high": None, "count": 2}
    loaded = EvaluationResult.load(path)
    assert loaded.rows == result.rows
    assert loaded.settings == result.settings
    assert loaded.result_lines() == result.result_lines()
    assert loaded.summary["geneval_strict"] == result.summary["geneval_strict"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"name": "x", "settings": {}, "summary": {"a": 1}, "rows": []}'])
def test_a_file_that_is_no_result_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "before.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"before\.json is no evaluation result"):
        EvaluationResult.load(path)
    with pytest.raises(DataError, match=r"absent\.json cannot be read"):
        EvaluationResult.load(tmp_path / "absent.json")


# Choosing prompts


def test_fewer_prompts_are_chosen_evenly_over_tags() -> None:
    prompts = [Prompt("", {"tag": tag}) for tag in ["a"] * 100 + ["b"] * 3 + ["c"] * 50]
    chosen = choose_prompts(prompts, 23)
    assert len(set(chosen)) == 23
    counts = [sum(prompts[i].metadata["tag"] == tag for i in chosen) for tag in "abc"]
    assert counts == [10, 3, 10]
    assert [i for i in chosen if i < 100] == list(range(0, 100, 10))
    assert choose_prompts(prompts, None) == choose_prompts(prompts, 500) == list(range(153))


# End to end


def test_evaluate_end_to_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    policy = NoisePolicy()
    result = evaluate(
        policy,
        engine(Brightness, Constant, names=["Geneval", "Flat"]),
        PROMPTS,
        config=CONFIG,
        name="before",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [(r.group, r.sample) for r in result.rows] == [(g, s) for g in range(5) for s in range(2)]
    assert [r.prompt for r in result.rows[::2]] == [prompt.text for prompt in PROMPTS]
    assert seen == [(4, 10), (8, 10), (10, 10)]
    assert max(policy.batches) == 4
    scores = [r.scores["Geneval"] for r in result.rows]
    assert result.summary["geneval"].value == pytest.approx(np.mean(scores), abs=1e-7)
    assert result.summary["flat"] == Estimate(0.25, 0.25, 0.25, 10)
    strict = [r.info["Geneval"]["strict"] for r in result.rows]
    assert 0 < sum(strict) < 10
    right = np.array(strict, dtype=float)
    rates = [np.mean([*right[:4], *right[8:]]), right[4:6].mean(), right[6:8].mean()]  # of TAGS, two images each
    assert result.summary["geneval_strict"].value == pytest.approx(np.mean(rates))
    assert list(tmp_path.iterdir()) == []
    result.save(tmp_path)
    kept = [r for r in result.rows if r.image]
    assert len(kept) == 3 == len(list((tmp_path / "before").iterdir()))
    assert {TAGS[r.group] for r in kept} == {"colors", "counting", "position"}
    with Image.open(tmp_path / str(kept[0].image)) as picture:
        assert np.asarray(picture).mean() / 255 == pytest.approx(kept[0].scores["Geneval"], abs=2e-3)


def test_before_and_after_share_noise_whatever_the_sizes() -> None:
    before = evaluate(NoisePolicy(), engine(Brightness), PROMPTS, config=CONFIG, name="before")
    other = CONFIG.model_copy(update={"batch_size": 3})
    after = evaluate(NoisePolicy(0.25), engine(Brightness), PROMPTS, config=other, name="after")
    gains = [
        new.scores["Brightness"] - old.scores["Brightness"] for old, new in zip(before.rows, after.rows, strict=True)
    ]
    # x0 = eps + 0.25 makes every image 0.05 brighter, a little less where it was clipped.
    assert all(0.045 < gain <= 0.0501 for gain in gains)
    difference = paired_difference(before, after, "brightness")
    assert difference.high - difference.low < 0.004
    assert difference.value == pytest.approx(np.mean(gains), abs=1e-6)
    few = evaluate(
        NoisePolicy(), engine(Brightness), PROMPTS, config=CONFIG.model_copy(update={"max_prompts": 3}), name="few"
    )
    assert [r.group for r in few.rows] == [0, 0, 2, 2, 3, 3]
    assert few.rows[2].scores == before.rows[4].scores


def test_a_full_disk_leaves_the_earlier_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = evaluate(NoisePolicy(), engine(Brightness, names=["Geneval"]), PROMPTS, config=CONFIG, name="x")
    result.save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(before) == 4  # a result and three pictures

    def full(path: Path, data: bytes | str) -> None:
        if path.suffix == ".json":
            raise CheckpointError("no space")
        path.write_bytes(data.encode() if isinstance(data, str) else data)

    monkeypatch.setattr("tiltflow.evaluation.results.write_atomically", full)
    with pytest.raises(CheckpointError, match="no space"):
        dataclasses.replace(result, settings={"other": 1}).save(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_result_with_fewer_pictures_leaves_none_of_the_earlier_one(tmp_path: Path) -> None:
    result = evaluate(NoisePolicy(), engine(Brightness, names=["Geneval"]), PROMPTS, config=CONFIG, name="x")
    result.save(tmp_path)
    dataclasses.replace(result, pictures={}).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_another_seed_makes_other_images() -> None:
    runs = [
        evaluate(NoisePolicy(), engine(Brightness), PROMPTS[:1], config=CONFIG.model_copy(update={"seed": s}), name="x")
        for s in (1, 2)
    ]
    assert runs[0].rows[0].scores != runs[1].rows[0].scores


def test_failures_are_counted_and_explained() -> None:
    result = evaluate(NoisePolicy(), engine(Constant, Breaks), PROMPTS, config=CONFIG, name="before")
    assert result.summary["breaks_failures"].value == 2
    assert result.summary["breaks"].count == 8
    assert result.summary["constant_failures"].value == 0
    failed = [r for r in result.rows if r.scores["Breaks"] is None]
    assert [r.group for r in failed] == [3, 3]
    assert failed[0].info["Breaks"]["failure"].startswith("OSError: the server is away (at test_evaluation.py:")
    with pytest.raises(RewardError, match="the server is away"):
        evaluate(NoisePolicy(), engine(Breaks, on_error="raise"), PROMPTS, config=CONFIG, name="before")


class Began(PointwiseRewardModel):
    """Says when it was asked about the first samples."""

    use_tensor_inputs = True
    asked = Event()

    def __call__(self, prompt: list[str], image: Any = None, **_: Any) -> RewardModelOutput:
        self.asked.set()
        return RewardModelOutput([item.mean().item() for item in image])


class GroupBegan(GroupwiseRewardModel):
    """The same of the first group; how much brighter a sample is than its group."""

    use_tensor_inputs = True
    asked = Event()

    def __call__(self, prompt: list[str], image: Any = None, **_: Any) -> RewardModelOutput:
        self.asked.set()
        values = torch.stack([item.mean() for item in image])
        return RewardModelOutput(values - values.mean())


class Patient(NoisePolicy):
    """Does not decode its second batch before a reward was asked about the first."""

    def __init__(self, asked: Event):
        super().__init__()
        self.asked = asked
        self.decoded = 0

    def decode(self, latents: Tensor) -> Tensor:
        self.decoded += 1
        assert self.decoded == 1 or self.asked.wait(20)
        return super().decode(latents)


@pytest.mark.parametrize("model", [Began, GroupBegan])
def test_asynchronous_rewards_begin_while_images_are_made(model: type[Began | GroupBegan]) -> None:
    def run(policy: NoisePolicy, **how: Any) -> EvaluationResult:
        entry = RewardArguments(name="mine", reward_model="x", batch_size=3, **how)
        return evaluate(policy, RewardEngine([entry], factory=model), PROMPTS, config=CONFIG, name="x")

    waited = run(NoisePolicy())
    model.asked.clear()
    assert run(Patient(model.asked), async_reward=True, num_workers=2) == waited


def test_bad_requests_name_the_remedy() -> None:
    with pytest.raises(DataError, match="no evaluation prompts"):
        evaluate(NoisePolicy(), engine(Constant), [], config=CONFIG, name="x")
    with pytest.raises(ConfigError, match="it becomes a file name"):
        evaluate(NoisePolicy(), engine(Constant), PROMPTS, config=CONFIG, name="../x")
    with pytest.raises(ConfigError, match="one name in lower case"):
        evaluate(NoisePolicy(), engine(Constant, Breaks, names=["A", "a"]), PROMPTS, config=CONFIG, name="x")
