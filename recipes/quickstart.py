"""Watch a model learn: a minute or two on a laptop's CPU, nothing to download.

    python recipes/quickstart.py

A Llama of a million weights has read stories and notes (recipes/quickstart_base.py made it). Here it is taught a job:
an order in plain English becomes one line of JSON. It is examined before, after LoRA and after QLoRA, with orders that
are not in the training data, and an answer counts only if every character is right. The training is that of
recipes/lora_finetune.py, called with the settings that its command line takes.
"""

import json
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this fork's modules, whatever else is installed

import torch
import tyro

from checkpointing.adapters import load_adapter
from checkpointing.atomic import atomic_write_text, discard, make_folder
from checkpointing.errors import clear_errors
from checkpointing.pretrained import WeightFiles, load_weights, read_config
from data.tokenizers import load_tokenizer
from models import build_model
from modules.generation import generate
from modules.memory import storage_bytes
from modules.nf4 import quantize_nf4
from recipes import lora_finetune

BASE = Path(__file__).resolve().parent / "assets" / "quickstart_base"

NAMES = "Ada Ben Dana Emma Finn Hugo Ivan Juan Lara Lin Max Nina Olga Paul Rosa Tom".split()
CITIES = "Accra Berlin Boston Cork Delhi Geneva Kyoto Lima London Madrid Milan Oslo Prague Rome Tokyo Warsaw".split()
ITEMS = "apron basket bike bowl card coat desk flag jar lamp mug plate shirt table vase".split()
COLORS = "black blue brown gray green orange pink purple red silver white yellow".split()
NUMBERS = "two three four five six seven eight nine ten eleven twelve".split()  # 2 to 12
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
ORDERS = (
    "{name} from {city} wants {number} {color} {item}s by {day}.",
    "Please send {number} {color} {item}s to {name} in {city} before {day}.",
    "Hi, this is {name}. I need {number} {item}s in {color}, delivered to {city} on {day}.",
    "By {day} we must bring {name} the {number} {color} {item}s; the address is in {city}.",
    "{city}, for {day}: {number} {item}s, {color}, ordered by {name}.",
    "Can you ship {number} {color} {item}s to {city} for {day}? Thanks, {name}",
)


@dataclass
class Config:
    output: Path = Path("runs/quickstart")
    """Folder for the orders, the two runs and the answers; an earlier quickstart there is replaced."""
    train_rows: int = 1200
    """Orders to learn from."""
    held_out_rows: int = 200
    """Orders to be examined with."""
    epochs: int = 4
    """Passes over the training orders."""
    lr: float = 4e-3
    """Peak learning rate: small models like it high."""
    seed: int = 0
    """Seed of the orders and of the training."""


def main(cfg: Config) -> None:
    started = time.perf_counter()
    torch.set_num_threads(1)  # matrices this small gain little from more, and one gives the same numbers on any CPU
    train_file, held_out_file = cfg.output / "orders.jsonl", cfg.output / "held_out.jsonl"
    if train_file.exists():  # an earlier quickstart's folder
        for name in ("lora", "qlora"):
            discard(cfg.output / name)
    orders = make_orders(cfg.train_rows + cfg.held_out_rows, cfg.seed)
    held_out, train = orders[: cfg.held_out_rows], orders[cfg.held_out_rows :]
    make_folder(cfg.output)
    write_rows(train_file, train)
    write_rows(held_out_file, held_out)

    results = {"base model": examine(held_out)}
    for title, name, quantize in (("LoRA", "lora", "none"), ("QLoRA (NF4)", "qlora", "nf4")):
        print(f"\n{title}: recipes/lora_finetune.py --quantize {quantize}", file=sys.stderr)
        settings = lora_finetune.Config(
            model=str(BASE),
            data=train_file,
            eval_data=held_out_file,
            output=cfg.output / name,
            quantize=quantize,
            epochs=cfg.epochs,
            batch_size=16,
            lr=cfg.lr,
            warmup_steps=10,
            eval_every=50,
            activations="none",
            device="cpu",
            seed=cfg.seed,
        )
        training = time.perf_counter()
        lora_finetune.main(settings)
        seconds = time.perf_counter() - training
        results[title] = examine(held_out, cfg.output / name / "adapter", quantize) | {"seconds": seconds}
    print(report(cfg, held_out, results))
    print(f"\nThis took {time.perf_counter() - started:.0f} s in all.")


def make_orders(count: int, seed: int) -> list[dict[str, str]]:
    """Orders as prompt/completion rows, no two alike, the same ones for the same seed."""
    rng, orders = random.Random(seed), {}
    while len(orders) < count:
        name, city, item, color, day = (rng.choice(words) for words in (NAMES, CITIES, ITEMS, COLORS, DAYS))
        number = rng.choice(NUMBERS)
        prompt = rng.choice(ORDERS).format(name=name, city=city, item=item, color=color, number=number, day=day)
        order = {"name": name, "city": city, "item": item, "color": color, "count": NUMBERS.index(number) + 2}
        orders[prompt] = " " + json.dumps(order | {"day": day[:3]})
    return [{"prompt": prompt, "completion": completion} for prompt, completion in orders.items()]


def examine(rows: list[dict[str, str]], adapter: Path | None = None, quantize: str = "none") -> dict:
    """What the model writes behind each prompt, greedily; how many answers are right; what its weights take."""
    model, tokenizer = build_model(read_config(BASE)), load_tokenizer(BASE)
    if quantize == "nf4":
        quantize_nf4(model)
    load_weights(model, WeightFiles(BASE), device=torch.device("cpu"), dtype=torch.float32)
    size = sum(storage_bytes(parameter) for parameter in model.parameters())
    if adapter:
        load_adapter(model, adapter)
    prompts = [tokenizer.encode_prompt(row["prompt"]) for row in rows]
    completions = generate(model, prompts, max_new_tokens=64, stop_ids={tokenizer.eos_id})
    answers = [tokenizer.decode(completion) for completion in completions]
    right = sum(answer == row["completion"] for answer, row in zip(answers, rows, strict=True))
    trained = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    return {"answers": answers, "right": right, "base_bytes": size, "trained": trained, "seconds": 0.0}


def report(cfg: Config, rows: list[dict[str, str]], results: dict[str, dict]) -> str:
    """The table, one order with all answers to it, and where to look next; all answers go to answers.jsonl."""
    answers = [result["answers"] for result in results.values()]
    write_rows(
        cfg.output / "answers.jsonl",
        [row | dict(zip(results, said, strict=True)) for row, *said in zip(rows, *answers, strict=True)],
    )
    lines = [f"{len(rows)} orders that were not in the training data, each to become one line of JSON:\n"]
    lines.append(f"{'':14}{'exact match':>11}{'trained weights':>18}{'frozen base':>14}{'training':>11}")
    for title, result in results.items():
        lines.append(
            f"{title:14}{result['right'] / len(rows):>11.1%}{result['trained']:>18,}"
            f"{result['base_bytes'] / 1e6:>11.1f} MB{result['seconds']:>9.0f} s"
        )
    lines.append(f"\n{'order':14}{rows[0]['prompt']}")
    lines += [
        f"{title:14}{' / '.join(said[0].split(chr(10))).strip()}" for title, said in zip(results, answers, strict=True)
    ]
    folder = os.path.relpath(Path(__file__).parent)
    lines += [
        f"\nloss curves   {cfg.output}/lora/loss.svg and {cfg.output}/qlora/loss.svg",
        f"all answers   {cfg.output}/answers.jsonl",
        f"how it works  {folder}/lora_finetune.py: read it, copy it, change it",
        f"try it        python {folder}/generate.py --raw --model {os.path.relpath(BASE)} \\",
        f'                  --adapter {cfg.output}/lora/adapter --prompt "{rows[0]["prompt"]}"',
    ]
    return "\n".join(lines)


def write_rows(path: Path, rows: list[dict]) -> None:
    atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Config))
