"""The lock of a run folder: one process at a time works in it."""

import os
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from checkpointing.errors import say


def lock_folder(folder: Path) -> FileLock:
    """Lock `folder` until `release()`, or until this process ends. Raises ValueError if another one holds the lock."""
    path, holder = folder / ".lock", folder / ".lock.pid"  # asking for a lock may empty its file
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link; expected a file of the run's own: remove it")
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        process = "unknown"
        with suppress(OSError):
            process = holder.read_text(encoding="utf-8", errors="replace")[:20].strip()
        raise ValueError(f"{folder} is in use by process {process}: wait for it or choose another --output") from None
    except (OSError, NotImplementedError) as error:  # some network file systems have no locks
        reason = getattr(error, "strerror", None) or error
        say(f"{folder} cannot be locked ({reason}): make sure that no other run uses it")
    holder.unlink(missing_ok=True)  # a link there is not followed
    holder.write_text(f"{os.getpid()}\n", encoding="utf-8")
    return lock
