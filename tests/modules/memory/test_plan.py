"""The estimate that a run states before it starts, against what runs have taken on a GPU."""

import json
from types import SimpleNamespace

import pytest
import torch

from models import build_model
from models.llama import PRESETS
from modules.adapters.lora import add_lora
from modules.memory.host_embedding import keep_embedding_on_host
from modules.memory.plan import describe_memory, plan_memory, total_bytes
from recipes.benchmarks.measure import Row
from tests.tiny import ROOT

LONGEST = json.loads((ROOT / "recipes/benchmarks/benchmark_h200.json").read_text(encoding="utf-8"))["longest"]
LONGEST = [row for row in LONGEST if row["date"] >= "2026-11-29"]  # since groups of heads go one by one
assert len(LONGEST) == 4
MEASURED = json.loads((ROOT / "recipes/benchmarks/benchmark_h100.json").read_text(encoding="utf-8"))["speed"]
ROWS = [(Row(**row["settings"]), row["peak_gib"], row["host_gib"]) for row in MEASURED]


@pytest.mark.parametrize(
    "row, peak, host",
    [row for row in ROWS if row[0].quantize == "none" and row[0].fused],
    ids=lambda value: f"{value.column}, {value.way}" if isinstance(value, Row) else "",
)
def test_the_plan_of_lora(row, peak, host):
    model = build_model(PRESETS[row.preset] | {"architectures": ["LlamaForCausalLM"]})
    model = model.to(torch.bfloat16).requires_grad_(False)
    if row.embedding == "host":
        keep_embedding_on_host(model, torch.device("meta"))
        host -= model.model.embed_tokens.weight.nbytes / 2**30
    add_lora(model, rank=row.rank, alpha=1.0)
    budgets = dict(budget=row.activations_gib * 2**30, host_budget=row.activations_host_gib * 2**30)
    options = dict(tokens=row.batch * row.length, dtype=torch.bfloat16, fused=True, **budgets)
    plan = plan_memory(model, row.activations, **options)
    waiting, total = plan["host"] / 2**30, total_bytes(plan) / 2**30
    assert peak * 0.98 < total < peak * 1.1
    assert waiting == pytest.approx(host, abs=0.51)  # it is locked in pieces of 16 MiB, 16 at a time
    assert describe_memory(plan).startswith(f"memory: about {total:.2f} GiB (weights ")


@pytest.mark.parametrize("measured", LONGEST)
def test_the_plan_of_long_sequences(measured):
    row = Row(**measured["settings"])
    model = build_model(PRESETS[row.preset] | {"architectures": ["LlamaForCausalLM"]})
    model = model.to(torch.bfloat16).requires_grad_(False)
    block = 2 * sum(p.numel() for p in model.blocks[0].parameters())
    keep_embedding_on_host(model, torch.device("meta"))
    add_lora(model, rank=row.rank, alpha=1.0)
    frozen = [name for name, p in model.named_parameters() if "layers" in name and not p.requires_grad]
    streamed = SimpleNamespace(names=frozen, card_bytes=2 * 0.26 * block)  # two NF4 blocks at a time
    options = dict(tokens=row.length, dtype=torch.bfloat16, fused=True, streamed=streamed, optimizer=row.optimizer)
    plan = plan_memory(model, row.activations, **options)
    assert measured["peak_gib"] * 0.95 < total_bytes(plan) / 2**30 < measured["peak_gib"] * 1.1


def test_a_small_plan_is_told_in_mib():
    names = ("weights", "gradients", "optimizer", "activations", "one block", "loss")
    plan = dict(zip(names, (4 * 2**20, 2**19, 2**20, 160 * 2**20, 40 * 2**20, 2**17), strict=True)) | {
        "host": 3 * 2**20,
        "not at once": 2**17,
    }
    told = "(weights 4.0, gradients 0.5, optimizer 1.0, activations 160.0, one block 40.0, loss 0.1)"
    assert describe_memory(plan) == f"memory: about 205.5 MiB {told}, and 3.0 MiB of host memory"
    assert describe_memory(plan | {"weights": 2**30, "host": 0}).startswith("memory: about 1.20 GiB (weights 1.00, ")
