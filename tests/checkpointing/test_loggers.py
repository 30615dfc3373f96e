"""The optional loggers, against stand-ins for their packages."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from checkpointing.loggers import open_loggers


class Writer:
    made = []

    def __init__(self, folder, purge_step):
        self.rows, self.purge_step, self.closed = [], purge_step, False
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        self.rows.append((name, value, step))

    def close(self):
        self.closed = True


def test_tensorboard(tmp_path, monkeypatch):
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    (logger,) = open_loggers(SimpleNamespace(tensorboard=True, wandb=None), tmp_path, step=4)
    logger.log({"loss": 1.5}, 5)
    logger.close()
    writer = Writer.made[-1]
    assert writer.rows == [("loss", 1.5, 5)] and writer.purge_step == 5 and writer.closed


def test_wandb_continues_the_same_run(tmp_path, monkeypatch):
    started, rows = [], []

    def init(**options):
        started.append(options)
        return SimpleNamespace(log=lambda values, step: rows.append((values, step)), finish=lambda: rows.append("end"))

    module = ModuleType("wandb")
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    cfg = SimpleNamespace(tensorboard=False, wandb="project")
    monkeypatch.setattr("checkpointing.loggers.to_json", vars)
    for step in (0, 3):
        (logger,) = open_loggers(cfg, tmp_path, step)
        logger.log({"loss": 2.0}, step + 1)
        logger.close()
    assert started[0]["id"] == started[1]["id"] and started[0]["project"] == "project"
    assert rows == [({"loss": 2.0}, 1), "end", ({"loss": 2.0}, 4), "end"]


@pytest.mark.parametrize("package, flags", [("torch.utils.tensorboard", (True, None)), ("wandb", (False, "p"))])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, package, flags):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match="loggers"):
        open_loggers(SimpleNamespace(tensorboard=flags[0], wandb=flags[1]), tmp_path, 0)
