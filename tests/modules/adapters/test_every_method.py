"""What every method of the table has to keep, a new one without a line here: the start, the frozen weights, NF4, every
way to keep activations, compile, packing, streaming, bfloat16, resume. (Without its adapter and merged: test_switch.py;
by the recipe: tests/recipes/test_peft_finetune.py.)
"""

import copy
from pathlib import Path

import pytest
import torch

from checkpointing.training_state import load_training_state, save_training_state
from modules.adapters.methods import METHODS, add_method, check_options, find_method, read_by
from modules.adapters.options import Options
from modules.attention import packed_layout
from modules.fused.blocks import disagreement, why_plain
from modules.generation import generate
from modules.memory.activations import MODES, checkpoint_activations
from modules.memory.weight_streaming import stream_weights
from modules.quantization.nf4 import quantize_nf4
from tests.models.test_llama import make_pair
from tests.modules.adapters.every_method import OWN_START, WITH_NETWORKS, base_of, inner, make, move, optimizer_of
from tests.modules.adapters.peft_methods import adamw, behind_virtual, hidden_of, ids, logits, loss_of, train, trained

CPU = torch.device("cpu")
FUSED = ("lora", "rslora", "lora-plus", "lora-fa", "pissa", "olora", "loftq", "eva")  # what the fused block computes
VIRTUAL = ("prompt", "p-tuning", "p-tuning lstm", "prefix", "prefix mlp")
READS_THE_WEIGHTS = ("dora", "pissa", "olora", "loftq", "eva")  # needs them, or the batches, when it is added


@pytest.mark.parametrize("name", [name for name in METHODS if name not in (*VIRTUAL, "loftq")])
def test_starts_at_the_base(tmp_path, name):
    deviation = (logits(make(tmp_path, name)) - logits(base_of(tmp_path, name))).abs().max()
    assert 0 < deviation < 1e-5 if name in OWN_START else deviation == 0  # W - s · B A + s · B A rounds


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_trains_its_own_and_nothing_else(tmp_path, name, nf4):
    model, base = make(tmp_path, name, nf4=nf4), base_of(tmp_path, name, nf4)
    quantized = [key for key, p in model.named_parameters() if hasattr(p, "quantized_data")]
    assert len(quantized) == (14 if nf4 or name == "loftq" else 0)
    mine = set(trained(model))
    frozen = {key: p for key, p in model.named_parameters() if key not in mine}
    for key, p in base.named_parameters():  # all of them are there, frozen; PiSSA's and OLoRA's residual is another one
        assert torch.equal(inner(frozen[key]), inner(p)) or name in OWN_START, key
    before = {key: inner(p).clone() for key, p in model.named_parameters()} | dict(model.named_buffers())
    before = {key: tensor.clone() for key, tensor in before.items()}
    losses = train(model, optimizer_of(model), steps=8)
    assert mine and min(losses[4:]) < losses[0]
    for key, p in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(inner(p), before[key]) == (key not in mine), key


@pytest.mark.slow(1)
@pytest.mark.parametrize("name", WITH_NETWORKS)
def test_every_mode_trains_the_same(tmp_path, name):
    """Gradients after two steps, by the plain modules and by the fused block where the method allows that."""
    gradients = {}
    for mode in MODES:
        for fused in (False, True):
            model = make(tmp_path / mode / str(fused), name)
            train(model, optimizer_of(model), steps=2)
            if fused and why_plain(model):
                continue
            assert not fused or disagreement(model) is None
            checkpoint_activations(model, mode, fused=fused)
            loss_of(model, ids()).backward()
            gradients[mode, fused] = {key: p.grad for key, p in trained(model).items()}
    assert len(gradients) == (2 if name in FUSED else 1) * len(MODES)
    for (_, fused), other in gradients.items():
        for key, gradient in gradients["none", False].items():
            assert gradient.abs().max() > 0, key
            tolerance = dict(rtol=1e-3, atol=1e-5) if fused else dict(rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(other[key], gradient, **tolerance)


@pytest.mark.slow(1)
@pytest.mark.parametrize("name", WITH_NETWORKS)
def test_compiles_in_one_graph(tmp_path, name):
    model = make(tmp_path, name)
    train(model, optimizer_of(model), steps=2)
    plain = loss_of(model, ids())
    plain.backward()
    gradients = {key: p.grad.clone() for key, p in trained(model).items()}
    model.zero_grad()
    torch._dynamo.reset()
    model.blocks[0].compile(backend="aot_eager", fullgraph=True)
    compiled = loss_of(model, ids())
    compiled.backward()
    assert abs(compiled - plain) < 1e-5
    for key, p in trained(model).items():
        torch.testing.assert_close(p.grad, gradients[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("name", WITH_NETWORKS)
def test_packed_equals_unpacked(tmp_path, name, nf4):
    model = make(tmp_path, name, nf4=nf4)
    move(model)
    model.eval()
    rows = [behind_virtual(model, part[None])[0] for part in ids()[0].split([8, 12])]
    lengths = [len(row) for row in rows]
    padded = torch.cat([*rows, torch.zeros(5, dtype=torch.long)])
    packed = model(padded[None], packed_layout([lengths], len(padded)).prepare(CPU, torch.float32))[0, :-5]
    for row, part in zip(rows, packed.split(lengths), strict=True):
        assert (model(row[None])[0] - part).abs().max() < 1e-5


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("name", WITH_NETWORKS)
def test_resumes_bit_for_bit(tmp_path, name, nf4):
    """Weights, optimizer and dropout's randomness; of what is drawn at the start only the seed need be the same."""
    model = make(tmp_path / "base", name, nf4=nf4, dropout=0.1)
    optimizer = optimizer_of(model)
    torch.manual_seed(5)
    train(model, optimizer, steps=3)
    save_training_state(tmp_path / "state", parameters=trained(model), optimizer=optimizer, progress={"step": 3})
    expected = train(model, optimizer, steps=3)
    again = make(tmp_path / "base", name, nf4=nf4, drawn=7, dropout=0.1)
    optimizer = optimizer_of(again)
    load_training_state(tmp_path / "state", parameters=trained(again), optimizer=optimizer)
    assert train(again, optimizer, steps=3) == expected
    for key, p in trained(model).items():
        assert torch.equal(p, again.get_parameter(key)), key
    assert torch.equal(logits(model), logits(again))


@pytest.mark.parametrize("name", [name for name in WITH_NETWORKS if name not in READS_THE_WEIGHTS])
def test_over_nf4_and_streamed_weights(tmp_path, name):
    """Training over NF4 is training over the dequantised weights, and over streamed ones as over resident ones."""
    quantized, plain = make(tmp_path, name, nf4=True), base_of(tmp_path, name)
    rounded = base_of(tmp_path, name, nf4=True)
    for path in quantize_nf4(base_of(tmp_path, name)):
        plain.get_submodule(path).weight.data = rounded.get_submodule(path).dense_weight()
    streamed = copy.deepcopy(plain).requires_grad_(False)
    weights = stream_weights(streamed, CPU)
    for model in (plain, streamed):
        add(model, name)
    checkpoint_activations(streamed, "lean", bind=weights.use)
    expected, *others = (train(model, adamw(model, 1e-2), steps=5) for model in (plain, quantized, streamed))
    for got in others:
        assert got == pytest.approx(expected, abs=1e-5) and got[-1] != got[0]


def add(model, name):
    """As `make` adds it."""
    method, _, encoder = name.partition(" ")
    torch.manual_seed(1)
    add_method(model, method, Options(rank=4, alpha=8.0, prompt_encoder=encoder or None))


@pytest.mark.parametrize("name", WITH_NETWORKS)
def test_generation_with_and_without_cache(tmp_path, name):
    model, prompts = make(tmp_path, name), [[5, 6, 7], [8, 9, 10, 11, 12]]
    before = generate(model, prompts, max_new_tokens=12)
    move(model)
    cached = generate(model, prompts, max_new_tokens=12)
    assert cached == generate(model, prompts, max_new_tokens=12, use_cache=False) and cached != before


@pytest.mark.parametrize("name", [name for name in WITH_NETWORKS if name not in READS_THE_WEIGHTS])
def test_over_bfloat16(tmp_path, name):
    """What is trained stays float32 and is cast where used: the model computes in bfloat16 throughout."""
    model = make_pair(tmp_path)[1].to(torch.bfloat16)
    start = model(ids())
    add(model, name)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    hidden = hidden_of(model, ids())
    assert hidden.dtype == torch.bfloat16 and torch.equal(hidden, start) == (name not in VIRTUAL)
    hidden.float().square().sum().backward()
    assert any(p.grad.any() for p in trained(model).values())


@pytest.mark.parametrize("name", (*FUSED, "dora", "vera"))
def test_every_option_reaches_the_layers(tmp_path, name):
    model = make(tmp_path, name, dropout=0.5, targets=("q_proj", "down_proj"), dtype=torch.bfloat16)
    layers = {key.split(".lora_")[0].split(".vera_")[0].rpartition(".")[2] for key in trained(model)}
    assert layers == {"q_proj", "down_proj"} and {p.dtype for p in trained(model).values()} == {torch.bfloat16}
    train(model, torch.optim.SGD(trained(model).values(), lr=0.5), steps=2)
    assert not torch.equal(loss_of(model.train(), ids()), loss_of(model, ids()))  # dropout
    assert torch.equal(loss_of(model.eval(), ids()), loss_of(model, ids()))


def effect(folder, name, **options):
    """What is trained, moved away from its start, and the loss in training."""
    model = make(folder, name, **options).train()
    move(model)
    torch.manual_seed(2)
    return {key: tuple(p.shape) for key, p in trained(model).items()}, loss_of(model, ids()).item()


FLAGS = {  # two values, and what they need to have an effect
    "rank": (4, 2, {}),
    "alpha": (8.0, 5.0, {}),
    "dropout": (0.0, 0.5, {"prompt_encoder": "lstm"}),
    "targets": (None, None, {}),  # the second depends on the method
    "rank_pattern": ({}, {"q_proj": 2}, {}),
    "alpha_pattern": ({}, {"q_proj": 5.0}, {}),
    "num_virtual_tokens": (4, 5, {}),
    "prompt_init": ("vocabulary", "random", {}),
    "prompt_ids": ((5, 6), (7, 8), {"prompt_init": "text"}),
    "prompt_encoder": (None, "lstm", {}),
    "encoder_size": (8, 12, {"prompt_encoder": "mlp"}),
}


@pytest.mark.slow(1)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_reads_what_it_says(tmp_path, name):
    """And nothing else: recipes say which flags a method ignores, going by READS."""
    for flag, (one, other, needs) in FLAGS.items():
        if name == "prefix":
            needs = {key: value for key, value in needs.items() if value != "lstm"}
            other = "mlp" if other == "lstm" else other
        if flag == "targets" and "targets" in read_by(name):
            other = {"ln": ("norm",), "parallel": ("model.layers.0.mlp",)}.get(name, ("o_proj",))
        wanted = {"prompt_ids": "prompt_text"}.get(flag, flag) in read_by(name)
        if flag.endswith("_pattern") and (not wanted or name == "eva"):
            with pytest.raises(ValueError, match="pattern"):
                check_options(name, Options(quantize=torch.nn.Linear, **{flag: other}))
            continue
        found = [effect(tmp_path / flag / str(i), name, **needs, **{flag: v}) for i, v in enumerate((one, other))]
        assert (found[0] != found[1]) == wanted, flag
    vectors = all(p.ndim < 2 for p in trained(make(tmp_path / "base", name)).values())
    assert vectors == getattr(find_method(name), "VECTORS", False)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_one_short_file(name):
    assert len(Path(find_method(name).__file__).read_text(encoding="utf-8").splitlines()) <= 150
