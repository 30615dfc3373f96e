"""Reading and writing adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

Each method says what they hold (`export` and `load`, see modules/adapters/methods/).
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpointing.pretrained import read_json
from checkpointing.safetensors_file import open_safetensors, specs_of, write_safetensors
from modules.adapters import token_rows, whole_modules
from modules.adapters.lora_peft import read_layers
from modules.adapters.methods import find_method, method_of
from modules.adapters.vocabulary import fit_vocabulary

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(
    folder: Path, model: nn.Module, *, base: str, chat_template: str | None = None, task_type: str = "CAUSAL_LM"
) -> None:
    """Write what the model's method (`model.method`, LoRA if it has none) trained, over `base`."""
    fields, tensors = find_method(getattr(model, "method", "lora")).export(model)
    for extra in (whole_modules, token_rows):
        more_fields, more_tensors = extra.export(model)
        fields, tensors = fields | more_fields, tensors | more_tensors
    write_adapter(folder, fields | {"task_type": task_type}, tensors, base=base)
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def write_adapter(folder: Path, fields: dict, tensors: dict[str, Tensor], *, base: str) -> None:
    """The two files, from what a method's `export` returns."""
    config = {"base_model_name_or_path": base, "task_type": "CAUSAL_LM", "inference_mode": True} | fields
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / TENSORS, specs_of(tensors), tensors.__getitem__)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(
    model: nn.Module, folder: Path, *, dtype: torch.dtype = torch.float32, method: str | None = None
) -> list[str]:
    """Add a saved adapter to a model that has none; returns the names of the modules that it changed.

    The folder's config says which method it is. Some save plain LoRAs (LoRA+, LoRA-FA): `method` reads it as one of
    those, to train on. Raises ValueError for damaged files and for adapters that do not fit the model.
    """
    config, tensors = read_folder(folder)
    with _explained(folder):
        method = method or method_of(config)
        indices = token_rows.find_saved(config)
        others = fit_vocabulary(model, tensors, rows=1 + max((i for ids in indices.values() for i in ids), default=-1))
        whole = whole_modules.find_saved(model, config, tensors)
        others |= {key for keys in whole.values() for key in keys}
        # Of a resized vocabulary peft saves the same matrices a second and third time.
        copies = (token_rows.KEY, ".modules_to_save.weight", ".original_module.weight")
        others |= {key for key in tensors if key.endswith(copies)}
        own = {key: tensor for key, tensor in tensors.items() if key not in others}
        plain = config | {"modules_to_save": None, "trainable_token_indices": None}
        names = find_method(method).load(model, plain, own, dtype)
        names += whole_modules.load(model, whole, tensors)
        names += token_rows.load(model, indices, tensors, dtype)
    model.method = method
    return names


def read_adapter(folder: Path) -> tuple[dict[str, dict], dict[str, Tensor]]:
    """A LoRA folder as (settings, tensors): per module name `rank` and `alpha`, and `lora_A`/`lora_B` tensors by
    `<module>.lora_A.weight`. Raises ValueError for other methods and for damaged files.
    """
    config, tensors = read_folder(folder)
    with _explained(folder):
        return read_layers(config, tensors)


def count_virtual_tokens(folder: Path | None) -> int:
    """Virtual tokens that rows begin with for this adapter (virtual_tokens.py); 0 without an adapter."""
    return read_folder(folder)[0].get("num_virtual_tokens", 0) if folder else 0


def read_folder(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """adapter_config.json, and the tensors by PEFT's name."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"--adapter {folder} is not a folder")
    if not (folder / CONFIG).is_file():
        hint = f"; did you mean {folder / 'adapter'}?" if (folder / "adapter" / CONFIG).is_file() else ""
        raise ValueError(f"--adapter {folder} holds no {CONFIG}{hint}")
    config = read_json(folder / CONFIG)
    with open_safetensors(folder / TENSORS) as file:
        return config, {key: file.get_tensor(key) for key in file.keys()}


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Every error says which adapter it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"--adapter {folder}: {error}") from None
