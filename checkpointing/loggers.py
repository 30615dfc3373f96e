"""Optional loggers in addition to metrics.jsonl: TensorBoard and Weights & Biases (`pip install -e ".[loggers]"`)."""

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from checkpointing.run_record import to_json


@dataclass
class Logger:
    log: Callable[[dict, int], None]  # takes the values of a metrics row, and its step
    close: Callable[[], None]


def check_loggers(cfg) -> None:
    """Raise ImportError, with the fix, if a requested logger is not installed."""
    if cfg.tensorboard:
        _package("--tensorboard", "torch.utils.tensorboard")
    if cfg.wandb:
        _package("--wandb", "wandb")


def open_loggers(cfg, folder: Path, step: int) -> list[Logger]:
    """The loggers that `cfg.tensorboard` and `cfg.wandb` ask for, of a run that stands at `step`."""
    loggers = []
    if cfg.tensorboard:
        # What was logged after the checkpoint that a resumed run goes on from is dropped.
        writer = _package("--tensorboard", "torch.utils.tensorboard").SummaryWriter(
            str(folder / "tensorboard"), purge_step=step + 1 if step else None
        )

        def to_tensorboard(values: dict, step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        loggers.append(Logger(to_tensorboard, writer.close))
    if cfg.wandb:
        wandb = _package("--wandb", "wandb")
        # One id per folder, so that a resumed run continues its curve.
        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        options = dict(project=cfg.wandb, id=identity, name=folder.name, resume="allow", dir=str(folder))
        run = wandb.init(config=to_json(cfg), **options)
        loggers.append(Logger(lambda values, step: run.log(values, step=step), run.finish))
    return loggers


def _package(flag: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f'{flag} needs the loggers extra: pip install -e ".[loggers]"') from None
