"""A tokenised data set: token ids and targets of all examples, end to end in flat tensors."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from data.dataset_report import DatasetReport
from data.images.files import ImageFiles
from modules.adapters import virtual_tokens
from modules.image_tokens import Images, place_images
from modules.loss import IGNORE_INDEX


@dataclass(eq=False)
class TokenizedDataset:
    """Examples end to end: example i is [offsets[i], offsets[i + 1]) of `input_ids` and `targets`.

    `targets[i]` is the token to be predicted at position i, or IGNORE_INDEX: nothing needs shifting any more.
    """

    input_ids: Tensor  # [tokens] int32
    targets: Tensor  # [tokens] int32
    offsets: Tensor  # [examples + 1] int64
    report: DatasetReport
    fingerprint: str  # SHA-256 of the tensors, the columns, and the images' names and sizes
    images: ImageFiles | None = None  # the examples' image files; None: a dataset for a text model
    lines: Sequence[int] = ()  # for each example, the line of the file on which its row begins
    columns: dict[str, list] = field(default_factory=dict)  # further values, such as `columns["label"][i]`

    @classmethod
    def of(
        cls, examples: Iterable[tuple[list[int], list[int]]], columns: dict[str, list] | None = None
    ) -> "TokenizedDataset":
        """A dataset of (input_ids, targets) pairs that were made elsewhere. An example needs at least one target."""
        reader = Examples(DatasetReport("examples", seq_len=None))
        for number, (input_ids, targets) in enumerate(examples, start=1):
            if len(input_ids) != len(targets) or not any_target(targets):
                raise ValueError(f"example {number} must have one target per token, and one that is not {IGNORE_INDEX}")
            reader.add(input_ids, targets, number, {})
            reader.report.rows += 1
        reader.columns = columns or {}
        return reader.dataset()

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
        """Example i's images for `ids`, the example's first tokens; None: they have no image."""
        if self.images is None or not (found := ids.count(self.images.processor.token_id)):
            return None
        tokens = self.images.processor.tokens
        pixel_values = self.pixel_values(i)[: found // tokens]
        return place_images([ids], pixel_values, image_token=self.images.processor.token_id, tokens_per_image=tokens)

    def pixel_values(self, i: int) -> Tensor | None:
        """Example i's images, decoded, as the model takes them: [tiles, 3, H, W] float32; None: it has none."""
        numbers = self.images.of(i) if self.images else ()
        if not numbers:
            return None
        return self.images.processor.normalize(torch.cat([self.images.decode(number) for number in numbers]))

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return self.offsets.diff().tolist()

    @cached_property
    def target_counts(self) -> list[int]:
        """Tokens of each example that are trained."""
        counted = torch.cat([torch.zeros(1, dtype=torch.int64), (self.targets != IGNORE_INDEX).cumsum(0)])
        return counted[self.offsets].diff().tolist()


class Examples:
    """A dataset while its rows are read."""

    def __init__(self, report: DatasetReport, images: ImageFiles | None = None, columns: Sequence[str] = ()):
        self.report, self.images = report, images
        self.input_ids, self.targets, self.offsets, self.lines = array("i"), array("i"), array("q", [0]), array("q")
        self.columns: dict[str, list] = {name: [] for name in columns}

    def add(self, input_ids: list[int], targets: list[int], line: int, values: dict[str, object]) -> None:
        self.input_ids.extend(input_ids)
        self.targets.extend(targets)
        self.offsets.append(len(self.input_ids))
        self.lines.append(line)
        for name, value in values.items():
            self.columns[name].append(value)
        self.report.examples += 1
        self.report.tokens += len(input_ids)
        self.report.target_tokens += len(targets) - targets.count(IGNORE_INDEX)
        self.report.longest = max(self.report.longest, len(input_ids))

    def dataset(self) -> TokenizedDataset:
        if not self.report.examples:
            raise ValueError(f"{self.report.path}: no row is left to train on: {'; '.join(self.report.lines()[1:])}")
        if wrong := [name for name, values in self.columns.items() if len(values) != self.report.examples]:
            raise ValueError(f"columns {', '.join(wrong)} must have {self.report.examples} values: one per example")
        digest = hashlib.sha256()
        for numbers in (self.input_ids, self.targets, self.offsets):
            digest.update(numbers)
        if self.images is not None and self.images.names:
            digest.update(self.images.digest())
        if self.columns:
            digest.update(json.dumps(self.columns, sort_keys=True).encode())
        return TokenizedDataset(
            input_ids=torch.frombuffer(self.input_ids, dtype=torch.int32),
            targets=torch.frombuffer(self.targets, dtype=torch.int32),
            offsets=torch.frombuffer(self.offsets, dtype=torch.int64),
            report=self.report,
            fingerprint=digest.hexdigest(),
            images=self.images,
            lines=self.lines,
            columns=self.columns,
        )


def any_target(targets: list[int]) -> bool:
    return targets.count(IGNORE_INDEX) < len(targets)
