"""EVA against peft: components, ranks, training, files."""

import copy

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

from data.batches import Batch
from modules.adapters.lora import lora_layers
from modules.adapters.methods import add_method
from modules.adapters.methods.eva import IncrementalPCA
from modules.adapters.options import Options
from modules.attention import padded_layout
from tests.models.test_llama import make_pair
from tests.modules.adapters.peft_methods import assert_follows_peft, ids, logits

TARGETS = ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")


def batches(seeds):
    layout = padded_layout(20).prepare(torch.device("cpu"), torch.float32)
    return [Batch(ids(seed), layout, torch.arange(40), ids(seed).flatten()) for seed in seeds]


def config(**settings):
    return LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), task_type="CAUSAL_LM", **settings)


def test_incremental_components_are_those_of_all_rows():
    """Rows that three components explain but for noise, in batches of different means."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(300, 3, generator=g) @ torch.randn(3, 40, generator=g) + 0.01 * torch.randn(300, 40, generator=g)
    X = X * 3 + torch.arange(300)[:, None] / 100 + 5
    pca = IncrementalPCA(4)
    for part in X.split(70):
        pca.add(part)
    centred = X - X.mean(0)
    _, S, Vt = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close((pca.Vt[:3] * Vt[:3]).sum(1).abs(), torch.ones(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(pca.shares()[:3]), (S.square() / S.square().sum())[:3], rtol=1e-3, atol=0)


def test_starts_as_peft_starts(tmp_path):
    """The same batch on both sides: the same ranks, scales and, up to sign, the same A."""
    reference, ours = make_pair(tmp_path)
    settings = config(init_lora_weights="eva", eva_config=EvaConfig(rho=2.0))
    theirs = get_peft_model(copy.deepcopy(reference), settings, low_cpu_mem_usage=True)
    # peft repeats its data until the components stand still: the same batch again does not move them
    initialize_lora_eva_weights(theirs, [{"input_ids": ids(1)}] * 2, show_progress_bar=False)
    base = logits(ours)
    add_method(ours, "eva", Options(rank=4, alpha=8.0, targets=TARGETS, batches=batches([1, 1])))
    assert torch.equal(logits(ours), base)
    found = lora_layers(ours)
    expected = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    expected = {name: m for name, m in expected.items() if m.lora_A}
    assert {n: (m.rank, m.scaling) for n, m in found.items()} == {
        n: (m.r["default"], m.scaling["default"]) for n, m in expected.items()
    }
    assert len({layer.rank for layer in found.values()}) > 1
    assert sum(layer.rank for layer in found.values()) == 4 * 10
    for name, layer in found.items():
        cosines = (layer.lora_A.weight * expected[name].lora_A["default"].weight).sum(1).abs()
        torch.testing.assert_close(cosines, torch.ones(layer.rank), rtol=0, atol=1e-2)


def test_follows_peft(tmp_path):
    """What peft's start wrote, ranks of their own and all, trains the same here."""
    ranks = dict(rank_pattern={"down_proj": 7}, alpha_pattern={"down_proj": 14})
    assert_follows_peft(tmp_path, config(init_lora_weights="eva", **ranks), method="eva")


def test_the_start_follows_from_the_batches_alone(tmp_path):
    """The SVD is randomised; a resumed run must find the same ranks whatever it has drawn before."""
    starts = []
    for seed in (1, 2):
        _, ours = make_pair(tmp_path)
        torch.manual_seed(seed)
        add_method(ours, "eva", Options(rank=4, targets=TARGETS, batches=batches([1, 2])))
        starts.append({name: layer.lora_A.weight for name, layer in lora_layers(ours).items()})
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(A, starts[1][name]) for name, A in starts[0].items())


def test_needs_batches(tmp_path):
    _, ours = make_pair(tmp_path)
    with pytest.raises(ValueError, match="needs options.batches"):
        add_method(ours, "eva", Options())
