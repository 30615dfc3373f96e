"""Safetensors files as we write them: the library reads the same bits, and every tensor is aligned."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from checkpointing.safetensors_file import DTYPE_NAMES, specs_of, write_safetensors


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def test_every_dtype_comes_back_bit_for_bit_and_aligned(tmp_path: Path):
    torch.manual_seed(0)
    tensors = {}
    for dtype in sorted(DTYPE_NAMES, key=lambda dtype: dtype.itemsize):  # the order that aligns least
        values = torch.randint(0, 2 if dtype == torch.bool else 256, (3, 5 * dtype.itemsize), dtype=torch.uint8)
        tensors[str(dtype)] = values.view(dtype).t()  # not contiguous
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3, dtype=torch.float16)}
    write_safetensors(tmp_path / "t.safetensors", specs_of(tensors), tensors.__getitem__)

    read = load_file(tmp_path / "t.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape, name
        assert bits(read[name]) == bits(tensor), name
    content = (tmp_path / "t.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8 : 8 + size]).items():
        if name != "__metadata__":
            assert (8 + size + entry["data_offsets"][0]) % tensors[name].itemsize == 0, name
    with safe_open(tmp_path / "t.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers asks for it


def test_tensors_are_read_one_at_a_time(tmp_path: Path):
    specs = [(f"w{i}", (1000, 1000), torch.float32) for i in range(3)]
    sizes = []

    def read(name: str) -> torch.Tensor:
        sizes.append((tmp_path / "t.safetensors").stat().st_size)
        return torch.full((1000, 1000), float(name[1]))

    write_safetensors(tmp_path / "t.safetensors", specs, read)
    assert [size // 4_000_000 for size in sizes] == [0, 1, 2]  # what was read before is on its way to the disk
    assert load_file(tmp_path / "t.safetensors")["w2"].unique().tolist() == [2.0]


def test_what_the_format_lacks_is_an_error_before_anything_is_written(tmp_path: Path):
    tensors = {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.complex64)}
    with pytest.raises(ValueError, match="^b: a tensor of torch.complex64 cannot be kept"):
        write_safetensors(tmp_path / "t.safetensors", specs_of(tensors), tensors.__getitem__)
    assert not list(tmp_path.iterdir())
