"""Where a run computes and in which precision: the choices behind `--device auto` and `--dtype auto`, and memory."""

import os
import sys

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def pick_device(name: str) -> torch.device:
    """`auto`: a CUDA device if there is one, else Apple's GPU, else the CPU. ValueError for one that is not here."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(f"--device {name} is not available here: {reason}") from None
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on GPUs that have it, float16 on older ones (T4, V100), float32 elsewhere."""
    if name != "auto":
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def make_deterministic(on: bool) -> None:
    """`--deterministic`: only kernels that give the same bits every time; an operation without one is an error."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    if on != torch.are_deterministic_algorithms_enabled():  # setting it imports PyTorch's compiler, which takes seconds
        torch.use_deterministic_algorithms(on)


def describe_device(device: torch.device, dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if device.type == "mps":
        return f"device: Apple GPU (mps), {name}"
    if device.type != "cuda":
        return f"device: {device}, {torch.get_num_threads()} threads, {name}"
    properties = torch.cuda.get_device_properties(device)
    return f"device: {properties.name}, {properties.total_memory / 2**30:.1f} GiB, {name}"


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: of PyTorch's allocator on a GPU (on Apple's: what is held now), of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
