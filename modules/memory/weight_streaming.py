"""Weights that live in host memory and visit the card one block ahead of their use.

A model computes with one block at a time, and a LoRA run never changes the block's large weights. So they can stay in
page-locked host memory, or on disk, while the card holds two blocks: the one that computes, and the next one, which is
being copied on a stream of its own. Backward recomputes the blocks, in reverse order:

                    in host memory      a block     two on the card     a block's copy, at 25 GB/s
    8B  NF4             3.6 GB          0.11 GB         0.23 GB               4.5 ms
    8B  bfloat16       14.0 GB          0.44 GB         0.87 GB                17 ms
    70B NF4            35.3 GB          0.44 GB         0.88 GB                18 ms

The copy is hidden once the block's forward takes longer. At 2 operations per weight and token and 100 TFLOP/s that is
from 1,000 tokens per micro-batch for NF4, from 4,000 for bfloat16.

Block i always takes place i mod 2, so its parameters on the card are made once, as views of that memory. The layers of
a block that is not on the card have the parameters in host memory: names, counts and values are those of the model, and
computing with such a block is an error about devices, not a wrong number. (Before the first use all layers have their
place on the card, filled with NaN; `add_lora` puts the adapters there.)

Norms, biases, adapters and the head stay on the card. So does a tied embedding; an untied one stays in host memory
(modules/memory/host_embedding.py).
"""

import dataclasses
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from modules.adapters.lora import lora_layers
from modules.memory.host_embedding import keep_embedding_on_host
from modules.memory.host_memory import pinned_empty

PLACES = 2
ALIGNMENT = 512  # bytes, as CUDA's allocator aligns
NEEDS_RECOMPUTATION = (
    "streamed weights have left the card when backward comes, so every block must be recomputed there: "
    "choose --activations lean or offload, or run without gradients"
)
ARE_FROZEN = (
    "streamed weights are frozen: their updates would be lost; train adapters, norms and biases, or keep the weights "
    "resident"
)


def stream_weights(model: nn.Module, device: torch.device, *, folder: Path | None = None) -> "StreamedWeights":
    """Keep the weights of the blocks' linear layers in page-locked host memory, or in a scratch file in `folder`.

    For a frozen model on the meta device (give `load_weights` the result's `take`) or loaded, before `add_lora`. The
    model then runs without gradients; to train it, something must recompute the blocks and call `use` before each one,
    in forward and in backward (`checkpoint_activations` with `bind=streamed.use`).
    """
    if lora_layers(model):
        raise ValueError("stream_weights comes before add_lora: adapters do not travel")
    streamed = StreamedWeights(model, device, folder)
    if any(model.get_parameter(name).requires_grad for name in streamed.names):
        raise ValueError(ARE_FROZEN)
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        keep_embedding_on_host(model, device)
    for name in streamed.names:
        if not model.get_parameter(name).is_meta:
            streamed.take(name)

    def run_block(block: nn.Module, hidden: Tensor, *inputs) -> Tensor:
        if torch.is_grad_enabled() and (hidden.requires_grad or any(p.requires_grad for p in block.parameters())):
            raise ValueError(NEEDS_RECOMPUTATION)
        streamed.use(block)
        return block(hidden, *inputs)

    model.model.run_block, model.streamed = run_block, True
    return streamed


@dataclasses.dataclass
class _Place:
    """Room for one block on the card."""

    memory: Tensor  # flat uint8
    stage: Tensor | None  # with a scratch file: page-locked memory between the disk and the card
    arrived: torch.cuda.Event | None  # on CUDA: the last copy to `memory` has ended
    block: int | None = None
    reading: Future | None = None


class StreamedWeights:
    """The blocks' frozen weights in host memory, and the two places on the card. Made by `stream_weights`.

    `names`: the streamed parameters. `copies`: blocks sent to the card so far.
    """

    def __init__(self, model: nn.Module, device: torch.device, folder: Path | None = None):
        self.device, self.folder, self.copies = device, folder, 0
        self.blocks = list(model.blocks)
        self.layers = [name for name, layer in self.blocks[0].named_modules() if isinstance(layer, nn.Linear)]
        prefix = next(name for name, module in model.named_modules() if module is model.blocks)
        self.names = [f"{prefix}.{i}.{layer}.weight" for i in range(len(self.blocks)) for layer in self.layers]
        self.host = torch.empty(0)  # [blocks, bytes] uint8, made when the first block shows how large it is
        self.places: list[_Place] = []
        self.in_host: dict[int, list[nn.Parameter]] = {}  # block -> its parameters, in the order of `layers`
        self.on_card: dict[int, list[nn.Parameter]] = {}
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.side is not None:
            weakref.finalize(self, self.side.synchronize)  # no copy under way when the host memory is given back
        self.reader = ThreadPoolExecutor(1, "weights") if folder else None
        self._expected = {name: i // len(self.layers) for i, name in enumerate(self.names)}
        self._started = False
        self._followed: dict[tuple[int, int], int] = {}  # two blocks in a row -> the one that was used after them
        self._last_two = (-2, -1)

    @property
    def host_bytes(self) -> int:
        return self.host.nbytes

    @property
    def card_bytes(self) -> int:
        return sum(place.memory.nbytes for place in self.places)

    def describe(self) -> str:
        where = f"a scratch file in {self.folder}" if self.folder else "page-locked host memory"
        sizes = f"{self.host_bytes / 2**30:.2f} GiB of {len(self.blocks)} blocks in {where}"
        return f"weights: {sizes}, {len(self.places)} blocks ({self.card_bytes / 2**30:.2f} GiB) at a time on the card"

    # Loading

    def take(self, name: str) -> None:
        """Parameter `name` has been loaded. With the last one of its block, the block moves to the host."""
        i = self._expected.pop(name, None)
        if i is not None and i not in self._expected.values():
            self._move_to_host(i)

    @torch.no_grad()
    def _move_to_host(self, i: int) -> None:
        weights = [self.blocks[i].get_parameter(f"{layer}.weight") for layer in self.layers]
        if not self.places:
            self._allocate(sum(_aligned(part.nbytes) for weight in weights for part in inner_tensors(weight).values()))
        self.in_host[i] = _laid_out(weights, self.host[i])
        self.on_card[i] = _laid_out(weights, self.places[i % len(self.places)].memory)
        for weight, home in zip(weights, self.in_host[i], strict=True):
            for name, part in inner_tensors(home).items():
                part.copy_(inner_tensors(weight)[name])
        self._bind(i, self.on_card[i])  # until the first `use`

    def _allocate(self, size: int) -> None:
        if self.folder:
            needed, free = len(self.blocks) * size, shutil.disk_usage(self.folder).free
            if free < needed:  # writing to mapped memory that the disk has no room for kills the process
                raise ValueError(f"{self.folder} has {free / 2**30:.2f} GiB free, weights need {needed / 2**30:.2f}")
            # The file loses its name at once and its room when the process ends, however it ends.
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".streamed-weights-") as file:
                flat = torch.from_file(file.name, shared=True, size=needed, dtype=torch.uint8)
            self.host = flat.view(len(self.blocks), size)
        else:
            self.host = pinned_empty(len(self.blocks), size, dtype=torch.uint8, device=self.device)
        for _ in range(min(PLACES, len(self.blocks))):
            # All bits set are NaN in every float type: whoever computes before the first `use` will notice.
            memory = torch.full((size,), 255, dtype=torch.uint8, device=self.device)
            stage = pinned_empty(size, dtype=torch.uint8, device=self.device) if self.folder else None
            if self.side is not None:
                memory.record_stream(self.side)  # freed with a copy under way, it is not given to others before its end
            self.places.append(_Place(memory, stage, torch.cuda.Event() if self.side is not None else None))

    # Use

    def use(self, block: nn.Module) -> None:
        """Call right before `block` computes, in forward and in backward, to have its weights on the card.

        Also starts to copy the next block: the one that followed these two last time, so that the turn from forward to
        backward is known. The GPU waits for the copies. The host waits only until a scratch file has been read.
        """
        if not self._started:
            self._start()
        i = block.index
        self._followed[self._last_two] = i
        self._last_two = (self._last_two[1], i)
        place = self._send(i)
        if place.reading is not None:
            place.reading.result()
        if place.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(place.arrived)
        self._bind(i, self.on_card[i])
        upwards = i > self._last_two[0] or i == 0
        following = self._followed.get(self._last_two, i + 1 if upwards else i - 1)
        if 0 <= following < len(self.blocks) and following % len(self.places) != i % len(self.places):
            self._send(following)

    def _start(self) -> None:
        assert not self._expected, f"{len(self._expected)} streamed weights are not loaded: load_weights(placed=…take)"
        for block in self.blocks:
            if any(block.get_submodule(layer).weight.requires_grad for layer in self.layers):
                raise ValueError(ARE_FROZEN)
        for i in range(len(self.blocks)):
            self._bind(i, self.in_host[i])
        self._started = True

    def _send(self, i: int) -> _Place:
        """Start block i's copy to the card, unless it is there or on its way."""
        place = self.places[i % len(self.places)]
        if place.block == i:
            return place
        if place.block is not None:
            self._bind(place.block, self.in_host[place.block])
        place.block = i
        self.copies += 1
        # All that reads the place's former block has been queued by now; the block that computes next sits elsewhere.
        vacant = torch.cuda.current_stream(self.device).record_event() if self.side is not None else None
        if self.reader is None:
            self._copy(self.host[i], place, vacant)
        else:
            place.reading = self.reader.submit(self._copy, self.host[i], place, vacant)
        return place

    def _copy(self, source: Tensor, place: _Place, vacant: torch.cuda.Event | None) -> None:
        if place.stage is not None:
            if place.arrived is not None:
                place.arrived.synchronize()  # in the reader's thread: the stage is still being read
            source = place.stage.copy_(source)
        if self.side is None:
            place.memory.copy_(source)
            return
        with torch.cuda.stream(self.side):
            self.side.wait_event(vacant)
            place.memory.copy_(source, non_blocking=True)
            place.arrived.record(self.side)

    def _bind(self, i: int, parameters: Sequence[nn.Parameter]) -> None:
        for layer, parameter in zip(self.layers, parameters, strict=True):
            # By name, since add_lora replaces layers; past nn.Module's __setattr__, since this runs for every block.
            self.blocks[i].get_submodule(layer)._parameters["weight"] = parameter


def inner_tensors(weight: Tensor) -> dict[str, Tensor]:
    """The memory that a weight consists of: its own, or the inner tensors of a quantised one."""
    if not hasattr(weight, "__tensor_flatten__"):
        return {"weight": weight}
    return {name: getattr(weight, name) for name in weight.__tensor_flatten__()[0]}


def _laid_out(weights: Sequence[Tensor], memory: Tensor) -> list[nn.Parameter]:
    """Parameters like `weights` over `memory` (flat uint8), one behind the other; their contents are not copied."""
    parameters, offset = [], 0
    for weight in weights:
        parts = {}
        for name, part in inner_tensors(weight).items():
            parts[name] = memory[offset : offset + part.nbytes].view(part.dtype).view(part.shape)
            offset += _aligned(part.nbytes)
        made = parts.get("weight")
        if made is None:
            _, context = weight.__tensor_flatten__()
            if "tensor_meta" in context:  # NF4Tensor keeps a device there, too
                context["tensor_meta"] = dataclasses.replace(context["tensor_meta"], device=memory.device)
            made = type(weight).__tensor_unflatten__(parts, context, weight.shape, weight.stride())
        parameters.append(nn.Parameter(made, requires_grad=False))
    assert offset == memory.numel(), "the blocks differ in their layers' shapes or types"
    return parameters


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
