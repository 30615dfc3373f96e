"""LLaVA against transformers and peft: logits, all gradients, generation, the folders in the wild, adapters."""

import itertools
import json
from operator import call

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig
from transformers import LlavaConfig as HFConfig
from transformers import LlavaForConditionalGeneration as HFLlava

from checkpointing.adapters import load_adapter, save_adapter
from checkpointing.export import save_model
from checkpointing.pretrained import read_config
from models import build_model
from models.llama import LlamaForCausalLM
from models.llava import PRESETS, LlavaConfig
from modules.adapters.lora import ALL_LINEAR, add_lora
from modules.attention import packed_layout
from modules.fused.blocks import disagreement, why_plain
from modules.generation import generate
from modules.image_tokens import place_images, put_features
from modules.loss import linear_cross_entropy
from modules.memory.activations import MODES, checkpoint_activations
from modules.quantization.nf4 import quantize_nf4
from tests.models.test_clip_vit import TINY as VISION
from tests.models.test_clip_vit import load, randomize
from tests.models.test_llama import TINY

IMAGE = 90
TEXT = TINY | dict(max_position_embeddings=128)
CONFIGS = {
    "plain": {},
    "full": dict(vision_feature_select_strategy="full"),
    "last layer": dict(vision_feature_layer=-1),
    "list of layers": dict(vision_feature_layer=[-3, 3, -2]),
    "list of layers, full": dict(vision_feature_layer=[1], vision_feature_select_strategy="full"),
    "embeddings only": dict(vision_feature_layer=[0]),
    "other projector": dict(projector_hidden_act="gelu_pytorch_tanh", multimodal_projector_bias=False),
    "tied": dict(tie_word_embeddings=True),
}
# How many images each row of a batch has.
BATCHES = {
    "one image": [1],
    "one image each": [1, 1, 1],
    "several images": [3],
    "unequal counts": [2, 0, 1],
    "text only": [0, 0],
}


def make_pair(folder, **overrides):
    """A random transformers model, and ours loaded from the folder that it wrote."""
    torch.manual_seed(0)
    towers = dict(vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT))
    config = HFConfig(**towers, image_token_index=IMAGE, **overrides)
    reference = randomize(HFLlava(config))
    reference.generation_config.eos_token_id = None
    reference.save_pretrained(folder)
    return reference, load(folder)


def make_rows(counts, tokens_per_image, seed=1):
    """Rows of random text with images in them, of unequal length, and the images' pixels (None without images)."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for b, count in enumerate(counts):
        row = torch.randint(1, IMAGE, (3 + b,), generator=generator).tolist()
        for _ in range(count):
            row += [IMAGE] * tokens_per_image + torch.randint(1, IMAGE, (2,), generator=generator).tolist()
        rows.append(row)
    pixels = torch.randn(sum(counts), 3, VISION["image_size"], VISION["image_size"], generator=generator)
    return rows, pixels if sum(counts) else None


def make_batch(config, counts, seed=1):
    """(ids [B, T], real tokens [B, T], pixel values, our Images)."""
    rows, pixels = make_rows(counts, config.tokens_per_image, seed)
    ids, real = (torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long) for _ in range(2))
    for b, row in enumerate(rows):
        ids[b, : len(row)], real[b, : len(row)] = torch.tensor(row), 1
    where = dict(image_token=config.image_token, tokens_per_image=config.tokens_per_image)
    images = place_images(ids, pixels, **where)
    by_rows = place_images(rows, pixels, **where)
    assert images is by_rows is None or torch.equal(images.positions, by_rows.positions)
    return ids, real, pixels, images


def targets_of(ids, real):
    targets = torch.where((real == 1) & (ids != IMAGE), ids, -100)
    return torch.cat([targets[:, 1:], torch.full((len(ids), 1), -100)], dim=1), targets


def loss_of(model, batch):
    ids, real, _, images = batch
    targets, _ = targets_of(ids, real)
    return linear_cross_entropy(model(ids, images=images), model.lm_head, targets) / (targets >= 0).sum()


def difference(ours, reference, batch):
    """Largest difference of the logits of real tokens."""
    ids, real, pixels, images = batch
    with torch.no_grad():
        expected = reference(input_ids=ids, attention_mask=real, pixel_values=pixels).logits
        return (ours.logits(ours(ids, images=images)) - expected)[real == 1].abs().max()


def check_logits_and_gradients(reference, ours, batch):
    ids, real, pixels, _ = batch
    assert difference(ours, reference, batch) < 1e-5
    expected = reference(input_ids=ids, attention_mask=real, pixel_values=pixels, labels=targets_of(ids, real)[1]).loss
    loss = loss_of(ours, batch)
    assert abs(loss - expected) < 1e-5
    loss.backward()
    expected.backward()
    wanted = {n: p.grad for n, p in reference.named_parameters()}
    got = {n: p.grad for n, p in ours.named_parameters()}
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        if gradient is None or got[name] is None:
            assert gradient is got[name], name
        else:
            # Keys' biases move all scores of a query alike: their gradient is 0 but for rounding.
            assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6 * ("k_proj.bias" in name), name
    return {name for name, gradient in got.items() if gradient is not None}


@pytest.mark.parametrize("counts", BATCHES.values(), ids=BATCHES)
def test_logits_and_all_gradients(tmp_path, counts):
    reference, ours = make_pair(tmp_path)
    trained = check_logits_and_gradients(reference, ours, make_batch(ours.config, counts))
    for part in ("model.vision_tower.encoder.layers.1.", "model.multi_modal_projector."):
        assert any(name.startswith(part) for name in trained) == (sum(counts) > 0)
    assert not any(name.startswith("model.vision_tower.encoder.layers.2.") for name in trained)  # -2 is the default


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(tmp_path, name):
    reference, ours = make_pair(tmp_path, **CONFIGS[name])
    assert ours.config.tokens_per_image == 9 + ("full" in name)
    check_logits_and_gradients(reference, ours, make_batch(ours.config, [2, 0, 1]))
    assert (ours.lm_head.weight is ours.model.language_model.embed_tokens.weight) == (name == "tied")


def check_packed_rows(ours):
    (a, b, c), pixels = make_rows([1, 0, 2], 9)
    where = dict(image_token=IMAGE, tokens_per_image=9)
    layout = packed_layout([[len(a), len(b), len(c)]], len(a + b + c) + 3).prepare(torch.device("cpu"), torch.float32)
    ids = torch.tensor([a + b + c + [0] * 3])
    packed = ours(ids, layout, images=place_images(ids, pixels, **where))[0]
    start = 0
    for row, part in ((a, pixels[:1]), (b, None), (c, pixels[1:])):
        alone = ours(torch.tensor([row]), images=place_images([row], part, **where))[0]
        assert (packed[start : start + len(row)] - alone).abs().max() < 1e-5
        start += len(row)


def test_packed_rows_equal_separate_rows(tmp_path):
    _, ours = make_pair(tmp_path)
    check_packed_rows(ours)


def check_generation(reference, ours, as_theirs=lambda pixels: pixels):
    """48 tokens, prompts of unequal length and with 1, 0 and 2 images in one batch, with and without cache."""
    rows, pixels = make_rows([1, 0, 2], 9)
    expected = []
    for row, part in zip(rows, (pixels[:1], None, pixels[1:]), strict=True):
        ids = torch.tensor([row])
        more = {} if part is None else {"pixel_values": as_theirs(part)}
        out = reference.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False, **more
        )
        expected.append(out[0, len(row) :].tolist())
    images = place_images(rows, pixels, image_token=IMAGE, tokens_per_image=9)
    assert generate(ours, rows, max_new_tokens=48, images=images) == expected
    assert generate(ours, rows, max_new_tokens=48, images=images, use_cache=False) == expected
    swapped = place_images(rows, pixels.flip(0), image_token=IMAGE, tokens_per_image=9)
    assert generate(ours, rows, max_new_tokens=48, images=swapped) != expected  # the images matter


def test_greedy_generation_is_token_identical(tmp_path):
    check_generation(*make_pair(tmp_path))


# Prefixes in memory → on disk, written down here a second time: a mistake in models/llava.py must not cancel out.
ON_DISK = {
    "hub": [
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ],
    "4.5x": [("model.vision_tower.", "model.vision_tower.vision_model.")],
    "state dict": [],
}


def rename(tensors, table):
    renamed = {}
    for name, tensor in tensors.items():
        ours, theirs = next(((a, b) for a, b in table if name.startswith(a)), ("", ""))
        renamed[theirs + name.removeprefix(ours)] = tensor
    return renamed


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["5.23", *ON_DISK])
def test_layouts_are_read_and_written_back(tmp_path, kind, tied):
    reference, _ = make_pair(tmp_path / "in", tie_word_embeddings=tied)
    if kind != "5.23":
        tensors = {n: p.detach().clone() for n, p in reference.named_parameters()}  # a tied head is not among them
        save_file(rename(tensors, ON_DISK[kind]), tmp_path / "in/model.safetensors", metadata={"format": "pt"})
    ours = load(tmp_path / "in")
    batch = make_batch(ours.config, [2, 0, 1])
    assert difference(ours, reference, batch) < 1e-5
    check_written_back(tmp_path, ours, HFLlava, batch)


def check_written_back(tmp_path, ours, oracle, batch):
    """From "in", whose weights it has, to "out": the same file, which transformers opens."""
    (tmp_path / "out").mkdir()
    save_model(tmp_path / "out", ours, config=read_config(tmp_path / "in"), source=tmp_path / "in")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    opened, report = oracle.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert difference(ours, opened, batch) < 1e-5


def test_a_model_without_a_checkpoint_is_saved_as_transformers_does(tmp_path):
    make_pair(tmp_path / "in")
    check_made(tmp_path, HFLlava, make_batch)


def check_made(tmp_path, oracle, make_batch):
    ours = build_model(read_config(tmp_path / "in")).to_empty(device="cpu")
    ours.init_weights(torch.Generator().manual_seed(0))
    (tmp_path / "out").mkdir()
    save_model(tmp_path / "out", ours, config=read_config(tmp_path / "in"), source=tmp_path / "in")
    names = [load_file(tmp_path / folder / "model.safetensors").keys() for folder in ("in", "out")]
    assert names[0] == names[1]
    assert difference(ours, oracle.from_pretrained(tmp_path / "out"), make_batch(ours.config, [1])) < 1e-5
    return ours


def test_one_error_lists_everything_in_the_folders_own_names(tmp_path):
    reference, _ = make_pair(tmp_path)
    tensors = rename({n: p.detach().clone() for n, p in reference.named_parameters()}, ON_DISK["hub"])
    del tensors["language_model.lm_head.weight"], tensors["vision_tower.vision_model.pre_layrnorm.bias"]
    tensors["model.image_newline"] = torch.zeros(48)
    tensors["multi_modal_projector.linear_1.bias"] = torch.zeros(5)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    missing, unused, misshaped = str(error.value).partition("config.json: ")[2].split("; ")
    assert missing.startswith("2 missing: ")
    assert set(missing.removeprefix("2 missing: ").split(", ")) == {
        "language_model.lm_head.weight",
        "vision_tower.vision_model.pre_layrnorm.bias",
    }
    assert unused == "1 not used by this model: model.image_newline"
    assert misshaped == "1 of another shape: multi_modal_projector.linear_1.bias: (5,), expected (48,)"


def language_layers(model, *short):
    """Full names of the Llama's layers: q_proj alone would match the vision tower's, too."""
    names = [name for name, _ in model.named_modules() if model.part_of(name) == "language"]
    return [name for name in names if name.rpartition(".")[2] in short]


def randomize_adapters(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0.0, 0.1, generator=generator)


def check_adapter_opens(tmp_path, reference, ours, targets, batch):
    """In peft and here; returns what is adapted."""
    adapted = set(add_lora(ours, rank=4, alpha=12.0, targets=targets))
    randomize_adapters(ours)
    save_adapter(tmp_path / "adapter", ours, base=str(tmp_path / "base"))
    opened = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter")
    theirs = {n.removeprefix("base_model.model.") for n, m in opened.named_modules() if hasattr(m, "lora_A")}
    assert theirs == adapted
    assert difference(ours, opened, batch) < 1e-5
    assert difference(load(tmp_path / "base"), opened, batch) > 1e-2  # the adapter does something
    again = load(tmp_path / "base")
    assert set(load_adapter(again, tmp_path / "adapter")) == adapted
    assert difference(again, opened, batch) < 1e-5
    return adapted


@pytest.mark.parametrize("where", ["language", "vision and projector", "both towers and the head"])
def test_adapters_open_in_peft(tmp_path, where):
    reference, ours = make_pair(tmp_path / "base")
    targets = {
        "language": language_layers(ours, "q_proj", "down_proj"),
        "vision and projector": ["vision_tower.encoder.layers.0.self_attn.q_proj", "linear_1", "fc2"],
        "both towers and the head": ["q_proj", "lm_head"],
    }[where]
    check_adapter_opens(tmp_path, reference, ours, targets, make_batch(ours.config, [2, 0, 1]))


@pytest.mark.parametrize("targets", [["q_proj", "linear_2"], r".*language_model.*\.(q|v|down)_proj"])
def test_adapters_of_peft_open_here(tmp_path, targets):
    reference, ours = make_pair(tmp_path / "base")
    theirs = peft.get_peft_model(reference, peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets))
    randomize_adapters(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    adapted = load_adapter(ours, tmp_path / "adapter")
    assert len(adapted) == (2 + 3 + 1 if isinstance(targets, list) else 6)
    assert difference(ours, theirs, make_batch(ours.config, [2, 0, 1])) < 1e-5


def test_short_target_adapts_both_towers_and_full_names_one(tmp_path):
    _, ours = make_pair(tmp_path)
    assert len(add_lora(ours, targets=["q_proj"])) == 3 + 2
    save_adapter(tmp_path / "both", ours, base="base")
    _, ours = make_pair(tmp_path)
    names = add_lora(ours, targets=language_layers(ours, "q_proj", "gate_proj"))
    save_adapter(tmp_path / "one", ours, base="base")
    written = [
        json.loads((tmp_path / f / "adapter_config.json").read_text())["target_modules"] for f in ("both", "one")
    ]
    assert written == [["q_proj"], sorted(names)]


@pytest.mark.parametrize("nf4", [False, True])
def test_modes_in_both_towers_and_a_trained_projector(tmp_path, nf4):
    """A gradient that goes through the Llama blocks into the projector and a checkpointed vision tower."""
    _, ours = make_pair(tmp_path)
    if nf4:
        assert len(quantize_nf4(ours.language_model)) == 14
    add_lora(ours, rank=4, targets=["q_proj", *language_layers(ours, *ALL_LINEAR)])
    check_modes_in_both_towers(ours, make_batch(ours.config, [2, 0, 1]), trained=28 + 4 + 2 * 2)


def check_modes_in_both_towers(ours, batch, trained):
    ours.projector.requires_grad_(True)
    randomize_adapters(ours)
    assert why_plain(ours.language_model) is disagreement(ours.language_model) is None
    gradients = []
    for mode, fused in [(None, False), *itertools.product(MODES, (False, True))]:
        if mode:
            checkpoint_activations(ours.language_model, mode, fused=fused)
            checkpoint_activations(ours.vision_tower, mode)
            assert ours.vision_tower.run_block is not call
            assert ours.language_model.model.run_block is not call
        ours.zero_grad()
        loss_of(ours, batch).backward()
        gradients.append({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[-1].keys() and len(gradients[0]) == trained
        for name, gradient in gradients[0].items():
            assert (gradients[-1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_the_language_model_is_our_llama_and_shares_its_modules(tmp_path):
    _, ours = make_pair(tmp_path)
    llama = ours.language_model
    assert type(llama) is LlamaForCausalLM and llama.model is ours.model.language_model
    ids = make_batch(ours.config, [0, 0])[0]
    assert torch.equal(llama(ids), ours(ids))
    assert [*ours.vision_tower.blocks, *llama.blocks] == ours.blocks
    assert len(quantize_nf4(ours)) == 3 * 6 + 2 * 7


def test_wrong_numbers_of_images_are_named(tmp_path):
    _, ours = make_pair(tmp_path)
    rows, pixels = make_rows([1, 2], 9)
    where = dict(image_token=IMAGE, tokens_per_image=9)
    for wrong, features in ((pixels[:2], 18), (torch.cat([pixels, pixels]), 54), (None, 0)):
        with pytest.raises(ValueError, match=f"27 image tokens .* {features} features"):
            place_images(rows, wrong, **where)
    with pytest.raises(ValueError, match="0 image tokens"):
        place_images([[1, 2]], pixels, **where)
    images = place_images(rows, pixels, **where)
    with pytest.raises(ValueError, match="2 images make 18 features, expected 27"):
        put_features(torch.zeros(2, 40, 48), torch.zeros(2, 9, 48), images.positions)


def test_bad_settings_are_named(tmp_path):
    make_pair(tmp_path)
    config = read_config(tmp_path)
    for bad, word in [
        (dict(vision_config=config["vision_config"] | dict(model_type="siglip_vision_model")), "siglip_vision_model"),
        (dict(text_config=config["text_config"] | dict(model_type="mistral")), "mistral"),
        (dict(projector_hidden_act="mish"), "projector_hidden_act 'mish'"),
        (dict(vision_feature_layer=-5), r"vision_feature_layer \[-5\].* 0 to 3"),
        (dict(vision_feature_layer=[-2, 4]), r"\[-2, 4\]"),
        (dict(vision_feature_layer=[]), "vision_feature_layer"),
        (dict(vision_feature_select_strategy="patch"), "patch"),
        (dict(image_token_index=97), "image_token_index 97"),
        (dict(text_config=None), "text_config"),
        (dict(architectures=["LlavaNextForConditionalGeneration"]), "LlavaNextFor.* supported: .*LlavaForConditional"),
    ]:
        with pytest.raises(ValueError, match=word):
            build_model(config | bad)


def test_published_configurations_leave_defaults_out():
    """config.json of llava-hf/llava-1.5-7b-hf names neither the Llama's width nor the projector's bias."""
    published = {"architectures": ["LlavaForConditionalGeneration"], **PRESETS["llava-1.5-7b"], "ignore_index": -100}
    published |= {"projector_hidden_act": "gelu", "vision_feature_select_strategy": "default"}
    config = LlavaConfig.from_dict(published | {"vision_feature_layer": -2})
    assert (config.text.hidden_size, config.text.num_hidden_layers, config.projector_bias) == (4096, 32, True)
    assert config == LlavaConfig.from_dict(published)
    tied_below = published | {"text_config": published["text_config"] | {"tie_word_embeddings": True}}
    assert LlavaConfig.from_dict(tied_below).tie_word_embeddings is HFConfig(**tied_below).tie_word_embeddings is True
    hub = HFConfig(**published)
    assert config.text.intermediate_size == hub.text_config.intermediate_size
    assert config.vision.hidden_act == hub.vision_config.hidden_act == "quick_gelu"
