"""Fine-tuning of a vision-language model (LLaVA, Idefics3, SmolVLM) on one device.

    python recipes/vlm_finetune.py --model llava-hf/llava-1.5-7b-hf --data train.jsonl --output runs/vlm --quantize nf4
    python recipes/vlm_finetune.py --model LLAVA --data train.jsonl --output runs/v --projector full --vision lora

Each of the three parts is frozen, gets LoRA adapters (arXiv:2106.09685) or is trained in full, with a learning rate of
its own if you like. Rows may have no image, one or several (recipes/README.md). What only adapters have changed is
saved as OUTPUT/adapter, in PEFT's format, a projector trained in full beside it included; if a tower was trained in
full, it is OUTPUT/model, a Hugging Face folder with the adapters merged.
"""

import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this fork's modules, whatever else is installed
# First: it keeps Ctrl-C during the slow imports below, and NumPy's absence, quiet.
from checkpointing.errors import clear_errors, say  # isort: split

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from checkpointing.adapters import save_adapter
from checkpointing.export import save_model
from checkpointing.loggers import open_loggers
from checkpointing.pretrained import WeightFiles, find_checkpoint, read_config
from checkpointing.run_folder import RunFolder
from checkpointing.training_state import load_training_state, save_training_state
from data.chat.templates import load_chat_template, stop_token_ids
from data.images.load import load_image_processor
from data.tokenizers.load import load_tokenizer
from data.tokenizers.new_tokens import add_tokens, read_tokens, save_tokenizer
from models import build_vision_language_model
from modules.adapters.lora import ALL_LINEAR
from modules.adapters.vlm_parts import fits_adapter, groups_by_part, quantize_parts, train_parts
from modules.attention import use_attention
from modules.device import DTYPES, peak_memory_gib
from modules.evaluation import evaluate_loss, sample_completion
from modules.loss import linear_cross_entropy
from modules.memory.activations import checkpoint_activations
from modules.memory.plan import describe_memory, plan_memory, plan_vision
from modules.memory.step_in_backward import step_in_backward
from modules.optim import build_optimizer, describe_trained, learning_rate
from modules.quantization.quantize import linear_kind
from recipes.common import setup
from recipes.common.checks import check_flags
from recipes.common.flags import AdapterFlags, FusedFlags, ImageFlags, TrainingFlags, parse_flags

# ---------------------------------------------------------------------------------------------------------------------
# 1 Config


@dataclass(kw_only=True)
class Config(TrainingFlags, ImageFlags, AdapterFlags, FusedFlags):
    vision: Literal["frozen", "lora", "full"] = "frozen"
    """What is trained of the vision tower."""
    projector: Literal["frozen", "lora", "full"] = "frozen"
    """What is trained of the projector between them."""
    language: Literal["frozen", "lora", "full"] = "lora"
    """What is trained of the language model."""
    lr: float = 2e-4
    """Peak learning rate."""
    vision_lr: float | None = None
    """Peak learning rate of the vision tower; default: --lr."""
    projector_lr: float | None = None
    """Peak learning rate of the projector; default: --lr."""
    language_lr: float | None = None
    """Peak learning rate of the language model; default: --lr."""
    targets: tuple[str, ...] = ALL_LINEAR
    """Layers of the language model to adapt, by name; of the other two parts it is every linear layer."""


def main(cfg: Config) -> None:
    # -----------------------------------------------------------------------------------------------------------------
    # 2 Setup
    check_flags(cfg)  # what cannot work is refused now, not after minutes
    with RunFolder.open(cfg.output, cfg, script=__file__, resume=cfg.resume) as run:
        if run.finished:
            say(f"{cfg.output} is finished: nothing to resume")
        else:
            train(cfg, run)


def train(cfg: Config, run: RunFolder) -> None:
    begun = time.perf_counter()
    device, dtype = setup.prepare_device(cfg, cfg.seed)

    # -----------------------------------------------------------------------------------------------------------------
    # 3 Tokenizer and data
    folder = find_checkpoint(cfg.model)
    config = read_config(folder)
    model = build_vision_language_model(config)  # on the meta device: shapes only
    tokenizer, new_rows = add_tokens(load_tokenizer(folder), read_tokens(cfg.new_tokens), model.config.vocab_size)
    template = load_chat_template(folder, tokenizer, cfg.chat_format, now=run.started)
    rows = dict(new_rows=new_rows, image_processor=load_image_processor(folder, config))
    batches, eval_batches = setup.open_data(cfg, tokenizer, template, model.config, device, **rows)
    total_steps = batches.total_steps(cfg.epochs, cfg.max_steps)

    # -----------------------------------------------------------------------------------------------------------------
    # 4 Model and weights
    weights = WeightFiles(folder)
    # Still on the meta device: each weight is quantised as it arrives.
    how = {"vision": cfg.vision, "projector": cfg.projector, "language": cfg.language}
    quantize_parts(model, how, linear_kind(cfg.quantize), head=cfg.quantize_head)
    model.requires_grad_(False)
    streamed = setup.load_base(cfg, model, weights, device=device, dtype=dtype, scratch=run.path)
    setup.add_token_rows(model, new_rows)

    # -----------------------------------------------------------------------------------------------------------------
    # 5 Adapters / quantisation
    sizes = dict(rank=cfg.rank, alpha=cfg.alpha, dropout=cfg.dropout, dtype=DTYPES[cfg.adapter_dtype])
    train_parts(model, how, targets=cfg.targets, **sizes)
    setup.train_beyond_adapters(cfg, model, new_rows)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rates = {"vision": cfg.vision_lr, "projector": cfg.projector_lr, "language": cfg.language_lr}
    groups = groups_by_part(model, rates, cfg.lr)
    say(f"{describe_trained(model)}, in {total_steps} steps")

    # -----------------------------------------------------------------------------------------------------------------
    # 6 Memory plan and compile
    language, vision = model.language_model, model.vision_tower
    attention = setup.pick_attention(cfg, language.config, device, dtype, batches.seq_len)
    blocks = setup.run_blocks(cfg, language, batches, device=device, dtype=dtype, streamed=streamed)
    checkpoint_activations(vision, cfg.activations if cfg.vision != "frozen" else "none", compile=cfg.compile)
    autocast = nullcontext()  # every layer already computes in the weights' dtype
    tokens, targets = batches.largest(total_steps)
    plan = plan_memory(language, cfg.activations, **blocks, tokens=tokens, targets=targets, dtype=dtype)
    steps = dict(optimizer=cfg.optimizer, step_in_backward=cfg.step_in_backward)
    plan["vision"] = plan_vision(model, cfg.activations, plan, images=batches.most_images, dtype=dtype, **steps)
    say(describe_memory(plan))

    # -----------------------------------------------------------------------------------------------------------------
    # 7 Optimizer and schedule
    optimizer = build_optimizer(cfg.optimizer, trainable, lr=cfg.lr, weight_decay=cfg.weight_decay, groups=groups)
    schedule = dict(peak=cfg.lr, schedule=cfg.schedule, warmup_steps=cfg.warmup_steps, total_steps=total_steps)
    norm_of_backward = None
    if cfg.step_in_backward:
        limits = dict(grad_accum=cfg.grad_accum, max_grad_norm=cfg.max_grad_norm, dtype=dtype)
        norm_of_backward = step_in_backward(optimizer, **limits)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # -----------------------------------------------------------------------------------------------------------------
    # 8 Resume
    result = "adapter" if fits_adapter(how) else "model"
    progress = {"step": 0, "epoch": 0, "step_in_epoch": 0}
    identity = {"weights": weights.fingerprint(), "data": batches.dataset.fingerprint}
    if checkpoint := run.latest_checkpoint():
        progress = load_training_state(checkpoint, parameters=trainable, optimizer=optimizer, scaler=scaler)
        run.check_resumable(progress.pop("config"), identity, progress.pop("identity"))
        use_attention(attention := progress.pop("attention"))  # as measured when the run began
        say(f"resuming after step {progress['step']}")
    run.cut_metrics(progress["step"])
    run.prune(cfg.keep_last)

    def save_checkpoint() -> None:
        state = progress | {"config": asdict(cfg), "identity": identity, "attention": attention}
        path = run.checkpoint_folder(progress["step"])
        save_training_state(path, parameters=trainable, optimizer=optimizer, progress=state, scaler=scaler)
        run.prune(cfg.keep_last)
        run.draw()

    def save_result() -> None:
        with run.result(result) as target:
            chat_template = template.source if batches.dataset.report.chat_rows else None
            if result == "adapter":
                save_adapter(target, model, base=cfg.model, chat_template=chat_template)
            else:
                save_model(target, model, config=config, source=folder, chat_template=chat_template)
            if new_rows:
                save_tokenizer(target, tokenizer, source=folder)

    run.rehearse(save_result)  # a save that cannot work fails now, not after the training

    # -----------------------------------------------------------------------------------------------------------------
    # 9 Training loop
    run.add_loggers(open_loggers(cfg, run.path, progress["step"]))
    stop_ids = stop_token_ids(folder, tokenizer, template)
    bar = tqdm(total=total_steps, initial=progress["step"], unit="step", disable=None)

    def evaluate() -> None:
        with autocast:
            loss, _ = evaluate_loss(model, eval_batches.one_epoch(), device, dtype)
        run.log({"step": progress["step"], "eval_loss": loss})
        sample = sample_completion(model, eval_batches.dataset, tokenizer, stop_ids)
        said = f"{sample['prompt'][-40:]!r} → {sample['completion']!r}"
        say(f"step {progress['step']}: evaluation loss {loss:.4f}; {said}")
        run.draw()

    model.train()
    first = progress["step"] + 1
    run.start_loop(total_steps)  # from here on Ctrl-C ends the step and saves
    for epoch, step_in_epoch, micro_batches in batches.steps(progress["epoch"], progress["step_in_epoch"]):
        if progress["step"] >= total_steps or run.stop_requested:
            break
        started = time.perf_counter()
        lr = learning_rate(progress["step"], **schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)
        tokens = sum(batch.target_tokens for batch in micro_batches)
        step_loss = torch.zeros((), device=device)
        for batch in micro_batches:
            batch = batch.to(device, dtype)
            with autocast:
                # hidden [B, T, D]; targets [N] stand at the flat positions target_index [N]. For a loss of your own see
                # modules/loss.py: whole logits are never in memory. A sum is divided by the tokens of the step.
                hidden = model(batch.input_ids, batch.layout, images=batch.images)
                loss = linear_cross_entropy(hidden, model, batch.targets, index=batch.target_index) / tokens
            del hidden  # backward frees what it has used, unless a name still holds it
            if loss.requires_grad:  # where only the vision part is trained, rows without an image teach nothing
                scaler.scale(loss).backward()
            step_loss += loss.detach()
        scaler.unscale_(optimizer)
        if norm_of_backward:
            grad_norm = norm_of_backward()
        else:
            grad_norm = clip_grad_norm_(trainable.values(), cfg.max_grad_norm or float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        progress = {"step": progress["step"] + 1, "epoch": epoch, "step_in_epoch": step_in_epoch + 1}

        row = {"step": progress["step"], "loss": step_loss.item(), "lr": lr, "grad_norm": grad_norm.item()}
        seconds = time.perf_counter() - started  # after .item(): the device has finished
        row |= {"tokens": tokens, "tokens_per_second": tokens / seconds}
        row |= {"peak_memory_gib": peak_memory_gib(device), "seconds": seconds}
        run.log(row, scaled=scaler.is_enabled())  # an error if loss or norm is not finite
        if progress["step"] == first:
            say(f"first step done after {time.perf_counter() - begun:.1f} s, {seconds:.1f} s of them its own")
        bar.update()
        speed = f"{row['tokens_per_second']:,.0f} tok/s, {row['peak_memory_gib']:.2f} GiB"
        bar.set_postfix_str(f"loss {row['loss']:.4f}, {speed}")
        due = cfg.eval_every and progress["step"] % cfg.eval_every == 0
        if eval_batches and (due or progress["step"] == total_steps):
            evaluate()
        if cfg.save_every and progress["step"] % cfg.save_every == 0:
            save_checkpoint()
    if eval_batches and total_steps == 0:
        evaluate()
    bar.close()

    # -----------------------------------------------------------------------------------------------------------------
    # 10 Save
    if progress["step"] < total_steps:  # Ctrl-C, SIGTERM, SIGHUP
        save_checkpoint()
        say(f"stopped after step {progress['step']} of {total_steps}; go on with --resume")
        raise SystemExit(run.stop_status)
    if cfg.save_every and (total_steps == 0 or total_steps % cfg.save_every):
        save_checkpoint()  # so that --resume can go on with more --max-steps or --epochs
    save_result()
    run.finish()
    say(f"peak memory {peak_memory_gib(device):.2f} GiB; {result} in {run.path / result}")


if __name__ == "__main__":
    with clear_errors():
        main(parse_flags(Config))
