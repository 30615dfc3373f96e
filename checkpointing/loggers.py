"""Optional loggers beside metrics.jsonl: TensorBoard and Weights & Biases (`pip install -e ".[loggers]"`)."""

from collections.abc import Callable
from pathlib import Path

from checkpointing.run_record import plain


class Loggers:
    """Passes every metrics row on to the loggers that were asked for."""

    def __init__(self, sinks: list[Callable[[dict], None]]):
        self._sinks = sinks

    def log(self, row: dict) -> None:
        for sink in self._sinks:
            sink(row)


def open_loggers(cfg, folder: Path) -> Loggers:
    """The loggers that `cfg.tensorboard` and `cfg.wandb` name; ImportError with the fix if one is not installed."""
    sinks: list[Callable[[dict], None]] = []
    if cfg.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError('--tensorboard needs the loggers extra: pip install -e ".[loggers]"') from None
        writer = SummaryWriter(str(folder / "tensorboard"))

        def to_tensorboard(row: dict) -> None:
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(name, value, row["step"])

        sinks.append(to_tensorboard)
    if cfg.wandb:
        try:
            import wandb
        except ImportError:
            raise ImportError('--wandb needs the loggers extra: pip install -e ".[loggers]"') from None
        run = wandb.init(project=cfg.wandb, dir=str(folder), config=plain(cfg), name=folder.name, resume="allow")
        sinks.append(lambda row: run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"]))
    return Loggers(sinks)
