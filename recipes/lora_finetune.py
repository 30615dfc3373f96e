"""LoRA and QLoRA fine-tuning of a Llama on one device.

    python recipes/lora_finetune.py --model meta-llama/Llama-3.2-1B --data train.jsonl --output runs/lora
    python recipes/lora_finetune.py --model meta-llama/Llama-3.1-8B --data train.jsonl --output runs/q --quantize nf4

Trains low-rank additions to the frozen linear layers of every block (arXiv:2106.09685), over a base in 4 bits with
`--quantize nf4` (arXiv:2305.14314). The result, OUTPUT/adapter, is in PEFT's format: generate.py, evaluate.py and
merge.py here take it, and so do peft and vLLM. Tokens per second and peak memory on named hardware stand in README.md,
losses in recipes/benchmarks/.
"""

import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this fork's modules, whatever else is installed

import torch
import tyro
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from checkpointing.adapters import save_adapter
from checkpointing.atomic import atomic_folder
from checkpointing.errors import clear_errors, say
from checkpointing.loggers import open_loggers
from checkpointing.pretrained import WeightFiles, find_checkpoint, load_weights, read_config
from checkpointing.run_folder import RunFolder
from checkpointing.training_state import load_training_state, save_training_state
from data.batches import Batches, fit_seq_len
from data.chat.templates import load_chat_template, stop_token_ids
from data.dataset import load_dataset
from data.tokenizers.load import load_tokenizer
from models import build_text_model
from modules.adapters.lora import ALL_LINEAR, add_lora
from modules.attention import choose_attention, describe_attention, use_attention
from modules.compile import enable_compile
from modules.device import DTYPES, describe_device, make_deterministic, peak_memory_gib, pick_device, pick_dtype
from modules.evaluation import evaluate_loss, sample_completion
from modules.fused.blocks import disagreement, why_not
from modules.loss import linear_cross_entropy
from modules.memory.activations import keep_activations
from modules.memory.host_embedding import keep_embedding_on_host
from modules.memory.plan import describe_memory, plan_memory
from modules.memory.step_in_backward import step_in_backward
from modules.memory.weight_streaming import stream_weights
from modules.optim import build_optimizer, describe_trained, learning_rate
from modules.quantization.quantize import linear_kind, quantize_blocks
from recipes.common.checks import check_flags, describe_choices

# ---------------------------------------------------------------------------------------------------------------------
# 1 Config


@dataclass
class Config:
    model: str
    """Checkpoint folder, or a Hub id such as meta-llama/Llama-3.2-1B."""
    data: Path
    """Training rows: JSON Lines or a JSON array."""
    output: Path
    """Folder for everything this run writes."""
    eval_data: Path | None = None
    """Held-out rows for the evaluation loss."""
    prompt_field: str | None = None
    """Column to use as the prompt, with --completion-field."""
    completion_field: str | None = None
    """Column to use as the completion, with --prompt-field."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens are trained: all assistant turns (completions), the last one, or everything."""
    chat_format: str = "auto"
    """Chat template: auto (the checkpoint's own), llama2, llama3, chatml, vicuna or a .jinja file."""
    on_special_content: Literal["keep", "error"] = "keep"
    """What to do with rows whose own text contains special tokens."""
    seq_len: int | None = None
    """Rows are cut (packs filled) to this many tokens; default: 2048, or what the model has if that is less."""
    packing: bool = False
    """Put several rows into one sequence; they do not see each other."""
    shuffle: bool = True
    """Draw a new order every epoch."""
    epochs: int = 1
    """Passes over the data."""
    max_steps: int | None = None
    """End after this many optimizer steps at the latest; 0 saves the initial state."""
    batch_size: int = 1
    """Rows (packs) per micro-batch."""
    grad_accum: int = 1
    """Micro-batches per optimizer step."""
    lr: float = 2e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """What the learning rate does after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's decay of matrices."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0: never."""
    rank: int = 16
    """Rank r of the adapters."""
    alpha: float = 32.0
    """The adapters' output is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapters' input."""
    targets: tuple[str, ...] = ALL_LINEAR
    """Layers to adapt, by name: q_proj, self_attn.q_proj, lm_head, embed_tokens, or a full name."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which adapters are kept; bfloat16 ones are updated with stochastic rounding."""
    quantize: Literal["none", "nf4", "int8", "int4", "float8"] = "none"
    """Keep the frozen linear layers of the blocks in 4 or 8 bits."""
    quantize_head: bool = False
    """The head, too; losses rise a little."""
    embedding: Literal["resident", "host"] = "resident"
    """Where the input embedding lives: on the device, or in host memory, from where a batch's rows travel."""
    activations: Literal["none", "fast", "lean", "offload"] = "lean"
    """What a block keeps for backward: everything, what is dear to recompute, its input, its input in host memory."""
    activations_every: int = 1
    """With lean and offload: only every k-th block; the others are kept as with fast."""
    activations_gib: float = 0.0
    """With lean and offload: as many of the last blocks as fit into this memory are kept as with fast."""
    activations_host_gib: float = 0.0
    """With offload: host memory for what attention made, too, of as many blocks as fit; saves computing it again."""
    fused: bool = torch.cuda.is_available()
    """Run the blocks by the hand-written lora_block.py where it covers them; default: where there is a GPU."""
    weights: Literal["resident", "stream", "disk"] = "resident"
    """Where frozen blocks live: on the device, or in host memory or a scratch file, visiting it one block ahead."""
    optimizer: Literal["adamw", "adamw-8bit", "adamw-host"] = "adamw"
    """AdamW with its moments in float32, in 8 bits, or in host memory."""
    step_in_backward: bool = False
    """Update each weight as soon as its gradient is complete, and free the gradient; needs --max-grad-norm 0."""
    compile: bool = torch.cuda.is_available()
    """Use torch.compile; default: where there is a CUDA device, whose compiler pays for its start-up."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 …"""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of weights and activations; auto: bfloat16 or float16 on a GPU, float32 on the CPU."""
    deterministic: bool = False
    """On CUDA: only kernels that give the same bits every time (slower)."""
    seed: int = 0
    """Seed of everything random."""
    eval_every: int | None = None
    """Evaluate every this many steps; default: at the end only."""
    save_every: int = 500
    """Save a resumable checkpoint every this many steps, and at the end; 0: only when interrupted."""
    keep_last: int = 2
    """How many of those checkpoints to keep."""
    resume: bool = False
    """Continue the run in --output from its last checkpoint."""
    tensorboard: bool = False
    """Also log to OUTPUT/tensorboard (pip install -e ".[loggers]")."""
    wandb: str | None = None
    """Also log to this Weights & Biases project."""


def main(cfg: Config) -> None:
    # -----------------------------------------------------------------------------------------------------------------
    # 2 Setup
    check_flags(cfg)  # what cannot work is refused now, not after minutes
    with RunFolder.open(cfg.output, cfg, script=__file__, resume=cfg.resume) as run:
        if run.finished:
            say(f"{cfg.output} is finished: nothing to resume")
            return
        train(cfg, run)


def train(cfg: Config, run: RunFolder) -> None:
    begun = time.perf_counter()
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    torch.manual_seed(cfg.seed)
    make_deterministic(cfg.deterministic)
    enable_compile(cfg.compile)
    say(f"{describe_device(device, dtype)}; {describe_choices(cfg)}")

    # -----------------------------------------------------------------------------------------------------------------
    # 3 Tokenizer and data
    folder = find_checkpoint(cfg.model)
    config = read_config(folder)
    model = build_text_model(config)  # on the meta device: shapes only
    seq_len = fit_seq_len(cfg.seq_len, model.config.max_length)
    tokenizer = load_tokenizer(folder)
    template = load_chat_template(folder, tokenizer, cfg.chat_format, now=run.started)
    rows = dict(
        seq_len=seq_len,
        train_on=cfg.train_on,
        prompt_field=cfg.prompt_field,
        completion_field=cfg.completion_field,
        on_special_content=cfg.on_special_content,
    )
    dataset = load_dataset(cfg.data, tokenizer, template, **rows)
    eval_dataset = load_dataset(cfg.eval_data, tokenizer, template, **rows) if cfg.eval_data else None
    for loaded in filter(None, (dataset, eval_dataset)):
        loaded.check_vocabulary(model.config.vocab_size)
        for line in loaded.report.lines():
            say(line)
    # Few different lengths on CUDA, where each one may cost a compilation.
    padding = dict(pad_multiple=1 if device.type == "cpu" else 64)
    batches = Batches(
        dataset,
        batch_size=cfg.batch_size,
        grad_accum=cfg.grad_accum,
        packing=cfg.packing,
        seq_len=seq_len,
        shuffle=cfg.shuffle,
        seed=cfg.seed,
        **padding,
    )
    eval_batches = Batches(eval_dataset, batch_size=cfg.batch_size, **padding) if eval_dataset else None
    total_steps = batches.total_steps(cfg.epochs, cfg.max_steps)

    # -----------------------------------------------------------------------------------------------------------------
    # 4 Model and weights
    weights = WeightFiles(folder)
    # Still on the meta device: each weight is quantised as it arrives.
    quantize_blocks(model, linear_kind(cfg.quantize), head=cfg.quantize_head)
    model.requires_grad_(False)
    if cfg.embedding == "host":
        keep_embedding_on_host(model, device)
    streamed = None
    if cfg.weights != "resident":
        streamed = stream_weights(model, device, folder=run.path if cfg.weights == "disk" else None)
    load_weights(model, weights, device=device, dtype=dtype, placed=streamed.take if streamed else None)
    if streamed:
        say(streamed.describe())

    # -----------------------------------------------------------------------------------------------------------------
    # 5 Adapters / quantisation
    add_lora(
        model,
        rank=cfg.rank,
        alpha=cfg.alpha,
        dropout=cfg.dropout,
        targets=cfg.targets,
        dtype=DTYPES[cfg.adapter_dtype],
    )
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    say(f"{describe_trained(model)}, in {total_steps} steps")

    # -----------------------------------------------------------------------------------------------------------------
    # 6 Memory plan and compile
    attention = "default"
    if not cfg.packing:  # packed documents have one kernel
        attention = choose_attention(model.config, device, dtype, batch=cfg.batch_size, length=seq_len)
    say(describe_attention(device, dtype, cfg.packing, attention))
    bind = streamed.use if streamed else None
    plain = (why_not(model) or disagreement(model, bind)) if cfg.fused else "--no-fused"
    say(
        f"blocks: plain modules ({plain})"
        if plain
        else "blocks: forward and backward by hand (modules/fused/lora_block.py)"
    )
    budgets = dict(budget=cfg.activations_gib * 2**30, host_budget=cfg.activations_host_gib * 2**30)
    measures = dict(every=cfg.activations_every, **budgets, fused=not plain)
    keep_activations(model, cfg.activations, **measures, compile=cfg.compile, bind=bind)
    autocast = nullcontext()  # every layer already computes in the weights' dtype
    measures |= dict(optimizer=cfg.optimizer, step_in_backward=cfg.step_in_backward, streamed=streamed)
    plan = plan_memory(model, cfg.activations, **measures, tokens=cfg.batch_size * seq_len, dtype=dtype)
    say(describe_memory(plan))

    # -----------------------------------------------------------------------------------------------------------------
    # 7 Optimizer and schedule
    optimizer = build_optimizer(cfg.optimizer, trainable, lr=cfg.lr, weight_decay=cfg.weight_decay)
    schedule = dict(peak=cfg.lr, schedule=cfg.schedule, warmup_steps=cfg.warmup_steps, total_steps=total_steps)
    norm_of_backward = None
    if cfg.step_in_backward:
        limits = dict(grad_accum=cfg.grad_accum, max_grad_norm=cfg.max_grad_norm, dtype=dtype)
        norm_of_backward = step_in_backward(optimizer, **limits)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # -----------------------------------------------------------------------------------------------------------------
    # 8 Resume
    progress = {"step": 0, "epoch": 0, "step_in_epoch": 0}
    identity = {"weights": weights.fingerprint(), "data": dataset.fingerprint}
    if checkpoint := run.latest_checkpoint():
        progress = load_training_state(checkpoint, parameters=trainable, optimizer=optimizer, scaler=scaler)
        run.check_resumable(progress.pop("config"), identity, progress.pop("identity"))
        use_attention(attention := progress.pop("attention"))  # as measured when the run began
        say(f"resuming after step {progress['step']}")
    run.cut_metrics(progress["step"])
    run.prune(cfg.keep_last)

    def save_checkpoint() -> None:
        state = progress | {"config": asdict(cfg), "identity": identity, "attention": attention}
        path = run.checkpoints / f"step-{progress['step']}"
        save_training_state(path, parameters=trainable, optimizer=optimizer, progress=state, scaler=scaler)
        run.prune(cfg.keep_last)
        run.draw()

    chat_template = template.source if dataset.report.chat_rows else None

    def save_result() -> None:
        with atomic_folder(run.adapter) as target:
            save_adapter(target, model, base=cfg.model, chat_template=chat_template)

    run.rehearse(save_result)  # a save that cannot work fails now, not after the training

    # -----------------------------------------------------------------------------------------------------------------
    # 9 Training loop
    loggers = run.closing(open_loggers(cfg, run.path, progress["step"]))
    stop_ids = stop_token_ids(folder, tokenizer, template)
    bar = tqdm(total=total_steps, initial=progress["step"], unit="step", disable=None)

    def evaluate() -> None:
        with autocast:
            loss, _ = evaluate_loss(model, eval_batches.one_epoch(), device, dtype)
        loggers.log({"step": progress["step"], "eval_loss": loss})
        run.log({"step": progress["step"], "eval_loss": loss})
        sample = sample_completion(model, eval_dataset, tokenizer, stop_ids)
        said = f"{sample['prompt'][-40:]!r} → {sample['completion']!r}"
        tqdm.write(f"step {progress['step']}: evaluation loss {loss:.4f}; {said}", file=sys.stderr)
        run.draw()

    model.train()
    first = progress["step"] + 1
    for epoch, step_in_epoch, micro_batches in batches.steps(progress["epoch"], progress["step_in_epoch"]):
        if progress["step"] >= total_steps or run.stop_requested:
            break
        started = time.perf_counter()
        lr = learning_rate(progress["step"], **schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        tokens = sum(batch.target_tokens for batch in micro_batches)
        step_loss = torch.zeros((), device=device)
        for batch in micro_batches:
            batch = batch.to(device, dtype)
            with autocast:
                # hidden [B, T, D]; targets [N] stand at the flat positions target_index [N]. For a loss of your own:
                # logits = model.logits(hidden.flatten(0, 1)[batch.target_index]) [N, V] are what they belong to. The
                # memory plan counts no whole logits: to weigh tokens, modules/loss.py's linear_logprobs does without.
                # A sum is divided by the step's tokens. Evaluation stays plain cross entropy (modules/evaluation.py).
                hidden = model(batch.input_ids, batch.layout)
                loss = linear_cross_entropy(hidden, model.lm_head, batch.targets, index=batch.target_index) / tokens
            del hidden  # backward frees what it has used, unless a name still holds it
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
        loggers.log(row)
        run.log(row, scaled=scaler.is_enabled())  # an error if loss or norm is not finite
        if progress["step"] == first:
            waited = f"first step done after {time.perf_counter() - begun:.1f} s, {seconds:.1f} s of them its own"
            tqdm.write(waited, file=sys.stderr)
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
    say(f"peak memory {peak_memory_gib(device):.2f} GiB; adapter in {run.adapter}")


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Config))
