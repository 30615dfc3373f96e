"""Messages on standard error, and a user's mistakes in one clear line.

Recipes import this module before torch, whose import takes seconds: from here on Ctrl-C prints no traceback, and torch
does not warn that NumPy is missing.
"""

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
for _name in ("stdout", "stderr"):
    if getattr(sys, _name) is None:  # closed (2>&-): the next file to be opened would receive what C code prints
        setattr(sys, _name, open(os.devnull, "w"))


def say(text: str) -> None:
    """Print a message on standard error, above a progress bar. A terminal or reader that is gone is no error."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)  # only training has progress bars
    with suppress(OSError):
        (tqdm.write if tqdm else print)(text, file=sys.stderr)
        sys.stderr.flush()  # it may be a file


@contextmanager
def clear_errors() -> Iterator[None]:
    """Around a script's main(): a user's mistake becomes one clear message and exit status 2, not a traceback.

    HANDTUNE_DEBUG=1 shows the traceback, too. Out of memory: exit status 1. Ctrl-C: 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        _leave(130, "interrupted")
    except OSError as error:
        known = error.strerror and error.filename
        _leave(2, f"error: {error.filename}: {error.strerror}" if known else f"error: {error}")
    except ValueError as error:
        _leave(2, f"error: {error}{_raised_elsewhere(error)}")
    except ImportError as error:
        if "pip install" not in str(error):  # not one of ours, which name the extra that is missing
            raise
        _leave(2, f"error: {error}")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's
            raise
        fix = "lower --batch-size or --seq-len, or keep less (--quantize nf4, activation checkpointing)"
        _leave(1, f"error: out of memory on the device: {fix}. {str(error).partition('. GPU')[0]}")
    finally:
        _drop_unwritable_streams()


def _raised_elsewhere(error: Exception) -> str:
    """Where an error came from, if not from this project: then an edited recipe may be the reason."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    if Path(last.filename).is_relative_to(ROOT):
        return ""
    return f" (raised in {last.filename}:{last.lineno}; HANDTUNE_DEBUG=1 shows the traceback)"


def _leave(status: int, text: str) -> None:
    if os.environ.get("HANDTUNE_DEBUG") == "1":
        with suppress(OSError):
            traceback.print_exc()
    say(text)
    raise SystemExit(status) from None


def _drop_unwritable_streams() -> None:
    """Python would end with status 120 if it cannot flush messages that nobody reads."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError as error:
            if name == "stderr" or error.errno == errno.EPIPE:  # a result that met a full disk is an error
                setattr(sys, name, open(os.devnull, "w"))


def _without_traceback(kind, error, trace, show=sys.excepthook) -> None:
    """Ctrl-C before clear_errors() is active; Python then ends with the status of the signal."""
    if issubclass(kind, KeyboardInterrupt) and os.environ.get("HANDTUNE_DEBUG") != "1":
        say("interrupted")
    else:
        show(kind, error, trace)


sys.excepthook = _without_traceback
