"""What is put comes back, and host memory is used again. CUDA's streams are stood in for; the copies are real."""

import contextlib
import gc

import pytest
import torch

from modules.fused import lora_block
from modules.memory import activation_offload
from modules.memory.activation_offload import ActivationOffload
from modules.memory.activations import checkpoint_activations
from tests.modules.memory.test_activations import ids_and_layout, loss_and_gradients, make_model


class Stream:
    """Everything asked of it has already happened."""

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        assert event == "done"

    def record_event(self):
        return "done"


@pytest.fixture
def offload(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(activation_offload, "PIECE", 64)
    monkeypatch.setattr(activation_offload, "PIECES_AT_A_TIME", 3)
    offload = ActivationOffload(torch.device("cpu"))
    offload.side = Stream()
    return offload


def test_a_step_and_another(offload):
    for step in range(3):
        tensors = [torch.randn(2, 5 + step, 7).to(torch.bfloat16) for _ in range(4)]
        items = [offload.put(tensor.clone()) for tensor in tensors]
        # The last one stays, the others have left.
        assert [item.resident is not None for item in items] == [False, False, False, True]
        for i in reversed(range(4)):
            got = offload.get(items[i])
            assert torch.equal(got, tensors[i]) and got.dtype == torch.bfloat16
            if i:
                assert items[i - 1].resident is not None  # already on its way
        used = 4 * -(-(2 * (5 + step) * 7 * 2) // 64)
        assert len(offload.spare) * 64 == offload.host_bytes == -(-used // 3) * 3 * 64
        assert not offload._last()


def test_memory_that_a_graph_holds_on_to_leaves_and_comes_back(offload):
    x, gradients = [torch.randn(3, 30) for _ in range(4)], []
    items, outputs = [], []
    for tensor in x:
        leaf = tensor.clone().requires_grad_()
        with lora_block.saved_for_backward() as saved:
            out = leaf.exp() * leaf.view(-1).view(3, 30)
        items.append(offload.put(tensor.clone(), saved))
        outputs.append((leaf, out))
        del saved
    emptied = [leaf.untyped_storage().nbytes() for leaf, _ in outputs]
    assert emptied == [0, 0, 0, 360]
    for tensor, item, (leaf, out) in reversed(list(zip(x, items, outputs, strict=True))):
        assert torch.equal(offload.get(item), tensor)
        assert torch.equal(leaf, tensor)
        gradients.append(torch.autograd.grad(out.sum(), leaf)[0])
        torch.testing.assert_close(gradients[-1], (1 + tensor) * tensor.exp())
    del items, outputs, item, leaf, out
    assert len(offload.spare) * 64 == offload.host_bytes


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("host_budget", [0, 2**40])
def test_blocks_whose_memory_is_really_gone(offload, monkeypatch, host_budget, packed):
    monkeypatch.setattr("modules.memory.activations.ActivationOffload", lambda device: offload)
    ids, layout = ids_and_layout(packed)
    model = make_model()
    loss, gradients = loss_and_gradients(model, layout, ids)
    checkpoint_activations(model, "offload", host_budget=host_budget, fused=True)
    for _ in range(2):
        got_loss, got = loss_and_gradients(model, layout, ids)
        assert abs(got_loss - loss) < 1e-5 * loss
        for name, gradient in gradients.items():
            assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    inputs, heads = 3 * 42 * 32 * 4, 3 * 42 * (32 + 12 * 8) * 4
    assert offload.host_bytes >= (inputs + heads if host_budget else inputs)
    model(ids, layout)  # and a graph that is dropped
    gc.collect()
    assert len(offload.spare) * 64 == offload.host_bytes


def test_a_dropped_graph_gives_its_memory_back(offload):
    items = [offload.put(torch.randn(40)) for _ in range(3)]
    kept = items[0]
    del items
    gc.collect()
    assert len(offload.spare) * 64 == offload.host_bytes - 3 * 64
    offload.put(torch.randn(40))
    assert offload.get(kept).shape == (40,)
    with pytest.raises(RuntimeError, match="one backward only"):
        offload.get(kept)


def test_on_a_cpu_nothing_moves():
    offload = ActivationOffload(torch.device("cpu"))
    tensor = torch.randn(3)
    item = offload.put(tensor)
    assert offload.get(item).data_ptr() == tensor.data_ptr() and offload.host_bytes == 0
