import base64
import io
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from tiltflow.errors import DataError
from tiltflow.evaluation import (
    Difference,
    Estimate,
    EvaluationResult,
    EvaluationRow,
    paired_difference,
    summarise,
    to_picture,
)
from tiltflow.report import before_after_picture, save_grid, write_report
from tiltflow.report.charts import Series, line_chart, log_ticks, nice_ticks, spans_decades, stacked_bar
from tiltflow.report.contents import read_run, verdict
from tiltflow.report.witnesses import held_out

ATTACK = '<script>alert("x")</script>"\'><img src=http://evil.example/x.png>'
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that tags close in order, and collects what a browser would fetch and show."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.resources: list[str] = []
        self.shown: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.resources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.shown.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.shown).split())


def result(name: str, right: Sequence[bool], folder: Path, *, failed: int = -1) -> EvaluationResult:
    rows, pictures = [], {}
    for index, strict in enumerate(right):
        tag = ("colors", "position")[index % 2]
        image = f"{name}/{index:05d}_00.png"
        pictures[image] = Image.new("RGB", (8, 8), (10 * index, 200 if strict else 20, 0))
        info = {
            "tag": tag,
            "correct": strict,
            "partial": 0.5,
            "strict": strict,
            "reasons": [] if strict else ["expected cup>=1, found 0"],
        }
        scores: dict[str, float | None] = {"Geneval": float(strict), "Other": None if index == failed else 0.125}
        cells = {"Geneval": info} | ({"Other": {"failure": "OSError: gone away"}} if index == failed else {})
        prompt = ATTACK if index == 0 else f"prompt number {index}"
        rows.append(EvaluationRow(prompt, 0, index, scores, cells, image))
    settings = {"num_steps": 7, "images": len(rows), "prompts": len(rows)}
    found = EvaluationResult(name, settings, summarise(rows), rows, pictures)
    found.save(folder)
    return found


def metrics(epochs: int) -> str:
    rows = [
        {
            "step": epoch,
            "reward/geneval/mean": 0.2 + 0.01 * epoch,
            "reward/geneval/std": 0.1,
            "loss": 100.0 / 10 ** (epoch / 4),
            "drift": 0.001 * epoch,
            "grad_norm": None if epoch == 2 else 1.5,
            "seconds/rollout": 6.0,
            "seconds/reward": 1.0,
            "seconds/update": 2.0,
            "seconds/epoch": 10.0,
            "failures/geneval": 3.0 if epoch == 1 else 0.0,
            "eval/geneval_strict": 0.3 + 0.01 * epoch,
        }
        for epoch in range(1, epochs + 1)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "demo"
    (folder / "evaluations").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(metrics(12))
    (folder / "config.yaml").write_text("seed: 0\ntrain:\n  epochs: 12\n  note: <b>&amp;</b>\n")
    result("before", [i % 4 == 0 for i in range(40)], folder / "evaluations")
    result("after", [i % 8 != 7 for i in range(40)], folder / "evaluations", failed=5)
    return folder


# The page


def test_report_shows_the_numbers_of_the_run(run_dir: Path) -> None:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    text = Page(path.read_text(encoding="utf-8")).text
    before, after = (EvaluationResult.load(run_dir / "evaluations" / f"{n}.json") for n in ("before", "after"))
    # colors: 10 of 20 before and all after; position: none before and 15 of 20 after.
    assert (before.summary["geneval_strict"].value, after.summary["geneval_strict"].value) == (0.25, 0.875)
    difference = paired_difference(before, after, "geneval_strict")
    assert f"geneval_strict rose: {before.summary['geneval_strict']} before" in text
    assert "the 95% intervals do not overlap. For the same prompts and noise the difference is +0.625" in text
    assert f"[{difference.low:+.3f}, {difference.high:+.3f}], which excludes zero" in text
    assert "0.250 → 0.875" in text
    assert "images 40, prompts 40, sampling steps 7" in text
    assert (
        f"position 20 {before.summary['geneval_correct_position']} {after.summary['geneval_correct_position']}" in text
    )
    assert f"mean over tags 40 {before.summary['geneval_correct']}" in text
    assert "Epoch 12 of 12, 2 min 00 s of training." in text
    for row in ("rollout 6 s 1 min 12 s", "reward 1 s 12 s", "update 2 s 24 s", "other 1 s 12 s"):
        assert row in text
    assert "training geneval 3" in text
    assert "evaluation 'after' Other (OSError: gone away) 1" in text
    for chart in ("Reward: geneval", "Evaluation: geneval", "Loss", "Drift from the reference", "Gradient norm"):
        assert chart in text
    assert text.count("Logarithmic scale.") == 1
    assert "note: <b>&amp;</b>" in text


def test_report_needs_nothing_from_outside_and_runs_nothing(run_dir: Path) -> None:
    html = write_report(run_dir).read_text(encoding="utf-8")
    page = Page(html)
    assert page.resources
    assert all(resource.startswith("data:image/png;base64,") for resource in page.resources)
    assert not {"script", "iframe", "object", "link"} & set(page.tags)
    assert "url(" not in html
    assert "@import" not in html
    assert "<script" not in html
    assert ATTACK in page.text  # shown as it was written
    assert html.count("&lt;script&gt;alert(") >= 3  # the caption and two alternative texts
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_images_are_paired_and_marked(run_dir: Path) -> None:
    html = write_report(run_dir).read_text(encoding="utf-8")
    sources = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert len(sources) == 32  # 16 pairs
    pictures = [Image.open(io.BytesIO(base64.b64decode(source))) for source in sources]
    colors = [picture.getpixel((0, 0)) for picture in pictures]
    assert [old[0] for old in colors[::2]] == [new[0] for new in colors[1::2]]  # the same prompt on both sides
    assert html.count("✓") == sum(color[1] == 200 for color in colors)
    assert html.count("✗") == sum(color[1] == 20 for color in colors)
    assert "expected cup&gt;=1, found 0" in html


def test_a_run_killed_midway(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text(metrics(5) + '{"step": 6, "lo')
    (run_dir / "evaluations" / "after.json").unlink()
    text = Page(write_report(run_dir).read_text(encoding="utf-8")).text
    assert "Epoch 5 of 12 (still running, or stopped before its end)" in text
    assert "no evaluation from after training yet" in text
    assert "colors 20 " in text


def test_the_end_of_a_run_that_was_extended_is_not_known(run_dir: Path) -> None:
    path = run_dir / "evaluations" / "after.json"
    for epoch, known in ((12, True), (11, False)):
        content = json.loads(path.read_text())
        content["settings"]["epoch"] = epoch
        path.write_text(json.dumps(content))
        text = Page(write_report(run_dir).read_text(encoding="utf-8")).text
        assert ("0.250 → 0.875" in text) is known
        assert ("There is no evaluation from after training yet" in text) is not known


def test_two_evaluations_are_no_curve(run_dir: Path) -> None:
    rows = [{"step": step, "time": 1.0, "eval/geneval_strict": 0.1 * step} for step in (0, 12)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "Evaluation: geneval" not in Page(write_report(run_dir).read_text(encoding="utf-8")).text


REWARDS = """
rewards:
- {name: pick, reward_model: PickScore, weight: 1.0, options: {}}
- {name: watched, reward_model: OCR, weight: 0.0, options: {}}
eval_rewards:
- {name: same, reward_model: PickScore, weight: 1.0, options: {}}
- {name: pick, reward_model: HPSv2, weight: 1.0, options: {}}
- {name: HPS, reward_model: HPSv2, weight: 1.0, options: {version: v2.0}}
"""


def test_every_evaluated_reward_has_a_chart_of_its_own(tmp_path: Path) -> None:
    """More rewards than a single chart could tell apart, one judged as GenEval does, one a prefix of another."""
    plain = ["same", "pick", "hps", "geneval2", "image_reward"]
    judged = ["geneval", "geneval_partial", "geneval_strict", "geneval_correct", "geneval_correct_colors"]
    keys = [*plain, *judged, *(f"{name}_failures" for name in (*plain, "geneval"))]
    rows = [{"step": s, "reward/pick/mean": s, **{f"eval/{key}": 0.1 * s for key in keys}} for s in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.yaml").write_text(REWARDS)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    titles = re.findall(r"<figure><h3>([^<]+)</h3><svg", html)
    assert titles[0] == "Reward: pick"  # the others stand beside it
    others = ["Evaluation: same", "Held out: pick", "Held out: hps"]
    assert sorted(titles[1:]) == sorted([*others, *(f"Evaluation: {name}" for name in (*plain[3:], "geneval"))])
    charts = dict(zip(titles, re.findall(r"<svg.*?</svg>", html), strict=False))
    assert {title: svg.count('class="line') for title, svg in charts.items() if svg.count('class="line') > 1} == {
        "Evaluation: geneval": 2
    }


def test_what_is_held_out_is_known_by_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(REWARDS)
    assert held_out(read_run(tmp_path)) == {"same": False, "pick": True, "hps": True}
    (tmp_path / "config.yaml").write_text(
        REWARDS.replace(
            "name: same, reward_model: PickScore, weight: 1.0, options: {}", "name: same, reward_model: PickScore_Rank"
        )
    )
    assert held_out(read_run(tmp_path)) == {"same": False, "pick": True, "hps": True}  # as ranks
    (tmp_path / "config.yaml").write_text(REWARDS.partition("eval_rewards")[0])
    assert held_out(read_run(tmp_path)) == {"pick": False, "watched": True}  # of weight 0
    (tmp_path / "config.yaml").write_text("rewards: [{name: 1}]")
    assert held_out(read_run(tmp_path)) == {}
    (tmp_path / "config.yaml").write_text("rewards: 3")
    assert held_out(read_run(tmp_path)) == {}


def test_an_empty_folder_gives_sentences(tmp_path: Path) -> None:
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    for sentence in (
        "No epoch has been recorded yet.",
        "There is no evaluation yet",
        "There are no metrics to draw yet.",
        "No evaluation has kept images yet.",
        "No timings have been recorded yet.",
        "There is no config.yaml",
    ):
        assert sentence in text
    with pytest.raises(DataError, match="does not exist; give the output_dir"):
        write_report(tmp_path / "absent")


def test_damaged_files_are_named_not_fatal(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    (run_dir / "evaluations" / "before.json").write_text("{")
    (run_dir / "config.yaml").write_text("a: [")
    for picture in (run_dir / "evaluations" / "after").iterdir():
        picture.write_bytes(b"no picture")
    text = Page(write_report(run_dir).read_text(encoding="utf-8")).text
    assert "metrics.jsonl, line 2" in text
    assert "before.json is no evaluation result" in text
    assert "There is no evaluation from before training" in text


def test_evaluations_that_cannot_be_compared_say_so(run_dir: Path) -> None:
    result("after", [True] * 30, run_dir / "evaluations")
    text = Page(write_report(run_dir).read_text(encoding="utf-8")).text
    assert "are not of the same prompts and samples" in text
    assert "Careful: the two evaluations differ in images (40 before, 30 after)" in text


def test_images_outside_the_run_are_not_read(run_dir: Path) -> None:
    Image.new("RGB", (8, 8)).save(run_dir.parent / "private.png")
    path = run_dir / "evaluations" / "after.json"
    content = json.loads(path.read_text())
    for row in content["rows"]:
        row["image"] = "../../private.png"
    path.write_text(json.dumps(content))
    (run_dir / "evaluations" / "before.json").unlink()
    assert "No evaluation has kept images yet." in write_report(run_dir).read_text(encoding="utf-8")


BEFORE, AFTER = Estimate(0.5, 0.4, 0.6, 90), Estimate(0.45, 0.35, 0.55, 90)


@pytest.mark.parametrize(
    ("low", "high", "score", "end"),
    [
        (-0.12, 0.02, -1.4, "-0.050 [-0.120, +0.020], which includes zero, so the change may be chance."),
        (-0.09, -0.01, -2.4, "[-0.090, -0.010], which excludes zero, so chance alone is an unlikely cause."),
        (-0.09, -0.01, -1.2, "[-0.090, -0.010], which a t-test over the prompts does not tell from chance."),
        (-0.09, -0.01, math.nan, "[-0.090, -0.010], which a t-test over the prompts does not tell from chance."),
        (math.nan, math.nan, math.nan, "; the 95% intervals overlap."),
    ],
)
def test_verdict(low: float, high: float, score: float, end: str) -> None:
    text = verdict("pick", BEFORE, AFTER, Difference(-0.05, low, high, 90, score), prompts=30)
    values = "pick fell: 0.500 [0.400, 0.600] before, 0.450 [0.350, 0.550] after"
    assert text.startswith(f"{values}; the 95% intervals overlap.")
    assert text.endswith(end) and "nan" not in text
    few = verdict("pick", BEFORE, AFTER, None, prompts=9)
    assert few == f"{values}. Few prompts (9): the 95% intervals are too short."


def test_verdict_of_no_change_speaks_of_no_chance() -> None:
    text = verdict("pick", BEFORE, BEFORE, Difference(0.0, 0.0, 0.0, 90, 0.0), prompts=30)
    assert text == "pick stayed: 0.500 [0.400, 0.600] before, 0.500 [0.400, 0.600] after."
    nothing = Estimate(math.nan, math.nan, math.nan, 0)
    assert verdict("pick", nothing, nothing, None, prompts=30) == "pick: nan before, nan after."


def plain_result(name: str, scores: Sequence[Sequence[float]], folder: Path) -> EvaluationResult:
    """An evaluation of a reward that gives no verdict: a list of scores a prompt."""
    rows = [
        EvaluationRow(f"prompt {group}", sample, group, {"Pick": score}, {}, f"{name}/{group:05d}_{sample:02d}.png")
        for group, own in enumerate(scores)
        for sample, score in enumerate(own)
    ]
    pictures = {row.image: Image.new("RGB", (8, 8), (0, 90, 0)) for row in rows if row.image}
    found = EvaluationResult(name, {"prompts": len(scores), "images": len(rows)}, summarise(rows), rows, pictures)
    found.save(folder)
    return found


def test_two_prompts_are_not_called_certain(tmp_path: Path) -> None:
    plain_result("before", [[0.2, 0.3], [0.2, 0.3]], tmp_path / "evaluations")
    plain_result("after", [[0.205, 0.305], [0.201, 0.301]], tmp_path / "evaluations")
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "Few prompts (2): the 95% intervals are too short. For the same prompts and noise the difference is" in text
    assert "+0.003 [+0.001, +0.005], which a t-test over the prompts does not tell from chance." in text
    assert "unlikely cause" not in text and "overlap" not in text
    assert "In brackets: 95% intervals, from resampling the prompts; from the images alone where" in text


def test_a_single_image(tmp_path: Path) -> None:
    plain_result("before", [[0.204]], tmp_path / "evaluations")
    plain_result("after", [[0.205]], tmp_path / "evaluations")
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "pick rose: 0.204 before, 0.205 after. How it was measured" in text
    assert "difference +0.001 mean score" in text
    assert not any(word in text for word in ("nan", "In brackets", "interval", "chance"))


def test_images_without_a_verdict_show_their_scores(run_dir: Path, tmp_path: Path) -> None:
    legend = "A tick: the image shows exactly what the prompt asks for"
    assert legend in Page(write_report(run_dir).read_text(encoding="utf-8")).text
    plain_result("before", [[0.25], [0.5]], tmp_path / "evaluations")
    after = plain_result("after", [[0.75], [1.5]], tmp_path / "evaluations")
    path = tmp_path / "evaluations" / "after.json"
    assert after.rows[1].scores["Pick"] == 1.5
    path.write_text(path.read_text().replace("1.5", "null"))
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert legend not in text
    for shown in ("before Pick 0.25 after Pick 0.75 prompt 0", "before Pick 0.5 after Pick no score prompt 1"):
        assert shown in text


@pytest.mark.parametrize(
    ("data", "unseen"),
    [
        ("{prompts: shapes, eval_prompts: shapes}", True),
        ("{prompts: a.txt, eval_prompts: b.txt}", True),
        ("{prompts: a.txt, eval_prompts: a.txt}", False),
        ("{prompts: ./a.txt, eval_prompts: a.txt}", False),
        ("{}", True),
    ],
)
def test_only_other_prompts_are_called_unseen(run_dir: Path, data: str, unseen: bool) -> None:
    (run_dir / "config.yaml").write_text(f"data: {data}\n")
    text = Page(write_report(run_dir).read_text(encoding="utf-8")).text
    assert "Mean on the evaluation prompts" in text
    assert ("which training never sees" in text) is unseen


def test_a_run_that_is_given_fewer_epochs_than_it_has(run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text("train:\n  epochs: 3\n")
    assert "Epoch 12, 2 min 00 s of training." in Page(write_report(run_dir).read_text(encoding="utf-8")).text


def test_rows_of_one_step_are_merged(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 2, "loss": 1.0}\n{"step": 1, "loss": 3.0}\n{"step": 2, "eval/a": 5.0}\n'
    )
    run = read_run(tmp_path)
    assert run.curve("loss") == ([1, 2], [3.0, 1.0])
    assert run.curve("eval/a") == ([2], [5.0])
    assert run.names("eval/") == ["a"]


# Charts


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.31, 0.52, [0.35, 0.4, 0.45, 0.5]),
        (-3, 12, [-2.5, 0, 2.5, 5, 7.5, 10]),
        (0, 1300, [0, 250, 500, 750, 1000, 1250]),
        (2e-5, 9e-5, [i * 1e-5 for i in range(2, 10)]),
        (5, 5, [5]),
    ],
)
def test_nice_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks, rel=1e-9, abs=1e-12)


def test_log_scale() -> None:
    assert log_ticks(0.02, 500) == [0.1, 1, 10, 100]
    assert len(log_ticks(1e-9, 1e9)) <= 7
    assert spans_decades([1.0, None, 101.0])
    assert not spans_decades([1.0, 100.0])
    assert not spans_decades([0.0, 1000.0])
    assert not spans_decades([])


def points(svg: str) -> list[tuple[float, float]]:
    path = next(item for item in ET.fromstring(svg).iter("path")).get("d", "")
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.]+),([\d.]+)", path)]


def test_line_chart_places_values_in_proportion() -> None:
    (x0, y0), (x1, y1), (x2, y2) = points(line_chart([Series("a", [0, 1, 4], [1.0, 2.0, 4.0])], title="t"))
    assert (x1 - x0) / (x2 - x0) == pytest.approx(1 / 4, abs=1e-3)
    assert (y1 - y0) / (y2 - y0) == pytest.approx(1 / 3, abs=2e-3)
    assert y2 < y0  # up is more
    log = points(line_chart([Series("a", [0, 1, 2], [1.0, 10.0, 1000.0])], title="t", log=True))
    assert (log[1][1] - log[0][1]) / (log[2][1] - log[0][1]) == pytest.approx(1 / 3, abs=2e-3)


def test_line_chart_of_gaps_single_points_and_nothing() -> None:
    assert line_chart([Series("a", [1, 2], [None, math.nan])], title="t") == ""
    assert line_chart([], title="t") == ""
    assert line_chart([Series("a", [1], [-1.0])], title="t", log=True) == ""
    root = ET.fromstring(line_chart([Series("a", [1, 2, 3, 4], [1.0, None, 2.0, 3.0])], title="t"))
    assert next(root.iter("path")).get("d", "").count("M") == 1
    assert len([c for c in root.iter("circle") if c.get("class", "").startswith("fill")]) == 1
    ET.fromstring(line_chart([Series("a", [3], [0.5], [0.1])], title="t"))
    ET.fromstring(line_chart([Series("a", [1, 2], [0.0, 0.0])], title="t"))


def test_line_chart_is_well_formed_thin_and_escaped() -> None:
    x = list(range(5000))
    series = [Series(ATTACK, x, [0.5] * 4999 + [1.0], [0.2] * 5000), Series("b", x, [1.0] * 5000)]
    svg = line_chart(series, title=ATTACK)
    root = ET.fromstring(svg)
    assert "script" not in {item.tag for item in root.iter()}
    assert len(svg) < 60_000
    assert max(x for x, _ in points(svg)) == pytest.approx(466, abs=0.11)  # the last epoch is kept
    assert ATTACK in [item.text for item in root.iter("text")]
    band = next(root.iter("polygon")).get("points", "").split()
    assert len(band) == 2 * len(points(svg))


def test_stacked_bar() -> None:
    root = ET.fromstring(stacked_bar([("rollout", 6.0), ("reward", 1.0), ("<b>", 3.0)], title="t"))
    widths = [float(item.get("width", "")) for item in root.iter("rect") if item.get("height") == "30"]
    assert [width / 480 for width in widths] == pytest.approx([0.6, 0.1, 0.3], abs=1e-3)
    assert {"60%", "10%", "30%", "<b>"} <= {item.text for item in root.iter("text")}
    assert stacked_bar([("a", 0.0)], title="t") == ""
    assert stacked_bar([], title="t") == ""


# Pictures


def test_save_grid(tmp_path: Path) -> None:
    images = torch.linspace(0, 1, 5).reshape(5, 1, 1, 1).expand(5, 3, 4, 6)
    path = tmp_path / "deep" / "grid.png"
    save_grid(images, path, columns=3)
    with Image.open(path) as grid:
        assert grid.size == (3 * 6 + 2 * 2, 2 * 4 + 2)
        assert grid.getpixel((6 + 2, 0)) == (64, 64, 64)
        assert grid.getpixel((0, 4 + 2)) == (191, 191, 191)
        assert grid.getpixel((16, 6)) == (255, 255, 255)  # the empty place
    with pytest.raises(ValueError, match="0 images in 3 columns"):
        save_grid(images[:0], path, columns=3)


def test_to_picture_rounds() -> None:
    assert to_picture(torch.full((3, 1, 1), 0.5)).getpixel((0, 0)) == (128, 128, 128)
    assert to_picture(torch.tensor([-1.0, 0.2, 2.0]).reshape(3, 1, 1)).getpixel((0, 0)) == (0, 51, 255)


def test_before_after_picture(run_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    before_after_picture(run_dir, path, pairs=6, scale=8)
    with Image.open(path) as picture:
        assert picture.width == 14 + 4 * (2 * 64 + 4 + 14)
        # 40 pairs, 6 chosen evenly: the second is prompt 6 (red 60), missed before and shown after.
        x, y = 14 + (2 * 64 + 4 + 14) + 30, 14 + 20 + 30
        assert picture.getpixel((x, y)) == (60, 20, 0)
        assert picture.getpixel((x + 68, y)) == (60, 200, 0)
    with pytest.raises(DataError, match="no image of one prompt both before and after"):
        (run_dir / "evaluations" / "before.json").unlink()
        before_after_picture(run_dir, tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()
