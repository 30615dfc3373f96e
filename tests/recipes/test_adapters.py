"""adapters.py: what it says of a folder, and what peft makes of the folders that it writes."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from checkpointing.adapters import read_adapter, save_adapter
from modules.adapters.lora import lora_layers
from modules.adapters.lora_combine import combine
from modules.adapters.methods import METHODS, add_method
from modules.adapters.options import Options
from modules.adapters.whole_modules import train_whole_modules
from modules.quantization.nf4 import NF4Linear
from tests.modules.adapters.every_method import batches, move
from tests.recipes.test_merge import load, logits
from tests.tiny import make_checkpoint, run_recipe, start_recipe

EXACT = ("lora", "rslora", "lora-plus", "lora-fa", "pissa", "olora", "loftq", "eva", "vera")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    make_checkpoint(folder / "base")
    return folder / "base"


def make(base, folder, name, *, whole=(), seed=4, **options):
    model = load(base)
    options = dict(rank=4, alpha=8.0, quantize=NF4Linear if name == "loftq" else None, batches=batches()) | options
    add_method(model, name, Options(**options))
    if whole:
        train_whole_modules(model, whole)
    move(model)
    save_adapter(folder, model, base=str(base))
    return model


def run(*arguments, check=True):
    return run_recipe("adapters", *arguments, check=check)


def in_peft(base, folder):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)


def delta(folder):
    settings, tensors = read_adapter(folder)
    return {
        name: tensors[f"{name}.lora_B.weight"].float()
        @ tensors[f"{name}.lora_A.weight"].float()
        * s["alpha"]
        / s["rank"]
        for name, s in settings.items()
    }


@pytest.mark.parametrize("name", METHODS)
def test_inspect_every_method(base, tmp_path, name):
    model = make(base, tmp_path / "adapter", name)
    found = json.loads(run("inspect", tmp_path / "adapter").stdout)
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    on_disk = name if name in ("rslora", "dora", "vera") or name not in EXACT else "lora"
    assert (found["method"], found["base"], found["dtypes"]) == (on_disk, str(base), ["float32"])
    assert found["tensors"] == len(tensors) and found["parameters"] == sum(t.numel() for t in tensors.values())
    assert found["bytes"] == 4 * found["parameters"] == 4 * sum(k["parameters"] for k in found["modules"].values())
    for kind, described in found["modules"].items():
        assert all(norm > 0 or name == "bitfit" for norm in described["norms"].values())
        if "delta" in described["norms"]:
            of_kind = [d.norm().item() for path, d in delta(tmp_path / "adapter").items() if path.endswith(kind)]
            assert described["norms"]["delta"] == pytest.approx(sum(of_kind) / len(of_kind), rel=1e-4)
            assert described["modules"] == len(of_kind) == 2
    if name == "lora":
        layers = {path.rpartition(".")[2]: layer for path, layer in lora_layers(model).items()}
        assert found["modules"].keys() == layers.keys() and found["rank"] == 4
        assert all(found["modules"][kind]["rank"] == [4] for kind in layers)


def test_inspect_says_what_is_trained_in_full(base, tmp_path):
    make(base, tmp_path / "adapter", "lora", whole=["lm_head"], targets=("q_proj",))
    found = json.loads(run("inspect", tmp_path / "adapter").stdout)
    assert found["modules_to_save"] == ["lm_head"] and found["modules"]["lm_head"]["norms"].keys() == {"weight"}
    assert found["modules"]["q_proj"]["norms"].keys() == {"lora_A", "lora_B", "delta"}


@pytest.mark.parametrize("name", EXACT)
def test_convert_exactly(base, tmp_path, name):
    model = make(base, tmp_path / "adapter", name)
    needs_base = ("--model", base) if name == "vera" else ()
    report = json.loads(
        run("convert", "--adapter", tmp_path / "adapter", "--output", tmp_path / "lora", *needs_base).stdout
    )
    assert report["exact"] and report["to"] == "lora" and report["modules"] == 14
    theirs = in_peft(base, tmp_path / "lora")
    config = theirs.peft_config["default"]
    assert not (config.use_rslora or config.use_dora) and config.init_lora_weights is True
    if name != "loftq":  # whose base is another one
        assert (logits(theirs) - logits(model)).abs().max() < 1e-5


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_convert_what_peft_took_out_of_the_base(base, tmp_path, start):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights=start)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "lora_" in key:
                p.add_(torch.randn_like(p), alpha=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    flags = ("convert", "--adapter", tmp_path / "adapter", "--output", tmp_path / "lora")
    done = run(*flags, check=False)
    assert done.returncode == 2 and "give --model" in done.stderr
    report = json.loads(run(*flags, "--model", base).stdout)
    assert report["exact"] and report["ranks"] == [8]
    run("merge", "--model", base, "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")
    for opened in (in_peft(base, tmp_path / "lora"), AutoModelForCausalLM.from_pretrained(tmp_path / "merged")):
        assert (logits(opened) - logits(theirs)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["dora", "ia3"])
def test_convert_by_svd_reports_the_error(base, tmp_path, name):
    model = make(base, tmp_path / "adapter", name)
    convert = ("convert", "--adapter", tmp_path / "adapter", "--model", base)
    if name == "ia3":
        done = run(*convert, "--output", tmp_path / "none", check=False)
        assert done.returncode == 2 and "say which --rank" in done.stderr
    wanted = {}
    for path, layer in load(base).named_modules():
        adapted = dict(model.named_modules()).get(path)
        if hasattr(adapted, "merged") and isinstance(layer, torch.nn.Linear):
            wanted[path] = (adapted.merged().weight - layer.weight).detach()
    errors = []
    for rank in (2, 8, 32):
        report = json.loads(run(*convert, "--rank", rank, "--output", tmp_path / f"{rank}").stdout)
        got = delta(tmp_path / f"{rank}")
        assert got.keys() == wanted.keys() and not report["exact"] and report["ranks"][-1] == rank
        lost = sum((got[path] - wanted[path]).square().sum() for path in wanted)
        whole = sum(change.square().sum() for change in wanted.values())
        assert report["relative_error"] == pytest.approx((lost / whole).sqrt().item(), rel=1e-3, abs=1e-5)
        kind, path = "down_proj", "model.layers.0.mlp.down_proj"
        best = torch.linalg.svdvals(wanted[path])[rank:].norm()
        assert (got[path] - wanted[path]).norm().item() == pytest.approx(best.item(), rel=1e-3, abs=1e-5)
        assert 0 <= report["relative_error_of"][kind] <= 1
        errors.append(report["relative_error"])
    assert errors[0] > errors[1] > 0.1 > 1e-4 > errors[2]  # 32 is the layers' own rank
    assert (logits(in_peft(base, tmp_path / "32")) - logits(model)).abs().max() < 1e-5


def test_convert_to_a_smaller_rank_and_dtype(base, tmp_path):
    make(base, tmp_path / "adapter", "rslora", whole=["model.norm"])
    report = json.loads(
        run(*("convert", "--adapter", tmp_path / "adapter", "--rank", "2", "--output", tmp_path / "two")).stdout
    )
    before, after = delta_of(tmp_path / "adapter"), delta_of(tmp_path / "two")
    for path in before:
        best = torch.linalg.svdvals(before[path])[2:].norm()
        assert (after[path] - before[path]).norm().item() == pytest.approx(best.item(), rel=1e-3)
    lost = sum((after[p] - before[p]).square().sum() for p in before) / sum(b.square().sum() for b in before.values())
    assert report["relative_error"] == pytest.approx(lost.sqrt().item(), rel=1e-4) and report["ranks"] == [2]
    run(*("convert", "--adapter", tmp_path / "adapter", "--dtype", "bfloat16", "--output", tmp_path / "small"))
    small = load_file(tmp_path / "small/adapter_model.safetensors")
    first = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert small.keys() == first.keys()
    for key, tensor in small.items():
        assert torch.equal(tensor, first[key].to(torch.bfloat16 if ".lora_" in key else torch.float32))
    assert (logits(in_peft(base, tmp_path / "small")) - logits(in_peft(base, tmp_path / "adapter"))).abs().max() < 0.1


def test_what_is_trained_in_full_goes_along(base, tmp_path):
    """Beside a DoRA, whose layers all have the rank that stands for them."""
    model = make(base, tmp_path / "adapter", "dora", whole=["lm_head", "model.norm"])
    flags = ("--adapter", tmp_path / "adapter", "--model", base, "--output", tmp_path / "lora", "--rank", "64")
    report = json.loads(run("convert", *flags).stdout)
    assert report["relative_error"] < 1e-5 and report["ranks"] == [16, 32]
    assert (logits(in_peft(base, tmp_path / "lora")) - logits(model)).abs().max() < 1e-5


def delta_of(folder):
    """Of a folder with modules trained in full beside."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    names = [key.removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key]
    return {n: tensors[f"{n}.lora_B.weight"] @ tensors[f"{n}.lora_A.weight"] * scale for n in names}


@pytest.mark.parametrize("name", ["bitfit", "ln", "houlsby", "prefix"])
def test_what_no_lora_can_do(base, tmp_path, name):
    make(base, tmp_path / "adapter", name)
    done = run(
        *("convert", "--adapter", tmp_path / "adapter", "--model", base, "--output", tmp_path / "x"), check=False
    )
    assert done.returncode == 2 and f"is {name}: no LoRA does" in done.stderr and not (tmp_path / "x").exists()


def test_combine(base, tmp_path):
    names = ("q_proj", "down_proj")
    make(base, tmp_path / "a", "lora", targets=names)
    make(base, tmp_path / "b", "rslora", targets=("q_proj", "k_proj"), rank=3)
    both = ("combine", "--adapters", tmp_path / "a", tmp_path / "b", "--weights", "0.5", "-1.5")
    report = json.loads(run(*both, "--output", tmp_path / "cat").stdout)
    assert report == {"combination": "cat", "weights": [0.5, -1.5], "modules": 6, "ranks": [3, 4, 7]}
    a, b, sum_of = delta(tmp_path / "a"), delta(tmp_path / "b"), delta(tmp_path / "cat")
    for path in sum_of:
        torch.testing.assert_close(sum_of[path], 0.5 * a.get(path, 0) - 1.5 * b.get(path, 0))
    model = AutoModelForCausalLM.from_pretrained(base)
    theirs = PeftModel.from_pretrained(model, tmp_path / "a", adapter_name="a")
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    theirs.add_weighted_adapter(["a", "b"], [0.5, -1.5], "new", combination_type="cat")
    theirs.set_adapter("new")
    expected = logits(theirs)
    assert (logits(in_peft(base, tmp_path / "cat")) - expected).abs().max() < 1e-5

    flags = ("--combination", "dare_ties_svd", "--density", "0.5", "--seed", "3", "--rank", "2", "--dtype", "bfloat16")
    run(*both, "--output", tmp_path / "dare", *flags)
    options = dict(rank=2, density=0.5, generator=torch.Generator().manual_seed(3))
    _, wanted = combine([read_adapter(tmp_path / name) for name in "ab"], (0.5, -1.5), "dare_ties_svd", **options)
    _, got = read_adapter(tmp_path / "dare")
    assert got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key].bfloat16()) for key in got)


def test_layers_that_peft_was_told_by_number(base, tmp_path):
    """`layers_to_transform` narrows what target_modules say: the result names its modules in full."""
    config = LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1], init_lora_weights=False)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    theirs.save_pretrained(tmp_path / "a")
    run("convert", "--adapter", tmp_path / "a", "--output", tmp_path / "converted")
    run("combine", "--adapters", tmp_path / "a", "--weights", "1", "--output", tmp_path / "combined")
    for name in ("converted", "combined"):
        opened = in_peft(base, tmp_path / name)
        adapted = [path for path, layer in opened.named_modules() if hasattr(layer, "lora_A")]
        assert adapted == ["base_model.model.model.layers.1.self_attn.q_proj"]
        assert (logits(opened) - logits(theirs)).abs().max() < 1e-5


def test_mistakes_are_one_line(base, tmp_path):
    make(base, tmp_path / "a", "lora")
    make(base, tmp_path / "dora", "dora")
    a, dora = tmp_path / "a", tmp_path / "dora"
    for arguments, words in [
        (("inspect", tmp_path / "nothing"), "is not a folder"),
        (("combine", "--adapters", a, a, "--weights", "1", "--output", tmp_path / "x"), "1 numbers for 2"),
        (("combine", "--adapters", a, a, "--weights", "1", "nan", "--output", tmp_path / "x"), "1.0 nan must be"),
        (("combine", "--adapters", a, dora, "--weights", "1", "1", "--output", tmp_path / "x"), "convert it"),
        (("combine", "--adapters", a, a, "--weights", "1", "1", "--output", a), "exists already"),
        (("convert", "--adapter", a, "--output", a), "exists already"),
        (("convert", "--adapter", a, "--rank", "-1", "--output", tmp_path / "x"), "--rank -1"),
        (("merge", "--adapter", a, "--model", base, "--output", a), "exists already"),
    ]:
        done = run(*arguments, check=False)
        assert done.returncode == 2 and words in done.stderr and not done.stdout
        assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert not (tmp_path / "x").exists()


def test_from_the_command_line(base, tmp_path):
    model = make(base, tmp_path / "adapter", "dora")
    process = start_recipe("adapters", "inspect", tmp_path / "adapter")
    output, _ = process.communicate()
    assert process.returncode == 0 and json.loads(output)["method"] == "dora"
    run("merge", "--model", base, "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged) - logits(copy.deepcopy(model))).abs().max() < 1e-5
