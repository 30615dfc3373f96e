"""The run folder: refusals, resuming, the lock, signals, metrics and the record of what ran."""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from torch import nn

from checkpointing import run_folder, run_record
from checkpointing.atomic import claim_folder
from checkpointing.loggers import Logger
from checkpointing.run_folder import RunFolder
from checkpointing.run_record import compare_config, to_json
from checkpointing.training_state import save_training_state

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__)


@dataclass(frozen=True)
class Config:
    data: Path = Path("train.jsonl")
    lr: float = 2e-4
    rank: int = 16
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    max_steps: int | None = 10
    save_every: int = 5


def start(path: Path, config: Config | None = None, *, resume: bool = False, script: Path = SCRIPT) -> RunFolder:
    return RunFolder.open(path, config or Config(), script=script, resume=resume)


def save_checkpoint(run: RunFolder, step: int) -> None:
    weight = nn.Parameter(torch.full((2,), float(step)))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    folder = run.checkpoints / f"step-{step}"
    save_training_state(folder, parameters={"w": weight}, optimizer=optimizer, progress={"step": step})


def save_adapter(run: RunFolder, text: str = "{}", name: str = "adapter") -> None:
    with run.result(name) as target:
        (target / "adapter_config.json").write_text(text)


def contents(path: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(path)): p.read_bytes()
        for p in sorted(path.rglob("*"))
        if p.is_file() and not p.name.startswith(".lock")
    }


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


# Opening: what is refused, what is replaced, what is kept.


@pytest.mark.parametrize("what", ["checkpoint", "adapter", "model", "adapter_ema"])
def test_an_earlier_run_is_refused_and_kept(what: str, tmp_path: Path):
    with start(tmp_path / "run") as run:
        run.log({"step": 1, "loss": 2.0})
        if what == "checkpoint":
            save_checkpoint(run, 5)
        else:
            save_adapter(run, name=what)
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match="--resume") as error:
        start(tmp_path / "run")
    assert str(tmp_path / "run") in str(error.value) and "\n" not in str(error.value)
    assert contents(tmp_path / "run") == before
    start(tmp_path / "run", resume=True).close()  # the refusal let go of the lock


def test_leftovers_of_a_run_that_saved_nothing_are_replaced(tmp_path: Path):
    path = tmp_path / "run"
    with start(path) as run:
        run.log({"step": 1, "loss": 2.0})
        run.draw()
    for name in ("checkpoints/.step-5.partial", ".adapter.partial", "checkpoints/step-7"):  # none of them complete
        (path / name).mkdir(parents=True)
        (path / name / "weights.safetensors").write_text("half")
    (path / ".run.json.partial").write_text("{")
    (path / "notes.txt").write_text("mine")
    (path / "plots").mkdir()
    (path / "plots" / "a.png").write_text("mine")
    with start(path, Config(lr=1.0)) as run:
        assert run.latest_checkpoint() is None and not run.finished
    left = set(contents(path))
    assert left == {"run.json", "recipe.py", "notes.txt", "plots/a.png", "checkpoints/step-7/weights.safetensors"}
    assert (path / "notes.txt").read_text() == (path / "plots" / "a.png").read_text() == "mine"
    record = json.loads((path / "run.json").read_text())
    assert record["config"]["lr"] == 1.0 and record["resumed"] == []


@pytest.mark.parametrize("name", ["model", "adapter", "recipe.py"])
def test_foreign_things_in_the_way_are_kept(name: str, tmp_path: Path):
    file = tmp_path / name if name == "recipe.py" else tmp_path / name / "__init__.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"holds {name}, which no run here wrote"):
        start(tmp_path)
    assert contents(tmp_path) == before


def test_a_script_may_run_from_its_own_output_folder(tmp_path: Path):
    script = tmp_path / "recipe.py"
    script.write_text("print(1)")
    start(tmp_path, script=script).close()
    start(tmp_path, script=script).close()
    assert script.read_text() == "print(1)"


def test_a_file_as_output_is_an_error(tmp_path: Path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        start(tmp_path / "run")


def test_resume_without_a_checkpoint_starts_afresh_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture):
    with start(tmp_path / "run", resume=True) as run:
        run.log({"step": 1, "loss": 2.0})
    assert "starting afresh" in capsys.readouterr().err
    with start(tmp_path / "run", Config(rank=4), resume=True) as run:  # nothing was saved: other settings are fine
        assert not run.finished and not (run.path / "metrics.jsonl").exists()
    output = capsys.readouterr()
    assert "starting afresh" in output.err and output.out == ""


def test_resume_keeps_everything_and_names_the_newest_checkpoint(tmp_path: Path):
    with start(tmp_path) as run:
        run.log({"step": 1, "loss": 2.0})
        for step in (9, 10, 100):
            save_checkpoint(run, step)
    (tmp_path / "checkpoints" / "step-200").mkdir()  # not complete
    (tmp_path / "checkpoints" / "step-x").mkdir()
    with start(tmp_path, resume=True) as run:
        assert run.latest_checkpoint() == tmp_path / "checkpoints" / "step-100"
        assert not run.finished
    assert rows(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_a_folder_that_was_being_replaced_is_put_back(tmp_path: Path):
    results = ("adapter", "adapter_ema")
    with start(tmp_path) as run:
        save_checkpoint(run, 5)
        for name in results:
            save_adapter(run, name=name)
    for name in ("checkpoints/step-5", *results):  # as a kill between two renames leaves it
        folder = tmp_path / name
        os.rename(folder, folder.with_name(f".{folder.name}.old"))
        folder.with_name(f".{folder.name}.partial").mkdir()
    with pytest.raises(ValueError, match="step-5, .*adapter, .*adapter_ema"):
        start(tmp_path)
    with start(tmp_path, resume=True) as run:
        assert run.latest_checkpoint().name == "step-5"
    assert all((tmp_path / name / "adapter_config.json").exists() for name in results)
    assert not list(tmp_path.rglob(".*.partial"))


# Finished runs.


def test_a_finished_run_stays_as_it_is(tmp_path: Path):
    with start(tmp_path) as run:
        run.log({"step": 10, "loss": 2.0})
        save_checkpoint(run, 5)
        save_adapter(run)
        assert not run.finished
        run.finish()
        assert run.finished
    before = contents(tmp_path)
    with start(tmp_path, resume=True) as run:
        assert run.finished
    assert contents(tmp_path) == before
    with pytest.raises(ValueError, match="lr: 0.0002 -> 0.1"):
        start(tmp_path, Config(lr=0.1), resume=True)
    shutil.rmtree(tmp_path / "adapter")  # the result is gone, so it is made again
    with start(tmp_path, resume=True) as run:
        assert not run.finished


def test_a_result_without_the_mark_is_not_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture):
    with start(tmp_path) as run:
        save_checkpoint(run, 5)
        save_adapter(run, "first")
    with start(tmp_path, resume=True) as run:
        assert not run.finished and run.latest_checkpoint()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="lr: 0.0002 -> 0.1"):  # it would replace the result by another run's
        start(tmp_path, Config(lr=0.1), resume=True)
    capsys.readouterr()
    with start(tmp_path, resume=True) as run:
        assert not run.finished and "starting afresh" in capsys.readouterr().err
        result = tmp_path / "adapter" / "adapter_config.json"
        assert result.read_text() == "first"  # until there is a newer one
        save_adapter(run, "second")
        assert result.read_text() == "second"
        run.finish()
    with start(tmp_path, resume=True) as run:
        assert run.finished


def test_a_finished_run_can_be_made_longer(tmp_path: Path, capsys: pytest.CaptureFixture):
    with start(tmp_path) as run:
        save_checkpoint(run, 10)
        save_adapter(run)
        run.finish()
    shutil.copytree(tmp_path, copy := tmp_path.with_name("copy"))
    capsys.readouterr()
    for _ in range(2):  # it has not ended since
        with start(tmp_path, Config(max_steps=20), resume=True) as run:
            assert not run.finished and (tmp_path / "adapter").exists()
    assert "another max_steps: 10 -> 20" in capsys.readouterr().err
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(ValueError, match="no checkpoint to go on from"):
        start(copy, Config(max_steps=30), resume=True)


def test_what_a_run_wrote_and_nothing_else_may_be_replaced(tmp_path: Path):
    with start(tmp_path) as run:
        for name in ("checkpoints", "../adapter", "run.json", ""):
            with pytest.raises(ValueError, match="cannot be called"), run.result(name):
                pass
        for name in ("mine", "file"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "notes.txt").write_text("mine")
        os.rename(tmp_path / "file", tmp_path / "folder")
        (tmp_path / "file").write_text("mine")
        for name in ("mine", "file"):
            with pytest.raises(ValueError, match=f"holds {name}, which no run here wrote"):
                run.rehearse(lambda name=name: save_adapter(run, name=name))  # before step 1
        for text in ("first", "second"):
            save_adapter(run, text)
        with pytest.raises(OSError, match="full"), run.result("adapter") as target:
            (target / "adapter_config.json").write_text("half")
            raise OSError("disk full")
        assert (tmp_path / "adapter" / "adapter_config.json").read_text() == "second"
    assert json.loads((tmp_path / "run.json").read_text())["results"] == ["adapter"]


@pytest.mark.parametrize("results", [["../precious"], [1], "adapter", None])
def test_names_in_a_damaged_record_lead_nowhere(results, tmp_path: Path):
    (tmp_path / ".precious.old").mkdir()
    with start(tmp_path / "run") as run:
        save_checkpoint(run, 5)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"results": results}))
    start(tmp_path / "run", resume=True).close()
    assert (tmp_path / ".precious.old").exists()


# The record.


def test_run_json_says_what_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    project = tmp_path / "project"
    project.mkdir()
    script = project / "my recipe.py"
    script.write_text("print(1)\n")
    git = ["git", "-C", str(project), "-c", "user.name=n", "-c", "user.email=e"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    script.write_text("print(2)\n")
    monkeypatch.setattr(sys, "argv", [str(script), "--prompt", "two words"])
    with start(tmp_path / "run", script=script) as run:
        save_checkpoint(run, 5)
    record = json.loads((tmp_path / "run" / "run.json").read_text(), parse_constant=pytest.fail)
    targets = ["q_proj", "v_proj"]
    config = dict(data="train.jsonl", lr=2e-4, rank=16, targets=targets, max_steps=10, save_every=5)
    assert record["config"] == to_json(Config()) == config
    revision = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert record["git"]["revision"] == revision
    assert "-print(1)" in record["git"]["diff"] and "+print(2)" in record["git"]["diff"]
    assert record["command"].endswith("--prompt 'two words'")
    assert record["versions"]["torch"] == torch.__version__
    assert record["hardware"]["cpu_count"] == os.cpu_count() and record["hardware"]["memory_bytes"] > 1e8
    assert (tmp_path / "run" / "recipe.py").read_text() == "print(2)\n"

    script.write_text("print(3)\n" * 200_000)
    start(tmp_path / "run", replace(Config(), save_every=7), resume=True, script=script).close()
    again = json.loads((tmp_path / "run" / "run.json").read_text())
    assert again["resumed"] == [{k: v for k, v in record.items() if k != "resumed"}]
    assert again["config"]["save_every"] == 7
    assert 1_000_000 < len(again["git"]["diff"]) < 1_000_100 and again["git"]["diff"].endswith("[cut here]\n")
    assert (tmp_path / "run" / "recipe-1.py").read_text() == "print(2)\n"  # the script that began the run


def test_no_repository_and_no_git_are_no_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "alone.py"
    script.write_text("")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    start(tmp_path / "a", script=script).close()
    monkeypatch.setenv("PATH", "")
    start(tmp_path / "b", script=script).close()
    for name in "ab":
        assert json.loads((tmp_path / name / "run.json").read_text())["git"] == {"revision": None, "diff": None}


def test_resume_survives_a_lost_run_json(tmp_path: Path, capsys: pytest.CaptureFixture):
    with start(tmp_path) as run:
        save_checkpoint(run, 5)
    (tmp_path / "run.json").write_text('{"conf')
    with start(tmp_path, resume=True) as run:
        assert run.latest_checkpoint().name == "step-5"
    assert "run.json is missing or damaged" in capsys.readouterr().err


def test_settings_that_may_change_are_said_others_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    saved = to_json(Config())
    assert compare_config(saved, Config()) == {}
    changes = compare_config(saved, Config(max_steps=None, save_every=1))
    assert changes == {"max_steps": "10 -> None", "save_every": "5 -> 1"}
    with pytest.raises(ValueError) as error:
        compare_config(saved, Config(lr=1e-3, rank=8, max_steps=3))
    assert "lr: 0.0002 -> 0.001; rank: 16 -> 8;" in str(error.value) and "max_steps" not in str(error.value)
    with pytest.raises(ValueError, match=r"extra: 1 -> \(absent\)"):
        compare_config(saved | {"extra": 1}, Config())
    assert compare_config(saved | {"extra": 1}, Config(), may_change=("extra",)) == {"extra": "1 -> (absent)"}

    with start(tmp_path) as run:
        save_checkpoint(run, 5)
        run.check_resumable(saved | {"max_steps": 3}, {"weights": "a"}, {"weights": "a"})
        with pytest.raises(ValueError, match="fingerprint of the weights: b -> a"):
            run.check_resumable(saved, {"weights": "a"}, {"weights": "b"})
        with pytest.raises(ValueError, match="rank: 4 -> 16"):
            run.check_resumable(saved | {"rank": 4}, {}, {})
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="rank: 16 -> 8"):
        start(tmp_path, Config(rank=8), resume=True)
    assert contents(tmp_path) == before
    capsys.readouterr()
    start(tmp_path, Config(max_steps=None, save_every=1), resume=True).close()
    said = [line.partition("another ")[2] for line in capsys.readouterr().err.splitlines()]
    assert said == ["max_steps: 10 -> None", "save_every: 5 -> 1"]


def test_a_resumed_run_knows_when_it_was_first_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    times = ["2026-01-31T23:59:58+14:00", "2026-02-01T08:00:00+00:00", "2026-03-01T08:00:00+00:00"]
    first = datetime.fromisoformat(times[0])
    with monkeypatch.context() as patch:
        for time in times:
            patch.setattr(run_record, "timestamp", lambda time=time: time)
            with start(tmp_path, resume=True) as run:
                assert run.started == first and f"{run.started:%d %b %Y}" == "31 Jan 2026"  # not where it is resumed
                save_checkpoint(run, 5)
        with start(tmp_path, resume=True) as run:
            save_adapter(run)
            run.finish()
        with start(tmp_path, resume=True) as run:
            assert run.finished and run.started == first
    before = datetime.now(UTC).replace(microsecond=0)
    with start(tmp_path / "new") as run:  # saves nothing, so that the next start is the first
        assert before <= run.started <= datetime.now(UTC)
        assert run.started.utcoffset() == datetime.now().astimezone().utcoffset()
    monkeypatch.setattr(run_record, "timestamp", lambda: times[0])
    with start(tmp_path / "new", resume=True) as run:
        assert run.started == first


# Metrics.


def test_without_a_progress_bar_a_line_now_and_then(tmp_path: Path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: now[0])
    with start(tmp_path / "long") as run:
        run.start_loop(100_000)
        for step, seconds in enumerate((10, 29, 31, 59, 62), start=1):
            now[0] = seconds
            run.log({"step": step, "loss": 1 / step, "tokens_per_second": 1234.5})
            run.log({"step": step, "eval_loss": 9.0})
        assert capsys.readouterr().err.splitlines() == [
            "step 3: loss 0.3333, 1,234 tok/s",
            "step 5: loss 0.2000, 1,234 tok/s",
        ]
        monkeypatch.setattr(run_folder.sys, "stderr", GoneTerminal(tty=False))
        now[0] = 100
        run.log({"step": 6, "loss": 1.0})
        assert rows(tmp_path / "long")[-1]["step"] == 6  # and no error
    monkeypatch.setattr(run_folder.sys, "stderr", io.StringIO())
    for steps, lines in ((7, 7), (100, 10), (109, 10), (19, 19)):
        with start(tmp_path / str(steps)) as run:
            run.start_loop(steps)
            for step in range(1, steps + 1):
                run.log({"step": step, "loss": 1.0})
        assert run_folder.sys.stderr.getvalue().count("step") == lines  # at least ten, if there are that many steps
        run_folder.sys.stderr.truncate(0)
    monkeypatch.setattr(run_folder.sys, "stderr", GoneTerminal(tty=True))
    with start(tmp_path / "terminal") as run:
        run.start_loop(1)
        monkeypatch.setattr(run_folder.sys, "stderr", io.StringIO())  # a terminal that is gone is none any more
        now[0] = 200
        run.log({"step": 1, "loss": 1.0})
        assert run_folder.sys.stderr.getvalue() == ""


class GoneTerminal(io.StringIO):
    def __init__(self, tty: bool):
        super().__init__()
        self.isatty = lambda: tty

    def write(self, text: str):
        raise OSError(5, "Input/output error")


def test_metrics_keep_every_bit_and_are_valid_json(tmp_path: Path):
    values = [0.1 + 0.2, 1 / 3, 5e-324, 1e300, torch.tensor(0.1).item()]
    with start(tmp_path) as run:
        for step, value in enumerate(values):
            run.log({"step": step, "loss": value})
        with pytest.raises(ValueError):
            run.log({"step": 5, "loss": math.nan, "grad_norm": math.inf, "lr": torch.tensor(2.5)})
        assert len(rows(tmp_path)) == 6  # on disk at once
    assert [row["loss"] for row in rows(tmp_path)[:5]] == values
    assert rows(tmp_path)[5] == {"step": 5, "loss": "NaN", "grad_norm": "Infinity", "lr": 2.5}
    assert math.isnan(float("NaN")) and float("Infinity") == math.inf
    assert "training" in (tmp_path / "loss.svg").read_text()  # close() has drawn it


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path):
    with start(tmp_path) as run:
        run.log({"step": 1, "loss": 2.0, "grad_norm": 1.0})
        run.log({"step": 1, "eval_loss": math.nan})  # of other rows: the weights may be all right
        with pytest.raises(ValueError, match=r"loss is Infinity at step 2: .*no checkpoint was saved.*--lr"):
            run.log({"step": 2, "loss": math.inf})
        save_checkpoint(run, 1)
        with pytest.raises(ValueError, match=r"loss is NaN at step 2: .*the last checkpoint is from step 1\)"):
            run.log({"step": 2, "loss": math.nan}, scaled=True)
        with pytest.raises(ValueError, match="grad_norm is NaN at step 2: "):
            run.log({"step": 2, "loss": 2.0, "grad_norm": math.nan})
        run.log({"step": 2, "loss": 2.0, "grad_norm": math.inf}, scaled=True)  # the scaler leaves this step out
    assert len(rows(tmp_path)) == 6


@pytest.mark.parametrize("torn", ['{"step": 7, "lo', '{"step": 3, "loss": 1.0', "\0\0\0", "7", ""])
def test_metrics_are_cut_to_the_checkpoint(torn: str, tmp_path: Path):
    with start(tmp_path) as run:
        run.cut_metrics(0)  # no file yet
        for step in range(1, 7):
            run.log({"step": step, "loss": 1 / step})
            run.log({"step": step, "eval_loss": 2 / step})
        before = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write(torn)
        run.cut_metrics(4)
        assert (tmp_path / "metrics.jsonl").read_text() == "".join(before[:8])
        run.log({"step": 5, "loss": 1 / 5})
        assert rows(tmp_path)[-1] == {"step": 5, "loss": 0.2} and len(rows(tmp_path)) == 9
        (tmp_path / "metrics.jsonl").write_text(torn)  # killed in the very first row
        run.cut_metrics(0)
        assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert not list(tmp_path.glob(".*.partial"))


def test_damaged_and_missing_rows_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture):
    with start(tmp_path) as run:
        for step in range(1, 7):
            run.log({"step": step, "loss": 1 / step})
        file = tmp_path / "metrics.jsonl"
        lines = file.read_bytes().splitlines(keepends=True)
        damaged = lines[1].replace(b"loss", b"lo\x80s")
        file.write_bytes(lines[0] + damaged + lines[3] + b"[4]\n" + b"".join(lines[4:]) + b'{"step": 7, "lo')
        run.cut_metrics(5)
        assert file.read_bytes() == lines[0] + lines[3] + lines[4]
        assert (tmp_path / "metrics-damaged.jsonl").read_bytes() == damaged + b"[4]\n"
        said = capsys.readouterr().err
        assert "damaged in line 2, 4: moved to metrics-damaged.jsonl" in said
        assert "lacks 2 of 5 steps, the first of them step 2" in said
        file.write_bytes(b"".join(lines[:4]))
        run.cut_metrics(4)
        file.unlink()
        assert capsys.readouterr().err == ""
        run.cut_metrics(2)
        assert "lacks 2 of 2 steps" in capsys.readouterr().err


def test_rows_that_a_checkpoint_counts_on_are_brought_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced = []
    with start(tmp_path) as run:
        run.checkpoint_folder(0)  # no rows yet
        run.log({"step": 1, "loss": 1.0})
        monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
        assert run.checkpoint_folder(1) == tmp_path / "checkpoints" / "step-1"
    assert (tmp_path / "metrics.jsonl").stat().st_ino in synced


def test_prune_keeps_the_newest(tmp_path: Path):
    with start(tmp_path) as run:
        run.prune(2)  # at start-up: nothing to remove yet, but the setting is checked
        for wrong in (0, -1):
            with pytest.raises(ValueError, match=f"--keep-last {wrong} .*at least 1"):
                run.prune(wrong)
        for step in (2, 9, 10, 11):
            save_checkpoint(run, step)
        (run.checkpoints / "mine").mkdir()
        run.prune(2)
        assert {p.name for p in run.checkpoints.iterdir()} == {"step-10", "step-11", "mine"}


def test_a_rehearsal_leaves_no_trace_and_its_failure_is_raised(tmp_path: Path):
    with start(tmp_path) as run:
        before = contents(tmp_path)
        seen = []

        def save() -> None:
            with run.result("adapter") as first, run.result("model") as second:
                (first / "adapter_config.json").write_text("{}")
                (second / "config.json").write_text("{}")
                seen.extend((first, second))

        run.rehearse(save)
        assert not {tmp_path / "adapter", tmp_path / "model"} & set(seen)
        with pytest.raises(OSError, match="full"):
            run.rehearse(lambda: (_ for _ in ()).throw(OSError("disk full")))
        assert contents(tmp_path) == before
        save()
    assert set(contents(tmp_path)) >= {"adapter/adapter_config.json", "model/config.json"}


# Other processes, signals, errors.

WORKER = """
import sys, time
from pathlib import Path
from checkpointing.errors import clear_errors
from checkpointing.run_folder import RunFolder
with clear_errors(), RunFolder.open(Path(sys.argv[1]), {"lr": 1.0}, script=sys.argv[0], resume=False) as run:
    step = 0
    run.start_loop(10_000)
    while not run.stop_requested or "--stubborn" in sys.argv:
        step += 1
        run.log({"step": step, "loss": 1 / step})
        if step == 1:
            print("ready", flush=True)
        time.sleep(0.01)
    print("saved", flush=True)
"""


def worker(path: Path, *flags: str) -> subprocess.Popen:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-c", WORKER, str(path), *flags], cwd=REPOSITORY, **pipes)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


@pytest.mark.slow(2)
def test_the_lock_holds_until_the_process_is_gone_and_sigterm_ends_it_gently(tmp_path: Path):
    process = worker(tmp_path)
    with pytest.raises(ValueError, match=f"in use by process {process.pid}"):
        start(tmp_path)
    with pytest.raises(ValueError, match="in use"):
        start(tmp_path, resume=True)
    process.kill()
    process.wait()
    start(tmp_path).close()

    process = worker(tmp_path)
    process.terminate()
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "saved\n") and err.count("SIGTERM: ending this step") == 1, err
    assert "training" in (tmp_path / "loss.svg").read_text()


@pytest.mark.slow(1)
def test_the_second_ctrl_c_stops_at_once(tmp_path: Path):
    process = worker(tmp_path, "--stubborn")
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM" in process.stderr.readline() + process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err


def test_one_process_cannot_open_a_folder_twice(tmp_path: Path):
    with start(tmp_path), pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
        start(tmp_path)
    start(tmp_path).close()


def test_a_link_as_lock_is_not_followed(tmp_path: Path):
    for name in ("precious", "process"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock.pid").symlink_to(tmp_path / "process")
    start(tmp_path / "run").close()
    (tmp_path / "run" / ".lock").unlink()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match="is a symbolic link"):
        start(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == (tmp_path / "process").read_text() == "mine"


@pytest.mark.parametrize("error", [OSError(95, "Operation not supported"), NotImplementedError("no flock")])
def test_a_file_system_without_locks_is_reported(error, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("filelock.FileLock.acquire", lambda *_, **__: (_ for _ in ()).throw(error))
    start(tmp_path).close()
    assert f"cannot be locked ({error.strerror if isinstance(error, OSError) else error})" in capsys.readouterr().err


def test_signal_handlers_come_and_go(tmp_path: Path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with start(tmp_path) as run:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)  # nothing to finish yet
        run.start_loop(10)
        assert not run.stop_requested
        os.kill(os.getpid(), signal.SIGINT)
        assert run.stop_requested and run.stop_status == 130
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers repeat themselves; that is no second Ctrl-C
        assert run.stop_status == 130
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    if hasattr(signal, "SIGHUP"):  # a closed terminal; under nohup it stays ignored
        with start(tmp_path) as run:
            run.start_loop(10)
            os.kill(os.getpid(), signal.SIGHUP)
            assert run.stop_status == 129
        ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with start(tmp_path) as run:
            run.start_loop(10)
            os.kill(os.getpid(), signal.SIGHUP)
            assert not run.stop_requested
        signal.signal(signal.SIGHUP, ignored)
    seen = []

    def elsewhere() -> None:
        with start(tmp_path) as run:
            run.start_loop(10)
            seen.append([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before]


# Child n kills itself before its n-th operation on a file: within a save, between two renames, while deleting …
KILLED_AT_EVERY_POINT = """
import itertools, json, os, random, shutil, signal, sys
from pathlib import Path
import torch
from checkpointing.run_folder import RunFolder
from checkpointing.training_state import load_training_state, save_training_state
torch.set_num_threads(1)
os.fsync = lambda _: None  # the kernel outlives these kills
RESULTS = ("adapter", "adapter_ema")

def train(path, steps, save_every):
    random.seed(0)
    torch.manual_seed(0)
    with RunFolder.open(path, {"max_steps": steps}, script=sys.argv[1], resume=True) as run:
        if run.finished:
            return
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        state = dict(parameters=dict(model.named_parameters()), optimizer=optimizer)
        checkpoint = run.latest_checkpoint()
        step = load_training_state(checkpoint, **state)["step"] if checkpoint else 0
        run.cut_metrics(step)

        def save_result():
            with run.result("adapter_ema") as first, run.result("adapter") as second:  # in any order
                for folder in (second, first):
                    (folder / "weight.json").write_text(repr(model[0].weight.tolist()))

        run.rehearse(save_result)
        run.start_loop(steps)
        while step < steps:
            loss = (model(torch.randn(4, 8)) - random.random()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            run.log({"step": step, "loss": loss})
            if save_every and step % save_every == 0:
                save_training_state(run.checkpoint_folder(step), **state, progress={"step": step})
                run.prune(1)
        save_result()
        run.finish()

def killed_at(operation, path, *arguments):
    child = os.fork()
    if child == 0:
        operations = itertools.count(1)
        def die_soon(event, details):
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
                if (str(path) in str(details) or event == "os.remove") and next(operations) == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(die_soon)
        train(path, *arguments)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0

def results(path):
    # Between two renames of a replacement the earlier result is at .NAME.old, from where the next start restores it.
    places = {name: [path / name, path / f".{name}.old"] for name in RESULTS}
    return {n: [(p / "weight.json").read_text() for p in both if p.exists()] for n, both in places.items()}

root, save_every, earlier = Path(sys.argv[1]), int(sys.argv[2]), None
train(root / "whole", 2, save_every)
after = results(root / "whole")["adapter"]
if sys.argv[3] == "longer":
    train(root / "earlier", 1, 1)
    earlier, before = root / "earlier", results(root / "earlier")["adapter"]
for operation in itertools.count(1):
    path = root / "killed"
    shutil.rmtree(path, ignore_errors=True)
    if earlier:
        shutil.copytree(earlier, path)
    killed = killed_at(operation, path, 2, save_every)
    for found in results(path).values():
        assert set(found) <= {*after, *(before if earlier else ())}, "a result that is not trained"
        assert found or not earlier, "a finished result is gone"
    record = path / "run.json"
    finished = record.exists() and json.loads(record.read_text())
    if finished and finished["finished"] and finished["config"]["max_steps"] == 2:
        assert all(found[0] == after[0] for found in results(path).values())
    train(path, 2, save_every)
    assert results(path) == {name: after for name in RESULTS}
    assert (path / "metrics.jsonl").read_bytes() == (root / "whole" / "metrics.jsonl").read_bytes()
    assert json.loads(record.read_text())["finished"]
    if not killed:
        break
print(operation)
"""


@pytest.mark.parametrize(("save_every", "kind"), [(0, "new"), (1, "longer")])
def test_a_kill_at_any_point_neither_loses_nor_fakes_a_result(save_every: int, kind: str, tmp_path: Path):
    command = [sys.executable, "-c", KILLED_AT_EVERY_POINT, *map(str, (tmp_path, save_every, kind))]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 60  # and nothing else went to standard output


def test_a_recipe_replaces_only_a_folder_of_its_own(tmp_path):
    mine = tmp_path / "mine"
    for _ in range(2):
        claim_folder(mine, "quickstart.py", ("lora",))
        assert not (mine / "lora").exists()
        (mine / "lora").mkdir()
        (mine / "kept.txt").write_text("a note")
    assert (mine / "kept.txt").exists()
    for owner in ("quickstart.py", "compare_methods.py"):
        foreign = tmp_path / "foreign"
        (foreign / "lora").mkdir(parents=True, exist_ok=True)
        (foreign / "train.jsonl").write_text("{}")
        before = sorted(foreign.rglob("*"))
        with pytest.raises(ValueError, match="exists already; choose another folder"):
            claim_folder(foreign, owner, ("lora",))
        assert sorted(foreign.rglob("*")) == before
    with pytest.raises(ValueError, match="exists already"):
        claim_folder(mine, "compare_methods.py", ("lora",))


def test_loggers_get_the_rows_and_are_closed_however_a_run_ends(tmp_path: Path):
    closed, seen = [], []
    logger = Logger(lambda values, step: seen.append((step, values)), lambda: closed.append(True))
    with pytest.raises(ZeroDivisionError), start(tmp_path) as run:
        run.add_loggers([logger])
        run.log({"step": 1, "loss": 2.0})
        assert seen == [(1, {"loss": 2.0})] and not closed
        raise ZeroDivisionError
    assert closed == [True]
