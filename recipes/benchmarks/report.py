"""What recipes/benchmark.py found: a JSON file, tables for a README, and memory against sequence length as SVG."""

import json
import time
from pathlib import Path

from checkpointing.atomic import atomic_write_text
from checkpointing.loss_plot import BOTTOM, HEIGHT, LEFT, OTHERS, QUIET, RIGHT, TOP, TRAIN, WIDTH, svg, text
from recipes.benchmarks.card import GIB, SPARE_BYTES, fit_line
from recipes.benchmarks.figures import Panel, linear, markdown
from recipes.benchmarks.measure import Row


class Results:
    """The JSON file: a part's rows under its name, each with its settings. Every addition is on disk at once.

    A row measured again replaces the one with the same settings, so a file can grow over several calls.
    """

    def __init__(self, path: Path, machine: dict, command: str):
        self.path = path
        self.data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"machine": machine}
        if self.data["machine"] != machine:
            raise ValueError(f"{path} is of {self.data['machine']}, this is {machine}: choose another --output")
        self.data.setdefault("runs", []).append({"date": time.strftime("%Y-%m-%d %H:%M"), "command": command})
        self.save()

    def add(self, part: str, settings: dict, figures: dict) -> None:
        rows = self.data.setdefault(part, [])
        new = {"settings": settings, "date": time.strftime("%Y-%m-%d")} | figures
        rows[:] = [row for row in rows if row["settings"] != settings] + [new]
        self.save()

    def put(self, part: str, figures: dict) -> None:
        self.data.setdefault(part, {}).update(figures)
        self.save()

    def save(self) -> None:
        add_percentages(self.data)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self.path, json.dumps(self.data, indent=1, ensure_ascii=False) + "\n")


def add_percentages(data: dict) -> None:
    """Give each row the share of the measured matrix-product ceiling that its necessary operations reach."""
    ceiling = data.get("ceilings", {}).get("matmul_tflops")
    for part in ("speed", "peers", "small", "full"):
        for row in data.get(part, []):
            if ceiling and "flops_per_token" in row:
                tflops = row["tokens_per_second"] * row["flops_per_token"] / 1e12
                row["percent_of_ceiling"] = round(100 * tflops / ceiling, 1)


def fit_memory(data: dict, settings: dict, caps_gib: tuple[float, ...]) -> dict:
    """A straight line through card GiB against tokens, and the longest sequence that it leaves room for under each cap.

    KB are 1,000 bytes. Rows measured under a cap are no points of it: there the allocator had to make do.
    """
    fit = {"settings": settings, "fixed_gib": None, "kb_per_token": None}
    rows = [row for row in longest_rows(data, settings) if not row["settings"]["cap_gib"] and row.get("card_gib")]
    if len(rows) < 2:
        return fit | {"longest": {f"{cap:g}": None for cap in caps_gib}}
    fixed, slope = fit_line([(row["settings"]["length"], row["card_gib"]) for row in rows])
    room = {cap: (cap - SPARE_BYTES / GIB - fixed) / slope if slope > 0 else 0 for cap in caps_gib}
    longest = {f"{cap:g}": max(0, int(tokens)) // 64 * 64 for cap, tokens in room.items()}
    return fit | {"fixed_gib": round(fixed, 3), "kb_per_token": round(slope * GIB / 1000, 2), "longest": longest}


def longest_rows(data: dict, settings: dict) -> list[dict]:
    """Measurements of `longest` that differ from these settings in length and cap only."""
    any_length = {"length": None, "cap_gib": None}
    return [row for row in data.get("longest", []) if row["settings"] | any_length == settings | any_length]


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def in_short(figures: dict) -> str:
    """One row's figures, for the terminal."""
    if "failed" in figures:
        return figures["failed"]
    words = [f"{figures['tokens_per_second']:,.0f} tokens/s"]
    for name in ("peak", "card", "host"):
        if gib := figures.get(f"{name}_gib"):
            words.append(f"{name} {gib} GiB")
    return ", ".join([*words, f"first step {figures['first_step_seconds']} s"])


def report(data: dict, path: Path) -> None:
    """Print the tables of this file and draw memory.svg next to it."""
    print("\n" + tables(data))
    picture = path.with_name("memory.svg")
    if draw_memory(data, picture):
        print(f"\n![memory against sequence length]({picture.name})")


def tables(data: dict) -> str:
    """All that was measured, as markdown."""
    machine = ", ".join(f"{name} {value}" for name, value in data["machine"].items())
    makers = {"ceilings": _ceilings, "speed": _speed, "rungs": _modes, "longest_fit": _longest}
    makers |= {"small": _small, "full": _full, "vlm": _vlm}
    parts = [make(data) for part, make in makers.items() if part in data or (part == "speed" and "peers" in data)]
    return "\n\n".join([f"{machine}; {data['runs'][-1]['date']}", *parts])


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _memory(row: dict, digits: int) -> list[str]:
    return [_number(row.get(name), digits) for name in ("peak_gib", "card_gib", "host_gib")]


def _tokens_per_second(row: dict) -> str:
    return row.get("failed") or _number(row["tokens_per_second"])


def _ceilings(data: dict) -> str:
    found = dict(data["ceilings"])
    for name, value in found.pop("attention_tflops", {}).items():
        found[f"attention {name}, TFLOP/s"] = value
    rows = []
    for name, value in found.items():
        if not isinstance(value, dict):
            shown = value if isinstance(value, str) else _number(value, 2)
            rows.append([name.replace("_per_s", "/s").replace("_", " "), shown])
    return markdown(["ceiling", ""], rows)


def _speed(data: dict) -> str:
    """A column per model and shape, a row per way: tokens/s / peak GiB (% of the ceiling)."""
    cells: dict[str, dict[str, str]] = {}
    columns: list[str] = []
    for part in ("speed", "peers"):
        for row in data.get(part, []):
            settings = row["settings"]
            fields = {name: value for name, value in settings.items() if name in Row.__dataclass_fields__}
            described = Row(**fields | ({"rank": 16} if part == "peers" else {}))
            versions = settings.get("versions", {})
            named = [name for name in settings.get("peer", "").split(" + ") if name]
            way = " + ".join(f"{name} {versions[name]}" for name in named) or described.way
            cell = row.get("failed")
            if not cell:
                share = f" ({row['percent_of_ceiling']:.0f} %)" if "percent_of_ceiling" in row else ""
                cell = f"{_number(row['tokens_per_second'])} / {_number(row['peak_gib'], 1)}{share}"
            columns += [described.column] if described.column not in columns else []
            cells.setdefault(way, {})[described.column] = cell
    rows = [[way, *(found.get(column, "") for column in columns)] for way, found in cells.items()]
    return markdown(["tokens/s / peak GiB (of the ceiling)", *columns], rows)


def _modes(data: dict) -> str:
    rows = []
    for row in data["rungs"]:
        described = Row(**row["settings"])
        way = described.way + (", weights streamed" if described.weights == "stream" else "")
        deviation, losses = row.get("max_relative_deviation"), row.get("losses")
        loss = row.get("failed") or f"{losses[0]:.4f} → {losses[-1]:.4f}"
        rows.append([way, loss, "–" if deviation is None else f"{deviation:.1e}"])
    return markdown([f"{described.column}, 20 steps", "loss", "largest relative deviation"], rows)


def _longest(data: dict) -> str:
    fit = data["longest_fit"]
    capped = [row for row in longest_rows(data, fit["settings"]) if row["settings"]["cap_gib"]]
    capped.sort(key=lambda row: ("failed" not in row, row["settings"]["length"]))
    confirmed = {f"{row['settings']['cap_gib']:g}": row for row in capped}  # of several, the longest that succeeded
    rows = []
    for cap, length in fit["longest"].items():
        row = confirmed.get(cap, {})
        tried = f"{row['settings']['length']:,}: {row.get('failed') or 'one step'}" if row else ""
        digits = {"card_gib": 2, "first_step_seconds": 0, "host_gib": 1}
        figures = [_number(row[name], n) if name in row else "" for name, n in digits.items()]
        rows.append([f"{cap} GiB", _number(length), tried, *figures])
    line = f"{_number(fit['fixed_gib'], 2)} GiB + {_number(fit['kb_per_token'], 1)} KB per token"
    head = ["card", f"longest sequence by the line {line}", "confirmed", "card GiB", "seconds", "host GiB"]
    return markdown(head, rows)


def _small(data: dict) -> str:
    """Streamed weights under a cap, resident ones without: tokens/s, and their ratio."""
    rows, resident = [], {}
    for row in data["small"]:
        if row["settings"]["weights"] == "resident" and "failed" not in row:
            resident[Row(**row["settings"]).column] = row["tokens_per_second"]
    for row in data["small"]:
        described = Row(**row["settings"])
        column, speed = described.column, row.get("tokens_per_second")
        compared = speed and column in resident and described.weights != "resident"
        ratio = f"{speed / resident[column]:.0%}" if compared else ""
        cap = f"{described.cap_gib:g} GiB" if described.cap_gib else ""
        memory = [_number(row.get("card_gib"), 2), _number(row.get("host_gib"), 1)]
        rows.append([column, described.weights, cap, _tokens_per_second(row), ratio, *memory])
    return markdown(["model", "weights", "cap", "tokens/s", "of resident", "card GiB", "host GiB"], rows)


def _full(data: dict) -> str:
    rows = []
    for row in data["full"]:
        described = Row(**row["settings"])
        speed = _tokens_per_second(row)
        rows.append([described.column, described.optimizer, described.way, speed, *_memory(row, 1)])
    return markdown(["model", "optimizer", "activations", "tokens/s", "peak GiB", "card GiB", "host GiB"], rows)


def _vlm(data: dict) -> str:
    rows = []
    for row in data["vlm"]:
        idle = f"{row['idle_share']:.1%}" if "idle_share" in row else ""
        rows.append([row["settings"]["name"], _tokens_per_second(row), *_memory(row, 2), idle])
    head = ["LLaVA-1.5, an image in each row", "tokens/s", "peak GiB", "card GiB", "host GiB", "GPU idle"]
    return markdown(head, rows)


# ---------------------------------------------------------------------------------------------------------------------
# Picture


def draw_memory(data: dict, path: Path) -> bool:
    """Card memory against sequence length: steps measured without a cap (dots), the line through them, steps confirmed
    under a cap (rings), the caps. Returns whether there was anything to draw."""
    fit = data.get("longest_fit", {})
    if fit.get("fixed_gib") is None:
        return False
    rows = [row for row in longest_rows(data, fit["settings"]) if row.get("card_gib")]
    free = [(row["settings"]["length"], row["card_gib"]) for row in rows if not row["settings"]["cap_gib"]]
    capped = [(row["settings"]["length"], row["card_gib"]) for row in rows if row["settings"]["cap_gib"]]
    caps = {float(cap): length for cap, length in fit["longest"].items()}
    fixed, slope = fit["fixed_gib"], fit["kb_per_token"] * 1000 / GIB
    lengths = [0, *(x for x, _ in free + capped), *caps.values()]
    used = [0, *caps, *(y for _, y in free + capped)]
    panel = Panel(LEFT, RIGHT, TOP, BOTTOM, linear(lengths, 8), linear(used))

    parts = panel.grid("tokens in the sequence", HEIGHT - 12)
    line = f"{fixed:.2f} GiB + {fit['kb_per_token']:.1f} KB per token"
    parts.append(text(RIGHT, 36, line, f'fill="{TRAIN}" text-anchor="end"'))
    for cap, length in caps.items():
        y = panel.y(cap)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="{OTHERS[0]}" stroke-dasharray="5 4"/>')
        on_the_right = length < panel.x_axis.ticks[-1] / 2  # away from the line
        x, anchor = (RIGHT - 8, "end") if on_the_right else (LEFT + 8, "start")
        parts.append(text(x, y - 5, f"{cap:g} GiB: {length:,} tokens", f'fill="{OTHERS[0]}" text-anchor="{anchor}"'))
    end = max(lengths)
    ends = f"M{panel.x(0):.1f} {panel.y(fixed):.1f}L{panel.x(end):.1f} {panel.y(fixed + slope * end):.1f}"
    parts.append(f'<path d="{ends}" stroke="{TRAIN}" stroke-width="2"/>')
    for points, fill in ((free, TRAIN), (capped, "#fff")):
        style = f'r="4.5" fill="{fill}" stroke="{TRAIN}" stroke-width="2"'
        parts += [f'<circle cx="{panel.x(x):.1f}" cy="{panel.y(y):.1f}" {style}/>' for x, y in points]
    middle = (TOP + BOTTOM) / 2
    turned = f'transform="rotate(-90 20 {middle})" fill="{QUIET}" text-anchor="middle"'
    parts.append(text(20, middle, "GiB that the card shows as used", turned))
    described = Row(**fit["settings"])
    preset = described.preset.rpartition("-")[2].upper()
    title = f"{preset} {described.method}, rank {described.rank}: memory of one step"
    atomic_write_text(path, svg(WIDTH, HEIGHT, 13, LEFT, title, parts))
    return True
