"""(IA)³ against peft: training, folders both ways, which side is scaled."""

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model

from checkpointing.adapters import load_adapter, save_adapter
from modules.adapters.methods import add_method
from modules.adapters.methods.ia3 import IA3Linear
from modules.adapters.options import Options
from modules.adapters.parts import modules_of
from tests.models.test_llama import make_pair
from tests.modules.adapters.peft_methods import assert_follows_peft, logits


def randomise(model):
    generator = torch.Generator().manual_seed(4)
    for layer in modules_of(model, IA3Linear).values():
        with torch.no_grad():
            layer.ia3_l.uniform_(0.5, 1.5, generator=generator)


@pytest.mark.parametrize(
    "settings",
    [
        {},  # PEFT's own choice for Llama is ours: the paper's
        dict(target_modules=["q_proj", "gate_proj"], feedforward_modules=["gate_proj"]),
        dict(target_modules=["k_proj", "down_proj"], feedforward_modules=[], init_ia3_weights=False),
    ],
)
def test_training_follows_peft(tmp_path, settings):
    assert_follows_peft(tmp_path, IA3Config(task_type="CAUSAL_LM", **settings), lr=1e-1)


def test_our_start_is_peft_s(tmp_path):
    reference, ours = make_pair(tmp_path / "base", attention_bias=True, mlp_bias=True)
    base = logits(ours)
    add_method(ours, "ia3", Options())
    assert torch.equal(logits(ours), base)
    theirs = get_peft_model(reference, IA3Config(task_type="CAUSAL_LM"))
    adapted = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "is_feedforward")}
    assert set(modules_of(ours, IA3Linear)) == adapted
    randomise(ours)  # biases are scaled, too
    save_adapter(tmp_path / "adapter", ours, base=str(tmp_path / "base"))
    opened = PeftModel.from_pretrained(theirs.unload(), tmp_path / "adapter")
    assert (logits(opened) - logits(ours)).abs().max() < 1e-5


def test_layers_of_one_name_scaled_on_different_sides(tmp_path):
    reference, ours = make_pair(tmp_path / "base")
    names = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    config = IA3Config(target_modules=names, feedforward_modules=names[:1], init_ia3_weights=False)
    theirs = get_peft_model(reference, config)
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(ours, tmp_path / "theirs")
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-5
    save_adapter(tmp_path / "ours", ours, base=str(tmp_path / "base"))
    opened = PeftModel.from_pretrained(theirs.unload(), tmp_path / "ours")
    assert (logits(opened) - logits(ours)).abs().max() < 1e-5


@torch.no_grad()
def test_a_bfloat16_model_feels_small_changes():
    """The vector is not rounded to bfloat16, where 1.003 is 1; the products are, some of them up."""
    model = torch.nn.ModuleDict({"v_proj": torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)})
    add_method(model, "ia3", Options(targets=("v_proj",)))
    x = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = model["v_proj"](x)
    model["v_proj"].ia3_l.fill_(1.003)
    after = model["v_proj"](x)
    assert before.dtype == after.dtype == torch.bfloat16
    assert after.float().norm() / before.float().norm() == pytest.approx(1.003, abs=1e-3)


def test_mistakes_are_explained(tmp_path):
    reference, ours = make_pair(tmp_path / "base")
    with pytest.raises(ValueError, match="--targets k_prj names no linear layer"):
        add_method(ours, "ia3", Options(targets=("k_prj",)))
    with pytest.raises(ValueError, match="--targets k_prj, v_prj name no linear layer"):
        add_method(ours, "ia3", Options(targets=("k_prj", "q_proj", "v_prj")))
    with pytest.raises(ValueError, match="--targets is empty"):
        add_method(ours, "ia3", Options(targets=()))
    other, _ = make_pair(tmp_path / "other", intermediate_size=40, num_hidden_layers=3)
    get_peft_model(other, IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"layers.2.self_attn.v_proj \(no such linear layer\)$"):  # the third of three
        load_adapter(ours, tmp_path / "adapter")
    other, _ = make_pair(tmp_path / "other", intermediate_size=40)
    get_peft_model(other, IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj.ia3_l is \(40,\), expected \(80,\)"):
        load_adapter(ours, tmp_path / "adapter")
