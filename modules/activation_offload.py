"""Activations that wait for their backward in host memory.

A block's input is needed twice, in forward and a whole pass later in backward. In between it can leave the card: 8 KB
per token and block of an 8B Llama (2.1 GB for 8,192 tokens) travel on a side stream while the next blocks compute, and
come back one block ahead of their use. Moving a block's input takes a hundredth of computing the block, so the
transfer hides; what was put last is needed first and stays on the card until the next one is put.
"""

import weakref

import torch
from torch import Tensor

PIECE = 1 << 24  # elements copied at a time: PyTorch's pinned allocator rounds up to powers of two, pieces waste little


class Offloaded:
    """A tensor on its way to host memory, there, or on its way back. Made by `ActivationOffload.put`."""

    def __init__(self, tensor: Tensor):
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.resident: Tensor | None = tensor  # on the card
        self.pieces: list[Tensor] = []  # in host memory
        self.copied: torch.cuda.Event | None = None  # the last copy, out or in

    def __del__(self):
        if self.resident is not None and self.copied is not None:  # dropped unused: no one may reuse its memory before
            torch.cuda.current_stream(self.device).wait_event(self.copied)


class ActivationOffload:
    """Takes tensors in the order of forward, gives them back in the order of backward, the last one first."""

    def __init__(self, device: torch.device):
        self.device = device
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waiting: list[weakref.ref[Offloaded]] = []  # those put and not yet got; a dropped graph drops its own

    def put(self, tensor: Tensor) -> Offloaded:
        """Start the tensor's way out. It must not be changed afterwards."""
        tensor = tensor.detach()
        item = Offloaded(tensor)
        if self.side is not None:
            if last := self._last():
                self._leave(last)
            self.side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.side):
                for piece in tensor.reshape(-1).split(PIECE):
                    host = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=True)
                    item.pieces.append(host.copy_(piece, non_blocking=True))
                item.copied = self.side.record_event()
        self.waiting.append(weakref.ref(item))
        return item

    def get(self, item: Offloaded) -> Tensor:
        """The tensor, on the card; starts the way back of the one put before it. Each can be got once."""
        if item.resident is None and not item.pieces:
            raise RuntimeError(
                "an offloaded activation is kept for one backward only: retain_graph needs --activations lean"
            )
        self._prefetch(item)
        if item.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(item.copied)
        tensor, item.resident, item.pieces = item.resident, None, []
        self.waiting = [ref for ref in self.waiting if ref() not in (None, item)]
        if before := self._last():
            self._prefetch(before)
        return tensor

    def _last(self) -> Offloaded | None:
        while self.waiting and self.waiting[-1]() is None:
            self.waiting.pop()
        return self.waiting[-1]() if self.waiting else None

    def _leave(self, item: Offloaded) -> None:
        """Give the card's memory back. The copy out began a block ago: what is queued next waits for nothing."""
        torch.cuda.current_stream(self.device).wait_event(item.copied)
        item.resident = None

    def _prefetch(self, item: Offloaded) -> None:
        if item.resident is not None:
            return
        item.resident = torch.empty(item.shape, dtype=item.dtype, device=self.device)
        self.side.wait_stream(torch.cuda.current_stream(self.device))  # its memory may just have been in use
        with torch.cuda.stream(self.side):
            for piece, host in zip(item.resident.view(-1).split(PIECE), item.pieces, strict=True):
                piece.copy_(host, non_blocking=True)
            item.copied = self.side.record_event()
