"""SmolVLM and Idefics3 against transformers and peft: the vision tower, logits, all gradients, folders, adapters."""

import itertools
from operator import call

import pytest
import torch
from transformers import Idefics3Config as HFIdefics3Config
from transformers import Idefics3ForConditionalGeneration as HFIdefics3
from transformers import SmolVLMConfig as HFSmolVLMConfig
from transformers import SmolVLMForConditionalGeneration as HFSmolVLM

from checkpointing.pretrained import read_config
from models import build_model
from models.siglip_vit import position_ids
from models.smolvlm import SmolVLMConfig
from modules.adapters.lora import ALL_LINEAR, add_lora
from modules.quantization.nf4 import quantize_nf4
from tests.models import test_llava as llava
from tests.models.test_clip_vit import load, randomize
from tests.models.test_llava import BATCHES, IMAGE, check_logits_and_gradients

VISION = llava.VISION | dict(patch_size=2)  # 6 × 6 patches
TEXT = llava.TEXT | dict(model_type="llama")
ARCHITECTURES = {
    "Idefics3": (HFIdefics3, HFIdefics3Config),
    "SmolVLM": (HFSmolVLM, HFSmolVLMConfig),
}
CONFIGS = {
    "scale factor 3": dict(scale_factor=3),
    "scale factor 1": dict(scale_factor=1),
    "tied": dict(tie_word_embeddings=True),
    "tied, says only the text section": dict(text_config=TEXT | dict(tie_word_embeddings=True)),
    "other activation": dict(vision_config=VISION | dict(hidden_act="gelu", layer_norm_eps=1e-3)),
    "patches that leave a margin": dict(vision_config=VISION | dict(patch_size=5), scale_factor=1),
}


def make_pair(folder, kind="Idefics3", **overrides):
    """A random transformers model, and ours loaded from the folder that it wrote."""
    torch.manual_seed(0)
    model, config = ARCHITECTURES[kind]
    sections = dict(vision_config=dict(VISION), text_config=dict(TEXT), image_token_id=IMAGE)
    reference = randomize(model(config(**sections | overrides)))
    reference.generation_config.eos_token_id = None
    reference.save_pretrained(folder)
    return reference, load(folder)


def nested(pixels, counts):
    """[B, most images of a row, C, S, S] as transformers takes them: rows with fewer images filled up with zeros."""
    if pixels is None:
        return None
    filled = torch.zeros(len(counts), max(counts), *pixels.shape[1:])
    for row, part in enumerate(pixels.split(counts)):
        filled[row, : len(part)] = part
    return filled


def make_batch(config, counts, seed=1):
    """(ids [B, T], real tokens [B, T], pixel values for transformers, our Images)."""
    ids, real, pixels, images = llava.make_batch(config, counts, seed)
    return ids, real, nested(pixels, counts), images


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("sizes", [[(6, 6)] * 3, [(6, 6), (4, 6), (1, 5)], [(3, 9), (4, 2)]], ids=str)
def test_vision_states_of_every_layer(tmp_path, kind, sizes):
    """Full squares, and images of unequal sizes in one batch: positions are spread over them, padding is not seen."""
    reference, ours = make_pair(tmp_path, kind)
    H, W = (max(side) for side in zip(*sizes, strict=True))
    mask = torch.zeros(len(sizes), H, W, dtype=torch.bool)
    for image, (h, w) in enumerate(sizes):
        mask[image, :h, :w] = True
    pixels = torch.randn(len(sizes), 3, 2 * H, 2 * W, generator=torch.Generator().manual_seed(3))
    states = []

    def run(block, hidden, *masks):
        states.append(hidden)
        return call(block, hidden, *masks)

    ours.vision_tower.run_block = run
    ours.vision_tower.post_layernorm.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    with torch.no_grad():
        expected = reference.model.vision_model(pixels, mask, output_hidden_states=True)
        last = ours.vision_tower(pixels, None if mask.all() else mask)
    assert len(states) == len(expected.hidden_states) == VISION["num_hidden_layers"] + 1
    for state, wanted in zip([*states, last], [*expected.hidden_states, expected.last_hidden_state], strict=True):
        assert (state - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("side", [14, 24, 26, 27, 32])  # of Idefics3, and odd ones: steps of 1 / side are rounded
def test_positions_of_full_images_are_those_learnt(side):
    mask = torch.ones(1, side, side, dtype=torch.bool)
    assert torch.equal(position_ids(mask, side).flatten(), torch.arange(side**2))


def test_padded_images_make_the_same_features(tmp_path):
    """The pixel mask of transformers' processor, from pixels to patches: a patch counts if any of its pixels does."""
    reference, ours = make_pair(tmp_path)
    pixels = torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(3, 8, 12, dtype=torch.long)
    for image, (h, w) in enumerate([(8, 12), (3, 7), (8, 1)]):
        mask[image, :h, :w] = 1
    vision = reference.model.vision_model
    patches = mask.unfold(1, 2, 2).unfold(2, 2, 2).sum((-1, -2)) > 0
    with torch.no_grad():
        states = vision(pixels, patches).last_hidden_state  # 4 × 6 patches, which transformers' connector cannot fold
        s, proj = 2, reference.model.connector.modality_projection.proj
        folded = states.view(3, 2, s, 3, s, -1).permute(0, 1, 3, 2, 4, 5).reshape(3, 6, -1)
        assert (ours.model.image_features(pixels, mask) - proj(folded)).abs().max() < 1e-5
        square, whole = torch.randn(2, 3, 12, 12), torch.ones(2, 12, 12)
        whole[1, 6:] = 0
        expected = reference.model.get_image_features(square[:, None], whole[:, None]).pooler_output
        assert (ours.model.image_features(square, whole) - torch.stack(expected)).abs().max() < 1e-5
    with pytest.raises(ValueError, match="4 × 3 patches cannot be folded 2 × 2"):
        ours.model.image_features(pixels[..., :6])


@pytest.mark.parametrize(("counts", "kind"), list(zip(BATCHES.values(), itertools.cycle(ARCHITECTURES))), ids=BATCHES)
def test_logits_and_all_gradients(tmp_path, kind, counts):
    reference, ours = make_pair(tmp_path, kind)
    trained = check_logits_and_gradients(reference, ours, make_batch(ours.config, counts))
    for part in ("model.vision_model.encoder.layers.2.", "model.vision_model.post_layernorm.", "model.connector."):
        assert any(name.startswith(part) for name in trained) == (sum(counts) > 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(tmp_path, name):
    reference, ours = make_pair(tmp_path, **CONFIGS[name])
    assert ours.config.tokens_per_image == {"scale factor 3": 4, "scale factor 1": 36}.get(
        name, 9 - 5 * ("margin" in name)
    )
    check_logits_and_gradients(reference, ours, make_batch(ours.config, [2, 0, 1]))
    assert (ours.lm_head.weight is ours.model.text_model.embed_tokens.weight) == (name == "tied")


def test_packed_rows_equal_separate_rows(tmp_path):
    _, ours = make_pair(tmp_path)
    llava.check_packed_rows(ours)


def test_greedy_generation_is_token_identical(tmp_path):
    reference, ours = make_pair(tmp_path)
    llava.check_generation(reference, ours, lambda pixels: pixels[None])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_saved_folders_open_in_transformers(tmp_path, kind, tied):
    reference, ours = make_pair(tmp_path / "in", kind, tie_word_embeddings=tied)
    llava.check_written_back(tmp_path, ours, ARCHITECTURES[kind][0], make_batch(ours.config, [2, 0, 1]))


def test_a_model_without_a_checkpoint_is_saved_as_transformers_does(tmp_path):
    make_pair(tmp_path / "in")
    ours = llava.check_made(tmp_path, HFIdefics3, make_batch)
    theirs = HFIdefics3(HFIdefics3.config_class.from_pretrained(tmp_path / "in"))
    spreads = [{n: p.std().item() for n, p in model.named_parameters() if p.numel() > 500} for model in (ours, theirs)]
    assert spreads[0] == pytest.approx(spreads[1], rel=0.15)


@pytest.mark.parametrize("where", ["language", "vision and connector", "both towers and the head"])
def test_adapters_open_in_peft(tmp_path, where):
    reference, ours = make_pair(tmp_path / "base")
    targets = {
        "language": llava.language_layers(ours, "q_proj", "down_proj"),
        "vision and connector": ["vision_model.encoder.layers.0.self_attn.q_proj", "proj", "fc2"],
        "both towers and the head": ["q_proj", "lm_head"],
    }[where]
    adapted = llava.check_adapter_opens(tmp_path, reference, ours, targets, make_batch(ours.config, [2, 0, 1]))
    assert len(adapted) == {"language": 4, "vision and connector": 5, "both towers and the head": 6}[where]


def test_modes_in_both_towers_and_a_trained_connector(tmp_path):
    """A gradient that goes through the Llama blocks into the connector and a checkpointed vision tower."""
    _, ours = make_pair(tmp_path)
    names = llava.language_layers(ours, *ALL_LINEAR)
    add_lora(ours, rank=4, targets=["model.vision_model.encoder.layers.1.mlp.fc1", *names])
    llava.check_modes_in_both_towers(ours, make_batch(ours.config, [2, 0, 1]), trained=28 + 2 + 1)


def test_quantising_takes_the_blocks_of_both_towers(tmp_path):
    _, ours = make_pair(tmp_path)
    assert [*ours.vision_tower.blocks, *ours.language_model.blocks] == ours.blocks
    assert len(quantize_nf4(ours)) == 3 * 6 + 2 * 7


def test_published_configurations(tmp_path):
    """Idefics3-8B's text_config leaves the width out; the first SmolVLMs call their vision tower "idefics3"."""
    published = {"architectures": ["Idefics3ForConditionalGeneration"], "image_token_id": 128257, "scale_factor": 2}
    published["text_config"] = {"model_type": "llama", "vocab_size": 128259, "intermediate_size": 14336}
    published["vision_config"] = {"model_type": "idefics3", "image_size": 364, "patch_size": 14}
    published["vision_config"] |= {"num_hidden_layers": 27, "intermediate_size": 4304}
    config = SmolVLMConfig.from_dict(published)
    assert (config.text.hidden_size, config.text.num_attention_heads, config.vision.hidden_size) == (4096, 32, 1152)
    assert config.tokens_per_image == 169
    assert type(build_model(published)).__name__ == "SmolVLMForConditionalGeneration"


def test_bad_settings_are_named(tmp_path):
    make_pair(tmp_path)
    config = read_config(tmp_path)
    for bad, word in [
        (dict(vision_config=config["vision_config"] | dict(model_type="clip_vision_model")), "'clip_vision_model'"),
        (dict(text_config=config["text_config"] | dict(model_type="mistral")), "mistral"),
        (dict(scale_factor=4), "scale_factor 4 in config.json must divide the 6 rows"),
        (dict(image_token_id=97), "image_token_id 97"),
        (dict(vision_config=None), "vision_config: not a complete SmolVLM configuration"),
    ]:
        with pytest.raises(ValueError, match=word):
            build_model(config | bad)
