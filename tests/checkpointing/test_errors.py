"""What the user is told: one line and an exit status for a mistake, and the status that it should have."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpointing.errors import clear_errors

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ValueError("--lr -1 is negative"), 2, "error: --lr -1 is negative\n"),
        (
            FileNotFoundError(2, "No such file or directory", "a.jsonl"),
            2,
            "error: a.jsonl: No such file or directory\n",
        ),
        (OSError("disk"), 2, "error: disk\n"),
        (ImportError('--wandb needs the loggers extra: pip install -e ".[loggers]"'), 2, "error: --wandb needs"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …"), 1, "--batch-size"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_mistakes_end_in_one_line_and_a_status(error: BaseException, status: int, text: str, capsys, monkeypatch):
    monkeypatch.delenv("HANDTUNE_DEBUG", raising=False)
    with pytest.raises(SystemExit) as left, clear_errors():
        raise error
    output = capsys.readouterr()
    assert left.value.code == status and output.out == ""
    assert text in output.err and output.err.count("\n") == 1 and "Traceback" not in output.err
    monkeypatch.setenv("HANDTUNE_DEBUG", "1")
    with pytest.raises(SystemExit), clear_errors():
        raise error
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("stream", ["2> /dev/full", "2>&-", "2>&1 | head -1"])
def test_messages_that_nobody_reads_change_no_status(stream: str):
    code = "from checkpointing.errors import *; import tqdm\nwith clear_errors():\n for i in range(2000): say('a' * 60)"
    code += "\n sys.stderr.isatty()\n sys.exit(int(sys.argv[1]))"
    for status in (0, 3):
        shell = f'set -o pipefail; "{sys.executable}" -c "{code}" {status} {stream}'
        assert subprocess.run(["bash", "-c", shell], cwd=REPOSITORY, stderr=subprocess.DEVNULL).returncode == status


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), ImportError("No module named x"), AssertionError("invariant")]
)
def test_bugs_keep_their_traceback(error: Exception):
    with pytest.raises(type(error)), clear_errors():
        raise error


@pytest.mark.parametrize("quiet", [True, False])
def test_torch_does_not_warn_that_numpy_is_missing(quiet: bool):
    code = "import sys; sys.modules['numpy'] = None" + "; import checkpointing.errors" * quiet + "; import torch"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and ("Failed to initialize NumPy" in done.stderr) != quiet
