"""Streamed weights against resident ones, bit for bit, and what travels when. On the CPU nothing overlaps, the same
blocks take the same places."""

import shutil
from operator import call as run_block
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from checkpointing.adapters import save_adapter
from checkpointing.pretrained import WeightFiles, load_weights, read_config
from models import build_model
from modules.adapters.lora import add_lora, lora_layers
from modules.generation import generate
from modules.loss import linear_cross_entropy
from modules.memory import weight_streaming
from modules.memory.host_embedding import HostEmbedding
from modules.memory.weight_streaming import StreamedWeights, stream_weights
from modules.quantization.nf4 import NF4Tensor, quantize_nf4
from tests.tiny import make_checkpoint

CPU = torch.device("cpu")
BLOCKS = 5


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_checkpoint(folder, num_hidden_layers=BLOCKS, attention_bias=True)
    return folder


def load(folder, *, stream, nf4=False, scratch=None, device=CPU, dtype=torch.float32):
    model = build_model(read_config(folder)).requires_grad_(False)
    if nf4:
        quantize_nf4(model)
    streamed = stream_weights(model, device, folder=scratch) if stream else None
    load_weights(model, WeightFiles(folder), device=device, dtype=dtype, placed=streamed.take if stream else None)
    return model, streamed


def load_lora(folder, **options):
    """With adapters away from their start, and blocks that are recomputed in backward."""
    model, streamed = load(folder, **options)
    add_lora(model, rank=4, alpha=8.0)
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers(model).values():
        for adapter in (layer.lora_A, layer.lora_B):
            assert adapter.weight.device.type == options.get("device", CPU).type
            values = torch.empty(adapter.weight.shape).normal_(0, 0.1, generator=generator)
            adapter.weight.data.copy_(values)
    recompute(model, streamed)
    return model, streamed


def recompute(model, streamed: StreamedWeights | None):
    def compute(block, hidden, *inputs):
        if streamed is not None:
            streamed.use(block)
            assert_bound(streamed, block)
        return block(hidden, *inputs)

    def run_block(block, hidden, *inputs):
        if not torch.is_grad_enabled():
            return compute(block, hidden, *inputs)
        return checkpoint(compute, block, hidden, *inputs, use_reentrant=False)

    model.model.run_block = run_block


def assert_bound(streamed, block):
    """The block's weights lie in its place, and no other block shows that place's memory."""
    place = streamed.places[block.index % len(streamed.places)].memory.untyped_storage().data_ptr()
    shown = {
        b for b in streamed.blocks if place in {storage(b.get_submodule(layer).weight) for layer in streamed.layers}
    }
    assert shown == {block}


def storage(weight) -> int:
    return (weight.quantized_data if isinstance(weight, NF4Tensor) else weight).untyped_storage().data_ptr()


def ids(seed, rows=2, device=CPU):
    return torch.randint(0, 97, (rows, 12), generator=torch.Generator().manual_seed(seed)).to(device)


def loss_of(model, tokens):
    return linear_cross_entropy(model(tokens)[:, :-1], model.lm_head, tokens[:, 1:])


def train(model, device=CPU, steps=4):
    """Losses, gradients, evaluations and what is generated: steps of two micro-batches, an evaluation after each."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    results = []
    for step in range(steps):
        for micro in range(2):
            loss = loss_of(model, ids(10 * step + micro, device=device))
            loss.backward()
            results.append(loss.detach())
        results += [p.grad.clone() for p in trained.values()]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            results += [loss_of(model, ids(100 + i, device=device)) for i in range(2)]
        results.append(torch.tensor(generate(model, ids(7)[:, :5].tolist(), max_new_tokens=4)))
    return results


@pytest.mark.parametrize("places", [2, 3])
@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("nf4", [False, True])
def test_training_equals_resident_weights_bit_for_bit(base, tmp_path, monkeypatch, nf4, where, places):
    monkeypatch.setattr(weight_streaming, "PLACES", places)
    resident, _ = load_lora(base, stream=False, nf4=nf4)
    model, streamed = load_lora(base, stream=True, nf4=nf4, scratch=tmp_path if where == "disk" else None)
    before = streamed.host.clone()
    expected, got = train(resident), train(model)
    assert len(got) == len(expected) > 100
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert torch.equal(streamed.host, before)
    for name, one in (("got", model), ("expected", resident)):
        save_adapter(tmp_path / name, one, base="base")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("got", "expected")]
    assert files[0] == files[1]
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in resident.parameters())
    for name, p in resident.state_dict().items():
        mine = model.state_dict()[name]
        for part, inner in weight_streaming.inner_tensors(p).items():
            assert torch.equal(weight_streaming.inner_tensors(mine)[part], inner), name


def test_forwards_before_their_backwards(base):
    """As preference losses run: the blocks go up twice, then down twice."""
    gradients = []
    for stream in (True, False):
        model, _ = load_lora(base, stream=stream, nf4=True)
        (loss_of(model, ids(1)) * loss_of(model, ids(2))).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("blocks", [1, 2, 5, 6])
def test_blocks_travel_as_often_as_they_must(tmp_path, blocks):
    """Two blocks stay where a pass turns: a training step costs 2 (L - 2) copies, an evaluation pass L."""
    make_checkpoint(tmp_path, num_hidden_layers=blocks)
    model, streamed = load_lora(tmp_path, stream=True)

    def copies(run) -> list[int]:
        counts = []
        for _ in range(4):
            before = streamed.copies
            run()
            counts.append(streamed.copies - before)
        return counts

    once = max(2 * (blocks - 2), 0)
    assert copies(lambda: loss_of(model, ids(1)).backward()) == [min(blocks, 2) + once, once, once, once]
    with torch.no_grad():
        passes = copies(lambda: loss_of(model, ids(1)))
    assert passes[0] == max(blocks - 2, 0)  # the first two are there from training
    assert passes[2:] == ([0, 0] if blocks <= 2 else [blocks, blocks])


def test_the_next_block_is_on_its_way(tmp_path):
    make_checkpoint(tmp_path, num_hidden_layers=4)
    model, streamed = load(tmp_path, stream=True)
    held = []

    def run_block(block, hidden, *inputs):
        streamed.use(block)
        held.append(sorted(place.block for place in streamed.places))
        return block(hidden, *inputs)

    model.model.run_block = run_block
    with torch.no_grad():
        model(ids(0))
        assert held == [[0, 1], [1, 2], [2, 3], [2, 3]]
        model(ids(0))
        assert held[4:] == [[0, 1], [1, 2], [2, 3], [0, 3]]  # learned: after the last block comes the first


@pytest.mark.parametrize("nf4", [False, True])
def test_a_loaded_model_can_be_streamed_too(base, tmp_path, nf4):
    resident, _ = load(base, stream=False, nf4=nf4)
    model, _ = load(base, stream=False, nf4=nf4)
    streamed = stream_weights(model, CPU, folder=tmp_path)
    assert not list(tmp_path.iterdir())  # the scratch file has no name
    assert isinstance(model.model.embed_tokens, HostEmbedding)
    with torch.no_grad():
        assert torch.equal(model(ids(3)), resident(ids(3)))
    assert streamed.copies == BLOCKS
    assert streamed.host_bytes == BLOCKS * streamed.places[0].memory.nbytes
    linear = sum(p.numel() for p in resident.blocks.parameters() if p.ndim == 2) * (0.5 if nf4 else 4)
    assert linear <= streamed.host_bytes < linear + BLOCKS * 7 * 5 * 2 * 512
    assert f"{BLOCKS} blocks in a scratch file" in streamed.describe()


def test_a_tied_embedding_stays_on_the_card(tmp_path):
    make_checkpoint(tmp_path, tie_word_embeddings=True)
    model, _ = load(tmp_path, stream=True)
    assert not isinstance(model.model.embed_tokens, HostEmbedding)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    resident, _ = load(tmp_path, stream=False)
    with torch.no_grad():
        assert torch.equal(model(ids(3)), resident(ids(3)))


def test_without_recomputation_is_an_error(base):
    model, streamed = load(base, stream=True)
    add_lora(model, rank=4)
    with pytest.raises(ValueError, match="--activations lean"):
        model(ids(0))
    with torch.no_grad():
        model(ids(0))

    def run_and_keep(block, hidden, *inputs):
        streamed.use(block)
        return block(hidden, *inputs)

    model.model.run_block = run_and_keep
    # Autograd sees that a place was overwritten; it would not with NF4, whose weights are no saved tensors.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(model, ids(0)).backward()


@pytest.mark.parametrize("nf4", [False, True])
def test_without_use_nothing_looks_right(base, nf4):
    model, _ = load(base, stream=True, nf4=nf4)
    model.model.run_block = run_block
    with torch.no_grad():
        assert model(ids(0)).isnan().all()


def test_mistakes_are_explained(base, tmp_path, monkeypatch):
    model, _ = load(base, stream=True)
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="in host memory is frozen"):
        model(ids(0))
    model.model.embed_tokens.requires_grad_(False)
    with pytest.raises(ValueError, match="streamed weights are frozen"), torch.no_grad():
        model(ids(0))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ValueError, match="0.00 GiB free, weights need 0.00"):
        load(base, stream=True, scratch=tmp_path)
    model, _ = load_lora(base, stream=False)
    with pytest.raises(ValueError, match="before add_lora"):
        stream_weights(model, CPU)
    model = build_model(read_config(base)).requires_grad_(False)
    stream_weights(model, CPU)
    load_weights(model, WeightFiles(base), device=CPU, dtype=torch.float32)
    with pytest.raises(AssertionError, match="placed="), torch.no_grad():
        model(ids(0))


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("nf4", [False, True])
def test_training_equals_resident_weights_on_cuda(tmp_path, nf4, where):
    """Blocks of 13 MB (NF4: 1.6), so that copies and kernels really overlap; equal losses, gradients and samples."""
    device = torch.device("cuda")
    shape = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=9, num_attention_heads=8)
    make_checkpoint(tmp_path / "base", **shape)
    options = dict(nf4=nf4, device=device, dtype=torch.float32)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        resident, _ = load_lora(tmp_path / "base", stream=False, **options)
        model, streamed = load_lora(
            tmp_path / "base", stream=True, scratch=tmp_path if where == "disk" else None, **options
        )
        if where == "memory":
            assert streamed.host.is_pinned()
        before = streamed.host.clone()
        expected, got = train(resident, device), train(model, device)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert torch.equal(streamed.host, before)
    assert model.model.embed_tokens.weight.device.type == "cpu"


@pytest.mark.gpu
def test_use_never_waits_for_the_card(tmp_path):
    """With the compute stream held up, a whole pass over the blocks is queued; the numbers are right afterwards."""
    device = torch.device("cuda")
    make_checkpoint(tmp_path, hidden_size=512, intermediate_size=1536, num_hidden_layers=9)
    model, streamed = load(tmp_path, stream=True, device=device)
    resident, _ = load(tmp_path, stream=False, device=device)
    tokens = ids(0)  # on the CPU: the embedding need not ask the card for them
    with torch.no_grad():
        expected = resident(tokens.to(device))
        model(tokens), model(tokens)  # warm: every allocation has been made
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.cuda._sleep(2_000_000_000)  # about a second
            asleep = torch.cuda.Event()
            asleep.record()
            got = model(tokens)
            assert not asleep.query(), "the host waited for the card"
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    assert torch.equal(got, expected)


@pytest.mark.gpu
def test_the_card_holds_two_blocks(tmp_path):
    device = torch.device("cuda")
    make_checkpoint(tmp_path, hidden_size=512, intermediate_size=1536, num_hidden_layers=9)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model, streamed = load(tmp_path, stream=True, device=device)
    held = torch.cuda.memory_allocated() - before
    rest = sum(p.nbytes for name, p in model.named_parameters() if p.is_cuda and name not in streamed.names)
    assert streamed.host_bytes > 4 * streamed.card_bytes
    assert held < streamed.card_bytes + rest + 2**20
