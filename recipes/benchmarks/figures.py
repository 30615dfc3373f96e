"""How results are shown: tables in markdown, charts in SVG."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from checkpointing.loss_plot import QUIET, text, ticks


def markdown(head: list[str], rows: list[list[str]], align: str = "---") -> str:
    """A table; `align` is the mark below every column head but the first."""
    lines = [head, ["---", *[align] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass(frozen=True)
class Axis:
    ticks: list[float]
    logarithmic: bool = False

    def place(self, start: float, end: float) -> Callable[[float], float]:
        """From a value to its place between `start` and `end`, where the first and the last tick are."""
        scale = math.log10 if self.logarithmic else float
        low, high = scale(self.ticks[0]), scale(self.ticks[-1])
        return lambda value: start + (scale(value) - low) / (high - low) * (end - start)


def linear(values: list[float], count: int = 6) -> Axis:
    return Axis(ticks(values, count))


def logarithmic(values: list[float], whole: bool = False) -> Axis:
    """Ticks at 1, 2 and 5 times powers of ten, or (`whole`) at powers of ten alone, that enclose the values."""
    steps = [m * 10.0**e for e in range(-9, 13) for m in ((1,) if whole else (1, 2, 5))]
    first = max(i for i, step in enumerate(steps) if step <= min(values))
    last = min(i for i, step in enumerate(steps) if step >= max(values))
    return Axis(steps[first : max(last, first + 1) + 1], logarithmic=True)


@dataclass(frozen=True)
class Panel:
    """A chart's rectangle in the picture, in pixels. SVG's y points down."""

    left: int
    right: int
    top: int
    bottom: int
    x_axis: Axis
    y_axis: Axis

    def x(self, value: float) -> float:
        return self.x_axis.place(self.left, self.right)(value)

    def y(self, value: float) -> float:
        return self.y_axis.place(self.bottom, self.top)(value)

    def grid(self, title: str, title_y: float) -> list[str]:
        """Lines, numbers at both axes, and the x axis's title."""
        quiet, picture = f'fill="{QUIET}" text-anchor=', []
        for value in self.y_axis.ticks:
            y = self.y(value)
            picture.append(f'<path d="M{self.left} {y:.1f}H{self.right}" stroke="#e8ebf0"/>')
            picture.append(text(self.left - 10, y + 4.5, f"{value:g}", f'{quiet}"end"'))
        for value in self.x_axis.ticks:
            x, number = self.x(value), f"{value:,.6g}" if value < 1e6 else f"{value:,.0f}"
            picture.append(f'<path d="M{x:.1f} {self.bottom}v5" stroke="#9aa4b2"/>')
            picture.append(text(x, self.bottom + 20, number, f'{quiet}"middle"'))
        picture.append(f'<path d="M{self.left} {self.bottom}H{self.right}" stroke="#9aa4b2"/>')
        return [*picture, text((self.left + self.right) / 2, title_y, title, f'{quiet}"middle"')]
