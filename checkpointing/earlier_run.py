"""What an earlier start left in a run folder: its record, checkpoints and results."""

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from checkpointing.atomic import discard, restore_folder
from checkpointing.training_state import STATE

USUAL_RESULTS = ("adapter", "model")  # what is looked for where run.json does not say which results a run has
LEFTOVERS = ("metrics.jsonl", "loss.svg", "recipe.py")


@dataclass
class EarlierRun:
    record: dict | None  # run.json; None if it is missing or damaged
    checkpoint: Path | None  # the newest complete one
    results: list[str]  # names of the results that exist; they are complete
    lost: list[str]  # files of a finished run's results that are gone
    finished: bool  # the run has ended, and its results are all there


def find_earlier_run(folder: Path) -> EarlierRun:
    """What is in `folder`, once the incomplete folders of a killed run are repaired or removed."""
    record = _read_record(folder)
    _recover(folder, {*USUAL_RESULTS, *(record["results"] if record else ())})
    checkpoint = latest_checkpoint(folder)
    known = record["results"] if record else USUAL_RESULTS if checkpoint else ()
    mark = record and record.get("finished")
    lost = [name for name in mark["results"] if not (folder / name).exists()] if mark else []
    results = [name for name in known if holds_something(folder / name)]
    return EarlierRun(record, checkpoint, results, lost, finished=bool(mark and not lost))


def clear_leftovers(folder: Path, earlier: EarlierRun, script: Path) -> None:
    """Remove what a run that saved nothing left. What is not ours stays; where it is in the way: ValueError."""
    recipe = folder / "recipe.py"
    in_the_way = [name for name in USUAL_RESULTS if name not in earlier.results and holds_something(folder / name)]
    if earlier.record is None and recipe.exists() and not same_file(recipe, script):
        in_the_way.append("recipe.py")
    if in_the_way:
        names = ", ".join(in_the_way)
        raise ValueError(f"--output {folder} holds {names}, which no run here wrote: choose another folder")
    for name in LEFTOVERS:
        if not same_file(folder / name, script):
            discard(folder / name)


def complete_checkpoints(folder: Path) -> list[Path]:
    """checkpoints/step-N, the newest last."""
    found = (folder / "checkpoints").glob("step-*")
    return sorted((f for f in found if f.name[5:].isdecimal() and (f / STATE).is_file()), key=step_of)


def latest_checkpoint(folder: Path) -> Path | None:
    return next(reversed(complete_checkpoints(folder)), None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def is_result_name(name: str) -> bool:
    return re.fullmatch(r"[\w-]+", name) is not None and name != "checkpoints"


def holds_something(path: Path) -> bool:
    return path.is_file() or path.is_dir() and any(path.iterdir())


def same_file(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and os.path.samefile(a, b)


def _read_record(folder: Path) -> dict | None:
    with suppress(FileNotFoundError, ValueError, TypeError, AttributeError):
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        record.setdefault("results", list(USUAL_RESULTS))  # records of earlier versions
        files = record["finished"]["results"] if record.get("finished") else []
        if record.keys() >= {"config", "started", "resumed"} and all(isinstance(name, str) for name in files):
            return record if all(map(is_result_name, record["results"])) else None
    return None


def _recover(folder: Path, results: set[str]) -> None:
    """Give a folder that was being replaced its name back, and remove incomplete ones."""
    checkpoints = folder / "checkpoints"
    for old in checkpoints.glob(".step-*.old"):
        restore_folder(checkpoints / old.name.removeprefix(".").removesuffix(".old"))
    for name in results:
        restore_folder(folder / name)
    for name in (*results, *LEFTOVERS, "run.json", "rehearsal"):
        discard(folder / f".{name}.partial")
    for partial in checkpoints.glob(".step-*.partial"):
        discard(partial)
