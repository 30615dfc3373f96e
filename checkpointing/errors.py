"""What the user is told: messages on standard error, and mistakes in one clear line."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def say(text: str) -> None:
    """Messages go to standard error; standard output carries results only. A terminal that is gone stops nothing."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Around a script's main(): a user's mistake becomes one clear message and exit status 2, not a traceback.

    HANDTUNE_DEBUG=1 shows the traceback, too. Out of memory: exit status 1. Ctrl-C: 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        _leave(130, "interrupted")
    except torch.OutOfMemoryError as error:
        fix = "lower --batch-size or --seq-len, or keep less (--quantize nf4, activation checkpointing)"
        _leave(1, f"error: out of memory on the device: {fix}. {str(error).partition('. GPU')[0]}")
    except OSError as error:
        known = error.strerror and error.filename
        _leave(2, f"error: {error.filename}: {error.strerror}" if known else f"error: {error}")
    except ValueError as error:
        _leave(2, f"error: {error}{_raised_elsewhere(error)}")
    except ImportError as error:
        if "pip install" not in str(error):  # not one of ours, which name the extra that is missing
            raise
        _leave(2, f"error: {error}")


def _raised_elsewhere(error: Exception) -> str:
    """Where an error came from, if not from this project's own checks: then an edited recipe may be the reason."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    if Path(last.filename).is_relative_to(ROOT):
        return ""
    return f" (raised in {last.filename}:{last.lineno}; HANDTUNE_DEBUG=1 shows the traceback)"


def _leave(status: int, text: str) -> None:
    if os.environ.get("HANDTUNE_DEBUG") == "1":
        traceback.print_exc()
    say(text)
    raise SystemExit(status) from None
