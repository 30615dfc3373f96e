"""Time and memory on a card, and how to keep it within a cap. On a CPU there is nothing to read or to limit."""

import gc
import time
from collections.abc import Callable
from statistics import linear_regression

import torch
from torch import Tensor, nn

from modules.memory.activation_offload import ActivationOffload
from modules.memory.plan import storage_bytes
from modules.memory.weight_streaming import StreamedWeights

GIB = 2**30
SPARE_BYTES = 64 * 2**20  # of a cap: what CUDA may yet load for itself


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(function: Callable[[], object], device: torch.device, at_least: float) -> float:
    """Mean over as many calls as take `at_least` seconds together, after a warm-up."""
    function()
    count = 1
    while True:
        synchronize(device)
        started = time.perf_counter()
        for _ in range(count):
            function()
        synchronize(device)
        seconds = time.perf_counter() - started
        if seconds >= at_least:
            return seconds / count
        count = min(100 * count, max(2 * count, int(1.2 * count * at_least / seconds)))


def outside_allocator_bytes(device: torch.device) -> int:
    """What the card shows as used beyond PyTorch's tensors: CUDA's context, its libraries, loaded kernels."""
    synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def card_gib(device: torch.device) -> float | None:
    """What the card showed as used at the peak. What CUDA has loaded stays loaded: that part is read afterwards."""
    if device.type != "cuda":
        return None
    return round((outside_allocator_bytes(device) + torch.cuda.max_memory_reserved(device)) / GIB, 3)


def limit_memory(cap_gib: float, device: torch.device) -> None:
    """Limit PyTorch to what keeps the whole card within the cap; more is an out-of-memory error."""
    if device.type != "cuda":
        return
    free_memory(device)
    allowed = cap_gib * GIB - SPARE_BYTES - outside_allocator_bytes(device)
    if allowed < torch.cuda.memory_reserved(device):
        raise torch.OutOfMemoryError(f"the model alone exceeds {cap_gib} GiB")
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), device)


def lift_limit(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def free_memory(device: torch.device) -> None:
    """Free what is no longer used, on the card and in page-locked host memory."""
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()
        # torch.accelerator's name for it is younger than torch 2.11.
        (getattr(torch.accelerator, "empty_host_cache", None) or torch._C._host_emptyCache)()


def attempt(device: torch.device, measure: Callable[..., dict], *args, **settings) -> dict:
    """The result of `measure`, or why it failed, so that one failure does not end the benchmark."""
    torch.compiler.reset()
    free_memory(device)  # what earlier measurements have left behind
    try:
        return measure(*args, **settings)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except (RuntimeError, ValueError) as error:  # ValueError: settings that this device cannot have
        return {"failed": str(error).strip().partition("\n")[0][:300]}


def host_memory(
    model: nn.Module,
    offload: ActivationOffload | None,
    streamed: StreamedWeights | None,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> dict:
    """GiB kept in host memory to save room on the card, by purpose."""
    if device.type != "cuda":
        return {"host_gib": None}
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    away = {
        "host_activations_gib": offload.host_bytes if offload else 0,
        "host_weights_gib": streamed.host_bytes if streamed else 0,
        "host_embedding_gib": storage_bytes(e) if (e := model.model.embed_tokens.weight).device.type == "cpu" else 0,
        "host_optimizer_gib": sum(t.nbytes for t in states if t.device.type == "cpu"),
    }
    away = {name: round(size / GIB, 2) for name, size in away.items()}
    return away | {"host_gib": round(sum(away.values()), 2)}


def fit_line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Least squares: (y at 0, y per x)."""
    slope, intercept = linear_regression(*zip(*points, strict=True))
    return intercept, slope
