"""rsLoRA against peft, and how gradients scale with the rank."""

import pytest
import torch
from peft import LoraConfig

from modules.adapters.lora import lora_layers
from modules.adapters.methods import add_method
from modules.adapters.options import Options
from tests.models.test_llama import make_pair
from tests.modules.adapters.peft_methods import assert_follows_peft, ids, loss_of

RANKS = (4, 16, 64, 256, 1024)


def test_follows_peft(tmp_path):
    settings = dict(r=4, lora_alpha=6, use_rslora=True, task_type="CAUSAL_LM")
    patterns = dict(rank_pattern={"up_proj": 9}, alpha_pattern={"up_proj": 5})
    ours, _ = assert_follows_peft(tmp_path, LoraConfig(target_modules=["q_proj", "up_proj"], **settings, **patterns))
    for name, layer in lora_layers(ours).items():
        assert layer.scaling == pytest.approx(5 / 9**0.5 if name.endswith("up_proj") else 6 / 4**0.5)


def test_gradients_keep_their_size_over_ranks(tmp_path):
    """Theorem 3.2: ‖∂B‖ at the start is of order √r · scale: constant with α/√r, falling like 1/√r with α/r."""
    norms = {}
    for method in ("lora", "rslora"):
        for rank in RANKS:
            _, model = make_pair(tmp_path / f"{method}-{rank}")
            torch.manual_seed(2)
            add_method(model, method, Options(rank=rank, alpha=1.0, targets=("v_proj", "down_proj")))
            loss_of(model, ids()).backward()
            grads = [layer.lora_B.weight.grad for layer in lora_layers(model).values()]
            norms[method, rank] = torch.stack([g.norm() for g in grads]).norm().item()
    for rank in RANKS:
        assert norms["rslora", rank] == pytest.approx(norms["rslora", 1024], rel=0.3)
        assert norms["lora", rank] == pytest.approx(norms["lora", 1024] * (1024 / rank) ** 0.5, rel=0.3)
