"""Without its adapters a model is its base, bit for bit; merged and unmerged it is what it was."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from modules.adapters.lora import add_lora
from modules.adapters.methods import METHODS, add_method
from modules.adapters.options import Options
from modules.adapters.switch import adapted_layers, adapters_disabled, base_layer, merge_adapters
from modules.adapters.token_rows import train_token_rows
from modules.adapters.vocabulary import grow_vocabulary
from modules.adapters.whole_modules import train_whole_modules
from modules.fused.blocks import why_plain
from modules.generation import generate
from modules.memory.activations import checkpoint_activations
from modules.memory.weight_streaming import stream_weights
from modules.quantization.quantize import linear_kind, quantize_blocks
from tests.models.test_llama import load, make_pair
from tests.modules.adapters.every_method import MERGEABLE, OWN_START, base_of, make, move
from tests.modules.adapters.peft_methods import adamw, ids, logits, train, trained

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12]]


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_disabled_is_the_base(tmp_path, name, nf4):
    model = make(tmp_path, name, nf4=nf4)
    started = logits(model)
    move(model)
    before = {key: p for key, p in model.named_parameters()}
    adapted, written = logits(model), generate(model, PROMPTS, max_new_tokens=8)
    model.train()
    state = torch.get_rng_state()
    with adapters_disabled(model):
        if name in OWN_START:  # exactly the start, which is the base up to rounding (over NF4, of the residual)
            reference = started
            assert nf4 or (logits(model) - logits(base_of(tmp_path, name, nf4))).abs().max() < 1e-5
        else:
            reference = logits(base_of(tmp_path, name, nf4))
            assert generate(model, PROMPTS, max_new_tokens=8) == generate(
                base_of(tmp_path, name, nf4), PROMPTS, max_new_tokens=8
            )
        assert torch.equal(logits(model), reference)
        assert not any(p.requires_grad for p in model.parameters())
        with pytest.raises(ValueError, match="no adapted layers"), adapters_disabled(model):
            pass
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training and not any(m.training for m in model.modules())  # `logits` has set it meanwhile
    assert torch.equal(logits(model), adapted) and (adapted - reference).abs().max() > 1e-2
    assert generate(model, PROMPTS, max_new_tokens=8) == written
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(p is after[key] for key, p in before.items())


@pytest.mark.parametrize(("name", "mode"), [("lora", "fast"), ("lora", "offload"), *((m, "lean") for m in METHODS)])
def test_reference_logits_between_steps(tmp_path, name, mode):
    """As DPO uses it: training goes on as without the look at the base, by the fused block where that is possible."""
    losses = []
    for look in (False, True):
        model = make(tmp_path / str(look), name)
        base = logits(base_of(tmp_path / str(look), name, False))
        checkpoint_activations(model, mode, fused=why_plain(model) is None)
        optimizer = adamw(model, 1e-2)
        losses.append(train(model, optimizer, steps=2))
        if look:
            with torch.no_grad(), adapters_disabled(model):
                assert (
                    (logits(model) - base).abs().max() < 1e-5 if name in OWN_START else torch.equal(logits(model), base)
                )
        losses[-1] += train(model, optimizer, steps=2)
    assert losses[0] == losses[1] and losses[0][-1] != losses[0][0]


def test_over_streamed_weights(tmp_path):
    make_pair(tmp_path)
    plain, model = load(tmp_path), load(tmp_path)
    base = logits(plain)
    weights = stream_weights(model.requires_grad_(False), torch.device("cpu"))
    add_lora(model, rank=4)
    for fused in (False, True):
        checkpoint_activations(model, "lean", bind=weights.use, fused=fused)
        train(model, adamw(model, 1e-2), steps=2)
        with torch.no_grad(), adapters_disabled(model):
            assert torch.equal(logits(model), base)
        assert (logits(model) - base).abs().max() > 1e-2
    with pytest.raises(ValueError, match="streamed weights cannot be merged"):
        merge_adapters(model)


def test_compiled_blocks_take_both_forms_without_compiling_again(tmp_path):
    model = make(tmp_path, "lora")
    move(model)
    base, adapted = logits(base_of(tmp_path, "lora", False)), logits(model)
    torch._dynamo.reset()
    counter = CompileCounter()
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    frames = []
    with torch.no_grad():
        for _ in range(4):
            assert (logits(model) - adapted).abs().max() < 1e-5
            with adapters_disabled(model):
                assert (logits(model) - base).abs().max() < 1e-5
            frames.append(counter.frame_count)
    assert frames[0] == frames[-1]


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("name", MERGEABLE)
def test_merge_and_unmerge(tmp_path, name, nf4):
    model = make(tmp_path, name, nf4=nf4)
    move(model)
    adapted = logits(model)
    before = {key: p.clone() if p.requires_grad else p for key, p in model.named_parameters()}
    merged = merge_adapters(model)
    assert (logits(model) - adapted).abs().max() < 1e-4
    assert not trained(model) and not any(hasattr(m, "base_class") for m in model.modules())
    model.train()
    merged.unmerge()
    assert model.training and all(m.training for m in model.modules())
    assert torch.equal(logits(model), adapted)
    for key, p in model.named_parameters():
        assert p is before[key] if not p.requires_grad else torch.equal(p, before[key]), key
    assert merge_adapters(model).unmerge() is None and torch.equal(logits(model), adapted)


ERRORS = {"nf4": (0.03, 0.15), "int8": (0.002, 0.01), "int4": (0.03, 0.15), "float8": (0.015, 0.04)}


@pytest.mark.parametrize(
    ("name", "base"), [*(("lora", base) for base in ERRORS), ("dora", "nf4"), ("pissa", "nf4"), ("ia3", "int8")]
)
def test_merging_into_a_quantised_base_reports_its_error(tmp_path, name, base):
    if base == "nf4":
        model = make(tmp_path, name, nf4=True)
    else:
        make_pair(tmp_path)
        model = load(tmp_path)
        quantize_blocks(model, linear_kind(base))
        add_method(model, name, Options(rank=4, alpha=8.0))
    move(model)
    adapted, layers = logits(model), adapted_layers(model)
    dense = {path: layer.merged().weight for path, layer in layers.items()}
    merged = merge_adapters(model, requantize=True)
    assert merged.errors.keys() == layers.keys()
    for path, error in merged.errors.items():
        layer, M = model.get_submodule(path), dense[path]
        assert type(layer) is linear_kind(base)
        W = base_layer(layers[path]).dense_weight()
        off = (layer.dense_weight() - M).norm()
        assert (
            error.of_weight == pytest.approx((off / M.norm()).item(), rel=1e-5)
            and ERRORS[base][0] < error.of_weight < ERRORS[base][1]
        )
        assert error.of_change == pytest.approx((off / (M - W).norm()).item(), rel=1e-4)
    assert 1e-3 < (logits(model) - adapted).abs().max()
    merged.unmerge()
    assert torch.equal(logits(model), adapted)


def test_a_tied_head_stays_tied(tmp_path):
    """Merged it stands alone; the embedding keeps the weight that both had."""
    make_pair(tmp_path, tie_word_embeddings=True)
    model = load(tmp_path)
    embedding = model.model.embed_tokens.weight
    add_method(model, "lora", Options(rank=4, targets=("lm_head", "q_proj")))
    move(model)
    adapted = logits(model)
    merged = merge_adapters(model, keep="host")
    assert model.model.embed_tokens.weight is embedding is not model.lm_head.weight
    assert (logits(model) - adapted).abs().max() < 1e-4
    merged.unmerge()
    assert model.lm_head.weight is embedding and torch.equal(logits(model), adapted)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_single_rows(tmp_path, tied):
    """An embedding with a LoRA; new tokens, whose rows the base keeps as they began."""
    make_pair(tmp_path, tie_word_embeddings=tied)
    model = load(tmp_path)
    base = logits(model)
    add_method(model, "lora", Options(rank=4, targets=("embed_tokens", "q_proj")))
    assert torch.equal(logits(model), base)
    rows = load(tmp_path)
    grow_vocabulary(rows, 99)
    add_method(rows, "lora", Options(rank=4, targets=("q_proj",)))
    train_token_rows(rows, [97, 98, 5])
    for adapted in (model, rows):
        move(adapted)
        before = logits(adapted)
        with adapters_disabled(adapted):
            assert torch.equal(logits(adapted)[..., :97], base)
        merged = merge_adapters(adapted)
        assert (logits(adapted) - before).abs().max() < 1e-4
        merged.unmerge()
        assert torch.equal(logits(adapted), before) and not torch.equal(before[..., :97], base)


def test_modules_trained_in_full_have_no_base(tmp_path):
    model = make(tmp_path, "lora")
    train_whole_modules(model, ["model.norm"])
    with pytest.raises(ValueError, match="model.norm are trained in full"), adapters_disabled(model):
        pass
    adapted = logits(model)
    merge_adapters(model).unmerge()
    assert torch.equal(logits(model), adapted)


@pytest.mark.gpu
@pytest.mark.parametrize("nf4", [False, True])
def test_originals_wait_in_host_memory(tmp_path, nf4):
    model = make(tmp_path, "lora", nf4=nf4).cuda()
    layer, before = model.blocks[0].mlp.up_proj, model.model(ids().cuda())
    merged = merge_adapters(model, keep="host")
    assert layer.weight.device.type == "cpu" and model.blocks[0].mlp.up_proj.weight.is_cuda
    merged.unmerge()
    assert layer.weight.is_cuda and torch.equal(model.model(ids().cuda()), before)
