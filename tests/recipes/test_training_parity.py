"""The training recipes against plain transformers and peft loops, step by step, in float32."""

import itertools
import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from recipes import full_finetune, lora_finetune
from tests.tiny import losses, make_checkpoint, read_metrics, sums, test_data, write_rows

STEPS = 20


def reference_rows(tokenizer, rows):
    """Token ids and labels, written independently of data/: BOS prompt completion EOS, or BOS text EOS."""
    examples = []
    for row in rows:
        if "text" in row:
            ids = [tokenizer.bos_token_id, *tokenizer.encode(row["text"], add_special_tokens=False)]
            ids.append(tokenizer.eos_token_id)
            examples.append((ids, [-100, *ids[1:]]))
        else:
            prompt = [tokenizer.bos_token_id, *tokenizer.encode(row["prompt"], add_special_tokens=False)]
            completion = [*tokenizer.encode(row["completion"], add_special_tokens=False), tokenizer.eos_token_id]
            examples.append((prompt + completion, [-100] * len(prompt) + completion))
    return examples


def reference_losses(model, examples, *, batch_size, lr, schedule, warmup, seq_len=512):
    """The loop that a transformers user would write: pad, mean loss over the batch's labels, clip, step."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=STEPS)
    batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    history = []
    for batch in itertools.islice(itertools.cycle(batches), STEPS):
        batch = [(ids[:seq_len], labels[:seq_len]) for ids, labels in batch]
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])
        labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in batch])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        history.append((loss.item(), scheduler.get_last_lr()[0], norm.item()))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return history


def assert_follows(folder, history, tolerance=1e-4):
    rows = [row for row in read_metrics(folder) if "loss" in row]
    assert len(rows) == len(history)
    for row, (loss, lr, norm) in zip(rows, history, strict=True):
        assert row["loss"] == pytest.approx(loss, rel=tolerance)
        assert row["lr"] == pytest.approx(lr, rel=1e-6, abs=1e-12)
        assert row["grad_norm"] == pytest.approx(norm, rel=10 * tolerance)
    assert rows[-1]["loss"] < rows[0]["loss"]


def settings(tmp_path, **extra):
    common = dict(
        model=str(tmp_path / "base"),
        data=tmp_path / "rows.jsonl",
        output=tmp_path / "run",
        packing=False,
        shuffle=False,
        epochs=STEPS,
        max_steps=STEPS,
        batch_size=4,
        warmup_steps=3,
        device="cpu",
    )
    return common | extra


@pytest.mark.parametrize("kind", ["text", "completion"])
def test_full_finetune_follows_transformers(tmp_path, kind):
    make_checkpoint(tmp_path / "base", tie_word_embeddings=kind == "text")
    rows = sums(30) if kind == "completion" else [{"text": r["prompt"] + r["completion"]} for r in sums(30)]
    write_rows(tmp_path / "rows.jsonl", rows)
    full_finetune.main(full_finetune.Config(**settings(tmp_path, lr=1e-3)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    history = reference_losses(
        model, reference_rows(tokenizer, rows), batch_size=4, lr=1e-3, schedule="cosine", warmup=3
    )
    assert_follows(tmp_path / "run", history)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    ids = torch.arange(4, 40)[None]
    assert (saved(ids).logits - model.eval()(ids).logits).abs().max() < 1e-3


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("kind", ["text", "completion"])
@pytest.mark.parametrize("where", ["sums", "gsm8k"])
def test_lora_follows_peft(tmp_path, where, kind, schedule):
    make_checkpoint(tmp_path / "base")
    rows, fields = sums(30), {}
    if where == "gsm8k":
        lines = (test_data() / "gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()[:24]
        rows = [{"prompt": row["question"], "completion": row["answer"]} for row in map(json.loads, lines)]
    if kind == "text":
        rows = [{"text": f"{row['prompt']}\n{row['completion']}"} for row in rows]
    named = rows
    if (where, kind) == ("gsm8k", "completion"):
        named = [{"question": row["prompt"], "answer": row["completion"]} for row in rows]
        fields = dict(prompt_field="question", completion_field="answer")
    write_rows(tmp_path / "rows.jsonl", named)
    options = settings(tmp_path, rank=4, alpha=8.0, lr=3e-3, schedule=schedule, seq_len=512, **fields)
    lora_finetune.main(lora_finetune.Config(**options | dict(max_steps=0, output=tmp_path / "start")))
    lora_finetune.main(lora_finetune.Config(**options))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(base, tmp_path / "start/adapter", is_trainable=True)
    examples = reference_rows(AutoTokenizer.from_pretrained(tmp_path / "base"), rows)
    assert any(len(ids) > 512 for ids, _ in examples) == (where == "gsm8k")  # truncation, too
    assert_follows(
        tmp_path / "run", reference_losses(model, examples, batch_size=4, lr=3e-3, schedule=schedule, warmup=3)
    )
    # and the trained adapters give the same logits
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    reloaded = PeftModel.from_pretrained(base, tmp_path / "run/adapter")
    ids = torch.arange(4, 40)[None]
    assert (reloaded(ids).logits - model.eval()(ids).logits).abs().max() < 1e-3


@pytest.mark.parametrize("recipe, options", [(lora_finetune, dict(rank=4)), (full_finetune, {})])
def test_accumulation_equals_the_big_batch(tmp_path, recipe, options):
    """Rows of unequal length: the mean must be over the step's tokens, not over micro-batches."""
    make_checkpoint(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", sums(18))  # the last step of an epoch is smaller
    for name, split in {"big": dict(batch_size=4), "small": dict(batch_size=1, grad_accum=4)}.items():
        recipe.main(recipe.Config(**settings(tmp_path, lr=3e-3, **options) | split | dict(output=tmp_path / name)))
    assert losses(tmp_path / "small") == pytest.approx(losses(tmp_path / "big"), rel=1e-5)
    tokens = [[row["tokens"] for row in read_metrics(tmp_path / name)] for name in ("big", "small")]
    assert tokens[0] == tokens[1]


@pytest.mark.slow(20)
@torch._dynamo.config.patch(assume_static_by_default=False)
def test_compiled_blocks_change_nothing(tmp_path):
    """One block and every length by one graph from the first: the C++ compiler takes a second for each kernel."""
    make_checkpoint(tmp_path / "base", num_hidden_layers=1)
    write_rows(tmp_path / "rows.jsonl", sums(12))
    options = dict(rank=4, lr=3e-3, max_steps=3, fused=False)
    lora_finetune.main(lora_finetune.Config(**settings(tmp_path, **options) | dict(output=tmp_path / "plain")))
    lora_finetune.main(lora_finetune.Config(**settings(tmp_path, **options, compile=True)))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)
