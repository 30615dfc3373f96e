"""peft_finetune.py beyond the blocks' linear layers: embeddings, ranks of their own, whole modules, new tokens."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.recipes import test_peft_finetune
from tests.recipes.test_peft_finetune import evaluated
from tests.tiny import losses, make_checkpoint, run_recipe, sums, write_rows

TOOLS = [
    {"prompt": row["prompt"] + " <tool>", "completion": "<tool>" + row["completion"] + "</tool>"} for row in sums(24)
]
NEW = ("--new-tokens", "<tool>", "</tool>")
WHAT = {
    "embedding and head": ("--targets", "q_proj", "down_proj", "embed_tokens", "lm_head"),
    "patterns": ("--rank-pattern", "q_proj=2", "down_proj=6", "--alpha-pattern", "k_proj=3"),
    "whole modules": ("--modules-to-save", "norm", "lm_head", "embed_tokens"),
    "new tokens": NEW,
    "new tokens, the head in full": (*NEW, "--modules-to-save", "lm_head"),
}
# Memory options that each must train under as without them.
OPTIONS = {
    "embedding and head": ("--activations", "offload", "--embedding", "host"),
    "patterns": ("--activations", "lean", "--weights", "stream"),
    "whole modules": ("--activations", "fast"),
    "new tokens": ("--activations", "lean", "--weights", "stream"),
    "new tokens, the head in full": ("--no-fused", "--activations", "fast", "--embedding", "host"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beyond")
    make_checkpoint(folder / "untied")
    make_checkpoint(folder / "tied", tie_word_embeddings=True)
    write_rows(folder / "rows.jsonl", TOOLS)
    return folder


def train(base, output, model, *flags, steps=6):
    return test_peft_finetune.train(base, output, "lora", "--save-every", "3", *flags, steps=steps, model=model)


@pytest.mark.parametrize(
    ("what", "model"),
    [(w, m) for w in WHAT for m in ("untied", "tied") if m == "untied" or "the head in full" not in w],
)
def test_trains_resumes_and_opens(base, tmp_path, what, model):
    done = train(base, tmp_path / "whole", model, *WHAT[what])
    if what == "whole modules":
        said = "the head and the embedding were one weight; they are two from now on" in done.stderr
        assert said == (model == "tied")
    assert evaluated(tmp_path / "whole") < losses(tmp_path / "whole")[0]
    flags = ("--model", base / model, "--data", base / "rows.jsonl", "--device", "cpu")
    found = json.loads(run_recipe("evaluate", *flags, "--adapter", tmp_path / "whole/adapter").stdout)
    assert found["loss"] == pytest.approx(evaluated(tmp_path / "whole"), rel=1e-5)

    train(base, tmp_path / "run", model, *WHAT[what], steps=3)
    train(base, tmp_path / "run", model, *WHAT[what], "--resume")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    adapters = [load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("whole", "run")]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0] | adapters[1])

    # merged: a folder of transformers' with the same loss
    merged = tmp_path / "merged"
    run_recipe("merge", "--model", base / model, "--adapter", tmp_path / "whole/adapter", "--output", merged)
    again = json.loads(run_recipe("evaluate", "--model", merged, *flags[2:]).stdout)
    assert again["tokens"] == found["tokens"] and again["loss"] == pytest.approx(found["loss"], rel=1e-5)

    # in transformers and peft: the same loss over one row
    adapter = tmp_path / "whole/adapter"
    theirs = AutoModelForCausalLM.from_pretrained(base / model)
    if "new tokens" in what:
        theirs.resize_token_embeddings(len(AutoTokenizer.from_pretrained(adapter)))
    theirs = PeftModel.from_pretrained(theirs, adapter)
    tokenizer = AutoTokenizer.from_pretrained(adapter if "new tokens" in what else base / model)
    text = TOOLS[5]["prompt"] + TOOLS[5]["completion"]
    ids = torch.tensor([tokenizer(text).input_ids])
    data = write_rows(tmp_path / "row.jsonl", [{"text": text}])
    ours = run_recipe("evaluate", *flags[:2], "--data", data, *flags[4:], "--adapter", adapter, "--train-on", "all")
    ids = torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], 1)
    opened = AutoModelForCausalLM.from_pretrained(merged)
    assert AutoTokenizer.from_pretrained(merged)(text).input_ids == tokenizer(text).input_ids
    for other in (theirs, opened):
        assert json.loads(ours.stdout)["loss"] == pytest.approx(other(ids, labels=ids).loss.item(), rel=1e-5)
    if "new tokens" in what:  # untrained rows stay bit for bit
        before = AutoModelForCausalLM.from_pretrained(base / model)
        size = before.config.vocab_size
        assert opened.config.vocab_size == size + 2
        assert torch.equal(opened.model.embed_tokens.weight[:size], before.model.embed_tokens.weight)
        assert torch.equal(opened.lm_head.weight[:size], before.lm_head.weight) == ("head in full" not in what)


@pytest.mark.parametrize("what", WHAT)
def test_under_memory_options(base, tmp_path, what):
    train(base, tmp_path / "plain", "untied", *WHAT[what], "--activations", "none", "--no-fused")
    done = train(base, tmp_path / "run", "untied", *WHAT[what], *OPTIONS[what])
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert ("blocks: fused" in done.stderr) == ("--no-fused" not in OPTIONS[what])
    train(base, tmp_path / "nf4", "untied", *WHAT[what], *OPTIONS[what], "--quantize", "nf4", "--packing")
    assert evaluated(tmp_path / "nf4") < losses(tmp_path / "nf4")[0]


@pytest.mark.parametrize("model", ["untied", "tied"])
def test_new_tokens_are_written_and_nothing_else_changes(base, tmp_path, model):
    done = train(base, tmp_path / "run", model, *NEW, steps=60)
    assert "2 rows were added, each the mean of the old ones" in done.stderr
    adapter = tmp_path / "run/adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    size = json.loads((base / model / "config.json").read_text())["vocab_size"]
    rows = {"embed_tokens": [size, size + 1]} | ({} if model == "tied" else {"lm_head": [size, size + 1]})
    assert config["trainable_token_indices"] == rows
    flags = ("--model", base / model, "--prompt", TOOLS[4]["prompt"], "--raw", "--device", "cpu")
    run_recipe("generate", *flags, "--adapter", adapter, "--max-new-tokens", "4")


def test_new_tokens_do_not_go_with_half_of_a_tied_pair(base, tmp_path):
    done = run_recipe(
        *("peft_finetune", "--model", base / "tied", "--data", base / "rows.jsonl", "--device", "cpu"),
        *("--output", tmp_path / "run", *NEW, "--modules-to-save", "lm_head"),
        check=False,
    )
    assert done.returncode == 2 and "in full together or not at all" in done.stderr and "Traceback" not in done.stderr
