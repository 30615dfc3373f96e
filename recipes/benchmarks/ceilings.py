"""What this machine can do at best: matrix products, copies, attention, NF4. Each is timed by itself.

Every figure is a mean over repetitions that take `SECONDS` together, long enough for a card to settle at the clock that
it can hold. What only a GPU has (transfers, attention's two kernels) is null on a CPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from modules.attention import SequenceLayout, attend, padded_layout, use_attention
from modules.memory.plan import storage_bytes
from modules.quantization.nf4 import dequantize_nf4, quantize_nf4_tensor
from recipes.benchmarks.card import seconds_per_call, synchronize
from recipes.benchmarks.measure import Machine

SECONDS = 0.5
# [tokens, in] × [in, out], as 8B models have them, and a square one.
PRODUCTS = ((8192, 4096, 14336), (8192, 14336, 4096), (16384, 4096, 4096), (8192, 8192, 8192))
COPY_BYTES = 2 * 2**30
TRANSFER_BYTES = 2**30
# batch, tokens, query heads, key/value heads, head dim: Llama 3.1 8B and Llama 3.2 1B
ATTENTION = ((1, 8192, 32, 8, 128), (4, 2048, 32, 8, 64))
# The frozen matrices of a block of Llama 3.1 8B, [out, in]
BLOCK = {
    "q_proj": (4096, 4096),
    "k_proj": (1024, 4096),
    "v_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096),
    "up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}

SLEEP_CYCLES = 200_000_000  # a tenth of a second


class Clock:
    """Times functions on a machine, `scale` times smaller and shorter in a dry run."""

    def __init__(self, machine: Machine):
        self.machine, self.device, self.dtype = machine, machine.device, machine.dtype
        self.scale = 64 if machine.tiny else 1

    def __call__(self, function: Callable[[], object]) -> float:
        return seconds_per_call(function, self.device, SECONDS / self.scale**2)

    def back_to_back(self, function: Callable[[], object], calls: int) -> float:
        """Seconds per call on the card alone: it sleeps until the host has queued them all."""
        if not self.machine.on_cuda:
            return self(function)
        function()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1e3 / calls

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)


def matrix_products(clock: Clock) -> dict:
    """2 · m · k · n operations per second, the best of a few shapes."""
    found = {}
    for m, k, n in PRODUCTS:
        m, k, n = m // clock.scale, k // clock.scale, n // clock.scale
        x, W = clock.random(m, k), clock.random(n, k)
        out = clock.random(m, n)
        seconds = clock(lambda x=x, W=W, out=out: torch.mm(x, W.t(), out=out))
        found[f"{m}×{k}×{n}"] = round(2 * m * k * n / seconds / 1e12, 3)
    return {"matmul_tflops": max(found.values()), "matmul_tflops_by_shape": found}


def device_copy(clock: Clock) -> dict:
    """Bytes read and written per second."""
    source = torch.zeros(COPY_BYTES // clock.scale**2, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return {"copy_tb_per_s": round(2 * source.nbytes / clock(lambda: target.copy_(source)) / 1e12, 3)}


def transfers(clock: Clock) -> dict:
    """Page-locked host memory to the card, back, and both at once (the sum of both directions)."""
    names = ("host_to_device_gb_per_s", "device_to_host_gb_per_s", "both_ways_gb_per_s")
    if not clock.machine.on_cuda:
        return dict.fromkeys(names)
    host = [torch.zeros(TRANSFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    card = [torch.zeros(TRANSFER_BYTES, dtype=torch.uint8, device=clock.device) for _ in range(2)]
    up, down = torch.cuda.Stream(clock.device), torch.cuda.Stream(clock.device)
    synchronize(clock.device)  # the tensors above are filled

    def upload() -> None:
        with torch.cuda.stream(up):
            card[0].copy_(host[0], non_blocking=True)

    def download() -> None:
        with torch.cuda.stream(down):
            host[1].copy_(card[1], non_blocking=True)

    def both() -> None:
        upload()
        download()

    sizes = (TRANSFER_BYTES, TRANSFER_BYTES, 2 * TRANSFER_BYTES)
    found = [size / clock(way) / 1e9 for size, way in zip(sizes, (upload, download, both), strict=True)]
    return dict(zip(names, (round(rate, 1) for rate in found), strict=True))


def attention_kernels(clock: Clock) -> dict:
    """Causal attention: 2 · B · T² · N · H operations forward (half of all pairs), 2.5 times that backward."""
    found = {}
    for B, T, N, K, H in ATTENTION:
        T //= clock.scale
        q, k, v = (clock.random(B, T, heads, H).transpose(1, 2).requires_grad_() for heads in (N, K, K))
        layout = padded_layout(T).prepare(clock.device, clock.dtype)
        for kernel in ("flash", "cudnn") if clock.machine.on_cuda else ("default",):
            use_attention(kernel)
            try:
                forward, backward = _time_attention(clock, q, k, v, layout)
            except RuntimeError as error:  # this card or this PyTorch lacks it
                found[f"{kernel}_head_{H}_failed"] = str(error).partition("\n")[0][:200]
                continue
            operations = 2 * B * T * T * N * H
            found[f"{kernel}_head_{H}_forward"] = round(operations / forward / 1e12, 3)
            found[f"{kernel}_head_{H}_backward"] = round(2.5 * operations / backward / 1e12, 3)
    use_attention("default")
    return {"attention_tflops": found}


def _time_attention(clock: Clock, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> tuple[float, float]:
    """Seconds forward and backward."""
    out = attend(q, k, v, layout)
    dout = torch.randn_like(out)
    with torch.no_grad():
        forward = clock(lambda: attend(q, k, v, layout))
    return forward, clock(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))


def nf4(clock: Clock) -> dict:
    """Dequantising each matrix of a block, all of them in turn (no cache holds them), and quantising one."""
    rates, block = {}, []
    for name, (rows, columns) in BLOCK.items():
        dense = clock.random(rows // clock.scale, columns // clock.scale)
        weight = quantize_nf4_tensor(dense)
        block.append((weight, storage_bytes(weight) + dense.nbytes))
        seconds = clock.back_to_back(lambda weight=weight: dequantize_nf4(weight), calls=200)
        rates[name] = round(block[-1][1] / seconds / 1e12, 4)
    seconds = clock.back_to_back(lambda: [dequantize_nf4(weight) for weight, _ in block], calls=30)
    parameters = sum(weight.numel() for weight, _ in block)
    return {
        "nf4_dequantize_tb_per_s": round(sum(size for _, size in block) / seconds / 1e12, 4),
        "nf4_dequantize_tb_per_s_by_matrix": rates,
        "nf4_dequantize_ms_per_billion": round(1e3 * seconds / (parameters / 1e9), 3),
        "nf4_quantize_ms_4096x14336": round(1e3 * clock(lambda: quantize_nf4_tensor(dense)), 3),
    }


MEASUREMENTS = (matrix_products, device_copy, transfers, attention_kernels, nf4)
