"""From tokenised rows to batches: order, packing, collation.

The order of an epoch follows from (seed, epoch) alone and the packs from the order and the rows' lengths. So a resume
needs two numbers, the epoch and the step in it. Images are decoded ahead in threads (data/images/prefetch.py).

B rows, T tokens, N target positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import Tensor

from data.dataset import TokenizedDataset
from data.images.prefetch import default_workers, prefetch
from modules.attention import SequenceLayout, packed_layout, padded_layout
from modules.image_tokens import Images, place_images
from modules.loss import IGNORE_INDEX

Plan = list[list[list[int]]]  # micro-batches of rows of dataset indices
PACK_WINDOW = 64  # packs that stay open for further rows while the epoch streams by


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor  # [B, T] int64, padded on the right
    layout: SequenceLayout
    target_index: Tensor  # [N] flat positions in B·T that have a target
    targets: Tensor  # [N] the token ids to be predicted there
    images: Images | None = None  # the images and their places; None: no row has one
    rows: list[list[int]] = field(default_factory=list)  # for each of B, the indices of its examples in the dataset

    @property
    def target_tokens(self) -> int:
        return self.targets.numel()

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        """On the device, ready for a model that computes in `dtype`."""
        moved = {name: getattr(self, name) for name in ("input_ids", "target_index", "targets")}
        if device.type == "cuda":
            moved = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in moved.items()}
        images = self.images and self.images.prepare(device, dtype)
        return replace(self, **moved, images=images, layout=self.layout.prepare(device, dtype))


class Batches:
    """The micro-batches of every epoch, grouped into optimizer steps.

    A micro-batch is `batch_size` rows, or packs of at most `seq_len` tokens; a step is `grad_accum` of them. The last
    of an epoch may be smaller: no row waits for the next epoch.
    """

    def __init__(
        self,
        dataset: TokenizedDataset,
        *,
        batch_size: int,
        grad_accum: int = 1,
        packing: bool = False,
        seq_len: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        pad_id: int = 0,
        pad_multiple: int = 1,
        image_workers: int | None = None,
    ):
        check_batches(batch_size, grad_accum, image_workers)
        self.dataset, self.batch_size, self.grad_accum = dataset, batch_size, grad_accum
        self.packing, self.seq_len = packing, seq_len
        self.shuffle, self.seed = shuffle, seed
        # No token sees padding, so any id will do; the tokenizer's own may have no row in the embedding.
        self.pad_id, self.pad_multiple = pad_id, pad_multiple
        self.image_workers = default_workers() if image_workers is None else image_workers  # 0: decode in the loop
        self._plan: tuple[int, Plan] | None = None

    def plan(self, epoch: int) -> Plan:
        """Micro-batches of an epoch, each a list of rows, each a list of dataset indices (one, unless packing)."""
        if self._plan is None or self._plan[0] != epoch:
            order = list(range(len(self.dataset)))
            if self.shuffle:
                generator = torch.Generator().manual_seed(((self.seed << 20) + epoch) % 2**63)
                order = torch.randperm(len(order), generator=generator).tolist()
            rows = first_fit(order, self.dataset.lengths, self.seq_len) if self.packing else [[i] for i in order]
            micro_batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
            self._plan = (epoch, micro_batches)
        return self._plan[1]

    def steps_in_epoch(self, epoch: int) -> int:
        return -(-len(self.plan(epoch)) // self.grad_accum)

    @property
    def most_images(self) -> int:
        """The most images (tiles) that a micro-batch can have."""
        images = self.dataset.images
        if images is None:
            return 0
        tiles = sorted(images.tiles_of(i) for i in range(len(self.dataset)))
        if self.packing:
            return min(sum(tiles), self.batch_size * (self.seq_len // images.processor.tokens))
        return sum(tiles[-self.batch_size :])

    def total_steps(self, epochs: int, max_steps: int | None) -> int:
        """Optimizer steps of a run of `epochs` epochs that ends at `max_steps` at the latest."""
        check_length(epochs, max_steps)
        steps = 0
        for epoch in range(epochs):
            if max_steps is not None and steps >= max_steps:
                break
            steps += self.steps_in_epoch(epoch)
        return steps if max_steps is None else min(steps, max_steps)

    def largest(self, steps: int) -> tuple[int, int]:
        """Tokens with padding, and targets, of the largest micro-batch of the first `steps` steps, or three epochs."""
        lengths, counts = self.dataset.lengths, self.dataset.target_counts
        tokens, targets, epoch = 0, 0, 0
        while epoch == 0 or (steps > 0 and epoch < 3):  # a run of no steps is planned like one
            for rows in self.plan(epoch)[: max(steps, 1) * self.grad_accum]:
                length = self._padded(max(sum(lengths[i] for i in row) for row in rows))
                tokens = max(tokens, len(rows) * length)
                targets = max(targets, sum(counts[i] for row in rows for i in row))
            steps -= self.steps_in_epoch(epoch)
            epoch += 1
        return tokens, targets

    def _padded(self, length: int) -> int:
        """T of a micro-batch whose longest row (pack) has `length` tokens."""
        if self.packing and self.pad_multiple > 1:
            length = self.seq_len  # packs are nearly full anyway
        return -(-length // self.pad_multiple) * self.pad_multiple

    def steps(self, epoch: int = 0, step_in_epoch: int = 0) -> Iterator[tuple[int, int, list[Batch]]]:
        """Endless optimizer steps from a position on: (epoch, step in epoch, its micro-batches)."""

        def planned() -> Iterator[tuple[int, int, Plan]]:
            at, first = epoch, step_in_epoch
            while True:
                for step in range(first, self.steps_in_epoch(at)):
                    start = step * self.grad_accum
                    yield at, step, self.plan(at)[start : start + self.grad_accum]
                at, first = at + 1, 0

        return self._collated(planned())

    def one_epoch(self) -> Iterator[Batch]:
        """Every row once: for evaluation."""
        for _, _, micro_batches in self._collated((0, i, [rows]) for i, rows in enumerate(self.plan(0))):
            yield from micro_batches

    def first(self, steps: int) -> Iterator[Batch]:
        """The micro-batches of the training's first steps."""
        return (batch for _, _, micro_batches in islice(self.steps(), steps) for batch in micro_batches)

    def _collated(self, steps: Iterator[tuple[int, int, Plan]]) -> Iterator[tuple[int, int, list[Batch]]]:
        """Each (epoch, step, its plan) with batches in place of the plan; images are decoded ahead."""
        images = self.dataset.images

        def numbers(step: tuple[int, int, Plan]) -> list[int]:
            return [number for rows in step[2] for row in rows for i in row for number in images.of(i)]

        def assemble(step: tuple[int, int, Plan], decoded: list[Tensor]) -> tuple[int, int, list[Batch]]:
            pixels = iter(decoded)
            return step[0], step[1], [self.collate(rows, pixels) for rows in step[2]]

        if images is None:
            return (assemble(step, []) for step in steps)
        return prefetch(steps, numbers, images.decode, assemble, self.image_workers)

    def collate(self, rows: list[list[int]], pixels: Iterator[Tensor]) -> Batch:
        """Rows of dataset indices as a batch; `pixels`: their images, decoded."""
        examples = [[self.dataset[i] for i in row] for row in rows]
        lengths = [[len(ids) for ids, _ in row] for row in examples]
        T = self._padded(max(sum(row) for row in lengths))
        input_ids = torch.full((len(rows), T), self.pad_id, dtype=torch.long)
        targets = torch.full((len(rows), T), IGNORE_INDEX, dtype=torch.long)
        for b, row in enumerate(examples):
            input_ids[b, : sum(lengths[b])] = torch.cat([ids for ids, _ in row])
            targets[b, : sum(lengths[b])] = torch.cat([wanted for _, wanted in row])
        layout = packed_layout(lengths, T) if self.packing else padded_layout(T)
        target_index = (targets.view(-1) != IGNORE_INDEX).nonzero().squeeze(1)
        batch = Batch(input_ids, layout, target_index, targets.view(-1)[target_index], rows=rows)
        images = self.dataset.images
        count = sum(len(images.of(i)) for row in rows for i in row) if images else 0
        if not count:
            return batch
        processor = images.processor
        pixel_values = processor.normalize(torch.cat(list(islice(pixels, count))))
        sizes = dict(image_token=processor.token_id, tokens_per_image=processor.tokens)
        return replace(batch, images=place_images(input_ids, pixel_values, **sizes))


def first_fit(order: list[int], lengths: list[int], capacity: int, window: int = PACK_WINDOW) -> list[list[int]]:
    """Pack rows, in order, into bins of `capacity` tokens: each goes into the oldest open bin with room.

    Only the last `window` bins are open, so that rows stay near their place in the order.
    """
    bins, room = [], []  # room[k]: tokens left in bins[k]; only the last `window` bins are open
    for index in order:
        length = int(lengths[index])
        first_open = max(0, len(bins) - window)
        for k in range(first_open, len(bins)):
            if room[k] >= length:
                bins[k].append(index)
                room[k] -= length
                break
        else:
            bins.append([index])
            room.append(capacity - length)
    return bins


def check_batches(batch_size: int, grad_accum: int, image_workers: int | None = None) -> None:
    for flag, count in (("--batch-size", batch_size), ("--grad-accum", grad_accum)):
        if count < 1:
            raise ValueError(f"{flag} {count} must be at least 1")
    if image_workers is not None and image_workers < 0:
        raise ValueError(f"--image-workers {image_workers} is negative; 0 decodes in the training loop")


def check_length(epochs: int, max_steps: int | None) -> None:
    if epochs < 1:
        raise ValueError(f"--epochs {epochs} must be at least 1")
    if max_steps is not None and max_steps < 0:
        raise ValueError(f"--max-steps {max_steps} must not be negative")


def fit_seq_len(asked: int | None, max_length: float) -> int:
    """The row length of a run: --seq-len if the model has as many positions; by default at most 2048."""
    if asked is None:
        return min(2048, max_length)
    if asked < 2:
        raise ValueError(f"--seq-len {asked} leaves no token to predict; it must be at least 2")
    if asked > max_length:
        fix = "lower it or set rope scaling in config.json"
        raise ValueError(f"--seq-len {asked} exceeds this model's {max_length} positions; {fix}")
    return asked
