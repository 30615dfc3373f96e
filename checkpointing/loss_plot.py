"""The loss curve as an SVG file, which opens in every browser; no package is needed."""

import math
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from itertools import accumulate, cycle
from pathlib import Path

from checkpointing.atomic import atomic_write_text

WIDTH, HEIGHT = 800, 450
LEFT, RIGHT, TOP, BOTTOM = 68, 766, 62, 398  # the plot's rectangle; SVG's y points down
TRAIN, INK, QUIET = "#3b6fd4", "#1f2733", "#6b7686"
OTHERS = ("#e0702c", "#2f9e6b", "#9a5bc4", "#c2374e", "#8a6d1f")  # of further curves, in turn
NAMES = {"loss": "training", "eval_loss": "evaluation"}
MAX_POINTS = 1200  # of the light line: more is not seen, and the file stays small
Points = list[tuple[float, float]]


def draw_loss_curve(rows: list[dict], path: Path, title: str | None = None) -> None:
    """Draw `loss` as a line (light, and smoothed) and every other column whose name contains "loss" as joined dots."""
    names = dict.fromkeys(name for row in rows for name in row if "loss" in name and name != "loss")
    train, others = _points(rows, "loss"), {name: points for name in names if (points := _points(rows, name))}
    everything = sum(others.values(), train)
    steps, losses = zip(*everything, strict=True) if everything else ((0.0, 1.0), (0.0, 1.0))
    first, last = (min(steps), max(steps)) if min(steps) < max(steps) else (steps[0] - 1, steps[0] + 1)
    x_ticks, y_ticks = ticks([first, last], 8, whole=True), ticks(losses, 6)

    def x_of(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (RIGHT - LEFT)

    def y_of(loss: float) -> float:
        return BOTTOM - (loss - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (BOTTOM - TOP)

    def line(points: Points, style: str) -> str:
        where = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        return f'<polyline points="{where}" fill="none" stroke-linejoin="round" stroke-linecap="round" {style}/>'

    def dots(points: Points, color: str) -> list[str]:
        style = f'r="4" fill="{color}" stroke="#fff" stroke-width="1.5"'
        return [f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" {style}/>' for x, y in points]

    centered = f'fill="{QUIET}" text-anchor="middle"'
    picture = []
    for y in y_ticks:
        picture.append(f'<path d="M{LEFT} {y_of(y):.1f}H{RIGHT}" stroke="#e8ebf0"/>')
        picture.append(text(LEFT - 10, y_of(y) + 4.5, _label(y, y_ticks), f'fill="{QUIET}" text-anchor="end"'))
    picture.append(f'<path d="M{LEFT} {BOTTOM}H{RIGHT}" stroke="#9aa4b2"/>')
    for x in (x for x in x_ticks if first <= x <= last):
        picture.append(f'<path d="M{x_of(x):.1f} {BOTTOM}v5" stroke="#9aa4b2"/>')
        picture.append(text(x_of(x), BOTTOM + 20, f"{x:,.0f}", centered))
    middle = (TOP + BOTTOM) / 2
    picture.append(text((LEFT + RIGHT) / 2, HEIGHT - 12, "optimizer step", centered))
    picture.append(text(20, middle, "loss per token", f'transform="rotate(-90 20 {middle})" {centered}'))

    if (smooth := _smooth(train)) is not train:
        picture.append(line(_thin(train), f'stroke="{TRAIN}" stroke-width="1" stroke-opacity="0.35"'))
    picture.append(line(_thin(smooth), f'stroke="{TRAIN}" stroke-width="2.2"'))
    picture += dots(train if len(train) == 1 else [], TRAIN)
    curves = [("loss", smooth, TRAIN)]
    for (name, points), color in zip(others.items(), cycle(OTHERS), strict=False):
        picture.append(line(_thin(points), f'stroke="{color}" stroke-width="1.8"'))
        picture += dots(points if len(points) <= 60 else points[-1:], color)
        curves.append((name, points, color))
    legend = []
    for name, points, color in curves:
        for _, value in points[-1:]:
            number = f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
            legend.append(f'<tspan fill="{color}">●</tspan>&#160;{escape(NAMES.get(name, name))}&#160;{number}')
    words = "&#160;&#160;&#160; ".join(legend) or "no finite loss yet"
    picture.append(f'<text x="{RIGHT}" y="36" fill="{INK}" text-anchor="end">{words}</text>')
    atomic_write_text(path, svg(WIDTH, HEIGHT, 13, LEFT, (title or "Loss")[:48], picture))


def _points(rows: list[dict], name: str) -> Points:
    points = []
    for row in rows:
        with suppress(KeyError, TypeError, ValueError):  # no such column here, null, or text
            points.append((float(row["step"]), float(row[name])))
    return sorted(point for point in points if all(map(math.isfinite, point)))


def _smooth(points: Points) -> Points:
    """A centred mean over a twentieth of the curve, which, unlike a running one, does not lag."""
    n = len(points)
    if (reach := n // 40) == 0:
        return points
    total = [0.0, *accumulate(y for _, y in points)]
    spans = [(max(0, i - reach), min(n, i + reach + 1)) for i in range(n)]
    return [
        (x, (total[end] - total[begin]) / (end - begin)) for (x, _), (begin, end) in zip(points, spans, strict=True)
    ]


def _thin(points: Points) -> Points:
    """About MAX_POINTS points at most: the lowest and the highest of every stretch, so that no spike is lost."""
    size = 2 * math.ceil(len(points) / MAX_POINTS)
    if size <= 2:
        return points
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    return [p for s in stretches for p in sorted({min(s, key=lambda p: p[1]), max(s, key=lambda p: p[1])})]


def ticks(values: Sequence[float], count: int, whole: bool = False) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, that enclose the values."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # constant: show it in the middle
        low, high = low - (abs(low) / 2 or 1.0), high + (abs(low) / 2 or 1.0)
    magnitude = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(m * magnitude for m in (1, 2, 5, 10, 20) if (high - low) / (m * magnitude) <= count)
    step = max(step, float(whole))
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _label(value: float, ticks: list[float]) -> str:
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    return f"{value:.{decimals}f}" if decimals <= 6 else f"{value:.3g}"


def text(x: float, y: float, words: str, style: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'


def svg(width: int, height: int, font_size: int, left: int, title: str, parts: list[str]) -> str:
    """The file: a white card with a title at `left`, and these parts."""
    begin = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="{font_size}">',
        f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10" fill="#fff" stroke="#d9dee6"/>',
        text(left, 36, title, f'fill="{INK}" font-size="17" font-weight="600"'),
    ]
    return "\n".join([*begin, *parts, "</svg>", ""])
