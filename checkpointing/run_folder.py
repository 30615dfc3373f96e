"""The run folder: everything about a run that must survive the night.

    run.json        what ran: settings, command, versions, git revision and diff, hardware; earlier starts in `resumed`
    recipe.py       the script that ran
    metrics.jsonl   one row per optimizer step, and the evaluations
    loss.svg        the same as a picture
    checkpoints/    step-N: resumable state, each complete or not there
    adapter/ model/ the result
    .lock           held (flock) while a process works here; the system lets go of it however the process ends

A run has ended when run.json says `finished` and the results that it names there still exist.
"""

import fcntl
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from checkpointing.atomic import atomic_write_text, discard, make_folder, remove_folder, restore_folder
from checkpointing.errors import say
from checkpointing.loggers import Loggers
from checkpointing.loss_plot import draw_loss_curve
from checkpointing.run_record import HOW_LONG, compare_config, describe_run, plain, timestamp
from checkpointing.training_state import STATE

RESULTS = {"adapter": "adapter_config.json", "model": "config.json"}  # and a file that every complete one has
STOPS = [number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None))]
TELL_EVERY = 30  # seconds
LEFTOVERS = ("metrics.jsonl", "loss.svg", "recipe.py")


class RunFolder:
    """One run's folder. Get it from `RunFolder.open`, use it in a `with` block.

    `stop_requested`: Ctrl-C, SIGTERM or SIGHUP (a closed terminal) came; end the step, save, leave with `stop_status`
    (130, 143, 129: to a shell or a scheduler 0 would mean that the run is complete). A second Ctrl-C raises
    KeyboardInterrupt.
    `finished`: the run has ended and its result is saved; there is nothing to resume.
    """

    def __init__(self, path: Path):
        if path.exists() and not path.is_dir():
            raise ValueError(f"--output {path} is a file; expected a folder, or a new name for one")
        self.path, self.checkpoints = path, path / "checkpoints"
        self.adapter, self.model = path / "adapter", path / "model"
        self.stop_requested = self.finished = False
        self.stop_status = 0
        self._record: dict = {}
        self._undrawn = False
        # Where there is no progress bar (under nohup, in a job) a line now and then takes its place.
        self._told = math.inf if sys.stderr.isatty() else time.monotonic()
        self._loggers: list[Loggers] = []
        self._handlers: dict[int, Any] = {}
        self._lock: int | None = None

    @classmethod
    def open(cls, output: Path, config: Any, *, script: str | Path, resume: bool) -> "RunFolder":
        """Claim `output` for the run of `config` (a dataclass or a dictionary), new or resumed.

        Raises ValueError, and changes nothing that an earlier run saved, where another process is at work in the
        folder, where a new run would overwrite a checkpoint or a result, and where a resumed one has other settings
        than `MAY_CHANGE` allows.
        """
        run = cls(Path(output))
        make_folder(run.path)
        try:
            run._lock = _lock(run.path / ".lock")
            run._settle()
            run._begin(plain(config), Path(script), resume)
            if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
                for number in STOPS:
                    if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                        run._handlers[number] = signal.signal(number, run._on_signal)
        except BaseException:
            run.close()
            raise
        return run

    @property
    def started(self) -> datetime:
        """When the run was first started: a resumed run that prints the date (chat templates do) prints the same."""
        first = [*self._record["resumed"], self._record][0]
        return datetime.fromisoformat(first["started"])

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoints/step-N, if there is one."""
        return max(self._complete_checkpoints(), key=_step, default=None)

    def check_resumable(self, saved_config: dict, identity: dict, saved_identity: dict) -> None:
        """The checkpoint's own settings and fingerprints (of weights and data, say) must be this run's; ValueError."""
        saved = saved_config | {f"fingerprint of the {name}": value for name, value in saved_identity.items()}
        here = self._record["config"] | {f"fingerprint of the {name}": value for name, value in identity.items()}
        compare_config(saved, here)

    def log(self, row: dict, *, scaled: bool = False) -> None:
        """Append a row to metrics.jsonl: valid JSON (NaN and infinities as strings), floats to the last bit.

        Where no terminal shows a progress bar, the loss of a step is said every `TELL_EVERY` seconds.

        Raises ValueError for a `loss` or `grad_norm` that is not finite: with such gradients the weights are lost, and
        saving them would push a good checkpoint out. `scaled`: float16's loss scaler leaves out a step whose gradients
        are not finite; a loss that is not has overflowed in forward, which no scale mends, and ends such a run, too.
        """
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(plain(row)) + "\n")
        self._undrawn = True
        for name in ("loss",) if scaled else ("loss", "grad_norm"):
            if not math.isfinite(row.get(name, 0.0)):
                saved = self.latest_checkpoint()
                last = f"the last checkpoint is from step {_step(saved)}" if saved else "no checkpoint was saved before"
                found = f"{name} is {plain(row[name])} at step {row['step']}: the run has diverged"
                anew = "start anew with a lower --lr" + (" and another --output" if saved else "")
                raise ValueError(f"{found}, and nothing more was saved ({last}); {anew}")
        if "loss" in row and time.monotonic() - self._told > TELL_EVERY:
            self._told = time.monotonic()
            speed = f", {row['tokens_per_second']:,.0f} tok/s" if "tokens_per_second" in row else ""
            say(f"step {row['step']}: loss {row['loss']:.4f}{speed}")

    def cut_metrics(self, step: int) -> None:
        """Drop the rows after `step`, and a last line that a kill cut short: the resumed run writes them again."""
        if (self.path / "metrics.jsonl").exists():
            kept = [line for line, row in self._rows() if row.get("step", 0) <= step]
            atomic_write_text(self.path / "metrics.jsonl", "".join(f"{line}\n" for line in kept))

    def draw(self) -> None:
        """Draw loss.svg from metrics.jsonl."""
        draw_loss_curve([row for _, row in self._rows()], self.path / "loss.svg", title=self.path.name)
        self._undrawn = False

    def prune(self, keep_last: int | None) -> None:
        """Remove all but the newest `keep_last` checkpoints; None keeps all."""
        if keep_last is None:
            return
        check_keep_last(keep_last)
        for checkpoint in sorted(self._complete_checkpoints(), key=_step)[:-keep_last]:
            try:
                remove_folder(checkpoint)
            except OSError as error:  # no reason to end a run
                say(f"could not remove {checkpoint}: {error}")

    def rehearse(self, save: Callable[[], None]) -> None:
        """Run the final `save()`, which writes to `adapter` or `model`, into a folder that is removed again.

        What cannot be saved fails before step 1, not after the training.
        """
        adapter, model, scratch = self.adapter, self.model, self.path / ".rehearsal.partial"
        self.adapter, self.model = scratch / "adapter", scratch / "model"
        try:
            save()
        finally:
            self.adapter, self.model = adapter, model
            discard(scratch)

    def closing(self, loggers: Loggers) -> Loggers:
        """Close them with the run, however it ends: what they have not written yet is not lost."""
        self._loggers.append(loggers)
        return loggers

    def finish(self) -> None:
        """Put on record that the run has ended; call it when the result is saved."""
        self.draw()  # before the mark: nobody comes back to a finished run
        self._record["finished"] = {"time": timestamp(), "results": self._results()}
        self._write_record()
        self.finished = True

    def close(self) -> None:
        """Close the loggers, draw what has not been drawn, give the signals back, let go of the folder."""
        try:
            while self._loggers:
                self._loggers.pop().close()
            if self._undrawn:
                self.draw()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler or signal.SIG_DFL)
            self._handlers = {}
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _begin(self, config: dict, script: Path, resume: bool) -> None:
        earlier, checkpoint, results = self._read_record(), self.latest_checkpoint(), self._results()
        mark = earlier and earlier.get("finished")
        ended = isinstance(mark, dict) and set(mark.get("results", ())) <= set(results)
        if not resume and (checkpoint or results):
            found = ", ".join(str(p) for p in (checkpoint, *(self.path / name for name in results)) if p)
            raise ValueError(
                f"an earlier run is in --output: {found}; add --resume to continue it or choose another folder"
            )
        self._record = describe_run(config, script)
        if not (checkpoint or results or (resume and ended)):
            if resume:
                say(f"{self.path} holds no complete checkpoint: starting afresh")
            self._clear_leftovers(script, ours=earlier is not None)
        else:
            if earlier is None:
                say(f"{self.path / 'run.json'} is missing or damaged: settings are not compared with the earlier ones")
            changed = compare_config(earlier["config"], config) if earlier else {}
            for name, change in changed.items():
                if name not in ("output", "resume"):
                    say(f"this run resumes with another {name}: {change}")
            another_end = any(name in HOW_LONG for name in changed)
            # A kill between the result and its mark: without a checkpoint there is nothing else to go on with.
            if not another_end and (ended or (earlier and not checkpoint)):
                self._record, self.finished = earlier, True
                return
            if not checkpoint:
                raise ValueError(f"{self.path} holds a result but no checkpoint to go on from: choose another --output")
            if earlier:
                before = {key: value for key, value in earlier.items() if key != "resumed"}
                if before.get("git") == self._record["git"]:  # diffs can be long, and starts many
                    before["git"] = "as in the start after this one"
                self._record["resumed"] = [*earlier["resumed"], before]
        self._write_record()  # first: it is what says that the rest is ours
        self._keep_script(script)

    def _settle(self) -> None:
        """Put right what a kill left: an earlier folder goes back to its name, half-written things go."""
        for old in self.checkpoints.glob(".step-*.old"):
            restore_folder(self.checkpoints / old.name.removeprefix(".").removesuffix(".old"))
        for name in RESULTS:
            restore_folder(self.path / name)
        for name in (*RESULTS, *LEFTOVERS, "run.json", "rehearsal"):
            discard(self.path / f".{name}.partial")
        for partial in self.checkpoints.glob(".step-*.partial"):
            discard(partial)

    def _clear_leftovers(self, script: Path, ours: bool) -> None:
        """Remove what a run that saved nothing left. What is not ours stays; where it is in the way: ValueError."""
        recipe = self.path / "recipe.py"
        in_the_way = [name for name in RESULTS if (self.path / name).exists() and any((self.path / name).iterdir())]
        if not ours and recipe.exists() and not _same_file(recipe, script):
            in_the_way.append("recipe.py")
        if in_the_way:
            names = ", ".join(in_the_way)
            raise ValueError(f"--output {self.path} holds {names}, which no run here wrote: choose another folder")
        for name in LEFTOVERS:
            if not _same_file(self.path / name, script):
                discard(self.path / name)

    def _keep_script(self, script: Path) -> None:
        recipe = self.path / "recipe.py"
        if not script.is_file() or _same_file(recipe, script):
            return
        text = script.read_text(encoding="utf-8")
        if recipe.exists() and recipe.read_text(encoding="utf-8") != text:
            earlier = self.path / f"recipe-{1 + len(list(self.path.glob('recipe-*.py')))}.py"
            os.rename(recipe, earlier)
            say(f"the script has changed since the earlier start, whose script is kept as {earlier}")
        atomic_write_text(recipe, text)

    def _complete_checkpoints(self) -> list[Path]:
        folders = self.checkpoints.glob("step-*")
        return [f for f in folders if f.name.removeprefix("step-").isdecimal() and (f / STATE).is_file()]

    def _results(self) -> list[str]:
        return [name for name, file in RESULTS.items() if (self.path / name / file).is_file()]

    def _rows(self) -> list[tuple[str, dict]]:
        """metrics.jsonl as (line, row); lines that are no JSON object, as a kill leaves them, are left out."""
        rows = []
        with suppress(FileNotFoundError):
            text = (self.path / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
            for line in text.split("\n"):
                with suppress(json.JSONDecodeError):
                    if isinstance(row := json.loads(line), dict):
                        rows.append((line, row))
        return rows

    def _read_record(self) -> dict | None:
        with suppress(FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            record = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
            return record if isinstance(record, dict) and record.keys() >= {"config", "started", "resumed"} else None
        return None

    def _write_record(self) -> None:
        atomic_write_text(self.path / "run.json", json.dumps(self._record, indent=1) + "\n")

    def _on_signal(self, number: int, frame) -> None:
        if self.stop_requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.stop_requested = True  # first: the next signal may come while this one is announced
        self.stop_status = 128 + number
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        text = f"\n{name}: ending this step and saving; press Ctrl-C (again) to stop at once, without saving\n"
        with suppress(OSError):
            os.write(2, text.encode())  # print() may not be entered twice, and this may have interrupted one


def check_keep_last(keep_last: int) -> None:
    if keep_last < 1:
        raise ValueError(f"--keep-last {keep_last} leaves nothing to resume from; expected at least 1")


def _lock(path: Path) -> int:
    """A descriptor that holds the lock until it is closed, or the process ends in whatever way."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 20).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise ValueError(
            f"{path.parent} is in use by process {holder}: wait for it or choose another --output"
        ) from None
    except OSError as error:  # some network file systems have no locks
        say(f"{path.parent} cannot be locked ({error.strerror}): see that no other run uses it")
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor


def _same_file(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and os.path.samefile(a, b)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
