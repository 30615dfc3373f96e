"""What plan_vision predicts against the storages that a vision tower's forward and backward really have alive."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.clip_vit import CLIPVisionConfig, CLIPVisionModel
from models.siglip_vit import SiglipVisionConfig, SiglipVisionModel
from modules.adapters.lora import add_lora
from modules.memory.activations import checkpoint_activations
from modules.memory.plan import plan_vision

IMAGES = 4
SHAPE = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4)
SHAPE |= dict(image_size=64, patch_size=4)
TOWERS = {"CLIP": (CLIPVisionModel, CLIPVisionConfig), "SigLIP": (SiglipVisionModel, SiglipVisionConfig)}


class Alive(TorchDispatchMode):
    """Adds up the bytes of all storages that operations return, as long as they live."""

    def __init__(self, *known):
        super().__init__()
        self.bytes = self.peak = 0
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self.bytes += (size := storage.nbytes())
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self.free, size)
        return result

    def free(self, size):
        self.bytes -= size


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize(
    ("how", "mode"), [("frozen", "lean"), ("lora", "none"), ("lora", "fast"), ("lora", "lean"), ("full", "lean")]
)
def test_prediction(tower, how, mode):
    model, config = TOWERS[tower]
    tower = model(config(**SHAPE))
    tower.init_weights(torch.Generator().manual_seed(0))
    tower.requires_grad_(how == "full")
    if how == "lora":
        add_lora(tower, rank=2, targets=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"])
    checkpoint_activations(tower, "none" if how == "frozen" else mode)
    pixels = torch.randn(IMAGES, 3, 64, 64)
    with Alive(*tower.parameters(), pixels) as alive:
        out = tower(pixels) if model is SiglipVisionModel else tower(pixels, [-1])[0]
        if how != "frozen":
            out.square().sum().backward()
    weights = sum(p.nbytes for p in tower.parameters())
    plan = {"activations": 0, "one block": 0}
    whole = SimpleNamespace(vision_tower=tower, projector=nn.Identity())
    sizes = dict(images=IMAGES, dtype=torch.float32, optimizer="adamw-host")
    near = 0.15 if how == "full" else 0.1  # block after block, gradients come and what was kept for them goes
    assert plan_vision(whole, mode, plan, **sizes) == pytest.approx(weights + alive.peak, rel=near)
    # Where the language model's activations have gone, they have made room.
    kept = plan_vision(whole, mode, {"activations": 1 << 40, "one block": 0}, **sizes)
    assert weights <= kept < plan_vision(whole, mode, plan, **sizes)
    assert plan_vision(whole, mode, plan, **sizes | dict(images=2 * IMAGES)) > plan_vision(whole, mode, plan, **sizes)
