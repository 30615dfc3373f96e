"""A run that dies goes on as if nothing had happened: SIGKILL at any step, then --resume, bit for bit."""

import dataclasses
import math
import os
import random
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest

from checkpointing.run_folder import RunFolder
from modules.loss import linear_cross_entropy
from recipes import lora_finetune
from tests.tiny import ROOT, losses, make_checkpoint, read_metrics, run_recipe, start_recipe, sums, write_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    make_checkpoint(folder / "base")
    write_rows(folder / "rows.jsonl", sums(50))
    return folder


def arguments(base, output, *extra):
    return [
        *("--model", base / "base", "--data", base / "rows.jsonl", "--eval-data", base / "rows.jsonl"),
        *("--output", output, "--device", "cpu", "--epochs", "3", "--batch-size", "2", "--grad-accum", "2"),
        *("--lr", "3e-3", "--save-every", "3", "--eval-every", "10", "--seq-len", "64", *extra),
    ]


LORA = ("--rank", "4", "--dropout", "0.1")
VARIANTS = {
    "lora, shuffled and packed": ("lora_finetune", (*LORA, "--packing")),
    "lora, in file order": ("lora_finetune", (*LORA, "--no-shuffle", "--no-packing")),
    "qlora": ("lora_finetune", (*LORA, "--quantize", "nf4")),
    "full": ("full_finetune", ("--packing",)),
    "pretrain": ("pretrain", ()),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed_equals_uninterrupted(base, tmp_path, variant):
    recipe, extra = VARIANTS[variant]
    run_recipe(recipe, *arguments(base, tmp_path / "whole", *extra))
    expected = losses(tmp_path / "whole")
    assert len(expected) > 12
    metrics = tmp_path / "killed/metrics.jsonl"
    # Before the first checkpoint (once is enough: starting a process takes seconds), and in the middle of an epoch.
    for rows in (2, 8) if "shuffled" in variant else (8,):
        process = start_recipe(recipe, *arguments(base, tmp_path / "killed", *extra), "--resume")
        while process.poll() is None and (not metrics.exists() or metrics.read_text().count("grad_norm") < rows):
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
    run_recipe(recipe, *arguments(base, tmp_path / "killed", *extra), "--resume")
    assert losses(tmp_path / "killed") == expected  # bit for bit
    keep = ("step", "loss", "lr", "grad_norm", "tokens", "eval_loss")
    whole, killed = (
        [{k: v for k, v in row.items() if k in keep} for row in read_metrics(tmp_path / name)]
        for name in ("whole", "killed")
    )
    assert killed == whole
    result = "adapter/adapter_model.safetensors" if recipe == "lora_finetune" else "model/model.safetensors"
    assert (tmp_path / "killed" / result).read_bytes() == (tmp_path / "whole" / result).read_bytes()
    again = run_recipe(recipe, *arguments(base, tmp_path / "killed", *extra), "--resume")
    assert "finished" in again.stderr and losses(tmp_path / "killed") == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves(base, tmp_path, number):
    """And the exit status says that the run is not complete."""
    extra = (*LORA, "--save-every", "1000", "--epochs", "200", "--eval-every", "1000", "--schedule", "constant")
    process = start_recipe("lora_finetune", *arguments(base, tmp_path / "run", *extra))
    metrics = tmp_path / "run/metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr
    assert "go on with --resume" in stderr
    last = losses(tmp_path / "run")
    assert (tmp_path / f"run/checkpoints/step-{len(last)}").is_dir()
    until = ("--max-steps", len(last) + 3)
    run_recipe("lora_finetune", *arguments(base, tmp_path / "run", *extra), *until, "--resume")
    run_recipe("lora_finetune", *arguments(base, tmp_path / "whole", *extra), *until)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")  # bit for bit


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_ends_the_run_at_once(base, tmp_path, number):
    slow = "import os, pathlib, runpy, sys, time; sys.argv = sys.argv[1:]; import data.tokenizers.load as load; "
    slow += "load.load_tokenizer = lambda _: [pathlib.Path(os.environ['READY']).touch(), time.sleep(60)]; "
    slow += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", slow, ROOT / "recipes/lora_finetune.py", *arguments(base, tmp_path / "run", *LORA)]
    environment = os.environ | {"READY": str(tmp_path / "ready")}
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode in (128 + number, -number) and "Traceback" not in stderr, stderr
    assert not (tmp_path / "run/checkpoints").exists() and not (tmp_path / "run/adapter").exists()
    run_recipe("lora_finetune", *arguments(base, tmp_path / "run", *LORA), "--max-steps", "1")  # not in the way


@pytest.mark.parametrize("module", ["torch", "tyro", "models"])
def test_ctrl_c_during_the_imports_prints_no_traceback(module, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(name, *_):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt)\n"
    )
    command = [sys.executable, ROOT / "recipes/lora_finetune.py", "--help"]
    for debug in ("", "1"):
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "HANDTUNE_DEBUG": debug}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode in (130, -signal.SIGINT) and done.stdout == ""
        assert ("Traceback" in done.stderr) == bool(debug)
        assert debug or done.stderr == "interrupted\n"


@pytest.mark.parametrize("recipe", ["lora_finetune", "full_finetune", "peft_finetune", "pretrain"])
def test_a_stopped_run_does_not_look_complete(base, tmp_path, recipe):
    def stopped(signum, frame):
        raise AssertionError("the run's own handler comes back")

    def stopped_at_once(run, total_steps, start_loop=RunFolder.start_loop):
        start_loop(run, total_steps)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stopped)
    try:
        with mock.patch("checkpointing.run_folder.RunFolder.start_loop", stopped_at_once):
            done = run_recipe(recipe, *arguments(base, tmp_path / "run"), check=False)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done.returncode == 143 and "stopped after step 0" in done.stderr
    assert (tmp_path / "run/checkpoints/step-0").is_dir() and not (tmp_path / "run/adapter").exists()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_run_that_diverges_keeps_its_checkpoints(base, tmp_path, monkeypatch, where):
    """NaN in step 3, with --keep-last 1 and a checkpoint due: the one from step 2 stays, and nothing is written."""

    def spoiled(hidden, *inputs, **named):
        spoiled.calls += 1
        loss = linear_cross_entropy(hidden, *inputs, **named)
        if spoiled.calls == 3:
            loss = loss * math.nan if where == "loss" else spoil_gradient(loss)
        return loss

    def spoil_gradient(loss):
        return loss + 0 * (loss - loss.detach()).sqrt()  # the gradient of a root is infinite at 0

    spoiled.calls = 0
    monkeypatch.setattr(lora_finetune, "linear_cross_entropy", spoiled)
    flags = ("--device", "cpu", "--batch-size", "2", "--rank", "4", "--save-every", "1", "--keep-last", "1")
    files = ("--model", base / "base", "--data", base / "rows.jsonl", "--output", tmp_path / "run")
    done = run_recipe("lora_finetune", *files, *flags, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    name = "loss" if where == "loss" else "grad_norm"
    assert f"error: {name} is NaN at step 3: " in done.stderr and "the last checkpoint is from step 2" in done.stderr
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-2"]
    assert not (tmp_path / "run/adapter").exists() and len(read_metrics(tmp_path / "run")) == 3
    monkeypatch.undo()
    run_recipe("lora_finetune", *files, *flags, "--resume")  # the weights in it are good ones
    assert all(map(math.isfinite, losses(tmp_path / "run")))


def test_float16_skips_steps_without_an_error(base, tmp_path):
    """The scaler begins too high, at 65,536: a step whose gradients overflow is left out and the scale halved."""
    files = ("--model", base / "base", "--data", base / "rows.jsonl", "--output", tmp_path / "run")
    run_recipe("lora_finetune", *files, "--dtype", "float16", "--rank", "4", "--device", "cpu", "--max-steps", "8")
    norms = [float(row["grad_norm"]) for row in read_metrics(tmp_path / "run")]
    assert not math.isfinite(norms[0]) and math.isfinite(norms[-1])


def config(base, output, **extra):
    return lora_finetune.Config(
        model=str(base / "base"),
        data=base / "rows.jsonl",
        output=output,
        device="cpu",
        rank=4,
        max_steps=4,
        save_every=2,
        **extra,
    )


def test_the_initial_state_can_be_resumed(base, tmp_path):
    lora_finetune.main(config(base, tmp_path / "whole"))
    lora_finetune.main(dataclasses.replace(config(base, tmp_path / "parts"), max_steps=0))
    lora_finetune.main(config(base, tmp_path / "parts", resume=True))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_run_killed_after_its_last_step_evaluates_once(base, tmp_path, monkeypatch):
    settings = dict(eval_data=base / "rows.jsonl")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):

        def killed(*_):
            raise RuntimeError("killed")

        patch.setattr("checkpointing.run_folder.RunFolder.finish", killed)
        lora_finetune.main(config(base, tmp_path / "run", **settings))
    lora_finetune.main(config(base, tmp_path / "run", resume=True, **settings))
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "eval_loss" in row] == [4]


def test_run_folder_holds_what_the_contract_says(base, tmp_path):
    lora_finetune.main(config(base, tmp_path / "run", eval_data=base / "rows.jsonl", eval_every=2, keep_last=1))
    run = tmp_path / "run"
    rows = read_metrics(run)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    wanted = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "peak_memory_gib", "seconds"}
    assert all(wanted <= set(row) for row in steps)
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4]
    assert (run / "recipe.py").read_text() == (ROOT / "recipes/lora_finetune.py").read_text()
    assert (run / "loss.svg").read_text().startswith("<svg")
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step-4"}
    assert {p.name for p in (run / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
