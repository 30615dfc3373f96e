"""The parts of a model, and what is done to them."""

import sys
import warnings
from pathlib import Path


def _warn_of_another_clone() -> None:
    """In a clone that is not the installed one, a notebook or script (not a recipe) imports the installed one."""
    root = Path(__file__).resolve().parents[1]
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    here = Path(script).resolve().parent if script else Path.cwd()
    folders = (here, *here.parents)
    clone = next((folder for folder in folders if (folder / "modules/fused/lora_block.py").is_file()), root)
    if clone != root:
        warnings.warn(f"you are in {clone}, but models, modules and data come from {root}", stacklevel=2)


_warn_of_another_clone()
