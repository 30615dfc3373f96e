"""Files and folders that are either complete or not there, whenever the process is killed or the power fails.

What is written goes to a hidden sibling, `.NAME.partial`, is brought to disk (fsync) and renamed into place: renaming
is the one step that a file system does entirely or not at all. A folder cannot be renamed over a full one, so the
earlier folder steps aside first, to `.NAME.old`. Two rules make every leftover of a kill readable:
`.partial` is rubbish, and `.old` is a complete folder, to be put back if there is none under its name.
"""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Write into the folder this yields; it becomes `path` when the block ends, and vanishes if the block fails.

    A folder that is at `path` already stays until then and is replaced whole.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; expected a folder or nothing there: move it away")
    make_folder(path.parent)
    restore_folder(path)
    partial, old = _partial(path), _old(path)
    discard(partial)
    try:
        partial.mkdir()
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
    """Settle what a kill between two renames left: an earlier folder goes back if its successor did not arrive."""
    old = _old(path)
    if not os.path.lexists(old):
        return
    if os.path.lexists(path):
        # Only whole folders are called .old, and a kill in the middle of deleting leaves a part of one.
        discard(_partial(path))
        os.rename(old, _partial(path))
        discard(_partial(path))
    else:
        os.rename(old, path)


def remove_folder(path: Path) -> None:
    """Delete a folder so that a kill in the middle leaves no half of it under its name."""
    discard(_partial(path))
    os.rename(path, _partial(path))
    discard(_partial(path))


def discard(path: Path) -> None:
    """Delete whatever is there; of a link, only the link. What cannot be deleted is tried again next time."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Replace one file's content (UTF-8), or leave it as it was."""
    path = Path(path)
    partial = _partial(path)
    try:
        with open(partial, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def check_vacant(path: Path) -> None:
    """A result is not overwritten: ValueError for a folder that holds something, and for a file."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"--output {path} exists already; choose another folder")


def claim_folder(path: Path, owner: str, contents: Iterable[str]) -> None:
    """Make a folder that a recipe fills with others; of an earlier one of its own, `contents` are deleted.

    What is in it says so itself, in a file. ValueError for a folder that holds anything else: nothing of it is touched.
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
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
