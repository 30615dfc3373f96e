"""VeRA against peft; its matrices are peft's, number for number, and need not be stored."""

import pytest
import torch
from peft import VeraConfig

from checkpointing.adapters import load_adapter, read_folder, save_adapter
from modules.adapters.methods import add_method
from modules.adapters.options import Options
from tests.models.test_llama import load, make_pair
from tests.modules.adapters.peft_methods import adamw, assert_follows_peft, logits, train, trained

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(("key", "stored"), [(0, True), (0, False), (5, False)])
def test_follows_peft(tmp_path, key, stored):
    settings = dict(r=16, target_modules=TARGETS, projection_prng_key=key, save_projection=stored)
    assert_follows_peft(tmp_path, VeraConfig(task_type="CAUSAL_LM", **settings), lr=3e-2)
    config, tensors = read_folder(tmp_path / "ours")
    assert config["save_projection"] == ("base_model.vera_A" in tensors) == (key != 0)  # our own seed gives them


def test_few_numbers_are_trained_and_stored(tmp_path):
    _, ours = make_pair(tmp_path / "base")
    add_method(ours, "vera", Options(rank=16, targets=("q_proj", "down_proj")))
    assert sum(p.numel() for p in trained(ours).values()) == 2 * 2 * (16 + 48)
    train(ours, adamw(ours, 3e-2), steps=3)
    save_adapter(tmp_path / "adapter", ours, base="base")
    assert all(tensor.ndim == 1 for tensor in read_folder(tmp_path / "adapter")[1].values())
    again = load(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(ours))
    _, other = make_pair(tmp_path / "other", hidden_size=24)
    with pytest.raises(ValueError, match="vera_lambda_b is \\(48,\\), expected \\(24,\\)"):
        load_adapter(other, tmp_path / "adapter")
