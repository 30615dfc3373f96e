"""Weights out: a folder that transformers, vLLM, llama.cpp's converter and lm-eval open with no step in between.

Tensors are written one at a time, so exporting needs no second copy of the model. The safetensors format is short
enough to write by hand: eight bytes with the header's length, a JSON header with dtype, shape and byte range of every
tensor, then the bytes.
"""

import ctypes
import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpointing.pretrained import COMPANIONS, INDEX, WEIGHTS

SHARD_BYTES = 5 * 10**9
DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}

Spec = tuple[str, tuple[int, ...], torch.dtype]  # name, shape, dtype


def save_model(folder: Path, model: nn.Module, *, config: dict, source: Path, chat_template: str | None = None) -> None:
    """Write a model as a Hugging Face folder; a tied head is written once. Write into an `atomic_folder`."""
    tensors = dict(model.named_parameters())  # leaves second names of tied parameters out
    specs = [(name, tuple(p.shape), p.dtype) for name, p in tensors.items()]
    write_weights(folder, specs, lambda name: tensors[name].detach())
    write_companions(folder, config, source, dtype=specs[0][2], chat_template=chat_template)


def write_weights(folder: Path, specs: Iterable[Spec], read: Callable[[str], Tensor]) -> None:
    """Write `read(name)` for every spec, in shards of at most 5 GB with an index if one file does not hold them."""
    shards: list[list[Spec]] = [[]]
    room = SHARD_BYTES
    for spec in specs:
        if shards[-1] and _bytes(spec) > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(spec)
        room -= _bytes(spec)
    total = sum(_bytes(spec) for shard in shards for spec in shard)
    if len(shards) == 1:
        write_safetensors(folder / WEIGHTS, shards[0], read)
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, read)
        weight_map |= {spec[0]: name for spec in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def write_safetensors(path: Path, specs: list[Spec], read: Callable[[str], Tensor]) -> None:
    """One safetensors file, tensor by tensor."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape, dtype in specs:
        end = offset + _bytes((name, shape, dtype))
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of eight bytes
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape, dtype in specs:
            tensor = read(name).detach().to("cpu").contiguous()
            assert tensor.shape == shape and tensor.dtype == dtype, (name, tensor.shape, tensor.dtype)
            if tensor.numel():
                file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))


def write_companions(
    folder: Path, config: dict, source: Path, *, dtype: torch.dtype, chat_template: str | None = None
) -> None:
    """config.json (with the weights' dtype), and generation config, tokenizer and template files as the source has them.

    `chat_template`, if given, is written where the source has none.
    """
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    config = config | {key: str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if chat_template is not None and not (folder / "chat_template.jinja").exists():
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def check_export(folder: Path, tensor_bytes: int) -> None:
    """Fail now rather than after the training: `folder`'s disk must take the result. Raises ValueError."""
    free = shutil.disk_usage(folder).free
    if free < 1.1 * tensor_bytes:
        raise ValueError(
            f"{folder} has {free / 1e9:.1f} GB free, the result needs {tensor_bytes / 1e9:.1f} GB: "
            "choose another --output or make room"
        )


def _bytes(spec: Spec) -> int:
    return math.prod(spec[1]) * spec[2].itemsize
