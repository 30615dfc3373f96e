"""A data file as a tokenised data set, or as several of one length if rows have several completions."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from data.chat.templates import ChatTemplate
from data.dataset_report import DatasetReport
from data.images.files import BadImage, ImageFiles
from data.images.processor import ImageProcessor
from data.json_rows import read_rows
from data.rows import Encoded, encode_row
from data.tokenized import Examples, TokenizedDataset, any_target
from data.tokenizers.load import Tokenizer
from modules.loss import IGNORE_INDEX


def load_dataset(
    path: str | Path,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    seq_len: int | None,
    completion_field: str | None = None,
    **options,
) -> TokenizedDataset:
    """Read, tokenise and mask a data file (formats: data/row_formats.py). `options`: those of `load_sides`.

    Raises FileNotFoundError, ValueError as `FILE:LINE: reason` for a bad row, and ValueError if no row is left.
    """
    sides = load_sides(path, tokenizer, template, completion_fields=[completion_field], seq_len=seq_len, **options)
    return sides[completion_field]


def load_sides(
    path: str | Path,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    completion_fields: Sequence[str | None],
    seq_len: int | None,
    columns: Sequence[str] = (),
    split_long: bool = False,
    virtual_ids: Sequence[int] = (),
    image_processor: ImageProcessor | None = None,
    image_root: str | Path | None = None,
    skip_bad_rows: bool = False,
    **encoding,
) -> dict[str | None, TokenizedDataset]:
    """One dataset per completion field, such as chosen and rejected; their examples i come from the same row.

    A row that one side drops is dropped from all. A row longer than `seq_len` tokens is cut; with `split_long` it
    becomes several examples, and no target is lost. The values of `columns` are kept in `dataset.columns`.
    `virtual_ids` are put in front of every example (virtual_tokens.py); `seq_len` counts them. `encoding` is passed to
    `encode_row`: train_on, prompt_field, on_special_content.

    With an `image_processor` rows may have images, in files under `image_root` (default: the data file's folder). A row
    is not cut before its last image; if that is too long, it is dropped. `skip_bad_rows` drops rows with a missing or
    broken image instead of raising.
    """
    if seq_len is not None and seq_len < 2:
        raise ValueError(f"--seq-len {seq_len} leaves nothing to predict; it must be at least 2")
    if split_long and len(completion_fields) > 1:
        raise ValueError("rows with several sides cannot be split: the pieces of one have no counterpart in the other")
    virtual = len(virtual_ids)
    room = room_behind(virtual, seq_len)
    sides: dict[str | None, Examples] = {}
    for name in completion_fields:
        report, images = DatasetReport(str(path), seq_len, virtual_tokens=virtual), None
        if image_processor is not None:
            image_processor.check_tokenizer(tokenizer)
            images = ImageFiles(image_processor, str(path), Path(image_root or Path(path).parent))
            report.tile_tokens = image_processor.tokens
        sides[name] = Examples(report, images, columns)
    title = f"Tokenising {Path(path).name}"
    for line, row in tqdm(read_rows(path), desc=title, unit=" rows", delay=1, leave=False):
        try:
            values = _values(row, columns)
            encoded = [
                encode_row(row, tokenizer, template, completion_field=name, image_files=side.images, **encoding)
                for name, side in sides.items()
            ]
        except BadImage as error:
            error = f"{path}:{line}: {error}"
            if not skip_bad_rows:
                raise ValueError(f"{error} (--skip-bad-rows leaves such rows out)") from None
            for side in sides.values():
                side.report.rows += 1
                side.report.bad_images += 1
                side.report.bad_image_example = side.report.bad_image_example or error
            continue
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from None
        pieces = []
        for side, found in zip(sides.values(), encoded, strict=True):
            assert max(found.input_ids, default=0) < tokenizer.vocab_size
            side.report.rows += 1
            side.report.chat_rows += found.chat
            pieces.append(list(_pieces(found, room, split_long, side.report)))
        complete = all(pieces)
        for side, found, its_pieces in zip(sides.values(), encoded, pieces, strict=True):
            side.report.other_side += bool(its_pieces) and not complete
            for piece_ids, piece_targets in its_pieces if complete else ():
                side.add([*virtual_ids, *piece_ids], [*[IGNORE_INDEX] * virtual, *piece_targets], line, values)
                if side.images is not None:
                    side.images.add(found.images, line)
                    side.report.images += len(found.images)
                    side.report.tiles += piece_ids.count(image_processor.token_id) // image_processor.tokens
    return {name: side.dataset() for name, side in sides.items()}


def _values(row: dict, columns: Sequence[str]) -> dict[str, object]:
    """The row's values of these columns; ValueError where it has none."""
    if missing := [name for name in columns if row.get(name) is None]:
        raise ValueError(f"the row has no {', '.join(map(repr, missing))}; it has {', '.join(map(repr, row))}")
    return {name: row[name] for name in columns}


def room_behind(virtual: int, seq_len: int | None) -> int | None:
    """Tokens of a row that fit into `seq_len` behind `virtual` tokens; ValueError if none do."""
    if virtual and seq_len is not None and seq_len - virtual < 2:
        raise ValueError(f"--seq-len {seq_len} leaves no room behind {virtual} virtual tokens: raise it")
    return None if seq_len is None else seq_len - virtual


def _pieces(
    encoded: Encoded, seq_len: int | None, split_long: bool, report: DatasetReport
) -> Iterator[tuple[list[int], list[int]]]:
    """The example or examples that a row gives; counts what it loses."""
    ids, targets = encoded.input_ids, encoded.targets
    if not any_target(targets):
        report.without_target += 1
        return
    if encoded.special is not None:
        report.special_content += 1
        report.special_example = report.special_example or encoded.special
    report.unended += encoded.unended
    if seq_len is None or len(ids) <= seq_len:
        yield ids, targets
    elif encoded.images_end > seq_len:
        report.images_too_long += 1
    elif split_long and not encoded.images:
        report.split += 1
        for start in range(0, len(ids), seq_len):
            # The last position of a piece predicts the first token of the next, so a piece without targets can go.
            if any_target(targets[start : start + seq_len]):
                yield ids[start : start + seq_len], targets[start : start + seq_len]
    else:
        report.cut += 1
        targets = [*targets[: seq_len - 1], IGNORE_INDEX]  # the token it would predict is gone
        if any_target(targets):
            yield ids[:seq_len], targets
        else:
            report.without_target_after_cut += 1
