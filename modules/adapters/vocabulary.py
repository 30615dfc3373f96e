"""The two matrices that have a row per token, the embedding and the head: found, untied, made longer."""

import dataclasses

import torch
from torch import Tensor, nn

from modules.adapters.peft_names import PREFIX

EMBEDDING, HEAD = "embed_tokens", "lm_head"  # PEFT's names for them, too


def embedding_name(model: nn.Module) -> str:
    """`model.embed_tokens`, or where a larger model has it."""
    return next(name for name, _ in model.named_modules() if name.endswith(EMBEDDING))


def is_tied(model: nn.Module) -> bool:
    """Whether the head's weight is the embedding's."""
    return model.lm_head.weight is model.get_submodule(embedding_name(model)).weight


def untie_head(model: nn.Module) -> None:
    """Give a tied head a copy of the weight as its own, and say so in the model's config."""
    if is_tied(model):
        weight = model.lm_head.weight
        model.lm_head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        model.was_tied = True
    _change_config(model, tie_word_embeddings=False)


@torch.no_grad()
def grow_vocabulary(model: nn.Module, rows: int) -> int:
    """Give a loaded model's embedding and head at least `rows` rows; → how many were added.

    New rows are the mean of the old ones: a new token begins as an average one. Old rows stay bit for
    bit. Raises ValueError for a head that cannot be made longer.
    """
    embedding = model.get_submodule(embedding_name(model))
    added = rows - embedding.num_embeddings
    if added <= 0:
        return 0
    if hasattr(model.lm_head, "pack_weight") or getattr(model.lm_head, "bias", None) is not None:
        what = "has a bias" if type(model.lm_head) is nn.Linear else f"is a {type(model.lm_head).__name__}"
        raise ValueError(f"the head {what} and cannot get rows for new tokens; keep it dense, without --quantize-head")
    tied = is_tied(model)
    for module in (embedding,) if tied else (embedding, model.lm_head):
        weight = module.weight
        mean = weight.mean(0, keepdim=True, dtype=torch.float32).to(weight.dtype)
        longer = torch.cat([weight.detach(), mean.expand(added, -1)])
        module.weight = nn.Parameter(longer, requires_grad=weight.requires_grad)
    if tied:
        model.lm_head.weight = embedding.weight
    embedding.num_embeddings = model.lm_head.out_features = rows
    _change_config(model, vocab_size=rows)
    return added


@torch.no_grad()
def fit_vocabulary(model: nn.Module, tensors: dict[str, Tensor], rows: int = 0) -> set[str]:
    """Give the model the rows that a saved adapter (`tensors` by PEFT's name) was trained with, and at least `rows`.

    peft saves a frozen embedding and head along with an adapter that changes them, or if they were resized. Rows that
    the model lacks are taken from there, the others are the base's; → the names of these tensors.
    """
    saved, names = {}, set()
    for name in (embedding_name(model), HEAD):
        for between in ("", ".base_layer", ".token_adapter.base_layer"):
            if (key := f"{PREFIX}{name}{between}.weight") in tensors:
                saved[name] = tensors[key]
                names.add(key)
        rows = max(rows, len(saved.get(name, ())), len(tensors.get(f"{PREFIX}{name}.lora_B.weight", ())))
    before = model.config.vocab_size
    if grow_vocabulary(model, rows):
        for name, tensor in saved.items():
            model.get_submodule(name).weight[before : len(tensor)] = tensor[before:].to(model.lm_head.weight)
    return names


def _change_config(model: nn.Module, **changes) -> None:
    """In the model's config, or in its language model's part of it."""
    config = model.config
    if hasattr(config, "text"):
        model.config = dataclasses.replace(config, text=dataclasses.replace(config.text, **changes))
    else:
        model.config = dataclasses.replace(config, **changes)
