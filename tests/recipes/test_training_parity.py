"""The training recipes against plain transformers and peft loops, step by step, in float32."""

import itertools

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from checkpointing.pretrained import WeightFiles, load_weights, read_config
from data.batches import Batches
from data.dataset import load_dataset
from data.tokenizers.load import load_tokenizer
from models import build_model
from modules.loss import linear_logprobs
from recipes import full_finetune, lora_finetune, merge
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


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("kind", ["text", "completion"])
def test_lora_follows_peft(tmp_path, kind, schedule):
    make_checkpoint(tmp_path / "base")
    rows = sums(30) if kind == "completion" else [{"text": r["prompt"] + r["completion"]} for r in sums(30)]
    write_rows(tmp_path / "rows.jsonl", rows)
    options = dict(rank=4, alpha=8.0, lr=3e-3, schedule=schedule)
    lora_finetune.main(
        lora_finetune.Config(**settings(tmp_path, **options) | dict(max_steps=0, output=tmp_path / "start"))
    )
    lora_finetune.main(lora_finetune.Config(**settings(tmp_path, **options)))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(base, tmp_path / "start/adapter", is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    history = reference_losses(
        model, reference_rows(tokenizer, rows), batch_size=4, lr=3e-3, schedule=schedule, warmup=3
    )
    assert_follows(tmp_path / "run", history)
    # and the trained adapters give the same logits
    reloaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "run/adapter"
    )
    ids = torch.arange(4, 40)[None]
    assert (reloaded(ids).logits - model.eval()(ids).logits).abs().max() < 1e-3


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


def gsm8k(count):
    """The first GSM8K rows, as {"question", "answer"}."""
    import json

    with open(test_data() / "gsm8k/train.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in itertools.islice(file, count)]


@pytest.mark.parametrize("kind", ["text", "completion"])
def test_lora_follows_peft_on_gsm8k(tmp_path, kind):
    make_checkpoint(tmp_path / "base")
    rows, fields = gsm8k(24), dict(seq_len=512)
    examples = [{"prompt": row["question"], "completion": row["answer"]} for row in rows]
    if kind == "text":
        rows = examples = [{"text": f"{row['question']}\n{row['answer']}"} for row in rows]
    else:
        fields |= dict(prompt_field="question", completion_field="answer")
    write_rows(tmp_path / "rows.jsonl", rows)
    options = dict(rank=4, alpha=8.0, lr=3e-3, **fields)
    lora_finetune.main(
        lora_finetune.Config(**settings(tmp_path, **options) | dict(max_steps=0, output=tmp_path / "start"))
    )
    lora_finetune.main(lora_finetune.Config(**settings(tmp_path, **options)))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(base, tmp_path / "start/adapter", is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    examples = reference_rows(tokenizer, examples)
    assert any(len(ids) > 512 for ids, _ in examples)  # truncation, too
    history = reference_losses(model, examples, batch_size=4, lr=3e-3, schedule="cosine", warmup=3)
    assert_follows(tmp_path / "run", history)


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


def test_packed_equals_unpacked_per_token(tmp_path):
    """The loss of every single token, packed with others or alone in its row."""
    make_checkpoint(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", sums(40))
    model = build_model(read_config(tmp_path / "base"))
    load_weights(model, WeightFiles(tmp_path / "base"), device=torch.device("cpu"), dtype=torch.float32)
    dataset = load_dataset(tmp_path / "rows.jsonl", load_tokenizer(tmp_path / "base"), None, seq_len=64)
    found = {}
    for packing in (False, True):
        batches = Batches(dataset, batch_size=3, packing=packing, seq_len=64)
        order = [i for micro in batches.plan(0) for row in micro for i in row]
        parts = []
        for batch in batches.one_epoch():
            batch = batch.to(torch.device("cpu"), torch.float32)
            hidden = model(batch.input_ids, batch.layout)
            parts.append(linear_logprobs(hidden, model.lm_head, batch.targets, index=batch.target_index))
        sizes = [int((dataset[i][1] != -100).sum()) for i in order]
        found[packing] = dict(zip(order, torch.cat(parts).split(sizes), strict=True))
    assert max(len(row) for micro in batches.plan(0) for row in micro) > 2
    for i in range(len(dataset)):
        assert (found[True][i] - found[False][i]).abs().max() < 1e-5


def test_qlora_equals_lora_on_the_dequantised_base(tmp_path):
    make_checkpoint(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", sums(30))
    merge.main(merge.Config(model=str(tmp_path / "base"), output=tmp_path / "dequantised", quantize="nf4"))
    options = dict(rank=4, alpha=8.0, lr=3e-3)
    lora_finetune.main(lora_finetune.Config(**settings(tmp_path, quantize="nf4", **options)))
    lora_finetune.main(
        lora_finetune.Config(
            **settings(tmp_path, **options) | dict(model=str(tmp_path / "dequantised"), output=tmp_path / "lora")
        )
    )
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "lora"), rel=1e-5)
    lora_finetune.main(lora_finetune.Config(**settings(tmp_path, **options) | dict(output=tmp_path / "unquantised")))
    assert losses(tmp_path / "run") != pytest.approx(losses(tmp_path / "unquantised"), rel=1e-3)


@pytest.mark.parametrize(
    "change",
    [dict(activations="none"), dict(activations_every=2), dict(compile=True)],
    ids=lambda change: next(iter(change)),
)
def test_memory_measures_change_nothing(tmp_path, change):
    make_checkpoint(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", sums(12))
    options = dict(rank=4, lr=3e-3, max_steps=3)
    lora_finetune.main(lora_finetune.Config(**settings(tmp_path, **options) | dict(output=tmp_path / "plain")))
    lora_finetune.main(lora_finetune.Config(**settings(tmp_path, **options) | change))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)
