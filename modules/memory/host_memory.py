"""Page-locked host memory: what the GPU can copy from and to by itself, at full speed, while both sides go on working.

Pageable memory goes through a bounce buffer and blocks the host. PyTorch's `pin_memory=True` rounds every allocation
up to a power of two, which can double the host memory that a large model needs; registering ordinary memory does not.
"""

import weakref

import torch
from torch import Tensor


def pinned_empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised host tensor, page-locked for a CUDA `device`. RuntimeError if the system refuses so much."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    if device.type != "cuda" or tensor.nbytes == 0:
        return tensor
    address = tensor.data_ptr()
    with torch.cuda.device(device):
        error = int(torch.cuda.cudart().cudaHostRegister(address, tensor.nbytes, 0))
    if error:
        raise RuntimeError(
            f"cannot lock {tensor.nbytes / 2**30:.2f} GiB of host memory for the GPU (CUDA error {error})"
        )
    # The storage outlives this tensor as long as any view of it does.
    weakref.finalize(tensor.untyped_storage(), torch.cuda.cudart().cudaHostUnregister, address).atexit = False
    return tensor
