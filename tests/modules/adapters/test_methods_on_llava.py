"""Every method in the language model of a LLaVA: images flow through it, the vision tower stays what it was."""

import pytest
import torch

from data.batches import Batch
from modules.adapters.lora import lora_layers
from modules.adapters.lora_set import LoRASet
from modules.adapters.methods import METHODS, add_method
from modules.adapters.options import Options
from modules.adapters.parts import tensors_of
from modules.adapters.peft_names import PREFIX
from modules.adapters.switch import adapters_disabled, merge_adapters
from modules.adapters.virtual_tokens import virtual_ids
from modules.attention import padded_layout
from modules.image_tokens import Images, place_images
from modules.loss import linear_cross_entropy
from modules.quantization.nf4 import NF4Linear
from tests.models.test_clip_vit import load
from tests.models.test_llava import IMAGE, make_pair, make_rows
from tests.modules.adapters.every_method import move


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    make_pair(path)
    return path


def make_batch(model, seed=1):
    """One row with two images behind the model's virtual tokens, all of its text trained."""
    ((row,), pixels) = make_rows([2], model.config.tokens_per_image, seed)
    ids = torch.tensor([[*virtual_ids(model.language_model), *row]])
    wanted = torch.where((ids >= model.config.vocab_size) | (ids == IMAGE), -100, ids)[0, 1:]
    index = (wanted != -100).nonzero().squeeze(1)
    images = place_images(ids, pixels, **sizes_of(model))
    return Batch(ids, padded_layout(ids.shape[1]), index, wanted[index]), images


def loss_of(model, batch, images):
    hidden = model(batch.input_ids, batch.layout, images=images)
    return linear_cross_entropy(hidden, model.lm_head, batch.targets, index=batch.target_index)


def bits(parameter):
    """Copies of all that a parameter consists of: 4-bit ones have inner tensors."""
    if not hasattr(parameter, "__tensor_flatten__"):
        return [parameter.detach().clone()]
    return [getattr(parameter, name).clone() for name in parameter.__tensor_flatten__()[0]]


@pytest.mark.parametrize("method", METHODS)
def test_trains_and_leaves_the_rest_alone(folder, method):
    model = load(folder).requires_grad_(False)
    text, _ = make_batch(model, seed=2)
    towers = [(name, type(m)) for name, m in model.named_modules() if model.part_of(name) != "language"]
    start = {name: bits(p) for name, p in model.named_parameters() if model.part_of(name) != "language"}
    torch.manual_seed(0)
    language = model.language_model
    quantize = NF4Linear if method == "loftq" else None
    add_method(language, method, Options(rank=4, num_virtual_tokens=3, batches=[text], quantize=quantize))
    model.lm_head = language.lm_head
    assert towers == [(name, type(m)) for name, m in model.named_modules() if model.part_of(name) != "language"]

    parameters = dict(model.named_parameters())
    frozen = {name: bits(p) for name, p in parameters.items() if not p.requires_grad}
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    assert start.keys() < frozen.keys() and trained
    batch, images = make_batch(model)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = loss_of(model, batch, images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, before in (start | frozen).items():
        assert all(map(torch.equal, before, bits(parameters[name]))), name
    # What it has learnt depends on the pictures that it was shown.
    swapped = Images(images.pixel_values.flip(0), images.positions)
    shown, other = (loss_of(model, batch, pictures).item() for pictures in (images, swapped))
    assert shown != pytest.approx(other, abs=1e-4)


@torch.no_grad()
def test_set_aside_merged_and_by_row(folder):
    """Adapters in the vision tower, too; in the language model by row."""
    base, model = load(folder), load(folder)
    batch, images = make_batch(base)
    both = place_images(batch.input_ids.repeat(2, 1), images.pixel_values.repeat(2, 1, 1, 1), **sizes_of(base))
    expected = base(batch.input_ids, images=images)
    add_method(model, "lora", Options(rank=4, targets=("q_proj", "up_proj", "fc1")))
    move(model)
    adapted = model(batch.input_ids, images=images)
    with adapters_disabled(model):
        assert torch.equal(model(batch.input_ids, images=images), expected)
    merged = merge_adapters(model)
    assert (model(batch.input_ids, images=images) - adapted).abs().max() < 1e-4
    merged.unmerge()
    assert torch.equal(model(batch.input_ids, images=images), adapted) and (adapted - expected).abs().max() > 0.1

    language = {name: layer for name, layer in lora_layers(model).items() if model.part_of(name) == "language"}
    settings = {name: {"rank": 4, "alpha": 8.0} for name in language}
    tensors = {key.removeprefix(PREFIX): p for key, p in tensors_of(language, "lora_").items()}
    adapters = LoRASet(load(folder))
    adapters.add("a", settings, tensors)
    with adapters.using(["a", None]):
        mixed = adapters.model(batch.input_ids.repeat(2, 1), images=both)
    adapters.use("a")
    alone = adapters.model(batch.input_ids, images=images)
    assert (mixed[:1] - alone).abs().max() < 1e-5 and (mixed[1:] - expected).abs().max() < 1e-5
    assert (alone - expected).abs().max() > 0.1


def sizes_of(model):
    return dict(image_token=model.config.image_token, tokens_per_image=model.config.tokens_per_image)
