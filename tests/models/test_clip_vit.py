"""CLIP's vision transformer against transformers: hidden states of every layer, gradients, folders in and out."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel
from transformers import CLIPVisionConfig as HFConfig
from transformers import CLIPVisionModel as HFVision

from checkpointing.export import save_model
from checkpointing.pretrained import WeightFiles, load_weights, read_config
from models import build_model
from models.clip_vit import CLIPVisionConfig, CLIPVisionModel
from modules.memory.activations import checkpoint_activations

TINY = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=12,
    patch_size=4,
)
CONFIGS = {
    "plain": {},
    "gelu": dict(hidden_act="gelu", layer_norm_eps=1e-3),
    "one head, one patch": dict(num_attention_heads=1, patch_size=12),
    "patches that leave a margin": dict(image_size=14),
    "greyscale": dict(num_channels=1),
}


def randomize(model):
    """Weights of a trained model's kind: biases and norms must matter."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3 if p.ndim == 1 else 0.15)
    return model


def load(folder):
    model = build_model(read_config(folder))
    load_weights(model, WeightFiles(folder), device=torch.device("cpu"), dtype=torch.float32)
    return model


def make_pair(folder, **overrides):
    """A random transformers model, and ours loaded from the folder that it wrote."""
    torch.manual_seed(0)
    reference = randomize(HFVision(HFConfig(**TINY | overrides)))
    reference.save_pretrained(folder)
    return reference, load(folder)


def pixels(config, count=2):
    shape = (count, config.num_channels, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_hidden_state_and_gradient(tmp_path, name):
    reference, ours = make_pair(tmp_path, **CONFIGS[name])
    images = pixels(reference.config)
    expected = reference(images, output_hidden_states=True)
    states = ours(images)
    assert len(states) == len(expected.hidden_states) == TINY["num_hidden_layers"] + 1
    for state, wanted in zip(states, expected.hidden_states, strict=True):
        assert state.shape == wanted.shape and (state - wanted).abs().max() < 1e-5
    assert (ours.pool(states[-1]) - expected.pooler_output).abs().max() < 1e-5
    (ours.pool(states[-1]).square().sum() + states[1].square().sum()).backward()
    (expected.pooler_output.square().sum() + expected.hidden_states[1].square().sum()).backward()
    gradients = {n: p.grad for n, p in ours.named_parameters()}
    assert gradients.keys() == dict(reference.named_parameters()).keys()
    for n, p in reference.named_parameters():
        # Keys' biases move all scores of a query alike: their gradient is 0 but for rounding.
        assert (gradients[n] - p.grad).norm() < 1e-5 * p.grad.norm() + 1e-3 * ("k_proj.bias" in n), n


def test_asked_layers_only(tmp_path):
    _, ours = make_pair(tmp_path)
    images, ran = pixels(ours.config), []
    every = ours(images)
    ours.run_block = lambda block, hidden: ran.append(block) or block(hidden)
    for layers in ([-2], [1, 0], [-1, -1], [0]):
        ran.clear()
        states = ours(images, layers)
        assert len(states) == len(layers)
        assert all(torch.equal(state, every[layer]) for state, layer in zip(states, layers, strict=True))
        assert ran == list(ours.blocks)[: max(range(4)[layer] for layer in layers)]
    with pytest.raises(IndexError):
        ours(images, [4])


def test_folders_of_both_generations_and_of_whole_clips(tmp_path):
    reference, ours = make_pair(tmp_path / "new")
    images = pixels(ours.config)
    tensors = load_file(tmp_path / "new/model.safetensors")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text((tmp_path / "new/config.json").read_text())
    old = {f"vision_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(
        old | {"vision_model.embeddings.position_ids": torch.arange(10)[None]}, tmp_path / "old/model.safetensors"
    )
    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=50)
    whole = randomize(
        CLIPModel(CLIPConfig(vision_config=TINY, text_config=text | dict(eos_token_id=1, bos_token_id=0)))
    )
    whole.vision_model.load_state_dict(reference.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    for kind in ("new", "old", "whole"):
        model = load(tmp_path / kind)
        assert all(torch.equal(a, b) for a, b in zip(model(images), ours(images), strict=True))
        with torch.no_grad():
            model.post_layernorm.weight.mul_(2)
        out = tmp_path / f"{kind} again"
        out.mkdir()
        save_model(out, model, config=read_config(tmp_path / kind), source=tmp_path / kind)
        before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / kind, out))
        before.pop("vision_model.embeddings.position_ids", None)
        assert before.keys() == after.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert len(changed) == 1 and changed.pop().endswith("post_layernorm.weight")
        opened = (CLIPModel if kind == "whole" else HFVision).from_pretrained(out)
        vision = opened.vision_model if kind == "whole" else opened
        assert (vision(images).pooler_output - model.pool(model(images)[-1])).abs().max() < 1e-5
    assert torch.equal(opened.text_model.final_layer_norm.weight, whole.text_model.final_layer_norm.weight)


@pytest.mark.parametrize("mode", ["fast", "lean", "offload"])
def test_modes_change_no_gradient(tmp_path, mode):
    _, ours = make_pair(tmp_path)
    images, gradients = pixels(ours.config), []
    for keep in ("none", mode):
        checkpoint_activations(ours, keep, every=2)
        ours.zero_grad()
        ours(images)[-1].square().sum().backward()
        gradients.append({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == len(gradients[1]) == len(list(ours.parameters())) - 2  # no post_layernorm
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-5)


def test_init_weights_is_that_of_transformers():
    config = TINY | dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, initializer_factor=0.5)
    torch.manual_seed(0)
    ours, reference = CLIPVisionModel(CLIPVisionConfig.from_dict(config)), HFVision(HFConfig(**config))
    ours.init_weights(torch.Generator().manual_seed(0))
    for name, p in reference.named_parameters():
        got = ours.get_parameter(name)
        if p.numel() < 100 or p.std() == 0:
            continue
        assert abs(got.std() / p.std() - 1) < 0.25, name  # class_embedding has 128 numbers only
    fixed = [name for name, p in reference.named_parameters() if p.std() == 0]
    assert len(fixed) == 24 and all(torch.equal(ours.get_parameter(n), reference.get_parameter(n)) for n in fixed)


def test_bad_settings_are_named(tmp_path):
    for bad, word in [
        (dict(hidden_act="mish"), "mish"),
        (dict(attention_dropout=0.1), "attention_dropout"),
        (dict(image_size=[12, 24]), "square"),
        (dict(patch_size=13), "patch_size 13"),
        (dict(num_attention_heads=5), "5 heads"),
        (dict(model_type="siglip_vision_model"), "siglip_vision_model"),
    ]:
        with pytest.raises(ValueError, match=word):
            build_model(TINY | dict(architectures=["CLIPVisionModel"]) | bad)
    with pytest.raises(ValueError, match="SiglipVisionModel.*supported: .*CLIPVisionModel"):
        build_model(TINY | dict(architectures=["SiglipVisionModel"]))
    legacy = {"architectures": ["CLIPModel"], "vision_config": {}, "vision_config_dict": TINY}
    assert build_model(json.loads(json.dumps(legacy))).config == CLIPVisionConfig.from_dict(TINY)
    _, ours = make_pair(tmp_path)
    with pytest.raises(ValueError, match=r"1 × 3 × 12 × 16, expected images × 3 × 12 × 12"):
        ours(torch.zeros(1, 3, 12, 16))
