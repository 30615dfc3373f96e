"""Activations that wait for their backward in host memory.

A block's input is needed in forward and again in backward. In between it can leave the card: 8 KB per token and block
of an 8B Llama (2.1 GB for 8,192 tokens and 32 blocks) are copied on a side stream while the next blocks compute, and
come back one block ahead of their use. The copy takes a hundredth of the block's computation, so it is hidden. The
tensor put last is needed first and stays on the card until the next one is put.

Tensors that an autograd graph holds, such as what attention saved for its backward, can leave together with the input.
The tensors and the graph stay; their memory is given back, and filled again in time.

Host memory is page-locked once and reused in pieces. All copies run in order on one stream, so a piece is free for the
next tensor as soon as its copy back has been queued.
"""

import weakref
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, UntypedStorage

from modules.memory.host_memory import pinned_empty

PIECE = 16 * 2**20  # bytes; smaller ones cost the host more calls
PIECES_AT_A_TIME = 16


class Offloaded:
    """A tensor on its way to host memory, there, or on its way back. Made by `ActivationOffload.put`."""

    def __init__(self, tensor: Tensor, held: list[UntypedStorage], spare: list[Tensor]):
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.resident: Tensor | None = tensor  # on the card
        self.held = held  # memory of others that leaves and comes back with it
        self.sizes = [storage.nbytes() for storage in held]
        self.pieces: list[Tensor] = []  # in host memory
        self.spare = spare  # where those go afterwards
        self.copied: torch.cuda.Event | None = None  # the last copy, out or in

    def parts(self) -> Iterator[Tensor]:
        """All that travels, on the card, as flat bytes of at most one piece each."""
        yield from self.resident.view(-1).view(torch.uint8).split(PIECE)
        for storage in self.held:
            yield from torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage).split(PIECE)

    def __del__(self):  # dropped unused: nobody else may have its memory on the card while a copy is under way
        if self.resident is not None and self.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)
        self.spare += self.pieces


class ActivationOffload:
    """Takes tensors in the order of forward, returns them in the order of backward; on a CPU nothing is moved.

    `host_bytes`: page-locked so far.
    """

    def __init__(self, device: torch.device):
        self.device, self.host_bytes = device, 0
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.spare: list[Tensor] = []
        self.waiting: list[weakref.ref[Offloaded]] = []  # those put and not yet got; a dropped graph drops its own

    def put(self, tensor: Tensor, held: Iterable[Tensor] = ()) -> Offloaded:
        """Start to copy the tensor, and the memory of the tensors `held`, which nobody reads until `get`, to the host.

        None of them may be changed afterwards. The next `put` frees their memory on the card.
        """
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in held}
        item = Offloaded(tensor.detach().contiguous(), list(storages.values()), self.spare)
        if self.side is not None:
            if last := self._last():
                self._leave(last)
            self.side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.side):
                for part in item.parts():
                    piece = self._piece()
                    piece[: part.numel()].copy_(part, non_blocking=True)
                    item.pieces.append(piece)
                item.copied = self.side.record_event()
        self.waiting.append(weakref.ref(item))
        return item

    def get(self, item: Offloaded) -> Tensor:
        """The tensor, on the card; starts to bring back the one put before it. Each can be got once."""
        if item.resident is None and not item.pieces:
            fix = "retain_graph needs --activations lean"
            raise RuntimeError(f"an offloaded activation is kept for one backward only: {fix}")
        self._bring_back(item)
        if item.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(item.copied)
        tensor, item.resident, item.held = item.resident, None, []
        self.waiting = [ref for ref in self.waiting if ref() not in (None, item)]
        if before := self._last():
            self._bring_back(before)
        return tensor

    def _piece(self) -> Tensor:
        if not self.spare:
            fresh = pinned_empty(PIECES_AT_A_TIME * PIECE, dtype=torch.uint8, device=self.device)
            self.host_bytes += fresh.nbytes
            self.spare += fresh.split(PIECE)
        return self.spare.pop()

    def _last(self) -> Offloaded | None:
        while self.waiting and self.waiting[-1]() is None:
            self.waiting.pop()
        return self.waiting[-1]() if self.waiting else None

    def _leave(self, item: Offloaded) -> None:
        """Give the card's memory back. The copy began a block ago, so there is nothing to wait for."""
        if item.resident is not None:
            torch.cuda.current_stream(self.device).wait_event(item.copied)
            item.resident = None
            # Autograd's graph now refers to tensors without storage; it is filled again before backward reads them.
            for storage in item.held:
                storage.resize_(0)

    def _bring_back(self, item: Offloaded) -> None:
        if item.resident is None:
            item.resident = torch.empty(item.shape, dtype=item.dtype, device=item.device)
            for storage, size in zip(item.held, item.sizes, strict=True):
                storage.resize_(size)
            self.side.wait_stream(torch.cuda.current_stream(self.device))  # its memory may just have been in use
            with torch.cuda.stream(self.side):
                for part, piece in zip(item.parts(), item.pieces, strict=True):
                    part.copy_(piece[: part.numel()], non_blocking=True)
                item.copied = self.side.record_event()
        self.spare += item.pieces
        item.pieces = []
