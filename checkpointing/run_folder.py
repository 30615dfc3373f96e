"""The run folder: settings, metrics, checkpoints and results of one run, safe against kills and power failures.

    run.json        what ran: settings, command, versions, git revision and diff, hardware; earlier starts in `resumed`
    recipe.py       the script that ran
    metrics.jsonl   one row per optimizer step, and the evaluations
    loss.svg        the same as a picture
    checkpoints/    step-N: resumable state
    adapter/ model/ the results, or whatever names the recipe gives them
    .lock           held while a process works here; the system releases it however the process ends

Checkpoints and results get their names only when they are complete. A run is finished when run.json says so and all
the result files that it lists still exist.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from checkpointing.atomic import atomic_folder, atomic_write_text, discard, make_folder, remove_folder
from checkpointing.earlier_run import (
    clear_leftovers,
    complete_checkpoints,
    find_earlier_run,
    holds_something,
    is_result_name,
    latest_checkpoint,
    step_of,
)
from checkpointing.errors import say
from checkpointing.loggers import Logger
from checkpointing.loss_plot import draw_loss_curve
from checkpointing.metrics import MetricsFile
from checkpointing.run_lock import lock_folder
from checkpointing.run_record import LENGTH, compare_config, describe_run, keep_script, timestamp, to_json
from checkpointing.signals import StopSignals

LOSS_LINES, LOSS_LINE_SECONDS = 10, 30  # without a terminal: at least so many lines per run, and one in this time


class RunFolder:
    """One run's folder. Get it from `RunFolder.open`, use it in a `with` block. `finished`: nothing is left to do."""

    def __init__(self, path: Path):
        if path.exists() and not path.is_dir():
            raise ValueError(f"--output {path} is a file; expected a folder, or a new name for one")
        self.path, self.checkpoints = path, path / "checkpoints"
        self.finished = False
        self._record: dict = {}
        self._may_change: Collection[str] = ()
        self._metrics = MetricsFile(path / "metrics.jsonl")
        self._undrawn = False
        self._rehearsal: Path | None = None
        self._print_losses = not sys.stderr.isatty()  # instead of a progress bar
        self._steps_per_line, self._last_line_time = math.inf, time.monotonic()
        self._loggers: list[Logger] = []
        self._signals = StopSignals()
        self._lock: FileLock | None = None

    @classmethod
    def open(
        cls, output: Path, config: Any, *, script: str | Path, resume: bool, may_change: Collection[str] = ()
    ) -> "RunFolder":
        """Claim `output` for the run of `config` (a dataclass or a dictionary), new or resumed.

        `may_change`: a recipe's own settings that a resumed run may change, in addition to run_record.MAY_CHANGE.
        Raises ValueError, and changes nothing, if another process uses the folder, if a new run would overwrite a
        checkpoint or a result, and if a resumed one has other settings.
        """
        run = cls(Path(output))
        run._may_change = may_change
        make_folder(run.path)
        try:
            run._lock = lock_folder(run.path)
            run._begin(to_json(config), Path(script), resume)
        except BaseException:
            run.close()
            raise
        return run

    @property
    def started(self) -> datetime:
        """When the run was first started. Chat templates print the date: a resumed run prints the same."""
        first = [*self._record["resumed"], self._record][0]
        return datetime.fromisoformat(first["started"])

    # Checkpoints.

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoints/step-N, if there is one."""
        return latest_checkpoint(self.path)

    def checkpoint_folder(self, step: int) -> Path:
        """Where to save the state after `step`; brings the metrics up to there to disk."""
        self._metrics.sync()
        return self.checkpoints / f"step-{step}"

    def check_resumable(self, saved_config: dict, identity: dict, saved_identity: dict) -> None:
        """Raise ValueError if the checkpoint's settings or fingerprints (of weights and data) are not this run's."""
        saved = saved_config | {f"fingerprint of the {name}": value for name, value in saved_identity.items()}
        here = self._record["config"] | {f"fingerprint of the {name}": value for name, value in identity.items()}
        compare_config(saved, here, self._may_change)

    def prune(self, keep_last: int) -> None:
        """Remove all but the newest `keep_last` checkpoints."""
        check_keep_last(keep_last)
        for checkpoint in complete_checkpoints(self.path)[:-keep_last]:
            try:
                remove_folder(checkpoint)
            except OSError as error:  # no reason to end a run
                say(f"could not remove {checkpoint}: {error}")

    # Results.

    @contextmanager
    def result(self, name: str) -> Iterator[Path]:
        """A folder to write a result into: it becomes OUTPUT/`name` when the block ends, in place of an earlier one.

        During `rehearse` it is a temporary one. Raises ValueError for a name that is taken.
        """
        path, known = self.path / name, self._record["results"]
        if not is_result_name(name):
            raise ValueError(f"a result cannot be called {name!r}: expected a name like adapter, not checkpoints")
        if name not in known and holds_something(path):
            raise ValueError(f"--output {self.path} holds {name}, which no run here wrote: choose another folder")
        if self._rehearsal:
            discard(self._rehearsal / name)
            (self._rehearsal / name).mkdir(parents=True)
            yield self._rehearsal / name
            return
        if name not in known:
            known.append(name)
            self._write_record()  # before the folder exists: the record is what says that it is ours
        with atomic_folder(path) as folder:
            yield folder

    def rehearse(self, save: Callable[[], None]) -> None:
        """Call the final `save()` into a temporary folder, so that what cannot be saved fails before step 1."""
        self._rehearsal = self.path / ".rehearsal.partial"
        try:
            save()
        finally:
            discard(self._rehearsal)
            self._rehearsal = None

    def finish(self) -> None:
        """Record that the run has ended; call it when the results are saved."""
        self.draw()  # before the mark: nobody comes back to a finished run
        files = [file for name in self._record["results"] for file in (self.path / name).rglob("*")]
        names = sorted(file.relative_to(self.path).as_posix() for file in files if file.is_file())
        self._record["finished"] = {"time": timestamp(), "results": names}
        self._write_record()
        self.finished = True

    # The training loop: metrics and signals.

    def start_loop(self, total_steps: int) -> None:
        """Call it right before the training loop: from here on a signal only sets `stop_requested`."""
        self._steps_per_line = max(1, total_steps // LOSS_LINES)
        self._signals.catch()

    @property
    def stop_requested(self) -> bool:
        """Ctrl-C, SIGTERM or SIGHUP came: end the step, save, leave with `stop_status`."""
        return self._signals.requested

    @property
    def stop_status(self) -> int:
        return self._signals.status

    def log(self, row: dict, *, scaled: bool = False) -> None:
        """Append a row to metrics.jsonl, pass it to the loggers, and print its loss where no progress bar shows it.

        Raises ValueError for a `loss` or `grad_norm` that is not finite: the weights are lost, and saving them would
        push a good checkpoint out. `scaled`: float16's loss scaler skips steps whose gradients are not finite, so only
        the loss is checked.
        """
        self._metrics.append(row)
        self._undrawn = True
        values = {name: value for name, value in row.items() if name != "step"}
        for logger in self._loggers:
            logger.log(values, row["step"])
        for name in ("loss",) if scaled else ("loss", "grad_norm"):
            if not math.isfinite(row.get(name, 0.0)):
                saved = self.latest_checkpoint()
                last = f"the last checkpoint is from step {step_of(saved)}" if saved else "no checkpoint was saved"
                found = f"{name} is {to_json(row[name])} at step {row['step']}: the run has diverged"
                anew = "start anew with a lower --lr" + (" and another --output" if saved else "")
                raise ValueError(f"{found}, and nothing more was saved ({last}); {anew}")
        if self._print_losses and "loss" in row:
            now = time.monotonic()
            if row["step"] % self._steps_per_line == 0 or now - self._last_line_time > LOSS_LINE_SECONDS:
                self._last_line_time = now
                speed = f", {row['tokens_per_second']:,.0f} tok/s" if "tokens_per_second" in row else ""
                say(f"step {row['step']}: loss {row['loss']:.4f}{speed}")

    def cut_metrics(self, step: int) -> None:
        """Drop the rows after `step`: the resumed run writes them again."""
        self._metrics.cut(step)

    def draw(self) -> None:
        """Draw loss.svg from metrics.jsonl."""
        draw_loss_curve(self._metrics.rows(), self.path / "loss.svg", title=self.path.name)
        self._undrawn = False

    def add_loggers(self, loggers: list[Logger]) -> None:
        """Loggers that get every row from now on, and are closed with the run, however it ends."""
        self._loggers += loggers

    def close(self) -> None:
        """Close the loggers, draw new rows, restore the signal handlers, release the folder."""
        try:
            while self._loggers:
                self._loggers.pop().close()
            if self._undrawn:
                self.draw()
        finally:
            self._signals.release()
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    # Opening.

    def _begin(self, config: dict, script: Path, resume: bool) -> None:
        """Decide how this start continues what an earlier one left, and record it.

        left behind                                     without --resume   with --resume
        nothing, or by a run that saved nothing         new                new, and says so
        a checkpoint                                    refused            resumed
        results of a run that has not finished          refused            new, and says so; they stay until replaced
        a finished run                                  refused            finished
        a finished run, other max_steps or epochs       refused            resumed; refused without a checkpoint
        """
        earlier = find_earlier_run(self.path)
        checkpoint, record = earlier.checkpoint, earlier.record
        if not resume and (checkpoint or earlier.results):
            found = [str(path) for path in (checkpoint, *(self.path / name for name in earlier.results)) if path]
            fix = "add --resume to continue it or choose another folder"
            raise ValueError(f"an earlier run is in --output: {', '.join(found)}; {fix}")
        finished = resume and earlier.finished
        self._record = describe_run(config, script) | {"results": earlier.results}
        if record and (checkpoint or earlier.results or finished):
            changed = compare_config(record["config"], config, self._may_change)
            for name, change in changed.items():
                if name not in ("output", "resume"):
                    say(f"this run resumes with another {name}: {change}")
            if finished and not changed.keys() & set(LENGTH):
                self._record, self.finished = record, True
                return
        if finished and not checkpoint:
            raise ValueError(f"{self.path} holds a result but no checkpoint to go on from: choose another --output")
        if resume and earlier.lost:
            say(f"{self.path / earlier.lost[0]} of the finished run is missing: it is made again")
        if not checkpoint:
            if resume:
                say(f"{self.path} holds no complete checkpoint: starting afresh")
            clear_leftovers(self.path, earlier, script)
        elif not record:
            say(f"{self.path / 'run.json'} is missing or damaged: settings are not compared with the earlier ones")
        else:
            before = {key: value for key, value in record.items() if key != "resumed"}
            if before.get("git") == self._record["git"]:  # diffs can be long, and starts many
                before["git"] = "as in the start after this one"
            self._record["resumed"] = [*record["resumed"], before]
        self._write_record()  # first: it is what says that the rest is ours
        keep_script(self.path, script)

    def _write_record(self) -> None:
        atomic_write_text(self.path / "run.json", json.dumps(self._record, indent=1) + "\n")


def check_keep_last(keep_last: int) -> None:
    if keep_last < 1:
        raise ValueError(f"--keep-last {keep_last} leaves nothing to resume from; expected at least 1")
