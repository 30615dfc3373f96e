"""Training state: what a run needs, in addition to the base model, to go on as if it had never stopped.

A checkpoint folder holds safetensors and JSON, no pickles, so opening a stranger's checkpoint runs no code:

    weights.safetensors    the trainable parameters, by name
    optimizer.safetensors  the optimizer's tensors, by "<state name>:<parameter name>"
    rng.safetensors        the random number generators: Python's, the CPU's, every CUDA device's
    state.json             the caller's progress, optimizer options, and the structure of the tensors above, whose
                           files carry its digest: files of two checkpoints are not mixed

A tensor subclass (8-bit optimizer states, NF4) is stored as its inner tensors, ".../codes", ".../scale" and so on;
state.json names the class.
"""

import hashlib
import json
import math
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from checkpointing.atomic import atomic_folder
from checkpointing.pretrained import read_json
from checkpointing.safetensors_file import DTYPE_NAMES, open_safetensors, specs_of, write_safetensors

FORMAT = 1
STATE, WEIGHTS, OPTIMIZER, RNG = "state.json", "weights.safetensors", "optimizer.safetensors", "rng.safetensors"
# Not restored: the kernel of the step is this machine's choice.
KERNEL_OPTIONS = ("foreach", "fused", "capturable")


def save_training_state(
    folder: Path, *, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, progress: dict, scaler=None
) -> None:
    """Write a checkpoint folder, complete or not at all.

    `parameters`: the trainable ones by name. `progress` is the caller's own (step, position in the data, config …), of
    JSON's types, tuples, dtypes, and paths, which come back as strings. Raises ValueError for what cannot be stored.
    """
    weights, states = {}, {}
    for name, parameter in parameters.items():
        _encode(parameter, name, weights)
    description = {
        "format": FORMAT,
        "progress": _encode(progress, "progress"),
        "scaler": _encode(_scaler_state(scaler), "scaler"),
        "optimizer": _encode_optimizer(optimizer, parameters, states),
    }
    with atomic_folder(folder) as partial:
        for name, tensors in ((WEIGHTS, weights), (OPTIMIZER, states), (RNG, _random_states())):
            write_safetensors(partial / name, specs_of(tensors), tensors.__getitem__, state=_digest(description))
        (partial / STATE).write_text(json.dumps(description, indent=1, allow_nan=False), encoding="utf-8")


def load_training_state(
    folder: Path, *, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, scaler=None
) -> dict:
    """Restore parameters, optimizer, scaler and random number generators, bit for bit; returns `progress`.

    Give an optimizer that has not stepped: what it already holds must be in the checkpoint, the rest of its state is
    made. Everything is checked first: one ValueError names all that is missing, unused or of another shape or dtype.
    """
    folder = Path(folder)
    saved = read_json(folder / STATE)
    if saved.get("format") != FORMAT:
        raise ValueError(f"{folder / STATE} has format {saved.get('format')!r}, expected {FORMAT}")
    weights, states = {}, {}
    for name, parameter in parameters.items():
        _encode(parameter, name, weights)
    here = _encode_optimizer(optimizer, parameters, states)
    with ExitStack() as stack, _explained(folder), torch.no_grad():
        files = {name: stack.enter_context(open_safetensors(folder / name)) for name in (WEIGHTS, OPTIMIZER, RNG)}
        problems = _compare_tensors(WEIGHTS, files[WEIGHTS], weights, set(weights))
        problems += _compare_tensors(OPTIMIZER, files[OPTIMIZER], states, set(_tensor_names(saved["optimizer"])))
        problems += _compare_optimizers(saved["optimizer"], here)
        if (saved["scaler"] is None) != (_scaler_state(scaler) is None):
            problems.append(f"loss scaler: {'none' if saved['scaler'] is None else 'one'} in the checkpoint")
        if problems:
            raise ValueError("it does not fit this run:\n  " + "\n  ".join(problems))
        progress, scaler_state = _decode(saved["progress"]), _decode(saved["scaler"])
        random_states = {name: files[RNG].get_tensor(name).clone() for name in files[RNG].keys()}
        new = _decode_optimizer(saved["optimizer"], optimizer, parameters, states, files[OPTIMIZER])
        _check_saved_together(_digest(saved), files)

        for live, file in ((weights, files[WEIGHTS]), (states, files[OPTIMIZER])):
            for name, tensor in live.items():
                tensor.copy_(file.get_tensor(name))
        for place, name, value in new:
            place[name] = value
        if scaler_state is not None:
            scaler.load_state_dict(scaler_state)
        _set_random_states(random_states)
    return progress


def _digest(description: dict) -> str:
    """The digest of state.json that the tensor files carry in their headers."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _check_saved_together(digest: str, files: dict) -> None:
    # Earlier versions wrote no digest.
    others = [name for name, file in files.items() if (file.metadata() or {}).get("state", digest) != digest]
    if others:
        what = f"{STATE} has changed since" if len(others) == 3 else f"{', '.join(others)}: from another checkpoint"
        raise ValueError(f"{what}; expected the files as they were saved together: resume from another checkpoint")


# The optimizer: parameter groups and their options, then for each parameter its state.


def _encode_optimizer(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict) -> dict:
    names = {id(parameter): name for name, parameter in parameters.items()}
    held = [p for group in optimizer.param_groups for p in group["params"]] + list(optimizer.state)
    if nameless := [tuple(p.shape) for p in held if id(p) not in names]:
        raise ValueError(f"the optimizer holds parameters without a name among `parameters`, of shapes {nameless}")
    for device in {p.device for p in held if p.is_cuda}:
        torch.cuda.synchronize(device)  # offloaded state may still be on its way to host memory
    groups, states, on_host = [], {}, []
    for i, group in enumerate(optimizer.param_groups):
        options = {k: _encode(v, f"{k}:group {i}", tensors) for k, v in group.items() if k != "params"}
        groups.append({"params": [names[id(p)] for p in group["params"]], "options": options})
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        states[name] = {k: _encode(v, f"{k}:{name}", tensors) for k, v in state.items()}
        leaves = [leaf for node in states[name].values() for leaf in _tensor_names(node)]
        # Offloaded state stays in host memory, as do the step counts of AdamW's unfused kernels.
        if parameter.device.type != "cpu":
            on_host += [leaf for leaf in leaves if tensors[leaf].device.type == "cpu"]
    return {"class": type(optimizer).__name__, "groups": groups, "state": states, "on_host": on_host}


def _decode_optimizer(saved: dict, optimizer, parameters: dict[str, nn.Parameter], live: dict, file) -> list[tuple]:
    """What the optimizer lacks, as (dictionary, key, value); tensors in `live` are left for the caller to fill."""
    entries = []
    for group, there in zip(optimizer.param_groups, saved["groups"], strict=True):
        entries += [(group, k, node, "cpu") for k, node in there["options"].items() if k not in KERNEL_OPTIONS]
    for name, state in saved["state"].items():
        parameter = parameters[name]
        entries += [(optimizer.state[parameter], k, node, parameter.device) for k, node in state.items()]
    on_host, new = set(saved["on_host"]), []
    for place, key, node, device in entries:
        names = set(_tensor_names(node))
        if not names or not names <= live.keys():
            read = {n: file.get_tensor(n).to("cpu" if n in on_host else device, copy=True) for n in names}
            new.append((place, key, _decode(node, read)))
    return new


def _compare_optimizers(saved: dict, here: dict) -> list[str]:
    problems = []
    if saved["class"] != here["class"]:
        problems.append(f"optimizer: {saved['class']} in the checkpoint, {here['class']} here")
    if len(saved["groups"]) != len(here["groups"]):
        return problems + [f"parameter groups: {len(saved['groups'])} saved, {len(here['groups'])} here"]
    for i, (there, group) in enumerate(zip(saved["groups"], here["groups"], strict=True)):
        if difference := sorted(set(there["params"]) ^ set(group["params"])):
            problems.append(f"parameter group {i}: only on one side: {', '.join(difference)}")
    return problems


# Python values as JSON. What JSON lacks is an object with one key that begins with "$".


def _encode(value: Any, key: str, tensors: dict[str, Tensor] | None = None) -> Any:
    """`value` for state.json; its plain tensors are collected in `tensors`, under names that begin with `key`."""
    if isinstance(value, Tensor) and tensors is not None:
        if not hasattr(value, "__tensor_flatten__"):
            tensors[key] = value
            return {"$tensor": key}
        names, context = value.__tensor_flatten__()
        try:
            context = _encode(context, key)
        except ValueError:  # then it can be filled, but not made
            context = {"$unknown": type(context).__name__}
        return {
            "$class": f"{type(value).__module__}.{type(value).__qualname__}",
            "inner": {name: _encode(getattr(value, name), f"{key}/{name}", tensors) for name in names},
            "context": context,
            "size": [list(value.shape), list(value.stride())],
        }
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if type(value) is list:
        return [_encode(item, f"{key}/{i}", tensors) for i, item in enumerate(value)]
    if type(value) in (tuple, torch.Size):
        return {"$tuple": [_encode(item, f"{key}/{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, dict) and all(isinstance(name, str) and not name.startswith("$") for name in value):
        return {name: _encode(item, f"{key}/{name}", tensors) for name, item in value.items()}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Path):
        return str(value)
    raise ValueError(f"{key}: a {type(value).__name__} ({value!r:.80}) cannot be kept in a checkpoint")


def _decode(node: Any, tensors: dict[str, Tensor] | None = None) -> Any:
    if isinstance(node, list):
        return [_decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    if "$tensor" in node:
        return tensors[node["$tensor"]]
    if "$class" in node:
        inner = {name: _decode(item, tensors) for name, item in node["inner"].items()}
        size, stride = node["size"]
        context = _decode(node["context"])
        return _tensor_class(node["$class"]).__tensor_unflatten__(inner, context, torch.Size(size), tuple(stride))
    if "$float" in node:
        return float(node["$float"])
    if "$tuple" in node:
        return tuple(_decode(item, tensors) for item in node["$tuple"])
    if "$dtype" in node:
        return {str(dtype): dtype for dtype in DTYPE_NAMES}[f"torch.{node['$dtype']}"]
    if "$unknown" in node:
        raise ValueError(f"a tensor's {node['$unknown']} was not stored; make this state before loading")
    return {name: _decode(item, tensors) for name, item in node.items()}


def _tensor_class(name: str) -> type:
    """A class that state.json names: only torchao's, and only one that this process has imported already."""
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module), attribute, None) if module.startswith("torchao.") else None
    if not (isinstance(found, type) and issubclass(found, Tensor)):
        raise ValueError(f"{STATE} asks for the tensor class {name}, which this run's optimizer does not use")
    return found


def _tensor_names(node: Any) -> Iterator[str]:
    if isinstance(node, dict) and "$tensor" in node:
        yield node["$tensor"]
    elif isinstance(node, dict | list):
        for item in node.values() if isinstance(node, dict) else node:
            yield from _tensor_names(item)


# Files.


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Every error says which checkpoint it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"checkpoint {folder}: {error}") from None
    except (KeyError, TypeError, AttributeError, IndexError, SafetensorError) as error:
        raise ValueError(f"checkpoint {folder}: {STATE} is not what this version writes ({error!r})") from None


def _compare_tensors(title: str, file, live: dict[str, Tensor], stored: set[str]) -> list[str]:
    """Tensors that a file lacks, that are not used, and that have another shape or dtype than ours."""
    there = set(file.keys())
    problems = [f"{title} lacks {name}" for name in sorted((stored | live.keys()) - there)]
    problems += [f"{title} holds {name}, which is not used" for name in sorted(there - stored)]
    for name in sorted(there & live.keys()):
        entry, tensor = file.get_slice(name), live[name]
        saved, here = (entry.get_dtype(), entry.get_shape()), (DTYPE_NAMES.get(tensor.dtype), list(tensor.shape))
        if saved != here:
            problems.append(f"{title} holds {name} as {saved[0]} {saved[1]}, here it is {here[0]} {here[1]}")
    return problems


# Random numbers, the loss scaler.


def _random_states() -> dict[str, Tensor]:
    states = {"python": torch.frombuffer(bytearray(json.dumps(random.getstate()).encode()), dtype=torch.uint8)}
    states["cpu"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        states |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_random_states(states: dict[str, Tensor]) -> None:
    version, numbers, gauss = json.loads(bytes(states["python"].tolist()))
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(states["cpu"])
    for i in range(torch.cuda.device_count()):  # on a machine with other devices, theirs stay as they are seeded
        if f"cuda:{i}" in states:
            torch.cuda.set_rng_state(states[f"cuda:{i}"], i)


def _scaler_state(scaler) -> dict | None:
    return scaler.state_dict() or None if scaler is not None else None  # a disabled scaler's is empty
