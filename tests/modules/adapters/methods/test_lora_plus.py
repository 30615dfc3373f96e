"""LoRA+ against peft's create_loraplus_optimizer."""

import torch
from peft import LoraConfig
from peft.optimizers import create_loraplus_optimizer

from modules.adapters.methods import add_method
from modules.adapters.methods.lora_plus import parameter_groups
from modules.adapters.options import Options
from modules.optim import build_optimizer
from tests.models.test_llama import make_pair
from tests.modules.adapters.peft_methods import assert_follows_peft, trained


def ours_adamw(model, lr):
    groups = parameter_groups(trained(model), lr)
    return build_optimizer("adamw", trained(model), lr=lr, weight_decay=0.01, groups=groups)


def theirs_adamw(model, lr):
    settings = dict(lr=lr, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.01)
    return create_loraplus_optimizer(model, torch.optim.AdamW, **settings)


def test_follows_peft(tmp_path):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    optimizers = dict(ours_adamw=ours_adamw, theirs_adamw=theirs_adamw)
    assert_follows_peft(tmp_path, config, method="lora-plus", lr=3e-4, **optimizers)


def test_groups(tmp_path):
    _, model = make_pair(tmp_path)
    add_method(model, "lora-plus", Options(rank=4, targets=("q_proj",)))
    optimizer = ours_adamw(model, 1e-3)
    found = {
        (g["lr"], g["lr_ratio"], g["weight_decay"], tuple(p.shape for p in g["params"])) for g in optimizer.param_groups
    }
    assert found == {(1e-3, 1.0, 0.01, ((4, 48),) * 2), (16e-3, 16.0, 0.01, ((48, 4),) * 2)}
