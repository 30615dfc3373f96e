"""Combined adapters against peft's add_weighted_adapter, number for number."""

from unittest import mock

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from checkpointing.adapters import read_adapter
from modules.adapters.lora_combine import COMBINATIONS, ON_FACTORS, combine, factor, truncate
from tests.models.test_llama import make_pair
from tests.modules.adapters.peft_methods import make_adapter

PRUNING = [name for name in COMBINATIONS if name not in ("cat", "svd", "linear")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("combine")
    reference, _ = make_pair(folder / "base")
    make_adapter(folder / "a", reference, 1, r=4, lora_alpha=8)
    make_adapter(folder / "b", reference, 2, r=4, lora_alpha=3, use_rslora=True)
    make_adapter(folder / "c", reference, 3, r=4, lora_alpha=4, target_modules=["q_proj", "up_proj"])
    patterns = dict(rank_pattern={"v_proj": 3}, alpha_pattern={"down_proj": 1})
    make_adapter(folder / "wide", reference, 4, r=9, lora_alpha=2, **patterns)
    return folder


def theirs(folder, names, weights, combination, **options):
    """Per module, B A · scale as peft has it, in the order of its modules."""
    model = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(folder / "base"), folder / names[0], adapter_name=names[0]
    )
    for name in names[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    # The new adapter begins at random, too: what is called after that is where the masks' randomness begins.
    with mock.patch("peft.tuners.lora.model._freeze_adapter", lambda *_: torch.manual_seed(5)):
        model.add_weighted_adapter(names, weights, "new", combination_type=combination, **options)
    return {
        path.removeprefix("base_model.model."): layer.get_delta_weight("new").detach()
        for path, layer in model.named_modules()
        if "new" in getattr(layer, "lora_A", {})
    }


def ours(folder, names, weights, combination, order, **options):
    """The same from the folders, and the settings; masks are drawn in the given order of modules."""
    adapters = []
    for name in names:
        settings, tensors = read_adapter(folder / name)
        adapters.append(({path: settings[path] for path in order if path in settings}, tensors))
    torch.manual_seed(5)
    settings, tensors = combine(adapters, weights, combination, **options)
    return {
        path: tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"] * (s["alpha"] / s["rank"])
        for path, s in settings.items()
    }, settings


def assert_equals_peft(folder, names, weights, combination, *, for_peft=None, **options):
    expected = theirs(folder, names, weights, combination, **(options if for_peft is None else for_peft))
    got, settings = ours(folder, names, weights, combination, expected, **options)
    assert got.keys() == expected.keys()
    for path, delta in expected.items():
        assert (got[path] - delta).abs().max() < 1e-5 and delta.abs().max() > 0.05, path
    return got, settings


@pytest.mark.parametrize("weights", [[0.7, 0.4], [1.0, -0.6]])
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_equals_peft(folder, combination, weights):
    options = dict(density=0.6) if combination in PRUNING else {}
    got, settings = assert_equals_peft(folder, ["a", "b"], weights, combination, **options)
    assert len(got) == 6
    assert {s["rank"] for s in settings.values()} == {8 if combination == "cat" else 4}


@pytest.mark.parametrize("combination", ["cat", "svd", "ties_svd", "dare_linear_svd"])
def test_different_ranks_and_targets(folder, combination):
    names, weights = ["a", "wide", "c"], [0.5, 1.5, -0.3]
    # up_proj comes last here and not in peft, which matters to masks alone: none are drawn
    options = dict(density=1.0 if combination.startswith("dare") else 0.4) if combination in PRUNING else {}
    got, settings = assert_equals_peft(folder, names, weights, combination, **options)
    assert len(got) == 8
    of_up = {s["rank"] for path, s in settings.items() if path.endswith("up_proj")}
    assert of_up == ({4} if combination == "cat" else {9})


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("combination", ["ties", "dare_ties", "ties_svd"])
def test_both_ways_to_vote(folder, combination, majority):
    for_peft = dict(density=0.5, majority_sign_method=majority)
    options = dict(density=0.5, majority=majority)
    assert_equals_peft(folder, ["a", "b"], [0.5, 0.7], combination, for_peft=for_peft, **options)


@pytest.mark.parametrize("combination", ["cat", "linear", "ties", "svd", "ties_svd"])
def test_embeddings(folder, combination):
    reference = LlamaForCausalLM.from_pretrained(folder / "base")
    for seed, name in enumerate("xy"):
        make_adapter(folder / name, reference, seed, r=3, lora_alpha=5, target_modules=["embed_tokens"])
    options = dict(density=0.5) if combination in PRUNING else {}
    model = PeftModel.from_pretrained(reference, folder / "x", adapter_name="x")
    model.load_adapter(folder / "y", adapter_name="y")
    model.add_weighted_adapter(["x", "y"], [0.7, -0.4], "new", combination_type=combination, **options)
    expected = model.base_model.model.model.embed_tokens.get_delta_weight("new").t()
    _, got = combine([read_adapter(folder / name) for name in "xy"], (0.7, -0.4), combination, **options)
    A, B = (got[f"model.embed_tokens.lora_embedding_{x}"] for x in "AB")
    assert (B @ A - expected).abs().max() < 1e-5 and expected.abs().max() > 0.1


def test_svd_of_a_given_rank_is_the_best_one(folder):
    got, settings = assert_equals_peft(folder, ["a", "wide"], [1.0, 0.5], "svd", for_peft=dict(svd_rank=3), rank=3)
    whole, _ = ours(folder, ["a", "wide"], (1.0, 0.5), "cat", got)
    for path in got:
        assert settings[path]["rank"] == 3
        left = torch.linalg.svdvals(whole[path])[3:].norm()
        assert (whole[path] - got[path]).norm().item() == pytest.approx(left.item(), rel=1e-4)


def test_density_1_drops_nothing(folder):
    adapters = [read_adapter(folder / name) for name in "ab"]
    _, plain = combine(adapters, (0.5, 0.5), "linear")
    for combination in ("dare_linear", "magnitude_prune"):
        _, kept = combine(adapters, (0.5, 0.5), combination, density=1.0)
        assert all(torch.equal(kept[name], plain[name]) for name in plain)


def test_drops_keep_the_mean_and_follow_the_generator(folder):
    adapters = [read_adapter(folder / "a")]
    name = "model.layers.0.mlp.down_proj.lora_A.weight"

    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return combine(adapters, (0.5,), "dare_linear", density=0.3, generator=generator)[1][name]

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    many = torch.stack([drawn(seed) for seed in range(400)])
    assert ((many != 0).float().mean() - 0.3).abs() < 0.01
    whole = combine(adapters, (0.5,), "linear")[1][name]
    assert (many.mean(0) - whole).norm() < 0.1 * whole.norm()


def test_factors_of_a_rank_that_the_matrix_lacks():
    A, B = torch.randn(2, 7), torch.randn(5, 2)
    for small_A, small_B in (truncate(A, B, 6), factor(B @ A, 6)):
        assert small_A.shape == (6, 7) and small_B.shape == (5, 6)
        torch.testing.assert_close(small_B @ small_A, B @ A)


def test_mistakes_are_explained(folder):
    a, wide = read_adapter(folder / "a"), read_adapter(folder / "wide")
    for weights, combination, options, words in [
        ((1.0,), "cat", {}, "2 adapters and 1 weights"),
        ((1.0, 1.0), "sum", {}, "'sum' is not one of cat, svd"),
        ((1.0, 1.0), "linear", {}, "equal ranks.*4, 9.*cat or svd"),
        ((1.0, 1.0), "ties_svd", {}, "density in"),
        ((1.0, 1.0), "ties_svd", dict(density=0.0), "density in"),
        ((1.0, 1.0), "cat", dict(density=0.5), "keeps everything"),
        ((1.0, 1.0), "cat", dict(rank=4), "follows from the adapters"),
        ((1.0, 1.0), "svd", dict(rank=-1), "at least 1"),
        ((1.0, 1.0), "ties_svd", dict(density=0.5, majority="most"), "total or frequency"),
    ]:
        with pytest.raises(ValueError, match=words):
            combine([a, wide], weights, combination, **options)
    assert set(ON_FACTORS) < set(COMBINATIONS)
