"""metrics.jsonl: one JSON object per line, for every optimizer step and every evaluation."""

import json
import os
from contextlib import suppress
from pathlib import Path

from checkpointing.atomic import atomic_write_text, name_the_file
from checkpointing.errors import say
from checkpointing.run_record import to_json


class MetricsFile:
    def __init__(self, path: Path):
        self.path = path

    def append(self, row: dict) -> None:
        """Valid JSON (NaN and infinities as strings), floats to the last bit."""
        with name_the_file(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(to_json(row)) + "\n")

    def sync(self) -> None:
        """Bring the rows to disk: a checkpoint relies on them."""
        if self.path.exists():
            with name_the_file(self.path), open(self.path, "rb+") as file:
                os.fsync(file.fileno())

    def rows(self) -> list[dict]:
        return [row for _, row in self._lines() if row is not None]

    def cut(self, step: int) -> None:
        """Drop the rows after `step` and an incomplete last line: the resumed run writes them again.

        Other damaged lines are moved to metrics-damaged.jsonl; these and missing steps are reported.
        """
        if not step and not self.path.exists():
            return
        lines = self._lines()
        damaged = [i for i, (_, row) in enumerate(lines[:-1]) if row is None]
        if damaged:
            moved = self.path.with_name("metrics-damaged.jsonl")
            with name_the_file(moved), open(moved, "ab") as file:
                file.writelines(lines[i][0] + b"\n" for i in damaged)
            numbers = ", ".join(str(i + 1) for i in damaged[:10]) + (" …" if len(damaged) > 10 else "")
            say(f"{self.path} is damaged in line {numbers}: moved to {moved.name}")
        kept = [(line, row) for line, row in lines if row is not None and row.get("step", 0) <= step]
        missing = sorted(set(range(1, step + 1)) - {row.get("step") for _, row in kept if "loss" in row})
        if missing:
            say(f"{self.path} lacks {len(missing)} of {step} steps, the first of them step {missing[0]}")
        atomic_write_text(self.path, "".join(f"{line.decode()}\n" for line, _ in kept))

    def _lines(self) -> list[tuple[bytes, dict | None]]:
        """Every line, and its row; None for a line that is not one. The last line is empty or incomplete."""
        lines = []
        with suppress(FileNotFoundError):
            for line in self.path.read_bytes().split(b"\n"):
                row = None
                with suppress(ValueError):  # no JSON, or no text
                    row = json.loads(line)
                good = isinstance(row, dict) and isinstance(row.get("step", 0), int)
                lines.append((line, row if good else None))
        return lines
