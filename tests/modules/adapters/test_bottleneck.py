"""Bottleneck adapters against their formulas, written once more around transformers' own Llama."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from checkpointing.adapters import load_adapter, read_folder, save_adapter
from modules.adapters.methods import add_method
from modules.adapters.options import Options
from tests.models.test_llama import load, make_pair
from tests.modules.adapters.peft_methods import adamw, ids, logits, train, trained

# Which modules' outputs the adapter is added to, whether it reads that output or the module's input, its
# non-linearity and, for r = 4 and α = 6, its scale.
FORMULAS = {
    "houlsby": (("self_attn.o_proj", "mlp.down_proj"), "output", F.gelu, 1.0),
    "pfeiffer": (("mlp.down_proj",), "output", F.relu, 1.0),
    "parallel": (("mlp",), "input", F.relu, 1.5),
}


def randomise(model):
    """Away from the start, where W_up = 0 hides everything."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in trained(model).values():
            p.normal_(0, 0.2, generator=generator)


def reference_model(reference, ours, method):
    """transformers' model with copies of our adapters, hooked in."""
    endings, reads, f, scale = FORMULAS[method]
    reference = copy.deepcopy(reference).requires_grad_(False)
    for name, module in list(reference.named_modules()):
        if name.endswith(endings):
            adapter = nn.ModuleDict({"down": nn.Linear(48, 4), "up": nn.Linear(4, 48)})
            adapter.load_state_dict(ours.get_submodule(f"{name}.adapter").state_dict())

            def add(module, inputs, output, adapter=adapter):
                read = inputs[0] if reads == "input" else output
                return output + scale * adapter["up"](f(adapter["down"](read)))

            module.adapter = adapter
            module.register_forward_hook(add)
    return reference


@pytest.mark.parametrize("method", FORMULAS)
def test_training_follows_the_formula(tmp_path, method):
    reference, ours = make_pair(tmp_path)
    before = {name: p.clone() for name, p in ours.named_parameters()}
    add_method(ours, method, Options(rank=4, alpha=6.0))
    randomise(ours)
    theirs = reference_model(reference, ours, method)
    assert trained(theirs).keys() == trained(ours).keys()
    sizes = 2 * len(FORMULAS[method][0]) * (2 * 4 * 48 + 4 + 48)  # two blocks
    assert sum(p.numel() for p in trained(ours).values()) == sizes
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-5
    expected, got = train(theirs, adamw(theirs, 1e-2)), train(ours, adamw(ours, 1e-2))
    of_losses = max(abs(a - b) for a, b in zip(expected, got, strict=True))
    of_weights = max((p - trained(theirs)[name]).abs().max().item() for name, p in trained(ours).items())
    assert of_losses < 1e-4 and of_weights < 1e-4 and got[-1] < got[0] - 0.1
    after = dict(ours.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in before.items())


@pytest.mark.parametrize("method", FORMULAS)
def test_folder_round_trip(tmp_path, method):
    _, ours = make_pair(tmp_path / "base")
    add_method(ours, method, Options(rank=4, alpha=6.0, dropout=0.5))
    randomise(ours)
    save_adapter(tmp_path / "adapter", ours, base="base")
    fresh = load(tmp_path / "base")
    changed = load_adapter(fresh, tmp_path / "adapter")
    assert changed == read_folder(tmp_path / "adapter")[0]["target_modules"]
    assert fresh.method == method and torch.equal(logits(fresh), logits(ours))
    assert torch.equal(fresh.train()(ids()), fresh.eval()(ids()))  # like a LoRA, it is read without dropout
    assert trained(fresh).keys() == trained(ours).keys()


def test_some_blocks_only(tmp_path):
    _, ours = make_pair(tmp_path)
    add_method(ours, "pfeiffer", Options(rank=4, targets=("layers.1.mlp.down_proj",)))
    assert all(name.startswith("model.layers.1.mlp.down_proj.adapter.") for name in trained(ours))


def test_mistakes_are_explained(tmp_path):
    _, ours = make_pair(tmp_path / "base")
    for options, words in [
        (Options(rank=0), "--rank 0 must be at least 1"),
        (Options(dropout=1.0), "--dropout 1.0"),
        (Options(targets=("q_proj",)), "--targets q_proj names no FeedForward; the model has mlp"),
    ]:
        with pytest.raises(ValueError, match=words):
            add_method(ours, "parallel", options)
    _, other = make_pair(tmp_path / "other", num_hidden_layers=3)
    add_method(other, "houlsby", Options(rank=4))
    save_adapter(tmp_path / "adapter", other, base="other")
    with pytest.raises(ValueError, match=r"layers.2.mlp.down_proj \(no such Linear"):
        load_adapter(ours, tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(path.read_text().replace('"bottleneck_size": 4', '"bottleneck_size": 5'))
    with pytest.raises(ValueError, match=r"is \(4, 48\), expected \(5, 48\),.* and 15 more$"):
        load_adapter(load(tmp_path / "other"), tmp_path / "adapter")
