"""Reading JSON: data files (JSON Lines or one array) row by row with line numbers for errors, and single objects."""

import gzip
import json
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path


def read_rows(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Every row of a JSON Lines file or JSON array (either may be gzipped) and the line on which it begins.

    Blank lines are skipped. Raises FileNotFoundError, or ValueError as `FILE:LINE: reason`.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; the data must be a JSON Lines file (or a JSON array)")
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such data file")
    lines = _numbered_lines(path)
    begin = next(((number, line) for number, line in lines if line.strip()), None)
    if begin is None:
        raise ValueError(f"{path} is empty: it holds no rows")
    # No row begins with a bracket: one at the start begins an array.
    read = _array if begin[1].lstrip().startswith("[") else _json_lines
    for number, row in read(path, chain([begin], lines)):
        if not isinstance(row, dict):
            raise ValueError(f'{path}:{number}: a row must be an object like {{"text": …}}, got {shown(row)}')
        yield number, row


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    # Bytes split at \n only; text would split at U+2028, too, which a string may hold.
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        number = 0
        try:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 text (byte {error.start + 1} of the line)") from None
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: broken gzip file after line {number}: {error}") from None


def _json_lines(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, object]]:
    for number, line in lines:
        if line.strip():
            try:
                yield number, json.loads(line.rstrip("\r\n"))  # with its end, an error there would be on line 2
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: not valid JSON (one object per line): {_reason(error)}") from None


def _array(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, object]]:
    """The elements of a JSON array, one by one, so that each comes with its own line."""
    number, first_line = next(lines)
    text = first_line + "".join(line for _, line in lines)
    parse = json.JSONDecoder().raw_decode
    position, counted = _skip(text, text.index("[") + 1), 0
    if text[position : position + 1] == "]":
        raise ValueError(f"{path} is empty: its array holds no rows")
    while True:
        number, counted = number + text.count("\n", counted, position), position
        try:
            row, position = parse(text, position)
        except (ValueError, RecursionError) as error:
            number += text.count("\n", counted, getattr(error, "pos", counted))
            raise ValueError(f"{path}:{number}: not valid JSON: {_reason(error)}") from None
        yield number, row
        position = _skip(text, position)
        following = text[position : position + 1]
        if following == "]" and _skip(text, position + 1) == len(text):
            return
        if following != ",":
            number += text.count("\n", counted, position)
            raise ValueError(f"{path}:{number}: expected a comma or the end of the array, got {shown(following)}")
        position = _skip(text, position + 1)


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def shown(value: object) -> str:
    """A value, as short as an error message wants it."""
    text = json.dumps(value, ensure_ascii=False) if value is not None else "nothing"
    return text if len(text) <= 60 else text[:57] + "..."


def read_json(path: Path) -> dict:
    """A JSON object, empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content
