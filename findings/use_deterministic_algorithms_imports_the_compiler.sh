#!/usr/bin/env bash
# torch 2.13.0: torch.use_deterministic_algorithms(False), which changes nothing in a fresh process, imports the compiler
# (torch._inductor, and with it sympy): hundreds of modules. A script that passes a flag's value on unconditionally pays
# for it at every start, without a GPU and without compiling anything. Asking first
# (torch.are_deterministic_algorithms_enabled()) imports nothing.
#
# Output seen, 2026-12-01, Python 3.11, torch 2.13.0+cpu:
#     asking imports sympy: False
#     setting imports sympy: True, torch._inductor: True, more than 500 modules: True
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0"
result="$("$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import sys

import torch

torch.are_deterministic_algorithms_enabled()
print("asking imports sympy:", "sympy" in sys.modules)
before = len(sys.modules)
torch.use_deterministic_algorithms(False)
many = len(sys.modules) - before > 500
names = (f"{name}: {name in sys.modules}" for name in ("sympy", "torch._inductor"))
print("setting imports", ", ".join(names) + f", more than 500 modules: {many}")
PYTHON
)"
printf '%s\n' "$result"
[ "$result" = "asking imports sympy: False
setting imports sympy: True, torch._inductor: True, more than 500 modules: True" ]
