"""Other tools on the same shapes, the same tokens and the same clock, set up as their users are told to.

    transformers + peft     bfloat16 weights and autocast (what Trainer's bf16=True does), scaled-dot-product attention,
                            float32 adapters (peft's default), a non-reentrant checkpoint per block
    … + liger-kernel        the same with its rotary embedding, RMSNorm, SwiGLU and fused linear cross entropy
    unsloth                 FastLanguageModel with its own checkpoints ("unsloth"), the rest as above
    torchtune               bfloat16 throughout, a checkpoint per block, blocks and the loss of a chunk compiled

All have LoRA on all linear layers, no dropout, and fused AdamW. QLoRA is bitsandbytes' NF4 with double quantisation;
torchtune's is torchao's. What is not installed is left out.

Liger and Unsloth change transformers where they find it, so every tool runs in a process of its own, which makes a
model once for all columns that can use it and prints a line of JSON per row:

    python -m recipes.benchmarks.peers '{"peer": "liger", "device": "cuda:0", "tiny": false, "steps": 13, "rows": []}'
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from checkpointing.export import write_weights
from checkpointing.safetensors_file import specs_of
from models.llama import LlamaConfig
from modules.adapters.lora import ALL_LINEAR
from modules.device import pick_dtype
from modules.loss import IGNORE_INDEX
from recipes.benchmarks.card import attempt, free_memory
from recipes.benchmarks.measure import UNTIMED, Machine, Row, flops_per_token, random_batch, random_model, run_steps

ROOT = Path(__file__).resolve().parents[2]
Trained = tuple[nn.Module, Callable[[Tensor], Tensor]]
"""A model, and how it comes from token ids to the mean loss."""


@dataclass(frozen=True)
class Peer:
    name: str
    """The packages that the tool stands for; a table says them with their versions."""
    build: Callable[[Row, Machine], Trained]
    needs: tuple[str, ...] = ()
    """What else must be installed."""
    needs_for_nf4: tuple[str, ...] = ("bitsandbytes",)
    needs_cuda: bool = False

    def packages(self, row: Row) -> list[str]:
        return [*self.name.split(" + "), *self.needs, *(self.needs_for_nf4 if row.quantize == "nf4" else ())]


def missing(peer: Peer, row: Row) -> list[str]:
    """The packages that this row would need and that are not installed."""
    return [name for name in peer.packages(row) if not _installed(name)]


def _installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def settings(peer: Peer, row: Row) -> dict:
    """What a result row says about its settings."""
    return {
        "peer": peer.name,
        "versions": {name: importlib.metadata.version(name) for name in peer.packages(row)},
        **{name: getattr(row, name) for name in ("preset", "batch", "length", "quantize", "rank")},
        "gradient_checkpointing": True,
        "attention": "sdpa",
    }


# ---------------------------------------------------------------------------------------------------------------------
# The tools: random weights made on the device, nothing downloaded


def with_peft(row: Row, machine: Machine) -> Trained:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = transformers_config(row, machine)
    with machine.device:
        model = AutoModelForCausalLM.from_config(config, dtype=machine.dtype, attn_implementation="sdpa")
    model = put_lora(model, model.model.layers, row, machine, target_modules=list(ALL_LINEAR), task_type="CAUSAL_LM")
    return model, lambda ids: autocast_loss(model, machine, input_ids=ids, labels=ids)


def put_lora(model: nn.Module, blocks: Iterable[nn.Module], row: Row, machine: Machine, **lora) -> nn.Module:
    """peft's LoRA in a transformers model, whose blocks are quantised and checkpointed as the row says."""
    from peft import LoraConfig, get_peft_model

    if row.quantize == "nf4":
        quantize_blocks(blocks, machine)
        model.is_loaded_in_4bit = True  # peft asks for it
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return get_peft_model(model, LoraConfig(r=row.rank, lora_alpha=2 * row.rank, **lora)).train()


def with_liger(row: Row, machine: Machine) -> Trained:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(rope=True, rms_norm=True, swiglu=True, fused_linear_cross_entropy=True)
    return with_peft(row, machine)


def with_unsloth(row: Row, machine: Machine) -> Trained:
    """Its from_pretrained wants a folder: a temporary one, with random weights and a tokenizer of four words."""
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(tempfile.gettempdir(), "unsloth_compiled_cache")))
    from unsloth import FastLanguageModel  # isort: skip  # before transformers: it says so
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    words = models.WordLevel({word: i for i, word in enumerate(special.values())}, unk_token="<unk>")
    with tempfile.TemporaryDirectory() as folder:
        transformers_config(row, machine, dtype=machine.dtype).save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **special).save_pretrained(folder)
        write_random_weights(Path(folder), row, machine)
        free_memory(machine.device)
        loading = dict(max_seq_length=row.length, dtype=machine.dtype, load_in_4bit=row.quantize == "nf4")
        model, _ = FastLanguageModel.from_pretrained(folder, **loading)
    lora = dict(r=row.rank, lora_alpha=2 * row.rank, lora_dropout=0, bias="none", target_modules=list(ALL_LINEAR))
    lora |= dict(use_gradient_checkpointing="unsloth", max_seq_length=row.length)
    model = FastLanguageModel.get_peft_model(model, **lora)
    FastLanguageModel.for_training(model)
    return model, lambda ids: autocast_loss(model, machine, input_ids=ids, labels=ids)


def with_torchtune(row: Row, machine: Machine) -> Trained:
    """As its LoRA recipe for one device puts it together, with compile=True."""
    from torchtune.models.llama3_1 import lora_llama3_1
    from torchtune.models.llama3_2 import lora_llama3_2
    from torchtune.modules import TransformerSelfAttentionLayer
    from torchtune.modules.loss import LinearCrossEntropyLoss
    from torchtune.modules.peft import get_adapter_params, set_trainable_params
    from torchtune.training import compile_loss, compile_model, set_activation_checkpointing, set_default_dtype

    torch.manual_seed(0)
    config = LlamaConfig.from_dict(machine.config(row.preset))
    builder = lora_llama3_2 if config.tie_word_embeddings else lora_llama3_1
    with set_default_dtype(machine.dtype), machine.device:
        model = builder(
            ["q_proj", "k_proj", "v_proj", "output_proj"],
            apply_lora_to_mlp=True,
            vocab_size=config.vocab_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            embed_dim=config.hidden_size,
            max_seq_len=config.max_position_embeddings,
            intermediate_dim=config.intermediate_size,
            norm_eps=config.rms_norm_eps,
            lora_rank=row.rank,
            lora_alpha=2 * row.rank,
            quantize_base=row.quantize == "nf4",
        )
    set_trainable_params(model, get_adapter_params(model))
    loss_of = LinearCrossEntropyLoss()
    loss_of.set_model_output(model)
    if row.compile:
        compile_model(model)
        compile_loss(loss_of)
    set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})

    def loss_of_ids(ids: Tensor) -> Tensor:
        nothing = torch.full_like(ids[:, :1], IGNORE_INDEX)
        return loss_of(model(ids), torch.cat([ids[:, 1:], nothing], dim=1))

    return model.train(), loss_of_ids


def write_random_weights(folder: Path, row: Row, machine: Machine) -> None:
    model, _ = random_model(replace(row, quantize="none", rank=0), machine)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    write_weights(folder, specs_of(weights), weights.get)


def transformers_config(row: Row, machine: Machine, **settings):
    from transformers import LlamaConfig

    return LlamaConfig(**machine.config(row.preset), use_cache=False, **settings)


def autocast_loss(model: nn.Module, machine: Machine, **inputs: Tensor) -> Tensor:
    with torch.autocast(machine.device.type, machine.dtype, enabled=machine.dtype != torch.float32):
        return model(**inputs).loss


def quantize_blocks(blocks: Iterable[nn.Module], machine: Machine) -> None:
    """What from_pretrained with a BitsAndBytesConfig does to the blocks' linear layers."""
    import bitsandbytes as bnb

    for layer in blocks:
        for name, dense in list(layer.named_modules()):
            if type(dense) is not nn.Linear:
                continue
            kind, sizes = dict(compress_statistics=True, quant_type="nf4"), (dense.in_features, dense.out_features)
            linear = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=machine.dtype, **kind, device="meta")
            weight = bnb.nn.Params4bit(dense.weight.detach(), requires_grad=False, **kind)
            linear.weight = weight.to(machine.device)  # quantises
            layer.set_submodule(name, linear)


PEERS = {
    "peft": Peer("transformers + peft", with_peft),
    "liger": Peer("transformers + peft + liger-kernel", with_liger, needs_cuda=True),
    "unsloth": Peer(
        "unsloth", with_unsloth, needs=("unsloth_zoo", "transformers", "peft", "bitsandbytes"), needs_cuda=True
    ),
    "torchtune": Peer("torchtune", with_torchtune, needs=("torchao",), needs_for_nf4=()),
}

# ---------------------------------------------------------------------------------------------------------------------
# A process


def measure(peer: str, rows: list[Row], machine: Machine, *, steps: int) -> Iterator[tuple[Row, dict]]:
    """Train each row with this tool, in a process of its own: (row, figures) as they come."""
    if not rows:
        return
    free_memory(machine.device)  # the card is the other process's now
    request = {"peer": peer, "device": str(machine.device), "tiny": machine.tiny, "steps": steps}
    request |= {"rows": [asdict(row) for row in rows]}
    command = [sys.executable, "-m", "recipes.benchmarks.peers", json.dumps(request)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for row in rows:
            line = process.stdout.readline()
            yield row, json.loads(line) if line else {"failed": f"the process ended with {process.wait()}"}


def train_all(peer: Peer, rows: list[Row], machine: Machine, *, steps: int) -> Iterator[dict]:
    for _, group in groupby(rows, key=lambda row: (row.preset, row.quantize, row.rank)):
        alike = list(group)
        longest = max(alike, key=lambda row: row.length)
        built = tried(machine, lambda row=longest: {"trained": peer.build(row, machine)})
        for row in alike:
            yield built if "failed" in built else tried(machine, train, *built["trained"], row, machine, steps=steps)
        del built  # before the next model is made


def tried(machine: Machine, measure: Callable[..., dict], *args, **settings) -> dict:
    """`attempt` for errors of any kind: another tool's next row may work."""
    try:
        return attempt(machine.device, measure, *args, **settings)
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}".partition("\n")[0][:300]}


def train(model: nn.Module, loss_of_ids: Callable[[Tensor], Tensor], row: Row, machine: Machine, *, steps: int) -> dict:
    config = LlamaConfig.from_dict(machine.config(row.preset))
    ids = random_batch(row, row.length, config.vocab_size).input_ids.to(machine.device)
    figures = train_on(model, lambda: loss_of_ids(ids), machine, steps=steps, tokens=row.batch * row.length)
    return figures | {"flops_per_token": flops_per_token(row, config)}


def train_on(model: nn.Module, loss_of: Callable[[], Tensor], machine: Machine, *, steps: int, tokens: int) -> dict:
    """Train on one batch of so many tokens; `loss_of` computes its loss."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0, fused=True)
    model.zero_grad()  # an earlier run may have ended in the middle of a step

    def step() -> float:
        loss = loss_of()
        loss.backward()
        clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run_steps(step, steps=steps, untimed=UNTIMED, tokens=tokens, on=machine.device)


def main(request: dict) -> None:
    results, sys.stdout = sys.stdout, sys.stderr  # the tools have much to say
    device = torch.device(request["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    machine = Machine(device, pick_dtype("auto", device), request["tiny"])
    rows = [Row(**row) for row in request["rows"]]
    for figures in train_all(PEERS[request["peer"]], rows, machine, steps=request["steps"]):
        print(json.dumps(figures), file=results, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
