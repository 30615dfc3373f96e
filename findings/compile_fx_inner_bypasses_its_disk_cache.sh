#!/usr/bin/env bash
# torch 2.13.0: torch._inductor.compile_fx.compile_fx_inner, called directly with fake inputs, never looks into its
# cache of compiled graphs on the disk: every process compiles anew. Inside torch._guards.tracing(TracingContext(mode))
# the same call misses once and hits from the second process on. (FxGraphCache takes its ShapeEnv from the tracing
# context and bypasses the cache without one.) The CPU backend needs a C++ compiler.
#
# Output seen, 2026-12-01, Python 3.11, torch 2.13.0+cpu:
#     plain:   bypass, bypass
#     tracing: miss, hit
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0"
cat > "$folder/once.py" <<'PYTHON'
import contextlib
import sys

import torch
from torch._dynamo.utils import counters
from torch._guards import TracingContext, tracing
from torch._inductor import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

mode = FakeTensorMode(shape_env=ShapeEnv())
x = mode.from_tensor(torch.zeros(4, 8), static_shapes=True)
with mode:
    graph = make_fx(lambda x: (x * 2 + 1,))(x)
with tracing(TracingContext(mode)) if sys.argv[1] == "tracing" else contextlib.nullcontext():
    kernel = compile_fx.compile_fx_inner(graph, [x])
assert kernel([torch.ones(4, 8)])[0].eq(3).all()
(seen,) = [name for name in ("bypass", "miss", "hit") if counters["inductor"][f"fxgraph_cache_{name}"]]
print(seen)
PYTHON
export TORCHINDUCTOR_CACHE_DIR="$folder/cache"
result=""
for how in plain tracing; do
  first="$("$folder/venv/bin/python" "$folder/once.py" "$how" 2>/dev/null)"
  second="$("$folder/venv/bin/python" "$folder/once.py" "$how" 2>/dev/null)"
  result+="$how: $first, $second"$'\n'
done
printf '%s' "$result"
[ "$result" = "plain: bypass, bypass"$'\n'"tracing: miss, hit"$'\n' ]
