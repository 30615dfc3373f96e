"""A data file as token ids and targets, all rows end to end in flat tensors."""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.chat.templates import ChatTemplate
from data.dataset_report import DatasetReport
from data.images.files import BadImage, ImageFiles
from data.images.processor import ImageProcessor
from data.json_rows import read_rows
from data.rows import Encoded, encode_row
from data.tokenizers.load import Tokenizer
from modules.adapters import virtual_tokens
from modules.image_tokens import Images, place_images
from modules.loss import IGNORE_INDEX


@dataclass(eq=False)
class TokenizedDataset:
    """Examples end to end: example i is [offsets[i], offsets[i + 1]) of `input_ids` and `targets`.

    `targets[i]` is the token to be predicted at position i, IGNORE_INDEX where none is; so both have one length and
    nothing needs shifting any more.
    """

    input_ids: Tensor
    """[tokens] int32"""
    targets: Tensor
    """[tokens] int32"""
    offsets: Tensor
    """[examples + 1] int64"""
    report: DatasetReport
    fingerprint: str
    """SHA-256 of the three tensors, and of the images' names and sizes: a run resumed on other data notices."""
    images: ImageFiles | None = None
    """The examples' image files; None: a dataset for a text model."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """Example i as (input_ids, targets), views of [T] int32."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        start, end = self.offsets[i % len(self)].item(), self.offsets[i % len(self) + 1].item()
        return self.input_ids[start:end], self.targets[start:end]

    def check_vocabulary(self, size: int) -> None:
        """Raise ValueError if a token has no row in the model's embedding: tokenizer and weights do not match."""
        if (largest := int(self.input_ids[self.input_ids < virtual_tokens.FIRST].max())) >= size:
            raise ValueError(
                f"{self.report.path} contains token id {largest}, but the model has {size} embeddings: "
                "the tokenizer in its folder has more tokens than the model"
            )

    def place_images(self, i: int, ids: list[int]) -> Images | None:
        """Example i's images for `ids`, which begin as it does and hold all or the first of them; None: no image."""
        if self.images is None or not (found := ids.count(self.images.processor.token_id)):
            return None
        tokens = self.images.processor.tokens
        pixel_values = self.pixel_values(i)[: found // tokens]
        return place_images([ids], pixel_values, image_token=self.images.processor.token_id, tokens_per_image=tokens)

    def pixel_values(self, i: int) -> Tensor | None:
        """Example i's images as the model takes them, [tiles, 3, H, W] float32, decoded here and now; None: none."""
        numbers = self.images.of(i) if self.images else ()
        if not numbers:
            return None
        return self.images.processor.normalize(torch.cat([self.images.decode(number) for number in numbers]))

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return self.offsets.diff().tolist()


def load_dataset(
    path: str | Path,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    seq_len: int | None,
    train_on: str = "assistant",
    prompt_field: str | None = None,
    completion_field: str | None = None,
    on_special_content: str = "keep",
    split_long: bool = False,
    progress: bool = True,
    image_processor: ImageProcessor | None = None,
    image_root: str | Path | None = None,
    skip_bad_rows: bool = False,
    virtual_ids: Sequence[int] = (),
) -> TokenizedDataset:
    """Read, tokenise and mask a data file (formats: data/row_formats.py).

    A row longer than `seq_len` tokens is cut; with `split_long` it becomes several examples instead, and no target is
    lost. Raises FileNotFoundError, or ValueError with `FILE:LINE: reason` for a bad row, and ValueError where no row
    is left to train on.

    With an `image_processor` rows may have images, in files under `image_root` (unless given: the data file's folder);
    these are looked at here and decoded when their turn comes. A row with images is cut behind the last one or, where
    even that is too long, dropped. `skip_bad_rows` drops rows with a missing or broken image instead of raising.

    `virtual_ids` are put in front of every example (virtual_tokens.py); `seq_len` counts them, and no target
    falls on them.
    """
    if seq_len is not None and seq_len < 2:
        raise ValueError(f"--seq-len {seq_len} leaves nothing to predict; it must be at least 2")
    virtual = len(virtual_ids)
    room = room_behind(virtual, seq_len)
    report = DatasetReport(str(path), seq_len, virtual_tokens=virtual)
    images = None
    if image_processor is not None:
        image_processor.check_tokenizer(tokenizer)
        images = ImageFiles(image_processor, str(path), Path(image_root or Path(path).parent))
        report.tile_tokens = image_processor.tokens
    input_ids, targets, offsets = array("i"), array("i"), array("q", [0])
    rows = tqdm(
        read_rows(path), desc=f"Tokenising {Path(path).name}", unit=" rows", delay=1, leave=False, disable=not progress
    )
    for line, row in rows:
        try:
            encoded = encode_row(
                row,
                tokenizer,
                template,
                train_on=train_on,
                prompt_field=prompt_field,
                completion_field=completion_field,
                on_special_content=on_special_content,
                image_files=images,
            )
        except BadImage as error:
            error = f"{path}:{line}: {error}"
            if not skip_bad_rows:
                raise ValueError(f"{error} (--skip-bad-rows leaves such rows out)") from None
            report.rows += 1
            report.bad_images += 1
            report.bad_image_example = report.bad_image_example or error
            continue
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from None
        assert max(encoded.input_ids, default=0) < tokenizer.vocab_size
        report.rows += 1
        report.chat_rows += encoded.chat
        for piece_ids, piece_targets in _examples(encoded, room, split_long, report):
            input_ids.extend([*virtual_ids, *piece_ids])
            targets.extend([*[IGNORE_INDEX] * virtual, *piece_targets])
            offsets.append(len(input_ids))
            if images is not None:
                images.add(encoded.images, line)
                report.images += len(encoded.images)
                report.tiles += piece_ids.count(image_processor.token_id) // image_processor.tokens
            report.examples += 1
            report.tokens += virtual + len(piece_ids)
            report.target_tokens += len(piece_targets) - piece_targets.count(IGNORE_INDEX)
            report.longest = max(report.longest, virtual + len(piece_ids))
    if not report.examples:
        raise ValueError(f"{path}: no row is left to train on: {'; '.join(report.lines()[1:])}")

    digest = hashlib.sha256()
    for numbers in (input_ids, targets, offsets):
        digest.update(numbers)
    if images is not None and images.names:
        digest.update(images.digest())
    return TokenizedDataset(
        input_ids=torch.frombuffer(input_ids, dtype=torch.int32),
        targets=torch.frombuffer(targets, dtype=torch.int32),
        offsets=torch.frombuffer(offsets, dtype=torch.int64),
        report=report,
        fingerprint=digest.hexdigest(),
        images=images,
    )


def room_behind(virtual: int, seq_len: int | None) -> int | None:
    """Tokens of a row that fit into `seq_len` behind so many virtual ones; ValueError if none do."""
    if virtual and seq_len is not None and seq_len - virtual < 2:
        raise ValueError(f"--seq-len {seq_len} leaves no room behind {virtual} virtual tokens: raise it")
    return None if seq_len is None else seq_len - virtual


def _examples(
    encoded: Encoded, seq_len: int | None, split_long: bool, report: DatasetReport
) -> Iterator[tuple[list[int], list[int]]]:
    """The example or examples that a row gives; counts what it loses."""
    ids, targets = encoded.input_ids, encoded.targets
    if not _any_target(targets):
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
            # The last position of a piece predicts the first token of the next one. So nothing is lost where a piece
            # without targets, such as a single last token, is left out.
            if _any_target(targets[start : start + seq_len]):
                yield ids[start : start + seq_len], targets[start : start + seq_len]
    else:
        report.cut += 1
        targets = [*targets[: seq_len - 1], IGNORE_INDEX]  # the token it would predict is gone
        if _any_target(targets):
            yield ids[:seq_len], targets
        else:
            report.without_target_after_cut += 1


def _any_target(targets: list[int]) -> bool:
    return targets.count(IGNORE_INDEX) < len(targets)
