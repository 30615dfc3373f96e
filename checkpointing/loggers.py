"""Optional loggers beside metrics.jsonl: TensorBoard and Weights & Biases (`pip install -e ".[loggers]"`)."""

import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from checkpointing.run_record import plain


class Loggers:
    """Passes every metrics row on to the loggers that were asked for."""

    def __init__(self) -> None:
        self._sinks: list[tuple[Callable[[dict, int], None], Callable[[], None]]] = []

    def add(self, log: Callable[[dict, int], None], close: Callable[[], None]) -> None:
        self._sinks.append((log, close))

    def log(self, row: dict) -> None:
        values = {name: value for name, value in row.items() if name != "step"}
        for log, _ in self._sinks:
            log(values, row["step"])

    def close(self) -> None:
        for _, close in self._sinks:
            close()


def check_loggers(cfg) -> None:
    """Raise ImportError, with the fix, if one that is asked for is not installed."""
    if cfg.tensorboard:
        _package("--tensorboard", "torch.utils.tensorboard")
    if cfg.wandb:
        _package("--wandb", "wandb")


def open_loggers(cfg, folder: Path, step: int) -> Loggers:
    """The loggers that `cfg.tensorboard` and `cfg.wandb` ask for, of a run that stands at `step`.

    Raises ImportError, with the fix, if one is not installed.
    """
    loggers = Loggers()
    if cfg.tensorboard:
        # What was logged after the checkpoint that a resumed run goes on from is dropped.
        writer = _package("--tensorboard", "torch.utils.tensorboard").SummaryWriter(
            str(folder / "tensorboard"), purge_step=step + 1 if step else None
        )

        def to_tensorboard(values: dict, step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        loggers.add(to_tensorboard, writer.close)
    if cfg.wandb:
        wandb = _package("--wandb", "wandb")
        # One id per folder, so that a resumed run continues its curve.
        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        options = dict(project=cfg.wandb, id=identity, name=folder.name, resume="allow", dir=str(folder))
        run = wandb.init(config=plain(cfg), **options)
        loggers.add(lambda values, step: run.log(values, step=step), run.finish)
    return loggers


def _package(flag: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f'{flag} needs the loggers extra: pip install -e ".[loggers]"') from None
