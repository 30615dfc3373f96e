"""Weights out: a folder that transformers, vLLM, llama.cpp's converter and lm-eval open with no step in between.

Tensors are written one at a time, so exporting needs no second copy of the model.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpointing.pretrained import COMPANIONS, INDEX, WEIGHTS, WeightFiles, matches, on_disk
from checkpointing.safetensors_file import Spec, spec_bytes, specs_of, write_safetensors

SHARD_BYTES = 5 * 10**9


def save_model(folder: Path, model: nn.Module, *, config: dict, source: Path, chat_template: str | None = None) -> None:
    """Write a model as a Hugging Face folder, with the parameter names of the checkpoint that it was loaded from.

    A tied head is written once, unless it or the embedding has an adapter: then they differ, and config.json says so.
    """
    prefixes = model.names_on_disk[0] if model.names_read is None else model.names_read
    weights = WeightFiles(source) if model.names_read is not None else None
    plain = plain_parameters(model, None if weights is None else lambda name: weights.read(on_disk(name, prefixes)))
    tied = any(part.get("tie_word_embeddings") for part in (config, config.get("text_config", {})))
    if tied and "lm_head.weight" in plain:
        config = changed(config, tie_word_embeddings=False)
    specs = [(on_disk(name, prefixes), tuple(like.shape), like.dtype) for name, (like, _) in plain.items()]
    reads = {on_disk(name, prefixes): read for name, (_, read) in plain.items()}
    if model.unread and weights is not None:  # the half that was not loaded goes along as it was
        rest = {name: weights.read(name) for name in weights.names() if matches(name, model.unread)}
        specs += specs_of(rest)
        reads |= {name: (lambda tensor=tensor: tensor) for name, tensor in rest.items()}
    write_weights(folder, specs, lambda name: reads[name]())
    write_companions(folder, config, source, dtype=specs[0][2], chat_template=chat_template)


def plain_parameters(
    model: nn.Module, original: Callable[[str], Tensor] | None
) -> dict[str, tuple[Tensor, Callable[[], Tensor]]]:
    """Each parameter that the model would have without adapters and quantisation: one like it, and how to make it.

    Adapters are merged. Other quantised weights are frozen: `original(name)` reads them from the checkpoint; without it
    they are dequantised. Second names of tied ones are left out, unless an adapter makes them differ.
    """
    layers = dict(model.named_modules())
    adapted = [f"{path}." for path, layer in layers.items() if hasattr(layer, "merged")]
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    plain = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        layer, owner = layers[path], layers[first[id(parameter)].rpartition(".")[0]]
        if name != first[id(parameter)] and not (hasattr(layer, "merged") or hasattr(owner, "merged")):
            continue
        own = hasattr(layer, "merged") and leaf not in ("weight", "bias")
        if own or path.startswith(tuple(adapted)):
            continue  # an adapter's own
        if hasattr(layer, "merged") and leaf == "weight":
            plain[name] = parameter, (lambda layer=layer: layer.merged().weight)
        elif hasattr(layer, "dense_weight") and leaf == "weight":
            dtype = parameter.dtype
            read = partial(original, name) if original else layer.dense_weight
            plain[name] = parameter, (lambda read=read, dtype=dtype: read().to(dtype))
        else:
            plain[name] = parameter, (lambda parameter=parameter: parameter)
    return plain


def changed(config: dict, **values) -> dict:
    """config.json with other values; in a vision-language model's, also for the language model."""
    inner = {"text_config": config["text_config"] | values} if "text_config" in config else {}
    return config | values | inner


def write_weights(folder: Path, specs: Iterable[Spec], read: Callable[[str], Tensor]) -> None:
    """Write `read(name)` for every spec, in files of up to 5 GB; more than one file gets an index."""
    shards: list[list[Spec]] = [[]]
    room = SHARD_BYTES
    for spec in specs:
        if shards[-1] and spec_bytes(spec) > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(spec)
        room -= spec_bytes(spec)
    total = sum(spec_bytes(spec) for shard in shards for spec in shard)
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


def write_companions(
    folder: Path, config: dict, source: Path, *, dtype: torch.dtype, chat_template: str | None = None
) -> None:
    """config.json, with the weights' dtype, and the source's COMPANIONS, with `chat_template` if it is given."""
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    config = config | {key: str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def check_export(folder: Path, tensor_bytes: int) -> None:
    """Raise ValueError if `folder`'s disk has no room for the result: now rather than after the training."""
    free = shutil.disk_usage(folder).free
    if free < 1.1 * tensor_bytes:
        raise ValueError(
            f"{folder} has {free / 1e9:.1f} GB free, the result needs {tensor_bytes / 1e9:.1f} GB: "
            "choose another --output or make room"
        )
