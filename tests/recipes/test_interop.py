"""generate, evaluate and merge, and what transformers and peft make of the folders they write."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpointing import export
from data.chat.templates import TEMPLATES
from data.tokenizers.load import load_tokenizer
from recipes import lora_finetune, merge
from tests.tiny import CHATML, make_checkpoint, read_metrics, run_recipe, sums, write_rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base with a chat template, and an adapter trained on chat rows."""
    folder = tmp_path_factory.mktemp("trained")
    make_checkpoint(folder / "base", chat_template=CHATML)
    messages = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        for row in sums(16)
    ]
    write_rows(folder / "rows.jsonl", [{"messages": m} for m in messages])
    cfg = dict(model=str(folder / "base"), data=folder / "rows.jsonl", output=folder / "run", device="cpu")
    lora_finetune.main(lora_finetune.Config(**cfg, lr=1e-2, batch_size=4, rank=4))
    return folder


def ids():
    return torch.arange(4, 60)[None]


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_shards_tied_heads_and_lm_head_adapters(tmp_path, monkeypatch, tied):
    """A sharded bfloat16 checkpoint keeps dtype and shards; an adapted tied head is written on its own."""
    make_checkpoint(tmp_path / "float", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.bfloat16)
    AutoTokenizer.from_pretrained(tmp_path / "float").save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 2
    write_rows(tmp_path / "rows.jsonl", sums(8))
    cfg = dict(model=str(tmp_path / "base"), data=tmp_path / "rows.jsonl", output=tmp_path / "run", device="cpu")
    lora_finetune.main(lora_finetune.Config(**cfg, lr=1e-2, rank=4, targets=("q_proj", "lm_head")))
    monkeypatch.setattr(export, "SHARD_BYTES", 30_000)
    merge.main(merge.Config(model=str(tmp_path / "base"), adapter=tmp_path / "run/adapter", output=tmp_path / "merged"))
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"
    for file in (tmp_path / "merged").glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            assert all(handle.get_tensor(name).dtype == torch.bfloat16 for name in handle.keys())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "run/adapter")
    want = adapted(ids()).logits
    assert (merged(ids()).logits - want).norm() < 0.02 * want.norm()


def test_generate_equals_transformers(trained):
    base = AutoModelForCausalLM.from_pretrained(trained / "base")
    tokenizer = AutoTokenizer.from_pretrained(trained / "base")
    adapted = PeftModel.from_pretrained(base, trained / "run/adapter")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "3 + 4 ="}], add_generation_prompt=True, tokenize=False
    )
    for flags, text, model in [
        (["--adapter", trained / "run/adapter"], chat, adapted),
        (["--raw"], "<s>3 + 4 =", None),
    ]:
        prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with adapted.disable_adapter() if model is None else torch.no_grad():
            stop = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
            new = adapted.generate(**prompt, max_new_tokens=24, do_sample=False, eos_token_id=stop, pad_token_id=1)
        want = tokenizer.decode(new[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        done = run_recipe(
            *("generate", "--model", trained / "base", "--prompt", "3 + 4 =", "--max-new-tokens", "24", *flags),
            *("--temperature", "0", "--device", "cpu"),
        )
        assert done.stdout == want + "\n"


def test_evaluate_prints_one_json_object(trained):
    flags = ["--model", trained / "base", "--data", trained / "rows.jsonl", "--device", "cpu"]
    results = [
        json.loads(run_recipe("evaluate", *flags, *extra).stdout)
        for extra in ([], ["--batch-size", "5"], ["--adapter", trained / "run/adapter"], ["--train-on", "all"])
    ]
    plain, batched, adapted, everything = results
    assert set(plain) == {"loss", "perplexity", "tokens"}
    assert plain["loss"] == pytest.approx(batched["loss"], rel=1e-6) and plain["tokens"] == batched["tokens"]
    assert adapted["loss"] < plain["loss"] - 0.05
    assert everything["tokens"] > plain["tokens"]
    assert plain["perplexity"] == pytest.approx(torch.tensor(plain["loss"]).exp().item(), rel=1e-5)


def test_tokenizer_files_and_full_model_open_in_transformers(tmp_path):
    make_checkpoint(tmp_path / "base", tie_word_embeddings=True)
    write_rows(tmp_path / "rows.jsonl", sums(8))
    run_recipe(
        *("full_finetune", "--model", tmp_path / "base", "--data", tmp_path / "rows.jsonl"),
        *("--output", tmp_path / "run", "--device", "cpu", "--freeze-layers", "1", "--lr", "1e-3"),
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").state_dict()
    frozen = ("model.embed_tokens", "model.layers.0.", "lm_head")
    for name in base:
        assert torch.equal(base[name], tuned[name]) == name.startswith(frozen), name
    with safe_open(tmp_path / "run/model/model.safetensors", framework="pt") as handle:
        assert "lm_head.weight" not in handle.keys()
    text = "the quick brown fox 12"
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / d) for d in ("base", "run/model")]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]


def test_folders_that_were_mixed_up_are_named(trained):
    flags = ["--data", trained / "rows.jsonl"]
    for model, adapter, words in [
        (trained / "run", None, "run's output folder"),
        (trained / "run/adapter", None, "give it as --adapter"),
        (trained / "base", trained / "run", "did you mean"),
    ]:
        done = run_recipe(
            "evaluate", "--model", model, *flags, *(["--adapter", adapter] if adapter else []), check=False
        )
        assert done.returncode == 2 and words in done.stderr


def test_trainable_names_what_is_trained(tmp_path):
    make_checkpoint(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", sums(8))
    flags = ["--model", tmp_path / "base", "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "run"]
    run_recipe("full_finetune", *flags, "--device", "cpu", "--trainable", r"layers\.1\..*norm", "--lr", "1e-3")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").state_dict()
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert changed == {f"model.layers.1.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")}
    for pattern, word in [("(", "regular expression"), ("no_such_name", "nothing to train")]:
        again = run_recipe("full_finetune", *flags[:-1], tmp_path / "other", "--trainable", pattern, check=False)
        assert again.returncode == 2 and word in again.stderr


def test_a_pretrained_tied_head_stays_tied(tmp_path):
    make_checkpoint(tmp_path / "base", tie_word_embeddings=True)
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "the quick brown fox has 12 apples"}] * 4)
    run_recipe(
        *("pretrain", "--model", tmp_path / "base", "--data", data, "--output", tmp_path / "run"),
        *("--seq-len", "32", "--device", "cpu", "--eval-data", data),
    )
    with safe_open(tmp_path / "run/model/model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()
    *_, evaluated = read_metrics(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    row = torch.tensor(
        [AutoTokenizer.from_pretrained(tmp_path / "run/model")("the quick brown fox has 12 apples</s>").input_ids]
    )
    assert model(row, labels=row).loss.item() == pytest.approx(evaluated["eval_loss"], rel=1e-5)


def test_a_pad_token_beyond_the_embedding_is_no_matter(tmp_path):
    """Many tokenizers got a [PAD] that their model has no row for."""
    make_checkpoint(tmp_path / "base")
    data = write_rows(tmp_path / "rows.jsonl", sums(5))
    evaluate = ["evaluate", "--model", tmp_path / "base", "--data", data, "--device", "cpu", "--batch-size", "5"]
    plain = json.loads(run_recipe(*evaluate).stdout)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path / "base")
    assert (
        load_tokenizer(tmp_path / "base").pad_id
        == json.loads((tmp_path / "base/config.json").read_text())["vocab_size"]
    )
    assert json.loads(run_recipe(*evaluate).stdout) == plain
    run_recipe(
        *("lora_finetune", "--model", tmp_path / "base", "--data", data, "--output", tmp_path / "run"),
        *("--batch-size", "5", "--device", "cpu"),
    )


def test_the_template_that_was_trained_with_goes_along(trained, tmp_path):
    flags = ["--model", trained / "base", "--data", trained / "rows.jsonl"]
    flags += ["--chat-format", "vicuna", "--max-steps", "1"]
    run_recipe("full_finetune", *flags, "--output", tmp_path / "full", "--device", "cpu")
    run_recipe("lora_finetune", *flags, "--output", tmp_path / "lora", "--device", "cpu")
    adapter = tmp_path / "lora/adapter"
    run_recipe("merge", "--model", trained / "base", "--adapter", adapter, "--output", tmp_path / "merged")
    for folder in (tmp_path / "full/model", adapter, tmp_path / "merged"):
        assert (folder / "chat_template.jinja").read_text() == TEMPLATES["vicuna"]


def test_evaluate_prints_valid_json_for_a_broken_model(tmp_path):
    model = make_checkpoint(tmp_path / "base")
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    model.save_pretrained(tmp_path / "base")
    data = write_rows(tmp_path / "rows.jsonl", sums(2))
    done = run_recipe("evaluate", "--model", tmp_path / "base", "--data", data, "--device", "cpu")
    found = json.loads(done.stdout, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (found["loss"], found["perplexity"]) == ("NaN", "NaN")
