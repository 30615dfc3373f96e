"""Watch a model learn: two minutes on a laptop's CPU, nothing to download.

    python recipes/quickstart.py

A Llama of a million parameters has read a few thousand little stories (recipes/quickstart_base.py made it). Here it is
taught a job: an order in plain English becomes one line of JSON. It is asked before, after LoRA and after QLoRA, always
with orders that are not in the training data, and an answer counts only if every character is right.

The training itself is recipes/lora_finetune.py, called as its command line calls it.
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
from checkpointing.pretrained import WeightFiles, load_weights, read_config
from checkpointing.run_folder import clear_errors
from data.tokenizers import load_tokenizer
from models import build_model
from modules.generation import generate
from modules.nf4 import quantize_nf4, storage_bytes
from recipes import lora_finetune

BASE = Path(__file__).resolve().parent / "assets" / "quickstart_base"

NAMES = """Ada Ali Anna Ben Carl Cora Dana Ella Emil Emma Eric Eva Finn Gita Hana Hugo Ida Igor Ivan Jack Jane Juan Kai Kofi Lara
Leo Lily Lin Luis Mara Max Mei Mia Nina Noah Nora Olga Omar Otto Paul Priya Raj Rosa Sam Sara Tom Vera Zoe""".split()
CITIES = """Accra Athens Berlin Bogota Boston Cairo Cork Dakar Delhi Dublin Geneva Hanoi Kyoto Lagos Lima Lisbon London Lyon
Madrid Manila Milan Nairobi Oslo Paris Prague Riga Rome Seoul Tokyo Vienna Warsaw Zurich""".split()
ITEMS = """apron bag ball basket bell belt bike blanket bottle bowl bucket cap card chair clock coat cup curtain desk drum fan
flag hat jacket jar kettle kite lamp map mirror mug pen pillow plate ring rug shirt sofa spoon table tent towel vase
wallet""".split()
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
    """Folder for the data, both runs and the results; those of an earlier quickstart are replaced."""
    train_rows: int = 1200
    """Orders to learn from."""
    held_out_rows: int = 200
    """Orders to be examined with."""
    epochs: int = 4
    """Passes over the training orders."""
    seed: int = 0
    """Seed of the orders and of the training."""


def main(cfg: Config) -> None:
    # Matrices this small gain little from more threads, and one gives the same numbers on any number of cores.
    torch.set_num_threads(1)
    started = time.perf_counter()
    train_file, held_out_file = cfg.output / "orders.jsonl", cfg.output / "held_out.jsonl"
    if train_file.exists():  # an earlier quickstart's folder
        for name in ("lora", "qlora"):
            discard(cfg.output / name)
    orders = make_orders(cfg.train_rows + cfg.held_out_rows, cfg.seed)
    held_out, train = orders[: cfg.held_out_rows], orders[cfg.held_out_rows :]
    make_folder(cfg.output)
    write_rows(train_file, train)
    write_rows(held_out_file, held_out)

    say("before: the base model is given the held-out orders")
    results = [examine("base model", held_out)]
    for title, name, quantize in (("+ LoRA", "lora", "none"), ("+ LoRA on NF4 (QLoRA)", "qlora", "nf4")):
        say(f"\n{title}: recipes/lora_finetune.py --quantize {quantize}")
        training = time.perf_counter()
        lora_finetune.main(
            lora_finetune.Config(
                model=str(BASE),
                data=train_file,
                eval_data=held_out_file,
                output=cfg.output / name,
                quantize=quantize,
                epochs=cfg.epochs,
                batch_size=16,
                lr=4e-3,
                warmup_steps=10,
                eval_every=75,
                activations="none",
                device="cpu",
                seed=cfg.seed,
            )
        )
        seconds = time.perf_counter() - training
        results.append(examine(title, held_out, cfg.output / name / "adapter", quantize) | {"seconds": seconds})
    answers = zip(*(result["answers"] for result in results), strict=True)
    names = ("base", "lora", "qlora")
    write_rows(
        cfg.output / "answers.jsonl",
        [row | dict(zip(names, said, strict=True)) for row, said in zip(held_out, answers, strict=True)],
    )
    print(report(cfg, results, held_out[0], time.perf_counter() - started))


def make_orders(count: int, seed: int) -> list[dict[str, str]]:
    """Different orders as prompt/completion rows, the same ones for the same seed."""
    rng, orders = random.Random(seed), {}
    while len(orders) < count:
        name, city, item, color, day = (rng.choice(words) for words in (NAMES, CITIES, ITEMS, COLORS, DAYS))
        number = rng.randrange(len(NUMBERS))
        prompt = rng.choice(ORDERS).format(
            name=name, city=city, item=item, color=color, number=NUMBERS[number], day=day
        )
        order = {"name": name, "city": city, "item": item, "color": color, "count": number + 2, "day": day[:3]}
        orders[prompt] = " " + json.dumps(order)
    return [{"prompt": prompt, "completion": completion} for prompt, completion in orders.items()]


def examine(title: str, rows: list[dict[str, str]], adapter: Path | None = None, quantize: str = "none") -> dict:
    """What the model writes, greedily, behind each prompt, the share that is right, and what its weights take."""
    model, tokenizer = build_model(read_config(BASE)), load_tokenizer(BASE)
    if quantize == "nf4":
        quantize_nf4(model)
    load_weights(model, WeightFiles(BASE), device=torch.device("cpu"), dtype=torch.float32)
    frozen = sum(storage_bytes(parameter) for parameter in model.parameters())
    if adapter:
        load_adapter(model, adapter)
    trained = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    prompts = [tokenizer.encode_prompt(row["prompt"]) for row in rows]
    completions = generate(model, prompts, max_new_tokens=64, stop_ids={tokenizer.eos_id})
    answers = [tokenizer.decode(completion) for completion in completions]
    right = sum(answer == row["completion"] for answer, row in zip(answers, rows, strict=True))
    return {"title": title, "answers": answers, "right": right, "trained": trained, "frozen": frozen}


def report(cfg: Config, results: list[dict], row: dict[str, str], seconds: float) -> str:
    """The table, one held-out order with every answer to it, and where to look next."""
    lines = [f"{cfg.held_out_rows} orders that were not in the training data, each to become one line of JSON:", ""]
    lines.append(f"{'':24}{'exact match':>11}{'trained weights':>18}{'frozen base':>14}{'training':>11}")
    for result in results:
        share, trained = 100 * result["right"] / cfg.held_out_rows, f"{result['trained']:,}"
        training = f"{result['seconds']:.0f} s" if "seconds" in result else ""
        frozen = f"{result['frozen'] / 1e6:.1f} MB"
        lines.append(f"{result['title']:24}{share:>9.1f} %{trained:>18}{frozen:>14}{training:>11}")
    lines += ["", f"order   {row['prompt']}"]
    for name, result in zip(("before", "LoRA", "QLoRA"), results, strict=True):
        lines.append(f"{name:8}{' / '.join(result['answers'][0].strip().splitlines())}")
    command = f"python {shown(BASE.parents[1])}/generate.py --raw --model {shown(BASE)}"
    lines += [
        "",
        f"The loss curves are {cfg.output}/lora/loss.svg and {cfg.output}/qlora/loss.svg, all answers are in",
        f"{cfg.output}/answers.jsonl. The training loop is recipes/lora_finetune.py: read it, copy it, change it.",
        f"This took {seconds:.0f} s. Now write an order of your own:",
        "",
        f'{command} \\\n    --adapter {cfg.output}/lora/adapter --prompt "{row["prompt"]}"',
    ]
    return "\n".join(lines)


def write_rows(path: Path, rows: list[dict]) -> None:
    atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def shown(path: Path) -> str:
    """A path as one would type it here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Config))
