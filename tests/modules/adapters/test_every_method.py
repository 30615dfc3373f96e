"""What every method of the table has to keep, a new one without a line here: the frozen weights, NF4, every way to keep
activations, compile, packing, resume. (Without its adapter and merged: test_adapter_switch.py; by the recipe:
tests/recipes/test_peft_finetune.py.)
"""

from pathlib import Path

import pytest
import torch

from checkpointing.training_state import load_training_state, save_training_state
from modules.adapters.methods import METHODS, check_options, find_method, read_by
from modules.adapters.options import Options
from modules.attention import packed_layout
from modules.fused.blocks import disagreement, why_not
from modules.memory.activations import RUNGS, keep_activations
from tests.modules.adapters.every_method import OWN_START, base_of, inner, make, move, optimizer_of
from tests.modules.adapters.peft_methods import behind_virtual, ids, logits, loss_of, train, trained

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("name", METHODS)
def test_every_rung_trains_the_same(tmp_path, name):
    """Gradients after two steps, by the plain modules and by hand where the method allows that."""
    gradients = {}
    for rung in RUNGS:
        for fused in (False, True):
            model = make(tmp_path / rung / str(fused), name)
            train(model, optimizer_of(model), steps=2)
            if fused and why_not(model):
                continue
            assert not fused or disagreement(model) is None
            keep_activations(model, rung, fused=fused)
            loss_of(model, ids()).backward()
            gradients[rung, fused] = {key: p.grad for key, p in trained(model).items()}
    assert len(gradients) in (len(RUNGS), 2 * len(RUNGS))
    for (_, fused), other in gradients.items():
        for key, gradient in gradients["none", False].items():
            assert gradient.abs().max() > 0, key
            tolerance = dict(rtol=1e-3, atol=1e-5) if fused else dict(rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(other[key], gradient, **tolerance)


@pytest.mark.parametrize("name", METHODS)
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
@pytest.mark.parametrize("name", METHODS)
def test_packed_equals_unpacked(tmp_path, name, nf4):
    model = make(tmp_path, name, nf4=nf4)
    move(model)
    model.eval()
    rows = [behind_virtual(model, part[None])[0] for part in ids()[0].split([8, 12])]
    lengths = [len(row) for row in rows]
    packed = model(torch.cat(rows)[None], packed_layout([lengths], sum(lengths)).prepare(CPU, torch.float32))[0]
    for row, part in zip(rows, packed.split(lengths), strict=True):
        assert (model(row[None])[0] - part).abs().max() < 1e-5


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("name", METHODS)
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
