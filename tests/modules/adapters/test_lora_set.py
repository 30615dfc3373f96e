"""Several adapters on one base: each row as if it were alone, training, adding, swapping, removing."""

import pytest
import torch
from peft import PeftModel
from torch._dynamo.testing import CompileCounter
from transformers import LlamaForCausalLM

from checkpointing.adapters import load_adapter, read_adapter
from modules.adapters.lora_set import LoRASet
from modules.adapters.switch import adapters_disabled
from modules.fused.blocks import why_plain
from modules.generation import generate
from modules.memory.activations import checkpoint_activations
from modules.memory.weight_streaming import stream_weights
from modules.quantization.nf4 import NF4Linear, quantize_nf4
from tests.models.test_llama import load, make_pair
from tests.modules.adapters.peft_methods import loss_of, make_adapter

ADAPTERS = {
    "a": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]),
    "b": dict(r=9, lora_alpha=3, target_modules="all-linear", use_rslora=True),
    "c": dict(r=2, lora_alpha=5, target_modules=["up_proj", "lm_head"], rank_pattern={"layers.1.mlp.up_proj": 6}),
}
ROWS = ["a", None, "b", "c", "a", "b"]
ROWS_OF_TWO = ["a", None, "b", "a", "a", "b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    reference, _ = make_pair(folder / "base")
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        make_adapter(folder / name, reference, seed, **settings)
    return folder


def make_set(folder, *, nf4=False, names="abc"):
    model = load(folder / "base").eval()
    if nf4:
        quantize_nf4(model)
    adapters = LoRASet(model)
    for name in names:
        adapters.add(name, *read_adapter(folder / name))
    return model, adapters


def alone(folder, name, *, nf4=False):
    model = load(folder / "base").eval()
    if nf4:
        quantize_nf4(model)
    if name:
        load_adapter(model, folder / name)
    return model


def tokens(rows=6):
    return torch.randint(0, 97, (rows, 20), generator=torch.Generator().manual_seed(7))


def outputs(model, ids):
    return model.logits(model(ids))


@pytest.mark.parametrize("nf4", [False, True])
def test_every_row_is_as_if_alone(folder, nf4):
    model, adapters = make_set(folder, nf4=nf4)
    singles = {name: alone(folder, name, nf4=nf4) for name in dict.fromkeys(ROWS)}
    with adapters.using(ROWS):
        mixed = outputs(model, tokens())
    for i, name in enumerate(ROWS):
        expected = outputs(singles[name], tokens()[i : i + 1])[0]
        assert (mixed[i] - expected).abs().max() < 1e-5
        assert name is None or (expected - outputs(singles[None], tokens()[i : i + 1])[0]).abs().max() > 0.1
    for name in "abc":  # the whole batch with one
        adapters.use(name)
        assert torch.equal(outputs(model, tokens()), outputs(singles[name], tokens()))
        adapters.use([name] * 6)
        assert torch.equal(outputs(model, tokens()), outputs(singles[name], tokens()))
    adapters.use(None)
    assert torch.equal(outputs(model, tokens()), outputs(singles[None], tokens()))


def test_peft_computes_the_same_batch(folder):
    reference = LlamaForCausalLM.from_pretrained(folder / "base")
    theirs = PeftModel.from_pretrained(reference, folder / "a", adapter_name="a").eval()
    theirs.load_adapter(folder / "b", adapter_name="b")
    rows = ["a", None, "b", "b"]
    model, adapters = make_set(folder, names="ab")
    with adapters.using(rows), torch.no_grad():
        expected = theirs(tokens(4), adapter_names=[row or "__base__" for row in rows]).logits
        assert (outputs(model, tokens(4)) - expected).abs().max() < 1e-5


def test_what_was_added_can_be_had_back(folder):
    _, adapters = make_set(folder)
    for name in "abc":
        (settings, tensors), (wanted, saved) = adapters.get(name), read_adapter(folder / name)
        assert settings.keys() == wanted.keys() and tensors.keys() == saved.keys()
        for path, setting in settings.items():
            assert setting["rank"] == wanted[path]["rank"]
            assert setting["alpha"] == pytest.approx(wanted[path]["alpha"], rel=1e-12)
        assert all(torch.equal(tensor, saved[key]) for key, tensor in tensors.items())


def test_generation_is_token_identical(folder):
    model, adapters = make_set(folder)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [3], [20, 21], [5, 6, 7], [60, 61, 62, 63]]
    with adapters.using(ROWS):
        mixed = generate(model, prompts, max_new_tokens=16)
    singles = {name: alone(folder, name) for name in dict.fromkeys(ROWS)}
    for name, prompt, written in zip(ROWS, prompts, mixed, strict=True):
        assert generate(singles[name], [prompt], max_new_tokens=16) == [written]
    assert mixed[0] != generate(singles[None], prompts[:1], max_new_tokens=16)[0]


def test_each_adapter_learns_from_its_own_rows(folder):
    """Gradients of a mixed batch: those of each adapter's rows alone."""
    rows = ["a", "b", "a", "b"]
    model, adapters = make_set(folder, names="ab")
    for layer in adapters.layers.values():
        layer.lora_A.requires_grad_(True), layer.lora_B.requires_grad_(True)
    with adapters.using(rows):
        loss_of(model, tokens(4)).backward()
    for name in "ab":
        single = alone(folder, name)
        (loss_of(single, tokens(4)[[row == name for row in rows]]) / 2).backward()
        gradients = {key: p.grad for key, p in single.named_parameters() if p.requires_grad}
        for key, gradient in gradients.items():
            path, which = key.removesuffix(".weight").rsplit(".", 1)
            got = getattr(model.get_submodule(path), which)[name].weight.grad
            torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-6)
    assert "self_attn.q_proj is a ManyLoRALinear" in why_plain(model)
    model.zero_grad()
    checkpoint_activations(model, "lean")
    with adapters.using(rows):
        loss_of(model, tokens(4)).backward()
    torch.testing.assert_close(got, model.get_submodule(path).lora_B["b"].weight.grad, rtol=1e-4, atol=1e-6)


def test_hot_swap(folder):
    model, adapters = make_set(folder, names="a")
    adapters.use("a")
    settings, tensors = read_adapter(folder / "a")
    layer = model.blocks[0].mlp.down_proj
    kept, place = layer.lora_A["a"].weight, layer.lora_A["a"].weight.data_ptr()
    adapters.replace("a", settings, {name: 2 * t for name, t in tensors.items()})  # the same rank: in place
    assert layer.lora_A["a"].weight is kept and kept.data_ptr() == place
    assert torch.equal(kept, 2 * tensors["model.layers.0.mlp.down_proj.lora_A.weight"])
    for name in "bca":  # other ranks, other layers
        adapters.replace("a", *read_adapter(folder / name))
        assert torch.equal(outputs(model, tokens()), outputs(alone(folder, name), tokens()))
    assert set(adapters.layers) == set(settings)

    before, (settings, tensors) = outputs(model, tokens()), read_adapter(folder / "b")
    wrong = tensors | {"model.layers.1.mlp.up_proj.lora_B.weight": torch.zeros(7, 9)}
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj \(A \(9, 48\), B \(7, 9\), layer \(80, 48\)\)"):
        adapters.replace("a", settings, wrong)
    with pytest.raises(ValueError, match="no adapter 'x'; there are a"):
        adapters.replace("x", settings, tensors)
    assert torch.equal(outputs(model, tokens()), before)


def test_over_streamed_weights(folder):
    """The blocks' weights come and go by name, whatever layer has them."""
    model = load(folder / "base").requires_grad_(False).eval()
    stream_weights(model, torch.device("cpu"))
    adapters = LoRASet(model)
    for name in "ab":
        adapters.add(name, *read_adapter(folder / name))
    plain, expected = make_set(folder, names="ab")
    with torch.no_grad(), adapters.using(ROWS_OF_TWO), expected.using(ROWS_OF_TWO):
        assert torch.equal(outputs(model, tokens()), outputs(plain, tokens()))
    for name in "ab":
        adapters.remove(name)
    with torch.no_grad():
        assert torch.equal(outputs(model, tokens()), outputs(alone(folder, None), tokens()))


def test_a_swap_of_the_same_rank_compiles_nothing_again(folder):
    model, adapters = make_set(folder, names="ab")
    torch._dynamo.reset()
    counter = CompileCounter()
    model.blocks[0].compile(backend=counter, fullgraph=True)
    settings, tensors = read_adapter(folder / "a")
    frames = []
    with torch.no_grad():
        for factor in (1, 3, 5):
            swapped = {name: factor * tensor for name, tensor in tensors.items()}
            adapters.replace("a", settings, swapped)
            with adapters.using(ROWS_OF_TWO):
                compiled = outputs(model, tokens())
            frames.append(counter.frame_count)
            plain = LoRASet(load(folder / "base").eval())
            plain.add("a", settings, swapped)
            plain.use("a")
            assert (compiled[3] - outputs(plain.model, tokens()[3:4])[0]).abs().max() < 1e-4
    assert frames[0] == frames[-1] > 0


@pytest.mark.parametrize("nf4", [False, True])
def test_removed_adapters_leave_the_base(folder, nf4):
    model, adapters = make_set(folder, nf4=nf4)
    base = alone(folder, None, nf4=nf4)
    adapters.use("b")
    with pytest.raises(ValueError, match="'b' is in use"):
        adapters.remove("b")
    with adapters_disabled(model):
        assert torch.equal(outputs(model, tokens()), outputs(base, tokens()))
    adapters.use("a")
    adapters.remove("b")
    assert torch.equal(outputs(model, tokens()), outputs(alone(folder, "a", nf4=nf4), tokens()))
    adapters.use(None)
    for name in "ac":
        adapters.remove(name)
    kind = NF4Linear if nf4 else torch.nn.Linear
    assert not adapters.layers and not adapters.names and type(model.blocks[0].mlp.up_proj) is kind
    assert dict(model.named_parameters()).keys() == dict(base.named_parameters()).keys()
    assert torch.equal(outputs(model, tokens()), outputs(base, tokens()))


def test_mistakes_are_explained(folder):
    model, adapters = make_set(folder, names="a")
    settings, tensors = read_adapter(folder / "b")
    for call, words in [
        (lambda: adapters.add("a", settings, tensors), "'a' already"),
        (lambda: adapters.add("a.b", settings, tensors), "'a.b' cannot name"),
        (lambda: adapters.use(["a", "x"]), "no adapter 'x'; there are a"),
        (lambda: adapters.remove("x"), "no adapter 'x'"),
        (lambda: LoRASet(model), "has an adapter already"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    renamed = {key.replace("layers.1", "layers.7"): value for key, value in settings.items()}
    of_other = {key.replace("layers.1", "layers.7"): value for key, value in tensors.items()}
    with pytest.raises(ValueError, match=r"layers.7.mlp.down_proj \(no such linear layer\)"):
        adapters.add("b", renamed, of_other)
    of_embedding = {"model.embed_tokens.lora_embedding_A": torch.zeros(2, 97)}
    of_embedding["model.embed_tokens.lora_embedding_B"] = torch.zeros(48, 2)
    with pytest.raises(ValueError, match=r"model.embed_tokens \(an embedding"):
        adapters.add("e", {"model.embed_tokens": {"rank": 2, "alpha": 2}}, of_embedding)
    with adapters.using(["a", None]), pytest.raises(ValueError, match="3 rows, adapters are named for 2"):
        outputs(model, tokens(3))
    assert adapters.names == ["a"] and set(adapters.layers) == set(read_adapter(folder / "a")[0])
