"""BitFit: trains biases and nothing else, as peft trains the LoRA in whose form it is saved."""

import copy

import pytest
import torch
from peft import PeftModel

from checkpointing.adapters import load_adapter, save_adapter
from modules.adapters.methods import add_method
from modules.adapters.options import Options
from tests.models.test_llama import load, make_pair
from tests.modules.adapters.peft_methods import adamw, logits, train, trained


@pytest.mark.parametrize("biases", [False, True])
def test_trains_as_peft_trains_the_saved_adapter(tmp_path, biases):
    reference, ours = make_pair(tmp_path / "base", attention_bias=biases, mlp_bias=biases)
    base, before = logits(ours), {name: p.clone() for name, p in ours.named_parameters()}
    add_method(ours, "bitfit", Options())
    assert torch.equal(logits(ours), base)
    assert {name.rpartition(".")[2] for name in trained(ours)} == {"bitfit_bias"}
    assert {name.removesuffix(".bitfit_bias") + ".weight" for name in trained(ours)} == {
        name for name in before if "_proj.weight" in name
    }
    save_adapter(tmp_path / "start", ours, base=str(tmp_path / "base"))
    theirs = PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "start", is_trainable=True)
    expected, got = train(theirs, adamw(theirs, 1e-2)), train(ours, adamw(ours, 1e-2))
    of_losses = max(abs(a - b) for a, b in zip(expected, got, strict=True))
    assert of_losses < 1e-4 and got[-1] < got[0] - 0.1
    of_weights = 0.0
    for name, p in theirs.named_parameters():
        if "lora_B.default.bias" in name:
            name = name.removeprefix("base_model.model.").replace("lora_B.default.bias", "bitfit_bias")
            of_weights = max(of_weights, (p - ours.get_parameter(name)).abs().max().item())
        elif "lora_" in name:
            assert not p.any()  # neither of the products has moved
    assert of_weights < 1e-4
    after = dict(ours.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in before.items())

    save_adapter(tmp_path / "ours", ours, base=str(tmp_path / "base"))
    theirs.save_pretrained(tmp_path / "theirs")
    opened = PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "ours")
    assert (logits(opened) - logits(ours)).abs().max() < 1e-5
    fresh = load(tmp_path / "base")
    load_adapter(fresh, tmp_path / "theirs")
    assert fresh.method == "bitfit" and (logits(fresh) - logits(theirs)).abs().max() < 1e-5
