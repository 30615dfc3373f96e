"""LN-tuning against peft: training, folders both ways."""

import pytest
from peft import LNTuningConfig, get_peft_model

from checkpointing.adapters import load_adapter
from modules.adapters.methods import add_method
from modules.adapters.options import Options
from tests.models.test_llama import make_pair
from tests.modules.adapters.peft_methods import assert_follows_peft


@pytest.mark.parametrize("targets", [None, ["input_layernorm"], ["model.norm", "layers.1.post_attention_layernorm"]])
def test_training_follows_peft(tmp_path, targets):
    config = LNTuningConfig(task_type="CAUSAL_LM", target_modules=targets)
    assert_follows_peft(tmp_path, config, lr=5e-2)


def test_mistakes_are_explained(tmp_path):
    _, ours = make_pair(tmp_path / "base")
    with pytest.raises(ValueError, match="--targets q_proj names no norm; the model has input_layernorm, norm"):
        add_method(ours, "ln", Options(targets=("q_proj",)))
    other, _ = make_pair(tmp_path / "other", hidden_size=32)
    get_peft_model(other, LNTuningConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"layers.0.input_layernorm.ln_tuning_layers.weight is \(32,\), expected \(48,\)"
    ):
        load_adapter(ours, tmp_path / "adapter")
