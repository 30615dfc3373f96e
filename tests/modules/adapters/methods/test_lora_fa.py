"""LoRA-FA against peft's optimizer for it; the corrected gradient; what a layer keeps."""

from functools import partial

import torch
from peft import LoraConfig
from peft.optimizers import create_lorafa_optimizer, lorafa

from modules.adapters.lora import lora_layers
from modules.adapters.methods import add_method
from modules.adapters.methods.lora_fa import prepare_optimizer
from modules.adapters.options import Options
from modules.optim import build_optimizer
from tests.models.test_llama import make_pair
from tests.modules.adapters.peft_methods import adamw, assert_follows_peft, ids, loss_of, trained

CONFIG = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")


def test_follows_peft(tmp_path, monkeypatch):
    """Given one ε: peft's optimizer adds 1e-6 outside the bias correction, AdamW 1e-8 inside; and no bfloat16."""
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)

    def theirs_adamw(model, lr):
        optimizer = create_lorafa_optimizer(model, 4, 8, lr)
        optimizer.param_groups[0]["eps"] = 1e-12
        return optimizer

    def ours_adamw(model, lr):
        optimizer = build_optimizer("adamw", trained(model), lr=lr, weight_decay=0.0)
        optimizer.param_groups[0]["eps"] = 1e-12
        prepare_optimizer(model, optimizer)
        return optimizer

    optimizers = dict(ours_adamw=ours_adamw, theirs_adamw=theirs_adamw)
    assert_follows_peft(tmp_path, CONFIG, method="lora-fa", **optimizers)


def test_follows_frozen_A_in_peft(tmp_path):
    """The paper's first form: A frozen, plain AdamW."""

    def theirs_adamw(model, lr):
        for name, p in model.named_parameters():
            if ".lora_A." in name:
                p.requires_grad_(False)
        return adamw(model, lr)

    assert_follows_peft(tmp_path, CONFIG, method="lora-fa", theirs_adamw=theirs_adamw)


def test_corrected_gradient_is_the_closest(tmp_path):
    """s · ∂B A is the projection of ∂W onto A's rows: no other ∂B comes closer."""
    _, model = make_pair(tmp_path)
    add_method(model, "lora-fa", Options(rank=4, alpha=8.0, targets=("q_proj",)))
    layer = next(iter(lora_layers(model).values()))
    assert not layer.lora_A.weight.requires_grad
    layer.weight.requires_grad_()
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.0)
    prepare_optimizer(model, optimizer)
    loss_of(model, ids()).backward()
    optimizer.step()
    A, effect = layer.lora_A.weight, layer.scaling * layer.lora_B.weight.grad @ layer.lora_A.weight
    expected = layer.weight.grad @ torch.linalg.pinv(A) @ A
    torch.testing.assert_close(effect, expected, rtol=1e-3, atol=1e-6)


def keep(sizes, tensor):
    sizes.append(tuple(tensor.shape))
    return tensor


def test_input_is_not_kept():
    kept = {}
    for method in ("lora", "lora-fa"):
        model = torch.nn.Sequential(torch.nn.Linear(512, 512))
        add_method(model, method, Options(rank=4, targets=("0",)))
        x = torch.randn(7, 512, requires_grad=True)
        sizes = kept[method] = []
        with torch.autograd.graph.saved_tensors_hooks(partial(keep, sizes), lambda tensor: tensor):
            model(x)
    assert (7, 512) in kept["lora"] and (7, 512) not in kept["lora-fa"]
