"""Pretrained weights in: from a local folder or the Hugging Face Hub, tensor by tensor, onto the device.

The model is built on the meta device, so it has shapes but no memory. Each tensor is then read from a memory-mapped
safetensors file, cast, quantised if its layer is, and placed: the host never holds more than one tensor, the device
never holds a dense copy of a quantised model. Only safetensors and JSON are read; a checkpoint never runs code.

Parameter names are those that transformers has in memory. Some folders have others: a model's `names_on_disk` lists
tables of prefixes, ours → theirs. The one that fits a folder is kept in `model.names_read`, so that saving writes the
names that were read. A model's `unread` names what it leaves out.
"""

import fnmatch
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpointing.safetensors_file import open_safetensors
from data import json_rows

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# All other files of a checkpoint; `write_companions` copies them on export.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
)
# Buffers that old exports saved and that follow from the config.
IGNORED = ("*.rotary_emb.inv_freq", "*.position_ids")
MAPPED_BYTES = 256 * 2**20  # read through a mapping, then it is closed: until then they count as memory in use


def find_checkpoint(name: str | Path) -> Path:
    """A local folder, or the Hub's cache of a Hub id (ORG/NAME or ORG/NAME@REVISION). ValueError for neither."""
    folder = Path(name).expanduser()
    if folder.suffix == ".gguf" or (folder.is_dir() and not any(folder.glob("*.json")) and any(folder.glob("*.gguf"))):
        convert = "AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME).save_pretrained(OUT)"
        fix = f"convert it with transformers: {convert}, and the tokenizer likewise with AutoTokenizer"
        raise ValueError(f"--model {name} is a GGUF file; expected a Hugging Face folder: {fix}")
    if folder.is_dir():
        return folder
    repo, _, revision = str(name).partition("@")
    if folder.exists() or repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"--model {name} {what}, and is not a Hub id such as meta-llama/Llama-3.2-1B")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["config.json", "model*.safetensors", INDEX, *COMPANIONS]
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"--model {name} is no local folder, and the Hub did not provide it: {reason}") from None


def read_config(folder: Path) -> dict:
    """config.json as a dict; ValueError if it is missing, unreadable, or the weights in it are already quantised."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(f"{folder} is an adapter: give it as --adapter, and its base as --model")
        if (folder / "run.json").is_file():
            results = [str(folder / name) for name in ("model", "adapter") if (folder / name).is_dir()]
            raise ValueError(f"{folder} is a run's output folder; its result is {' and '.join(results) or 'missing'}")
    config = read_json(folder / "config.json")
    if method := config.get("quantization_config"):
        kind = method.get("quant_method", "unknown")
        raise ValueError(f"{folder} holds weights quantised by {kind!r}; start from the unquantised checkpoint")
    return config


def read_json(path: Path) -> dict:
    """A JSON object from a file; ValueError naming the file if it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: {path.parent} is not a complete checkpoint folder")
    return json_rows.read_json(path)


class WeightFiles:
    """The tensors of a checkpoint folder by name, single-file or sharded, each read when asked for."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.files: dict[str, Path] = {}  # tensor name -> file
        self._mapped: tuple[Path | None, Any] = (None, None)  # one file at a time
        self._mapped_bytes = 0  # read through it
        for file in self._shards():
            for name in open_safetensors(file).keys():
                self.files[name] = file

    def _shards(self) -> list[Path]:
        if (index := self.folder / INDEX).is_file():
            shards = [self.folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
            if missing := [shard.name for shard in shards if not shard.is_file()]:
                raise ValueError(f"{index} names shards that are missing: {', '.join(missing)}; download them again")
            return shards
        if (self.folder / WEIGHTS).is_file():
            return [self.folder / WEIGHTS]
        hint = ""
        if list(self.folder.glob("*.bin")) or list(self.folder.glob("*.pt*")):
            hint = "; it holds pickled weights, which are not read: save them as safetensors first"
        raise ValueError(f"{self.folder} holds no {WEIGHTS} and no {INDEX}{hint}")

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def names(self) -> list[str]:
        """Every tensor's name, in the order of the files."""
        return list(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle(name).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, memory-mapped."""
        tensor = self._handle(name).get_tensor(name)
        self._mapped_bytes += tensor.nbytes
        return tensor

    def close(self) -> None:
        """Give back the memory of tensors that are not used any more; the next read opens the file again."""
        self._mapped, self._mapped_bytes = (None, None), 0

    def _handle(self, name: str):
        if self._mapped[0] != self.files[name] or self._mapped_bytes > MAPPED_BYTES:
            self.close()
            self._mapped = (self.files[name], open_safetensors(self.files[name]))
        return self._mapped[1]

    def fingerprint(self) -> str:
        """A hash of every file's name, size and header, and of 4 KiB at each of 256 places: quick on any model."""
        digest = hashlib.sha256()
        for file in sorted(set(self.files.values())):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with open(file, "rb") as stream:
                header = int.from_bytes(stream.read(8), "little")
                digest.update(stream.read(header))
                for offset in range(stream.tell(), size, max(4096, size // 256)):
                    stream.seek(offset)
                    digest.update(stream.read(4096))
        return digest.hexdigest()


def load_weights(
    model: nn.Module,
    weights: WeightFiles,
    *,
    device: torch.device,
    dtype: torch.dtype,
    placed: Callable[[str], None] | None = None,
) -> None:
    """Fill a model built on the meta device, one tensor at a time, each cast to `dtype` and placed on `device`.

    Strict: see `check_names`. Layers with a `pack_weight` method (NF4Linear) store what it returns. `placed(name)` is
    called after each tensor, in the model's order (`StreamedWeights.take`).
    """
    model.names_read = check_names(model, weights)
    # In the model's order, not the files': one block is complete before the next one begins.
    names = [name for name, _ in model.named_parameters()]  # a tied head is filled through the embedding
    for name in tqdm(names, desc="loading", unit="tensor", leave=False, delay=1.0):
        source = on_disk(name, model.names_read)
        tensor = weights.read(source)
        if not tensor.is_floating_point():
            raise ValueError(f"{weights.files[source]}: {source} has dtype {tensor.dtype}, expected floating point")
        put_weight(model, name, tensor.to(device=device, dtype=dtype, copy=True))
        if placed is not None:
            placed(name)
    model.tie_weights()
    weights.close()


def map_weights(model: nn.Module, weights: WeightFiles) -> None:
    """Fill a model on the meta device with the files' tensors, memory-mapped and in their own dtype. Strict.

    For code that takes the weights one by one: what is not used is not read.
    """
    model.names_read = check_names(model, weights)
    for name, _ in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        tensor = weights.read(on_disk(name, model.names_read))
        setattr(model.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))
    model.tie_weights()


def on_disk(name: str, prefixes: dict[str, str]) -> str:
    """A parameter's name in files that call our prefixes so."""
    for ours, theirs in prefixes.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def check_names(model: nn.Module, weights: WeightFiles) -> dict[str, str]:
    """Compare a checkpoint with a model; one ValueError lists every name missing, unused or of another shape.

    Returns which of `names_on_disk` fits. The second name of a tied parameter is optional on disk.
    """
    names = [name for name, _ in model.named_parameters()]
    prefixes = max(model.names_on_disk, key=lambda prefixes: sum(on_disk(name, prefixes) in weights for name in names))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    expected = {on_disk(name, prefixes): shape for name, shape in shapes.items()}
    missing = [there for name in names if (there := on_disk(name, prefixes)) not in weights]
    unused = [name for name in weights.names() if name not in expected and not matches(name, IGNORED + model.unread)]
    misshaped = [
        f"{name}: {weights.shape(name)}, expected {shape}"
        for name, shape in expected.items()
        if name in weights and weights.shape(name) != shape
    ]
    if missing or unused or misshaped:
        parts = [("missing", missing), ("not used by this model", unused), ("of another shape", misshaped)]
        listed = "; ".join(f"{len(names)} {what}: {', '.join(names)}" for what, names in parts if names)
        raise ValueError(f"the weights in {weights.folder} do not fit its config.json: {listed}")
    return prefixes


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def put_weight(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter `name`, in the form in which its layer stores weights."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf == "weight" and hasattr(module, "pack_weight"):
        tensor = module.pack_weight(tensor)
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=getattr(module, leaf).requires_grad))
