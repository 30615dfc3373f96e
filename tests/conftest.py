"""How the suite runs: folders on all cores, one thread in each process, the longest tests first; what is quick."""

import gc
import os
from itertools import groupby
from pathlib import Path

# Before torch is imported, and for the processes that tests start: several workers with a thread per core each would
# wait for one another, and matrices this small gain nothing from threads.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """What is run by folder runs on all cores; files run in this process, sooner than workers would have started."""
    option = config.option
    by_default = getattr(option, "numprocesses", 0) is None and not (option.tx or option.distload or option.usepdb)
    if by_default and not hasattr(config, "workerinput") and any(Path(argument).is_dir() for argument in config.args):
        option.numprocesses, option.dist = "logical", "worksteal"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is quick, and put what takes long where two workers begin: at the front and in the middle."""
    short = [item for item in items if not item.get_closest_marker("slow")]
    for item in short:
        if not item.nodeid.startswith("tests/recipes/"):
            item.add_marker("quick")
    long = [item for item in items if item.get_closest_marker("slow")]
    files = [list(group) for _, group in groupby(long, key=lambda item: item.path)]  # whose fixtures are made once
    front, middle = [], []
    for file in sorted(files, key=seconds, reverse=True):
        min(front, middle, key=seconds).extend(file)
    half = len(short) // 2
    items[:] = [*front, *short[:half], *middle, *short[half:]]


def seconds(items: list[pytest.Item]) -> float:
    return sum(item.get_closest_marker("slow").args[0] for item in items)


def pytest_collection_finish() -> None:
    """What has been imported stays: leave it out of every garbage collection, which then takes 20 ms instead of 300."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
