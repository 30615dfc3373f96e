"""Training state: what comes back is what was saved, bit for bit, and a kill leaves what was there before."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import checkpointing.training_state as training_state
from checkpointing.atomic import atomic_folder, atomic_write_text, remove_folder
from checkpointing.training_state import load_training_state, save_training_state

REPOSITORY = Path(__file__).resolve().parents[2]

OPTIMIZERS = {
    "fused AdamW": lambda groups: torch.optim.AdamW(groups, lr=3e-2, fused=True),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=3e-2, foreach=False, fused=False, amsgrad=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=3e-2, momentum=0.9),
}


def make_model(seed: int, dtype=torch.float32, device: str = "cpu") -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4)).to(device, dtype)


def make_optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return OPTIMIZERS[kind]([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Steps whose losses depend on weights, optimizer state, dropout, torch's and Python's random numbers."""
    losses, weight = [], next(model.parameters())
    for _ in range(steps):
        x = torch.randn(5, 8, dtype=weight.dtype, device=weight.device) * random.random()
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        losses.append(loss.item())
    return losses


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_interrupted_training_equals_uninterrupted(kind: str, device: str, tmp_path: Path):
    random.seed(7)
    model = make_model(0, device=device)
    optimizer = make_optimizer(kind, model)
    train(model, optimizer, 5)
    parameters = dict(model.named_parameters())
    save_training_state(tmp_path / "step-5", parameters=parameters, optimizer=optimizer, progress={"step": 5})
    expected = train(model, optimizer, 5)

    random.seed(1)
    resumed = make_model(99, device=device)
    new_optimizer = make_optimizer(kind, resumed)
    new_parameters = dict(resumed.named_parameters())
    progress = load_training_state(tmp_path / "step-5", parameters=new_parameters, optimizer=new_optimizer)
    assert progress == {"step": 5}
    assert train(resumed, new_optimizer, 5) == expected
    for name, parameter in parameters.items():
        assert bits(parameter) == bits(new_parameters[name]), name
        for key, value in optimizer.state[parameter].items():
            returned = new_optimizer.state[new_parameters[name]][key]
            assert bits(value) == bits(returned) and value.device == returned.device, (name, key)
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in new_optimizer.param_groups]
    assert [g["weight_decay"] for g in new_optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_return_in_place_bit_for_bit(dtype: torch.dtype, tmp_path: Path):
    weight = nn.Parameter(torch.randn(6, 5).to(dtype).t())  # not contiguous
    with torch.no_grad():
        weight[0, :3] = torch.tensor([float("nan"), float("-inf"), -0.0])
    empty, odd = nn.Parameter(torch.zeros(0, 3, dtype=dtype)), nn.Parameter(torch.tensor(3.0, dtype=dtype))
    parameters = {"a.weight": weight, "empty": empty, "odd": odd}
    optimizer = torch.optim.AdamW(parameters.values())
    save_training_state(tmp_path / "s", parameters=parameters, optimizer=optimizer, progress={})
    expected = bits(weight)

    assert bits(load_file(tmp_path / "s" / "weights.safetensors")["a.weight"]) == expected  # other readers agree
    storage = weight.data_ptr()
    with torch.no_grad():
        weight.zero_()
        odd.zero_()
    load_training_state(tmp_path / "s", parameters=parameters, optimizer=optimizer)
    assert bits(weight) == expected and weight.data_ptr() == storage and weight.dtype == dtype
    assert odd.item() == 3.0


def test_optimizer_tensors_are_filed_by_state_and_parameter_name(tmp_path: Path):
    model = make_model(0, torch.bfloat16)
    optimizer = make_optimizer("AdamW", model)
    train(model, optimizer, 1)
    parameters = dict(model.named_parameters())
    save_training_state(tmp_path / "s", parameters=parameters, optimizer=optimizer, progress={})
    stored = load_file(tmp_path / "s" / "optimizer.safetensors")
    states = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    assert set(stored) == {f"{state}:{name}" for state in states for name in parameters}
    assert stored["step:0.bias"].item() == 1.0
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == sorted(
        ["weights.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"]
    )


def test_progress_returns_as_it_was(tmp_path: Path):
    model = make_model(0)
    optimizer = make_optimizer("SGD", model)
    progress = {"step": 3, "loss": 0.1 + 0.2, "best": float("inf"), "config": {"targets": ("a", "b"), "x": None}}
    arguments = dict(parameters=dict(model.named_parameters()), optimizer=optimizer)
    save_training_state(tmp_path / "s", **arguments, progress=progress | {"data": Path("a/b.jsonl")})
    assert load_training_state(tmp_path / "s", **arguments) == progress | {"data": "a/b.jsonl"}
    json.loads((tmp_path / "s" / "state.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    with pytest.raises(ValueError, match="progress/callback: a function"):
        save_training_state(tmp_path / "t", **arguments, progress={"callback": make_model})
    assert not (tmp_path / "t").exists()


def test_loss_scaler_returns(tmp_path: Path):
    model = make_model(0)
    arguments = dict(parameters=dict(model.named_parameters()), optimizer=make_optimizer("SGD", model))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    save_training_state(tmp_path / "s", **arguments, progress={}, scaler=scaler)
    fresh = torch.amp.GradScaler("cpu")
    load_training_state(tmp_path / "s", **arguments, scaler=fresh)
    assert fresh.get_scale() == 1024.0
    with pytest.raises(ValueError, match="loss scaler: one in the checkpoint"):
        load_training_state(tmp_path / "s", **arguments, scaler=torch.amp.GradScaler("cpu", enabled=False))


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_quantised_optimizer_states_return(name: str, tmp_path: Path):
    optimizers = pytest.importorskip("torchao.optim")

    def make(seed: int):
        torch.manual_seed(seed)
        parameters = {"w": nn.Parameter(torch.randn(64, 64)), "b": nn.Parameter(torch.randn(7))}
        return parameters, getattr(optimizers, name)(parameters.values(), lr=1e-2)

    def step(parameters, optimizer) -> None:
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        with torch.compiler.set_stance("force_eager"):  # compiling takes 20 s and is not what is tested
            optimizer.step()

    parameters, optimizer = make(0)
    step(parameters, optimizer)
    optimizer.param_groups[0]["lr"].fill_(5e-3)
    save_training_state(tmp_path / "s", parameters=parameters, optimizer=optimizer, progress={})
    assert "exp_avg:w/codes" in load_file(tmp_path / "s" / "optimizer.safetensors")

    fresh, new_optimizer = make(1)
    load_training_state(tmp_path / "s", parameters=fresh, optimizer=new_optimizer)
    rebuilt, original = new_optimizer.state[fresh["w"]]["exp_avg"], optimizer.state[parameters["w"]]["exp_avg"]
    assert type(rebuilt) is type(original) and rebuilt.shape == original.shape
    assert bits(rebuilt.codes) == bits(original.codes) and any(bits(rebuilt.codes))
    for _ in range(2):
        torch.manual_seed(5)
        step(parameters, optimizer)
        torch.manual_seed(5)
        step(fresh, new_optimizer)
    for key, parameter in parameters.items():
        assert bits(parameter) == bits(fresh[key]), key

    load_training_state(tmp_path / "s", parameters=fresh, optimizer=new_optimizer)  # into states that exist
    assert new_optimizer.state[fresh["w"]]["exp_avg"] is rebuilt
    assert new_optimizer.state[fresh["w"]]["step"].item() == 1.0


def test_nf4_is_filled_where_it_exists(tmp_path: Path):
    to_nf4 = pytest.importorskip("torchao.quantization").to_nf4

    def make(seed: int):
        torch.manual_seed(seed)
        parameter = nn.Parameter(torch.randn(4))
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        optimizer.state[parameter]["base"] = to_nf4(torch.randn(64, 256))
        return {"w": parameter}, optimizer

    parameters, optimizer = make(0)
    save_training_state(tmp_path / "s", parameters=parameters, optimizer=optimizer, progress={})
    fresh, new_optimizer = make(1)
    target = new_optimizer.state[fresh["w"]]["base"]
    load_training_state(tmp_path / "s", parameters=fresh, optimizer=new_optimizer)
    assert new_optimizer.state[fresh["w"]]["base"] is target
    expected = optimizer.state[parameters["w"]]["base"].get_original_weight()
    assert bits(target.get_original_weight()) == bits(expected)
    new_optimizer.state.clear()  # its description is not JSON, so it cannot be made anew
    with pytest.raises(ValueError, match="make this state before loading"):
        load_training_state(tmp_path / "s", parameters=fresh, optimizer=new_optimizer)


def save_one(folder: Path, steps: int = 2):
    model = make_model(0)
    optimizer = make_optimizer("AdamW", model)
    train(model, optimizer, steps)
    parameters = dict(model.named_parameters())
    save_training_state(folder, parameters=parameters, optimizer=optimizer, progress={"step": steps})
    return parameters, optimizer


def test_one_error_lists_everything_that_does_not_fit(tmp_path: Path):
    parameters, _ = save_one(tmp_path / "step-2")
    other = {
        "0.weight": nn.Parameter(torch.ones(16, 9)),
        "0.bias": nn.Parameter(torch.ones(16, dtype=torch.bfloat16)),
        "3.weight": parameters["3.weight"],
        "new.weight": nn.Parameter(torch.ones(3)),
    }
    before = bits(parameters["3.weight"])
    state = torch.get_rng_state()
    with torch.no_grad():
        parameters["3.weight"].add_(1.0)
    with pytest.raises(ValueError) as error:
        load_training_state(tmp_path / "step-2", parameters=other, optimizer=torch.optim.SGD(other.values()))
    message = str(error.value)
    assert str(tmp_path / "step-2") in message
    assert "lacks new.weight" in message and "holds 3.bias, which is not used" in message
    assert "0.weight as F32 [16, 8], here it is F32 [16, 9]" in message
    assert "0.bias as F32 [16], here it is BF16 [16]" in message
    assert "optimizer: AdamW in the checkpoint, SGD here" in message
    assert bits(parameters["3.weight"]) != before and torch.equal(state, torch.get_rng_state())  # nothing was loaded


def edit_state(folder: Path, edit) -> None:
    """Has `edit` change what state.json says of the optimizer state of 0.bias."""
    description = json.loads((folder / "state.json").read_text())
    edit(description["optimizer"]["state"]["0.bias"])
    (folder / "state.json").write_text(json.dumps(description))


def test_optimizer_tensors_must_be_those_that_the_state_names(tmp_path: Path):
    parameters, optimizer = save_one(tmp_path / "s")
    edit_state(tmp_path / "s", lambda state: state.update(exp_avg={"$tensor": "exp_avg:lost"}))
    fresh = torch.optim.AdamW(optimizer.param_groups)
    with pytest.raises(ValueError, match="(?s)lacks exp_avg:lost.* holds exp_avg:0.bias, which is not used"):
        load_training_state(tmp_path / "s", parameters=parameters, optimizer=fresh)


def test_a_changed_key_of_the_optimizer_state_is_refused(tmp_path: Path):
    parameters, optimizer = save_one(tmp_path / "s")
    edit_state(tmp_path / "s", lambda state: state.update(exp_avh=state.pop("exp_avg")))
    with pytest.raises(ValueError, match="state.json has changed"):
        load_training_state(tmp_path / "s", parameters=parameters, optimizer=torch.optim.AdamW(optimizer.param_groups))


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "of another checkpoint"])
def test_damaged_files_give_a_clear_error(name: str, damage: str, tmp_path: Path):
    save_one(tmp_path / "other", steps=1)
    parameters, optimizer = save_one(tmp_path / "s")
    file, expected, before = tmp_path / "s" / name, name, bits(parameters["0.weight"])
    if damage == "gone":
        file.unlink()
    elif "another" in damage:
        shutil.copy(tmp_path / "other" / name, file)
        expected = "state.json has changed" if name == "state.json" else f"{name}: from another checkpoint"
    else:
        file.write_bytes(file.read_bytes()[: -7 if damage == "cut" else 0])
    with pytest.raises(ValueError, match=expected) as error:
        load_training_state(tmp_path / "s", parameters=parameters, optimizer=optimizer)
    assert str(tmp_path / "s") in str(error.value) and bits(parameters["0.weight"]) == before


class Stranger(torch.Tensor):
    """What a crafted state.json might name: importable, a tensor, and with code to run."""

    @classmethod
    def __tensor_unflatten__(cls, *_):
        pytest.fail("a stranger's class was used")


STRANGERS = (f"{__name__}.Stranger", "subprocess.Popen", "torchao.absent.Tensor")


@pytest.mark.parametrize("class_name", STRANGERS)
def test_a_strangers_classes_are_refused(class_name: str, tmp_path: Path):
    save_one(tmp_path / "s")
    wrapped = {"$class": class_name, "context": None, "size": [[16], [1]]}
    edit_state(tmp_path / "s", lambda state: state.update(exp_avg=wrapped | {"inner": {"a": state["exp_avg"]}}))
    model = make_model(1)
    arguments = dict(parameters=dict(model.named_parameters()), optimizer=make_optimizer("AdamW", model))
    before = bits(model[0].weight)
    with pytest.raises(ValueError, match=f"asks for the tensor class {class_name}"):
        load_training_state(tmp_path / "s", **arguments)
    assert bits(model[0].weight) == before


def test_neither_numpy_nor_pickle_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "numpy", None)  # an installation without the test extra has none
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", lambda *_: pytest.fail("a pickle was read"))
    parameters, optimizer = save_one(tmp_path / "s")
    assert load_training_state(tmp_path / "s", parameters=parameters, optimizer=optimizer) == {"step": 2}


def test_a_failing_save_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parameters, optimizer = save_one(tmp_path / "s")
    earlier = {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()}
    write = training_state.write_safetensors

    def disk_full(path: Path, *arguments, **metadata) -> None:
        write(path, *arguments, **metadata)
        if path.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(training_state, "write_safetensors", disk_full)
    with torch.no_grad():
        parameters["0.bias"].zero_()
    with pytest.raises(OSError, match="No space left.*/s'"):  # and where
        save_training_state(tmp_path / "s", parameters=parameters, optimizer=optimizer, progress={"step": 3})
    assert {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()} == earlier
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_kill_while_deleting_leaves_no_half_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "step-1"
    with atomic_folder(path) as partial:
        (partial / "a").write_text("1")
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        remove_folder(path)
    assert not path.exists()


def test_atomic_text_is_replaced_or_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "run.json"
    atomic_write_text(path, "één\n")
    assert path.read_text(encoding="utf-8") == "één\n"
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda *_: (_ for _ in ()).throw(OSError("disk")))
        with pytest.raises(OSError, match="disk"):
            atomic_write_text(path, "two")
    assert path.read_text(encoding="utf-8") == "één\n" and len(list(tmp_path.iterdir())) == 1


def test_a_file_in_the_way_of_a_folder_is_kept(tmp_path: Path):
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(ValueError, match="is a file"), atomic_folder(tmp_path / "adapter"):
        pass
    assert (tmp_path / "adapter").read_text() == "mine"
