"""Writing safetensors files: eight bytes with the header's length, a JSON header that says the dtype, shape and byte
range of every tensor, then the bytes.

The library's own `save_file` needs NumPy, and all tensors in host memory at once. Reading is the library's part.
"""

import ctypes
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpointing.atomic import name_the_file

DTYPE_NAMES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL"},
}

Spec = tuple[str, tuple[int, ...], torch.dtype]  # name, shape, dtype


def specs_of(tensors: dict[str, Tensor]) -> list[Spec]:
    return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def spec_bytes(spec: Spec) -> int:
    _, shape, dtype = spec
    return math.prod(shape) * dtype.itemsize


def open_safetensors(path: Path):
    """`safetensors.safe_open` with a ValueError for a damaged file; one that may not be read stays an OSError."""
    try:
        path.open("rb").close()
        return safe_open(path, framework="pt")
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path} is missing, truncated or damaged ({error}); download or copy it again") from None


def write_safetensors(path: Path, specs: Iterable[Spec], read: Callable[[str], Tensor], **metadata: str) -> None:
    """Write `read(name)` for every spec; host memory: one tensor. Write into an `atomic_folder`.

    `metadata` goes into the header. ValueError, before anything is written, for a dtype that the format lacks.
    """
    # Wide dtypes first: then every tensor begins at a multiple of its item size, which readers rely on.
    specs = sorted(specs, key=lambda spec: -spec[2].itemsize)
    header, end = {"__metadata__": {"format": "pt", **metadata}}, 0
    for name, shape, dtype in specs:
        if dtype not in DTYPE_NAMES:
            raise ValueError(f"{name}: a tensor of {dtype} cannot be kept in a safetensors file")
        begin, end = end, end + spec_bytes((name, shape, dtype))
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with name_the_file(path), open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape, dtype in specs:
            tensor = read(name).detach().cpu().contiguous()
            assert tensor.shape == shape and tensor.dtype == dtype, (name, tensor.shape, tensor.dtype)
            if tensor.nbytes:
                file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
