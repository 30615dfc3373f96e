"""transformers + peft on the same shapes, the same tokens and the same clock, set up as its users are told to.

bfloat16 weights and autocast (what Trainer's bf16=True does), scaled-dot-product attention, LoRA on all linear layers
with float32 adapters (peft's default), non-reentrant gradient checkpointing, fused AdamW. QLoRA goes through
bitsandbytes' NF4 with double quantisation and is left out where that is not installed.
"""

import importlib.metadata
import importlib.util
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from modules.attention import use_attention
from modules.lora import ALL_LINEAR
from recipes.benchmarks.measure import UNTIMED, Machine, Row, flops_per_token, random_ids, run_steps


def packages(row: Row) -> list[str]:
    return ["transformers", "peft"] + (["bitsandbytes"] if row.quantize == "nf4" else [])


def missing(row: Row) -> list[str]:
    """The packages that this row would need and that are not installed."""
    return [name for name in packages(row) if importlib.util.find_spec(name) is None]


def settings(row: Row) -> dict:
    """What a result row says about its settings."""
    return {
        "peer": "transformers + peft",
        "versions": {name: importlib.metadata.version(name) for name in packages(row)},
        "preset": row.preset,
        "batch": row.batch,
        "length": row.length,
        "quantize": row.quantize,
        "rank": row.rank,
        "gradient_checkpointing": True,
        "attention": "sdpa",
    }


def train(row: Row, machine: Machine, *, steps: int) -> dict:
    device = machine.device
    model = make_model(row, machine)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0, fused=True)
    ids = random_ids(row.batch, row.length, model.config.vocab_size, device)

    def step() -> float:
        with torch.autocast(device.type, machine.dtype, enabled=machine.dtype != torch.float32):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    use_attention("default")  # PyTorch's own choice, whatever the rows before measured as best
    figures = run_steps(step, steps=steps, untimed=UNTIMED, tokens=row.batch * row.length, on=device)
    return figures | {"flops_per_token": flops_per_token(row, model.config)}


def make_model(row: Row, machine: Machine) -> nn.Module:
    """Random weights made on the device, no files."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**machine.config(row.preset), use_cache=False)
    with machine.device:
        model = AutoModelForCausalLM.from_config(config, dtype=machine.dtype, attn_implementation="sdpa")
    if row.quantize == "nf4":
        quantize_blocks(model.model.layers, machine)
        model.is_loaded_in_4bit = True  # peft asks for it
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = LoraConfig(r=row.rank, lora_alpha=2 * row.rank, target_modules=list(ALL_LINEAR), task_type="CAUSAL_LM")
    return get_peft_model(model, lora).train()


def quantize_blocks(blocks: Iterable[nn.Module], machine: Machine) -> None:
    """What from_pretrained with a BitsAndBytesConfig does to the blocks' linear layers."""
    import bitsandbytes as bnb

    for layer in blocks:
        for name, dense in list(layer.named_modules()):
            if type(dense) is not nn.Linear:
                continue
            kind = dict(bias=False, compute_dtype=machine.dtype, compress_statistics=True, quant_type="nf4")
            linear = bnb.nn.Linear4bit(dense.in_features, dense.out_features, **kind, device="meta")
            weight = bnb.nn.Params4bit(
                dense.weight.detach(), requires_grad=False, compress_statistics=True, quant_type="nf4"
            )
            linear.weight = weight.to(machine.device)  # quantises
            parent, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(parent), leaf, linear)
