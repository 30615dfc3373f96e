"""Llama against transformers: logits, gradients, generation, over many configurations, in float32."""

import re

import pytest
import torch
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM as HFLlama

from checkpointing.pretrained import WeightFiles, load_weights, read_config
from models import build_model
from models.llama import LlamaConfig
from modules.attention import packed_layout, padded_layout
from modules.generation import generate
from modules.loss import linear_cross_entropy

TINY = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
)
ROPE_LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=5e5)
ROPE_YARN = dict(rope_type="yarn", factor=4.0, rope_theta=1e4, original_max_position_embeddings=16)
CONFIGS = {
    "plain": {},
    "multi-head": dict(num_key_value_heads=4),
    "multi-query": dict(num_key_value_heads=1),
    "tied": dict(tie_word_embeddings=True),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "head_dim 20": dict(head_dim=20),
    "head_dim 2": dict(head_dim=2, num_attention_heads=6, num_key_value_heads=3),
    "one layer": dict(num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2),
    "four layers": dict(num_hidden_layers=4),
    "gelu": dict(hidden_act="gelu_pytorch_tanh"),
    "linear rope": dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4)),
    "dynamic rope, short": dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)),
    "dynamic rope, beyond": dict(
        max_position_embeddings=32, rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)
    ),
    "llama3 rope": dict(rope_parameters=ROPE_LLAMA3 | dict(original_max_position_embeddings=16)),
    "yarn rope": dict(rope_parameters=ROPE_YARN),
    "yarn rope, attention factor": dict(rope_parameters=ROPE_YARN | dict(attention_factor=1.3, truncate=False)),
    "yarn rope, mscale": dict(rope_parameters=ROPE_YARN | dict(mscale=0.7, mscale_all_dim=1.2, beta_fast=8)),
}


def make_pair(folder, **overrides):
    """A random transformers model, and ours loaded from the folder that it wrote."""
    torch.manual_seed(0)
    reference = HFLlama(HFConfig(**TINY | overrides))
    with torch.no_grad():
        for name, p in reference.named_parameters():  # biases and norms must matter
            if p.ndim == 1:
                p.normal_(1.0 if "norm" in name else 0.0, 0.3)
            else:
                p.normal_(0.0, 0.15)
    reference.save_pretrained(folder)
    return reference, load(folder)


def load(folder):
    model = build_model(read_config(folder))
    load_weights(model, WeightFiles(folder), device=torch.device("cpu"), dtype=torch.float32)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients(tmp_path, name):
    reference, ours = make_pair(tmp_path, **CONFIGS[name])
    ids = torch.randint(0, 97, (3, 50), generator=torch.Generator().manual_seed(1))
    expected = reference(ids, labels=ids)
    hidden = ours(ids)
    assert (ours.logits(hidden) - expected.logits).abs().max() < 1e-5
    targets = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], dim=1)
    loss = linear_cross_entropy(hidden, ours.lm_head, targets, chunk=11) / (3 * 49)
    assert abs(loss - expected.loss) < 1e-5
    loss.backward()
    expected.loss.backward()
    gradients = {n: p.grad for n, p in ours.named_parameters()}
    for n, p in reference.named_parameters():
        assert (gradients[n] - p.grad).norm() < 1e-5 * p.grad.norm(), n


def test_old_spelling_of_rope_keys(tmp_path):
    new = LlamaConfig.from_dict(TINY | dict(rope_parameters=ROPE_LLAMA3 | dict(original_max_position_embeddings=16)))
    scaling = {k: v for k, v in ROPE_LLAMA3.items() if k not in ("rope_theta", "rope_type")}
    old = TINY | dict(rope_theta=5e5, rope_scaling=scaling | dict(type="llama3", original_max_position_embeddings=16))
    assert LlamaConfig.from_dict(old).rope == new.rope


def test_unsupported_settings_are_named():
    for bad, word in [
        (dict(rope_scaling=dict(type="su", factor=2.0)), "su"),
        (dict(rope_scaling=dict(type="linear")), "factor"),
        (dict(hidden_act="mish"), "mish"),
        (dict(head_dim=5), "even"),
        (dict(attention_dropout=0.1), "attention_dropout"),
    ]:
        with pytest.raises(ValueError, match=word):
            LlamaConfig.from_dict(TINY | bad)
    foreign = dict(sliding_window=4096, use_sliding_window=True, attn_logit_softcapping=50.0, logits_scaling=8.0)
    foreign |= dict(query_pre_attn_scalar=256, residual_multiplier=0.2, no_rope_layers=[1, 0], qk_norm=True)
    foreign |= dict(layer_types=["full_attention", "sliding_attention"], partial_rotary_factor=0.5, scale_emb=12)
    for key, value in foreign.items():
        with pytest.raises(ValueError, match=f"{key} {re.escape(repr(value))}"):
            LlamaConfig.from_dict(TINY | {key: value})
    neutral = dict(sliding_window=None, use_sliding_window=False, layer_types=["full_attention"] * 2, logit_scale=1.0)
    neutral |= dict(
        no_rope_layers=[1, 1], partial_rotary_factor=1.0, eos_token_id=2, transformers_version="5", dtype="x"
    )
    assert LlamaConfig.from_dict(TINY | neutral) == LlamaConfig.from_dict(TINY)
    with pytest.raises(ValueError, match="MistralForCausalLM"):
        build_model(TINY | dict(architectures=["MistralForCausalLM"]))


def test_packed_rows_equal_separate_rows(tmp_path):
    """Hidden states of documents packed into one row are those of the documents alone."""
    _, ours = make_pair(tmp_path)
    lengths = [[7, 12, 3], [20, 1]]
    documents = [[torch.randint(0, 97, (n,)) for n in row] for row in lengths]
    ids = torch.zeros(2, 24, dtype=torch.long)
    for b, row in enumerate(documents):
        ids[b, : sum(lengths[b])] = torch.cat(row)
    packed = ours(ids, packed_layout(lengths, 24).prepare(torch.device("cpu"), torch.float32))
    for b, row in enumerate(documents):
        start = 0
        for document in row:
            alone = ours(document[None])[0]
            assert (packed[b, start : start + len(document)] - alone).abs().max() < 1e-5
            start += len(document)


def test_padding_changes_nothing(tmp_path):
    _, ours = make_pair(tmp_path)
    ours.double()  # in float32 some CPUs sum a longer matrix in another order, 1e-6 apart
    ids = torch.randint(0, 97, (1, 9))
    padded = torch.cat([ids, torch.zeros(1, 6, dtype=torch.long)], dim=1)
    layout = padded_layout(15).prepare(torch.device("cpu"), torch.float64)
    assert (ours(padded, layout)[:, :9] - ours(ids)).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["plain", "multi-query", "tied", "biases", "llama3 rope", "yarn rope"])
def test_greedy_generation_is_token_identical(tmp_path, name):
    """64 tokens, prompts of unequal length in one batch, with and without cache, against transformers one by one."""
    reference, ours = make_pair(tmp_path, **CONFIGS[name] | dict(max_position_embeddings=128))
    prompts = [torch.randint(1, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 17, 1, 9)]
    reference.generation_config.eos_token_id = None
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
        expected.append(out[0, len(prompt) :].tolist())
    assert generate(ours, prompts, max_new_tokens=64) == expected
    assert generate(ours, prompts, max_new_tokens=64, use_cache=False) == expected


def test_generation_stops_and_samples(tmp_path):
    _, ours = make_pair(tmp_path)
    free = generate(ours, [[5, 6]], max_new_tokens=20)[0]
    stop = free[4]
    assert generate(ours, [[5, 6]], max_new_tokens=20, stop_ids={stop})[0] == free[: free.index(stop) + 1]
    drawn = [
        generate(ours, [[5]], max_new_tokens=20, temperature=1.0, generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(ValueError, match="empty"):
        generate(ours, [[]], max_new_tokens=1)
    with pytest.raises(ValueError, match="63 at most"):
        generate(ours, [[1] * 64], max_new_tokens=1)
