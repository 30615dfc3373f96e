"""What recipes/compare_methods.py found: a table, and the score against trained parameters and memory as SVG."""

import math
from pathlib import Path

from checkpointing.atomic import atomic_write_text
from checkpointing.loss_plot import INK, TRAIN, svg, text
from recipes.benchmarks.figures import Panel, linear, logarithmic, markdown

WIDTH, HEIGHT, TOP, BOTTOM = 1160, 520, 64, 456
PANELS = ((70, 540), (640, 1110))  # left and right edge of each
LINE, LETTER = 14, 6.6  # height of a label, width of a letter

Point = tuple[float, float]


def table(results: dict) -> str:
    """All methods as markdown, the best first."""
    done = [row for row in results["rows"] if "failed" not in row]
    matches, gpu = all("exact_match" in row for row in done), "gpu" in results["machine"]
    head = ["method", "learning rate", "trained", *(["exact match"] if matches else []), "held-out loss"]
    head += ["peak memory", *(["target tokens/s"] if gpu else ["processor time"])]
    done.sort(key=lambda row: (-row.get("exact_match", 0), row["eval_loss"]))
    lines = []
    for row in done:
        settings = {name: value for name, value in row["settings"].items() if name != "lr"}
        others = "".join(f", {value}" for value in settings.values())
        score = [f"{row['exact_match']:.1%}"] if matches else []
        cost = f"{row['tokens_per_second']:,}" if gpu else f"{row['processor_seconds']:.0f} s"
        gib = row["peak_memory_gib"]
        memory = f"{gib:.2f} GiB" if gib >= 1 else f"{gib * 1024:.0f} MiB"
        figures = [*score, f"{row['eval_loss']:.4f}", memory, cost]
        rate = f"{row['settings']['lr']:.2g}"
        lines.append([row["method"] + others, rate, f"{row['trained']:,}", *figures])
    lines += [[row["method"], row["failed"], *[""] * (len(head) - 2)] for row in results["rows"] if "failed" in row]
    return markdown(head, lines, align="--:")


def draw(results: dict, path: Path) -> None:
    """A dot per method, twice: its held-out loss against what it trains, and against peak memory."""
    rows = [row for row in results["rows"] if "failed" not in row]
    if not rows:
        return
    names, losses = [row["method"] for row in rows], [row["eval_loss"] for row in rows]
    loss_axis = logarithmic(losses) if max(losses) > 20 * min(losses) else linear(losses)
    large = max(row["peak_memory_gib"] for row in rows) >= 1
    used = [row["peak_memory_gib"] * (1 if large else 1024) for row in rows]
    trained = [float(row["trained"]) for row in rows]
    unit = "peak memory, GiB" if large else "peak memory of the training, MiB"
    parts = []
    for edges, xs, axis, title in (
        (PANELS[0], trained, logarithmic(trained, whole=True), "trained parameters"),
        (PANELS[1], used, linear(used), unit),
    ):
        panel = Panel(*edges, TOP, BOTTOM, axis, loss_axis)
        dots = list(zip(map(panel.x, xs), map(panel.y, losses), strict=True))
        parts += panel.grid(title, HEIGHT - 16) + _dots(names, dots, edges)
    atomic_write_text(path, svg(WIDTH, HEIGHT, 12, PANELS[0][0], "Held-out loss (lower is better)", parts))


def _dots(names: list[str], dots: list[Point], edges: tuple[int, int]) -> list[str]:
    """Dots with their names, joined by a line where another dot is as near to the name."""
    lines, words, circles = [], [], []
    for name, dot, (x, y, anchor) in zip(names, dots, place_labels(names, dots, edges), strict=True):
        own, *others = sorted(dots, key=lambda other: (other != dot, math.dist(other, (x, y - 4))))
        if math.dist(own, (x, y - 4)) > min([20.0, *(math.dist(other, (x, y - 4)) for other in others)]):
            lines.append(f'<path d="M{dot[0]:.1f} {dot[1]:.1f}L{x:.1f} {y - 4:.1f}" stroke="#b4bcc8"/>')
        words.append(text(x, y, name, f'fill="{INK}" text-anchor="{anchor}"'))
        circles.append(f'<circle cx="{dot[0]:.1f}" cy="{dot[1]:.1f}" r="4.5" fill="{TRAIN}" stroke="#fff"/>')
    return lines + words + circles


def place_labels(names: list[str], dots: list[Point], edges: tuple[int, int]) -> list[tuple[float, float, str]]:
    """(x, baseline, anchor) of each name: the nearest place to its dot that is free of other names and of dots."""
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in dots]
    labels: dict[int, tuple[float, float, str]] = {}
    shifts = sorted(range(-24, 25), key=abs)
    for i in sorted(range(len(dots)), key=lambda i: (dots[i][1], dots[i][0])):
        (x, y), width = dots[i], len(names[i]) * LETTER
        places = [(side * (8 + reach), shift * LINE / 2) for shift in shifts for reach in (0, 40) for side in (1, -1)]
        for dx, dy in sorted(places, key=lambda at: math.hypot(at[0], 1.5 * at[1])):
            box = (x + dx, y + dy - LINE / 2, x + dx + width, y + dy + LINE / 2)
            if dx < 0:
                box = (x + dx - width, box[1], x + dx, box[3])
            inside = edges[0] < box[0] and box[2] < edges[1] + 40 and TOP - 12 < box[1] and box[3] < BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        labels[i] = (x + dx, y + dy + 4, "start" if dx > 0 else "end")
    return [labels[i] for i in range(len(dots))]


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
