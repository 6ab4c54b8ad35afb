"""Charts as SVG text for inlining in HTML; colours come from the page's style sheet (`--s0` ... `--s5`)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDTH: Final = 480  # small, so that text stays readable when a phone shrinks the chart to its width
HEIGHT: Final = 260
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 42
COLORS: Final = 6
MAX_POINTS: Final = 600
MAX_TOOLTIPS: Final = 150

Value = float | None


@dataclass(frozen=True)
class Series:
    """One line; None is a gap.

    Example: `Series("geneval", x=[1, 2], y=[0.4, 0.5], spread=[0.1, 0.1])` has a band of y +- 0.1.
    """

    name: str
    x: Sequence[float]
    y: Sequence[Value]
    spread: Sequence[Value] | None = None  # half the height of the band


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    ticks: tuple[float, ...]
    place: Callable[[float], float]  # value -> pixels


def nice_ticks(low: float, high: float, *, target: int = 5) -> list[float]:
    """Return round numbers (1, 2, 2.5 or 5 times a power of ten apart) within [low, high], about `target` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / target
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 2.5, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, 1 - math.floor(math.log10(step)))  # 2.5 needs one more than its power of ten
    return [round(index * step, digits) + 0.0 for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten within [low, high], thinned to about six."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    return [10.0**power for power in range(first, last + 1, max(1, (last - first) // 6 + 1))]


def spans_decades(values: Sequence[Value], *, decades: float = 2) -> bool:
    """Tell whether all values are positive and the largest is more than `10**decades` times the smallest."""
    known = [value for value in values if value is not None]
    return bool(known) and min(known) > 0 and max(known) / min(known) > 10**decades


def line_chart(series: Sequence[Series], *, title: str, x_label: str = "epoch", log: bool = False) -> str:
    """Return a line chart.

    Args:
        series: Lines over one x axis; values that a logarithmic axis cannot show become gaps.
        title: Read out by screen readers.
        x_label: Text under the x axis.
        log: Logarithmic y axis.

    Returns:
        One `<svg>` element, or "" when there is no value to draw.
    """
    lines = [_thinned(_drawable(one, log=log)) for one in series]
    known = [(x, y) for one in lines for x, y in zip(one.x, one.y, strict=True) if y is not None]
    if not known:
        return ""
    top = TOP + (20 if len(lines) > 1 else 0)
    x_axis = _linear([x for x, _ in known], start=LEFT, end=WIDTH - RIGHT, whole=True)
    edges = [edge for one in lines for edge in _edges(one)]
    make_y = _logarithmic if log else _linear
    y_axis = make_y(edges, start=HEIGHT - BOTTOM, end=top)
    parts = [_frame(x_axis, y_axis, x_label=x_label, top=top)]
    for index, one in enumerate(lines):
        parts += [_band(one, x_axis, y_axis, index), _line(one, x_axis, y_axis, index)]
    if len(lines) > 1:
        parts.append(_legend([one.name for one in lines]))
    return _svg("".join(parts), HEIGHT, title)


def stacked_bar(parts: Sequence[tuple[str, float]], *, title: str) -> str:
    """Return one horizontal bar split in proportion to the (name, value) pairs; "" when they add up to nothing."""
    total = sum(max(0.0, value) for _, value in parts)
    if total <= 0:
        return ""
    drawn, x = list[str](), 0.0
    for index, (name, value) in enumerate(parts):
        width = WIDTH * max(0.0, value) / total
        tooltip = f"<title>{escape(name)}: {value / total:.1%}</title>"
        drawn.append(
            f'<rect class="fill c{index % COLORS}" x="{x:.1f}" y="26" width="{width:.1f}" height="30">{tooltip}</rect>'
        )
        if width > 44:
            drawn.append(
                f'<text class="on" x="{x + width / 2:.1f}" y="46" text-anchor="middle">{value / total:.0%}</text>'
            )
        x += width
    return _svg(_legend([name for name, _ in parts], left=0) + "".join(drawn), 60, title)


def _svg(content: str, height: int, title: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{content}</svg>'


def _drawable(series: Series, *, log: bool) -> Series:
    y = [None if value is None or not math.isfinite(value) or (log and value <= 0) else value for value in series.y]
    return Series(series.name, series.x, y, series.spread)


def _thinned(series: Series) -> Series:
    """Keep every n-th point, and the last, so that a long run still makes a small page."""
    stride = math.ceil(len(series.x) / MAX_POINTS)
    if stride <= 1:
        return series
    keep = sorted({*range(0, len(series.x), stride), len(series.x) - 1})
    spread = None if series.spread is None else [series.spread[i] for i in keep]
    return Series(series.name, [series.x[i] for i in keep], [series.y[i] for i in keep], spread)


def _edges(series: Series) -> list[float]:
    """Return every y that the axis must hold."""
    edges = [value for value in series.y if value is not None]
    return edges + [edge for _, low, high in _band_points(series) for edge in (low, high)]


def _band_points(series: Series) -> list[tuple[float, float, float]]:
    if series.spread is None:
        return []
    rows = zip(series.x, series.y, series.spread, strict=True)
    return [(x, y - s, y + s) for x, y, s in rows if y is not None and s is not None and math.isfinite(s)]


def _linear(values: Sequence[float], *, start: float, end: float, whole: bool = False) -> _Axis:
    low, high = min(values), max(values)
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        low, high = (low - 0.5, high + 0.5) if whole else (low - pad, high + pad)
    elif not whole:
        pad = (high - low) * 0.04
        low, high = low - pad, high + pad
    ticks = [tick for tick in nice_ticks(low, high) if not whole or tick == round(tick)]
    return _Axis(low, high, tuple(ticks), lambda v: start + (v - low) / (high - low) * (end - start))


def _logarithmic(values: Sequence[float], *, start: float, end: float) -> _Axis:
    positive = [value for value in values if value > 0]
    low, high = math.log10(min(positive)) - 0.1, math.log10(max(positive)) + 0.1
    ticks = tuple(log_ticks(10**low, 10**high))
    place = lambda v: start + (math.log10(v) - low) / (high - low) * (end - start)  # noqa: E731 - as in _linear
    return _Axis(10**low, 10**high, ticks, place)


def _frame(x_axis: _Axis, y_axis: _Axis, *, x_label: str, top: float) -> str:
    """Return grid lines, tick labels and the label of the x axis."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [f'<line class="axis" x1="{LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>']
    for tick in y_axis.ticks:
        y = y_axis.place(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick_text(tick)}</text>')
    for tick in x_axis.ticks:
        x = x_axis.place(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{_tick_text(tick)}</text>')
    middle = (LEFT + right) / 2
    return "".join([*parts, f'<text x="{middle}" y="{HEIGHT - 7}" text-anchor="middle">{escape(x_label)}</text>'])


def _band(series: Series, x_axis: _Axis, y_axis: _Axis, index: int) -> str:
    points = _band_points(series)
    if len(points) < 2:
        return ""
    floor = y_axis.low if y_axis.low > 0 else -math.inf
    upper = [f"{x_axis.place(x):.1f},{y_axis.place(high):.1f}" for x, _, high in points]
    lower = [f"{x_axis.place(x):.1f},{y_axis.place(max(low, floor)):.1f}" for x, low, _ in reversed(points)]
    return f'<polygon class="band c{index % COLORS}" points="{" ".join(upper + lower)}"/>'


def _line(series: Series, x_axis: _Axis, y_axis: _Axis, index: int) -> str:
    """Return the line, a dot for every point that stands alone, and a tooltip per point while they are few."""
    color = f"c{index % COLORS}"
    points = [(x, y) for x, y in zip(series.x, series.y, strict=True) if y is not None]
    path, dots, run = list[str](), list[str](), list[str]()
    for x, y in [*zip(series.x, series.y, strict=True), (0.0, None)]:
        if y is not None:
            run.append(f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}")
            continue
        if len(run) == 1:
            cx, cy = run[0].split(",")
            dots.append(f'<circle class="fill {color}" cx="{cx}" cy="{cy}" r="3"/>')
        elif run:
            path.append(f"M{' L'.join(run)}")
        run = []
    tips = [
        f'<circle class="tip" cx="{x_axis.place(x):.1f}" cy="{y_axis.place(y):.1f}" r="6">'
        f"<title>{escape(series.name)}, {x:g}: {y:.5g}</title></circle>"
        for x, y in (points if len(points) <= MAX_TOOLTIPS else [])
    ]
    return f'<path class="line {color}" d="{" ".join(path)}"/>' + "".join(dots + tips)


def _legend(names: Sequence[str], *, left: float = LEFT) -> str:
    parts, x = list[str](), left
    for index, name in enumerate(names):
        parts.append(f'<rect class="fill c{index % COLORS}" x="{x:.0f}" y="4" width="11" height="11" rx="2"/>')
        parts.append(f'<text x="{x + 16:.0f}" y="14">{escape(name)}</text>')
        x += 32 + 7.2 * len(name)
    return "".join(parts)


def _tick_text(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e") if 0 < abs(value) < 1e-4 else f"{value:g}"
