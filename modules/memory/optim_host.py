"""AdamW whose two moments live in host memory: none on the card, 8 bytes per parameter on the host.

The arithmetic stays on the card. The moments are uploaded, updated and downloaded in chunks. Each of the three has its
own stream, so they overlap:

    upload      m₀ v₀ | m₁ v₁ | m₂ v₂ | …
    compute             p₀    | p₁    | p₂    | …
    download                    m₀ v₀ | m₁ v₁ | …

PCIe works in both directions at once, so a step takes as long as one copy of 8 bytes per parameter (H200, PCIe 5, 268 M
parameters: 44 ms, of which the copies alone take 43). The card holds 0.2 GiB of buffers for any model. On the CPU the
chunks are updated in place.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from modules.adamw import adamw_update
from modules.memory.host_memory import pinned_empty

CHUNK = 1 << 22  # elements, 16 MiB per moment: the copy takes longer than launching the update's dozen kernels
BUFFERS = 3  # one arriving, one being computed, one leaving


class HostAdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) with float32 moments in page-locked host memory; all parameters on one device.

    RuntimeError if the system does not lock that much. bfloat16 parameters are rounded stochastically.
    """

    def __init__(
        self, params, lr: float, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0, chunk: int = CHUNK
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        parameters = [p for group in self.param_groups for p in group["params"]]
        (device,) = {p.device for p in parameters}
        self.chunk = chunk
        self.card = CardBuffers(chunk, device) if device.type == "cuda" else None
        # One block for all: memory is locked in pages, which small tensors would have to share.
        sizes = [p.numel() for p in parameters]
        moments = pinned_empty(2, sum(sizes), dtype=torch.float32, device=device).zero_()
        for p, m, v in zip(parameters, moments[0].split(sizes), moments[1].split(sizes), strict=True):
            self.state[p] = {"step": torch.zeros(()), "exp_avg": m.view(p.shape), "exp_avg_sq": v.view(p.shape)}

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Returns before the last moments have arrived: synchronise the device before reading them on the host."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] += 1
                moments = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
                tensors = p.detach().view(-1), p.grad.reshape(-1), *moments
                for weight, grad, m, v in zip(*(t.split(self.chunk) for t in tensors), strict=True):
                    with self._on_card(m, v) as (m, v):
                        adamw_update(weight, grad, m, v, state["step"].item(), group)

    def _on_card(self, m: Tensor, v: Tensor) -> AbstractContextManager[tuple[Tensor, Tensor]]:
        return self.card.lend(m, v) if self.card else nullcontext((m, v))


class CardBuffers:
    """Room on the card for a few chunks of both moments, and the streams that fill and empty it.

    The buffers are never freed: the allocator could give their memory away while a copy still reads it.
    """

    def __init__(self, chunk: int, device: torch.device):
        self.buffers = torch.empty(BUFFERS, 2, chunk, dtype=torch.float32, device=device)
        self.upload, self.download = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.upload.wait_stream(torch.cuda.current_stream(device))  # which may still use this memory's last content
        self.turn = 0
        # Before a buffer is refilled, or a chunk fetched in the next step, its last download must be over.
        self.emptied, self.returned = defaultdict(torch.cuda.Event), defaultdict(torch.cuda.Event)

    @contextmanager
    def lend(self, m: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """A chunk's moments [n] on the card, for the current stream to update; they travel back afterwards."""
        turn, address = self.turn % BUFFERS, m.data_ptr()
        self.turn += 1
        m_card, v_card = self.buffers[turn, :, : m.numel()]
        compute = torch.cuda.current_stream(m_card.device)

        with torch.cuda.stream(self.upload):
            self.upload.wait_event(self.emptied[turn])
            self.upload.wait_event(self.returned[address])
            m_card.copy_(m, non_blocking=True)
            v_card.copy_(v, non_blocking=True)
        compute.wait_stream(self.upload)
        yield m_card, v_card
        self.download.wait_stream(compute)
        with torch.cuda.stream(self.download):
            m.copy_(m_card, non_blocking=True)
            v.copy_(v_card, non_blocking=True)
        self.emptied[turn] = self.returned[address] = self.download.record_event()
