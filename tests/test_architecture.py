"""The picture of the imports, and what else holds for the whole tree: no arrow upwards, no circle, short floors."""

import ast
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.tiny import ROOT

CODE = ("recipes", "models", "modules", "checkpointing", "data")
# A folder imports itself and those of lower rank.
RANKS = {"recipes": 4, "checkpointing": 3, "models": 2, "data": 1, "modules": 0}
# Within modules/ likewise: the parts of a model at its top import no folder, unless they put the folders to use.
ROOMS = {"memory": 4, "fused": 3, "adapters": 2, "quantization": 1, "": 0}
USE_THE_ROOMS = ("evaluation", "generation", "optim")


def files() -> list[Path]:
    return [path.relative_to(ROOT) for folder in CODE for path in sorted((ROOT / folder).rglob("*.py"))]


@cache
def imports(file: Path) -> set[str]:
    """Every module that a file imports, in its functions too; of `from a import b` also a.b, which may be one."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_files(file: Path) -> set[Path]:
    """Of this repository."""
    paths = [Path(*name.split(".")) for name in imports(file) if name.split(".")[0] in CODE]
    found = {path.with_suffix(".py") for path in paths} | {path / "__init__.py" for path in paths}
    return {path for path in found if (ROOT / path).exists()} - {file}


def room(file: Path) -> str:
    return file.parts[1] if len(file.parts) > 2 else ""


def is_downwards(file: Path, other: Path) -> bool:
    if file.parts[0] != other.parts[0]:
        return RANKS[file.parts[0]] > RANKS[other.parts[0]]
    return file.parts[0] != "modules" or file.stem in USE_THE_ROOMS or ROOMS[room(file)] >= ROOMS[room(other)]


def test_no_arrow_points_upwards():
    upwards = {str(file): [str(o) for o in imported_files(file) if not is_downwards(file, o)] for file in files()}
    assert len(upwards) > 80 and {file: others for file, others in upwards.items() if others} == {}


def test_no_circle_of_files():
    TopologicalSorter({file: imported_files(file) for file in files()}).prepare()  # names a circle in its error


@pytest.mark.parametrize("folder", sorted({file.parent for file in files()} - {Path("recipes")}), ids=str)
def test_at_most_twenty_files_on_a_floor(folder):
    assert len(list((ROOT / folder).glob("*.py"))) <= 20


def test_torchao_is_imported_in_one_place_and_numpy_nowhere():
    packages = {file.as_posix(): {name.split(".")[0] for name in imports(file)} for file in files()}
    assert [file for file in packages if "torchao" in packages[file]] == ["modules/quantization/torchao_parts.py"]
    assert not [file for file in packages if "numpy" in packages[file]]
    assert not [file for file in files() if ".numpy(" in (ROOT / file).read_text(encoding="utf-8")]


def test_every_folder_with_code_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(settings["packages"]) == {".".join(file.parent.parts) for file in files()}
