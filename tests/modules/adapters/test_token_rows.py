"""Single rows of embedding and head, against peft's trainable_token_indices."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from checkpointing.adapters import load_adapter, save_adapter
from modules.adapters.methods import add_method
from modules.adapters.options import Options
from modules.adapters.switch import merge_adapters
from modules.adapters.token_rows import train_token_rows
from modules.adapters.vocabulary import grow_vocabulary, is_tied
from modules.adapters.whole_modules import train_whole_modules
from modules.fused.blocks import disagreement, why_plain
from modules.memory.host_embedding import keep_embedding_on_host
from modules.quantization.nf4 import NF4Linear
from tests.models.test_llama import load, make_pair
from tests.modules.adapters.peft_methods import adamw, assert_follows_peft, logits, loss_of, train, trained

LORA = dict(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
OLD = [3, 40, 96]  # rows that the vocabulary of 97 has
BOTH = {"embed_tokens": OLD, "lm_head": OLD}
UNEQUAL = {"embed_tokens": OLD, "lm_head": [5]}


def make(folder, rows, *, method="lora", host=False, **overrides):
    _, model = make_pair(folder, **overrides)
    if host:
        keep_embedding_on_host(model, torch.device("cpu"))
    grow_vocabulary(model, max(rows) + 1)
    torch.manual_seed(1)
    add_method(model, method, Options(rank=4, alpha=8.0))
    train_token_rows(model, rows)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("indices", [OLD, BOTH, UNEQUAL, {"lm_head": OLD}])
def test_follows_peft(tmp_path, indices, tied):
    config = LoraConfig(**LORA, trainable_token_indices=indices)
    assert_follows_peft(tmp_path, config, tie_word_embeddings=tied)
    saved, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert saved.keys() == again.keys()
    expected = indices if isinstance(indices, dict) else {"embed_tokens": indices}
    if tied and indices is BOTH:
        expected = {"embed_tokens": OLD}
    found = json.loads((tmp_path / "ours/adapter_config.json").read_text())["trainable_token_indices"]
    assert found == expected


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_train_as_in_peft_and_open_there(tmp_path, tied):
    """The vocabulary grows on both sides; ours begins as the mean, theirs by chance, and the adapter holds all rows."""
    reference, _ = make_pair(tmp_path / "base", tie_word_embeddings=tied)
    ours = make(tmp_path / "base", [97, 98], tie_word_embeddings=tied)
    for matrix in (ours.model.embed_tokens.weight, ours.lm_head.weight):
        assert matrix.shape == (99, 48) and torch.equal(matrix[97], matrix[98])
    torch.testing.assert_close(ours.model.embed_tokens.weight[97], reference.model.embed_tokens.weight.mean(0))
    frozen = {name: p.clone() for name, p in ours.named_parameters() if not p.requires_grad}
    save_adapter(tmp_path / "start", ours, base=str(tmp_path / "base"))

    reference.resize_token_embeddings(99)
    theirs = PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "start", is_trainable=True)
    tokens = torch.randint(90, 99, (2, 20), generator=torch.Generator().manual_seed(3))
    assert (ours.logits(ours(tokens)) - theirs(tokens).logits).abs().max() < 1e-5
    counts = [sum(p.numel() for p in trained(model).values()) for model in (ours, theirs)]
    assert counts[0] == counts[1]
    losses = []
    for model in (ours, theirs):
        optimizer, found = adamw(model, 1e-3), []
        for _ in range(20):
            loss = loss_of(model, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        losses.append(found)
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-4 and losses[0][-1] < losses[0][0] - 0.1
    name = "token_adapter.trainable_tokens_delta"
    rows = dict(theirs.named_parameters())[f"base_model.model.model.embed_tokens.{name}.default"]
    assert (ours.get_parameter(f"model.embed_tokens.{name}") - rows).abs().max() < 1e-4
    for key, p in frozen.items():
        assert torch.equal(p, ours.get_parameter(key)), key

    save_adapter(tmp_path / "ours", ours, base=str(tmp_path / "base"))
    opened = PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "ours")
    assert (opened(tokens).logits - ours.logits(ours(tokens))).abs().max() < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")  # with the resized matrices: peft saves them whole
    fresh = load(tmp_path / "base")
    load_adapter(fresh, tmp_path / "theirs")
    assert (fresh.logits(fresh(tokens)) - theirs(tokens).logits).abs().max() < 1e-5
    again = load(tmp_path / "base")
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(again.logits(again(tokens)), ours.logits(ours(tokens))) and is_tied(again) == tied


@pytest.mark.parametrize("settings", [{}, dict(modules_to_save=["embed_tokens", "lm_head"])])
def test_a_vocabulary_resized_in_peft_opens_here(tmp_path, settings):
    """Whole embeddings, only resized or trained, lie in the folder."""
    make_pair(tmp_path / "base")
    reference, ours = make_pair(tmp_path / "base")
    reference = type(reference).from_pretrained(tmp_path / "base")  # only then does peft see that it was resized
    reference.resize_token_embeddings(101)
    theirs = get_peft_model(reference, LoraConfig(**LORA, **settings, init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter")
    assert ours.lm_head.weight.shape == (101, 48) and (logits(ours) - logits(theirs)).abs().max() < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_merged_and_beside_an_embedding_in_host_memory(tmp_path, tied):
    results = []
    for host in (False, True) if not tied else (False,):
        model = make(tmp_path, [7, 97], host=host, tie_word_embeddings=tied, num_attention_heads=4)
        assert why_plain(model) is None and disagreement(model) is None
        results.append(train(model, adamw(model, 3e-3), steps=4))
        adapted = logits(model)
        merge_adapters(model)
        assert (logits(model) - adapted).abs().max() < 1e-5
        assert not any("token_adapter" in name for name, _ in model.named_modules())
    assert results[0] == results[-1]


def test_a_matrix_trained_in_full_has_no_rows_of_its_own(tmp_path):
    _, model = make_pair(tmp_path)
    grow_vocabulary(model, 99)
    add_method(model, "lora", Options(rank=4))
    train_whole_modules(model, ["lm_head"])
    train_token_rows(model, [97, 98])
    assert {name for name in trained(model) if ".lora_" not in name} == {
        "lm_head.weight",
        "model.embed_tokens.token_adapter.trainable_tokens_delta",
    }
    save_adapter(tmp_path / "adapter", model, base="base")
    fresh = load(tmp_path)
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), logits(model))


def test_what_does_not_go_together_is_explained(tmp_path):
    _, model = make_pair(tmp_path)
    add_method(model, "lora", Options(rank=4, targets=("q_proj", "embed_tokens")))
    with pytest.raises(ValueError, match="embed_tokens has an adapter already; leave it out"):
        train_token_rows(model, [3])
    _, model = make_pair(tmp_path)
    model.lm_head = NF4Linear.from_linear(model.lm_head)
    with pytest.raises(ValueError, match="NF4Linear and cannot get rows.*--quantize-head"):
        grow_vocabulary(model, 99)
    save_adapter(tmp_path / "a", make(tmp_path, OLD), base="base")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    for wrong, words in (({"embed_tokens": [1]}, "expected \\(1, 48\\)"), ({"q_proj": [1]}, "supported are")):
        (tmp_path / "a/adapter_config.json").write_text(json.dumps(config | {"trainable_token_indices": wrong}))
        with pytest.raises(ValueError, match=words):
            load_adapter(load(tmp_path), tmp_path / "a")


def test_ids_reach_their_rows(tmp_path):
    model = make(tmp_path, [7, 97])
    rows = model.model.embed_tokens.token_adapter.trainable_tokens_delta
    with torch.no_grad():
        rows.copy_(torch.arange(96.0).view(2, 48))
    found = model.model.embed_tokens(torch.tensor([[7, 8, 97]]))[0]
    assert torch.equal(found[[0, 2]], rows) and torch.equal(found[1], model.model.embed_tokens.weight[8])
