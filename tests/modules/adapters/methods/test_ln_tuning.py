"""LN-tuning against peft: training, folders both ways, merging."""

import pytest
import torch
from peft import LNTuningConfig, get_peft_model

from checkpointing.adapters import load_adapter
from modules.adapters.methods import add_method
from modules.adapters.methods.ln_tuning import merge, tuned_norms
from modules.adapters.options import Options
from modules.norm import RMSNorm
from tests.models.test_llama import make_pair
from tests.modules.adapters.peft_methods import assert_follows_peft, logits, trained


@pytest.mark.parametrize("targets", [None, ["input_layernorm"], ["model.norm", "layers.1.post_attention_layernorm"]])
def test_training_follows_peft(tmp_path, targets):
    config = LNTuningConfig(task_type="CAUSAL_LM", target_modules=targets)
    assert_follows_peft(tmp_path, config, lr=5e-2)


def test_starts_at_the_base_with_every_norm_and_merges(tmp_path):
    _, ours = make_pair(tmp_path)
    base, before = logits(ours), {name: p.clone() for name, p in ours.named_parameters()}
    add_method(ours, "ln", Options())
    assert torch.equal(logits(ours), base)
    norms = tuned_norms(ours)
    assert len(norms) == sum("norm" in name for name in before) == 5
    assert sum(p.numel() for p in trained(ours).values()) == 5 * 48
    with torch.no_grad():
        for p in trained(ours).values():
            p.mul_(torch.rand(48, generator=torch.Generator().manual_seed(1)) + 0.5)
    adapted = logits(ours)
    assert (adapted - base).abs().max() > 0.1
    assert all(torch.equal(before[f"{name}.weight"], norm.weight) for name, norm in norms.items())
    merge(ours)
    assert not tuned_norms(ours) and ours.state_dict().keys() == before.keys()
    assert torch.equal(logits(ours), adapted)


def test_float32_weights_over_bfloat16():
    model = torch.nn.ModuleDict({"norm": RMSNorm(48).bfloat16()})
    with torch.no_grad():
        model["norm"].weight.normal_()
    x = torch.randn(3, 48).bfloat16()
    base = model["norm"](x)
    add_method(model, "ln", Options(targets=("norm",)))
    assert model["norm"].ln_tuning_layers.weight.dtype == torch.float32
    assert torch.equal(model["norm"](x), base) and base.dtype == torch.bfloat16


def test_mistakes_are_explained(tmp_path):
    _, ours = make_pair(tmp_path / "base")
    with pytest.raises(ValueError, match="--targets q_proj names no RMSNorm; the model has input_layernorm, norm"):
        add_method(ours, "ln", Options(targets=("q_proj",)))
    other, _ = make_pair(tmp_path / "other", hidden_size=32)
    get_peft_model(other, LNTuningConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"layers.0.input_layernorm.ln_tuning_layers.weight is \(32,\), expected \(48,\)"
    ):
        load_adapter(ours, tmp_path / "adapter")
