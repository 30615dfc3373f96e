"""The five changes of ARCHITECTURE.md, made in a copy of the repository, train."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.tiny import ROOT, losses, make_checkpoint, write_rows

PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").partition("## Five changes")[2]
EXAMPLES = dict(re.findall(r"^\*\*([^*]+)\*\*(.*?)(?=^\*\*|\Z)", PAGE, flags=re.DOTALL | re.MULTILINE))
EDIT = re.compile(r"(before|instead of) `([^`]+)`[^`]*:\n\n```python\n(.*?)```", flags=re.DOTALL)


def make(example: str, root) -> None:
    """Make the edits that the page describes: code before the line that holds a text, or instead of it."""
    file = root / re.search(r"In `([^`]+)`", EXAMPLES[example])[1]
    for where, text, code in EDIT.findall(EXAMPLES[example]):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        (at,) = [i for i, line in enumerate(lines) if text in line]
        lines[at : at + (where == "instead of")] = [code]
        file.write_text("".join(lines), encoding="utf-8")


@pytest.mark.parametrize("examples", [list(EXAMPLES)[:4], list(EXAMPLES)[4:]], ids=["four at once", "a teacher"])
def test_the_page_s_changes_train(tmp_path, examples):
    fork = tmp_path / "fork"
    for folder in ("recipes", "models", "modules", "checkpointing", "data"):
        shutil.copytree(ROOT / folder, fork / folder, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    for example in examples:
        make(example, fork)
    make_checkpoint(tmp_path / "base")
    rows = [{"question": f"{i} + {i} =", "answer": f" {2 * i}"} for i in range(8)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    command = [sys.executable, fork / "recipes/lora_finetune.py", "--model", tmp_path / "base", "--data", data]
    command += ["--output", tmp_path / "run", "--device", "cpu", "--lr", "1e-2", "--batch-size", "4", "--epochs", "5"]
    if len(examples) == 1:
        command += ["--prompt-field", "question", "--completion-field", "answer"]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    curve = losses(tmp_path / "run")
    assert len(curve) == 10
    if len(examples) == 1:
        assert abs(curve[0]) < 1e-6  # the student begins as its teacher
    else:
        assert curve[-1] < 0.8 * curve[0]
        assert "plain modules" in ran.stderr  # the fused block knows nothing of NoisyLoRA
