"""Files and folders that appear complete or not at all, whenever the process is killed or the power fails.

Everything is written to a hidden sibling, `.NAME.partial`, brought to disk (fsync) and renamed into place, which is
atomic. A folder cannot be renamed over a full one, so the earlier folder is first renamed to `.NAME.old`. What a kill
leaves is easy to tell apart: `.partial` can be deleted, `.old` is complete and goes back if nothing has its name.
"""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Write into the folder this yields. It replaces `path` when the block ends, and is deleted if the block fails."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; expected a folder or nothing there: move it away")
    make_folder(path.parent)
    restore_folder(path)
    partial, old = _partial(path), _old(path)
    discard(partial)
    try:
        partial.mkdir()
        with name_the_file(path):
            yield partial
            _sync_tree(partial)
        if path.exists():
            os.rename(path, old)
        os.rename(partial, path)
        _sync(path.parent)
    except BaseException:  # Ctrl-C too
        discard(partial)
        restore_folder(path)
        raise
    restore_folder(path)  # the earlier folder is not needed any more


def restore_folder(path: Path) -> None:
    """After a kill between two renames: put the earlier folder back, or delete it if its successor is there."""
    if os.path.lexists(_old(path)):
        if os.path.lexists(path):
            remove_folder(_old(path), _partial(path))
        else:
            os.rename(_old(path), path)


def remove_folder(path: Path, partial: Path | None = None) -> None:
    """Delete a folder so that a kill in the middle leaves no incomplete one under its name."""
    partial = partial or _partial(path)
    discard(partial)
    os.rename(path, partial)
    discard(partial)


def discard(path: Path) -> None:
    """Delete a file, a folder, or a link (not its target). A folder that cannot be deleted is left for next time."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Replace one file's content (UTF-8), or leave it as it was."""
    path = Path(path)
    partial = _partial(path)
    try:
        with name_the_file(path), open(partial, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def name_the_file(path: Path) -> Iterator[None]:
    """An OSError that names no file, as on a full disk, gets `path` as its file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.strerror:
            error.filename = str(path)
        raise


def check_vacant(path: Path) -> None:
    """A result is not overwritten: ValueError for a folder that holds something, and for a file."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"--output {path} exists already; choose another folder")


def claim_folder(path: Path, owner: str, contents: Iterable[str]) -> None:
    """Make a folder that a recipe fills with others; `contents` of an earlier one of its own are deleted.

    A file in the folder names its owner. Raises ValueError, and touches nothing, if the folder holds anything else.
    """
    mark = path / "made_by.txt"
    if not (mark.is_file() and mark.read_text(encoding="utf-8") == f"{owner}\n"):
        check_vacant(path)
        make_folder(path)
        atomic_write_text(mark, f"{owner}\n")
    for name in contents:
        discard(path / name)


def make_folder(path: Path) -> None:
    """`mkdir -p` whose new names are on disk, too."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _sync(folder.parent)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _sync_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not os.path.islink(os.path.join(place, name)):
                _sync(Path(place, name))
        _sync(Path(place))


def _sync(path: Path) -> None:
    if os.name == "nt":  # Windows can sync neither a folder nor a file that is opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
