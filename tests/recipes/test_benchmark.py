"""recipes/benchmark.py: a dry run of every part on two-layer models, and what is computed from the measurements."""

import json
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch

from models import build_model
from models.llama import LlamaConfig
from recipes import benchmark
from recipes.benchmarks import card, measure, peers, report, vlm
from recipes.benchmarks.measure import Machine, Row
from tests.tiny import run_recipe

CPU = Machine(torch.device("cpu"), torch.float32, tiny=True)
DRY = ("--device", "cpu", "--tiny", "--steps", 2)
GIB = 2**30


def run(path, *arguments):
    done = run_recipe("benchmark", *DRY, "--output", path, *arguments)
    return json.loads(path.read_text(encoding="utf-8")), done


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """All parts, on a few rows."""
    path = tmp_path_factory.mktemp("benchmark") / "results.json"
    only = ["1B LoRA", "8B QLoRA 2x2048, offload", "8B QLoRA 2x2048, none", "1B full 1x2048", "8B full 1x2048"]
    only += ["70B", "7B LoRA", "7B QLoRA 1x"]
    return run(path, "--only", *only, "--activations-gib", 0.001, "--confirm-gib", 8)


@pytest.mark.slow(16)  # makes `dry`
def test_every_part_runs_on_the_cpu(dry):
    data, done = dry
    parts = ("speed", "peers", "rungs", "longest", "small", "full", "vlm")
    for part in parts:
        assert data[part]
        for row in data[part]:
            assert "failed" not in row, row
            assert row["tokens_per_second"] > 0
            assert row["peak_gib"] is row["card_gib"] is None  # nothing of a GPU is made up
            assert {"preset", "batch", "length", "quantize", "rank"} < set(row["settings"])
    assert data["ceilings"]["matmul_tflops"] > 0
    assert data["ceilings"]["both_ways_gb_per_s"] is None
    assert data["longest_fit"]["longest"] == {"8": None, "12": None, "16": None, "24": None}
    assert data["machine"]["tiny"] and "python recipes/benchmark.py" in data["runs"][0]["command"]
    assert "| offload, hand-written |" in done.stdout and "| fast, hand-written |" in done.stdout
    assert "speed: 8B QLoRA 2×32, offload + 0.001 GiB, hand-written" in done.stdout
    assert "peers: 8B LoRA" not in done.stdout and "peers: 1B LoRA 4×32, transformers + peft: " in done.stdout
    assert "| transformers " in done.stdout and " + peft " in done.stdout


@pytest.mark.slow(1)
def test_modes_train_alike(dry):
    rows = dry[0]["rungs"]
    # Four modes, plain and fused; fused with attention in host memory, and streamed. The reference is the plain `none`.
    assert len(rows) == 10
    assert all(len(row["losses"]) == 20 and row["losses"][-1] < row["losses"][0] - 0.05 for row in rows)
    assert max(row["max_relative_deviation"] for row in rows) < 1e-5


@pytest.mark.slow(1)
def test_streamed_and_resident_models_are_the_same(dry):
    rows = [row for row in dry[0]["small"] if row["settings"]["preset"] == "llama-3.3-70b"]
    losses = {(row["settings"]["weights"], row["settings"]["length"]): row["losses"] for row in rows}
    for length in (64, 256):
        assert len(losses["stream", length]) == 3
        assert losses["stream", length] == pytest.approx(losses["resident", length], rel=1e-5)


@pytest.mark.slow(1)
def test_rows_with_images(dry):
    data, done = dry
    rows = {row["settings"]["name"]: row for row in data["vlm"]}
    assert [row["settings"]["measurement"] for row in data["vlm"]] == ["speed"] * 4 + ["peers", "loading"] + [
        "longest"
    ] * 2
    # The first two steps of every mode on the same batch from the same weights; the last is the loader's own batch.
    ways = [row["losses"] for name, row in rows.items() if "hand-written" in name and "4×1024" in name]
    assert all(losses == pytest.approx(ways[0], rel=1e-5) for losses in ways[:4])
    assert ways[4] != pytest.approx(ways[0], rel=1e-5)
    loading = rows["7B LoRA 4×1024, lean, hand-written, JPEG files"]
    waited = 1 - loading["tokens_per_second"] / loading["tokens_per_second_preloaded"]
    assert loading["idle_share"] == pytest.approx(waited, abs=1e-3)
    assert "| 7B LoRA 4×1024, transformers + peft |" in done.stdout


def card_that_takes(bytes_per_token, monkeypatch):
    """3.2 GiB, and so many bytes per token."""
    honest = measure.run_steps

    def run_steps(step, *, tokens, **settings):
        return honest(step, tokens=tokens, **settings) | {"card_gib": 3.2 + tokens * bytes_per_token / GIB}

    monkeypatch.setattr(measure, "run_steps", run_steps)


def test_longest_row_with_an_image_follows_from_the_line(tmp_path, monkeypatch):
    card_that_takes(8e7, monkeypatch)  # the dry run's short rows then fill 24 GiB
    monkeypatch.setattr(vlm, "LENGTHS", (64, 128))
    data, _ = run(tmp_path / "results.json", "--parts", "vlm", "--only", "7B QLoRA 1x")
    first, second, capped = data["vlm"]
    assert (first["settings"]["length"], second["settings"]["length"]) == (64, 128)
    room = 24 - card.SPARE_BYTES / GIB - 3.2
    assert capped["settings"]["length"] == int(room * GIB / 8e7) // 64 * 64 == 256
    assert capped["within_cap"] is True and capped["settings"]["cap_gib"] == 24
    assert capped["fixed_gib"] == pytest.approx(3.2, abs=1e-3)
    assert capped["kb_per_token"] == pytest.approx(8e4, rel=1e-3)


@pytest.mark.slow(1)
def test_percentages_are_operations_over_the_ceiling(dry):
    data = dry[0]
    row = data["speed"][0]
    tflops = row["tokens_per_second"] * row["flops_per_token"] / 1e12
    assert row["percent_of_ceiling"] == pytest.approx(100 * tflops / data["ceilings"]["matmul_tflops"], abs=0.1)
    assert "percent_of_ceiling" in data["peers"][0]


@pytest.mark.parametrize("rank, per_weight", [(16, 4), (0, 6)])
def test_operations_per_token(rank, per_weight):
    config = Machine(torch.device("cpu"), torch.float32, tiny=False).config("llama-3.1-8b")
    model = build_model(config)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2) - model.model.embed_tokens.weight.numel()
    attention = 6 * 2048 * 32 * 128 * 32  # 6 · T · N · H per block
    expected = per_weight * matrices + attention
    assert measure.flops_per_token(Row("llama-3.1-8b", 2, 2048, rank=rank), LlamaConfig.from_dict(config)) == expected


def test_longest_sequence_follows_from_the_line(tmp_path, monkeypatch):
    card_that_takes(80_000, monkeypatch)
    path = tmp_path / "results.json"
    data, _ = run(path, "--parts", "longest", "--fit-lengths", 4096, 16384, "--cap-gib", 8)
    assert data["longest_fit"]["fixed_gib"] == pytest.approx(3.2, abs=1e-3)
    assert data["longest_fit"]["kb_per_token"] == pytest.approx(80, abs=0.01)
    longest = data["longest_fit"]["longest"]["8"]
    assert longest % 64 == 0
    needed = 3.2 + card.SPARE_BYTES / GIB + longest * 80_000 / GIB
    assert 8 - 64 * 80_000 / GIB <= needed <= 8

    # Another call takes the points from the file, and confirms a cap that has room for few tokens.
    data, done = run(path, "--parts", "longest", "--fit-lengths", "--cap-gib", 8, "--confirm-gib", 3.3)
    assert [row["settings"]["length"] for row in data["longest"]] == [64, 256, data["longest_fit"]["longest"]["3.3"]]
    assert data["longest"][-1]["settings"]["cap_gib"] == 3.3 and data["longest"][-1]["within_cap"] is True
    assert data["longest_fit"]["fixed_gib"] == pytest.approx(3.2, abs=1e-3)  # a row under a cap is no point
    assert f"| 8 GiB | {longest:,} |" in done.stdout and "3.20 GiB + 80.0 KB per token" in done.stdout
    picture = (tmp_path / "memory.svg").read_text()
    assert f"8 GiB: {longest:,} tokens" in picture and picture.count("<circle") == 3

    before = path.read_bytes()
    (tmp_path / "memory.svg").unlink()
    assert f"| 8 GiB | {longest:,} |" in run_recipe("benchmark", "--table", path).stdout
    assert path.read_bytes() == before and (tmp_path / "memory.svg").exists()


def test_a_row_that_does_not_fit_is_recorded_and_the_next_one_measured(tmp_path, monkeypatch):
    honest = benchmark.build_and_train

    def build_and_train(row, machine, **settings):
        if row.activations == "fast":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        if row.activations == "lean":
            raise RuntimeError("something else\nand more")
        return honest(row, machine, **settings)

    monkeypatch.setattr(benchmark, "build_and_train", build_and_train)
    path = tmp_path / "results.json"
    rows = [f"1B LoRA 4x2048, {mode}, hand-written" for mode in ("fast", "lean", "offload")]
    data, done = run(path, "--parts", "speed", "--only", *rows)
    failed = {row["settings"]["activations"]: row.get("failed") for row in data["speed"]}
    assert failed == {"fast": "out of memory", "lean": "something else", "offload": None}
    assert "| fast, hand-written | out of memory |" in done.stdout
    # Measured again it is replaced, and nothing else.
    monkeypatch.undo()
    data, _ = run(path, "--parts", "speed", "--only", rows[0])
    failed = {row["settings"]["activations"]: row.get("failed") for row in data["speed"]}
    assert failed == {"fast": None, "lean": "something else", "offload": None}


def test_a_file_of_another_machine_is_not_added_to(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"machine": {"device": "another"}}))
    done = run_recipe("benchmark", *DRY, "--output", path, "--parts", "ceilings", check=False)
    assert done.returncode == 2 and "choose another --output" in done.stderr
    assert json.loads(path.read_text()) == {"machine": {"device": "another"}}


def test_other_settings_are_other_points():
    base = asdict(Row("llama-3.1-8b", 1, 0, rank=32))
    rows = [{"settings": base | {"length": n}, "card_gib": 2.0 + n} for n in (1, 2)]
    rows.append({"settings": base | {"length": 3, "quantize_head": True}, "card_gib": 1.0})
    rows.append({"settings": base | {"length": 4}, "failed": "out of memory"})
    assert report.fit_memory({"longest": rows}, base, (8,))["fixed_gib"] == 2.0


def test_fit_line_is_least_squares():
    assert card.fit_line([(0.0, 1.0), (1.0, 2.0), (2.0, 6.0)]) == pytest.approx((0.5, 2.5))


def test_seconds_per_call():
    assert 0.002 <= card.seconds_per_call(lambda: time.sleep(0.002), CPU.device, at_least=0.05) < 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Other tools


def test_a_tool_that_is_not_installed_is_skipped_with_one_line(tmp_path, monkeypatch):
    for key, peer in peers.PEERS.items():
        monkeypatch.setitem(peers.PEERS, key, replace(peer, needs=("no-such-package",)))
    peft = replace(peers.PEERS["peft"], needs=(), needs_for_nf4=("no-such-package",))
    monkeypatch.setitem(peers.PEERS, "peft", peft)
    for key in ("liger", "unsloth"):
        assert peers.PEERS[key].needs_cuda
    monkeypatch.setitem(peers.PEERS, "unsloth", replace(peers.PEERS["unsloth"], needs_cuda=False))
    data, done = run(tmp_path / "results.json", "--parts", "peers", "--only", "8B QLoRA", "torchtune")
    assert "peers" not in data
    lines = [line for line in done.stdout.splitlines() if line.startswith("peers: ")]
    assert lines[0] == "peers: transformers + peft: 2 of 2 skipped, not installed: no-such-package"
    assert lines[1] == "peers: transformers + peft + liger-kernel: skipped, its kernels need CUDA"
    assert lines[2].startswith("peers: unsloth: 2 of 2 skipped, not installed: ")
    assert lines[3].startswith("peers: torchtune: 5 of 5 skipped, not installed: ")
    assert len(lines) == len(peers.PEERS)


def test_a_tool_makes_one_model_for_the_columns_that_can_use_it(monkeypatch):
    """And a tool's error, of whatever kind, is the row's; the next is trained."""
    built = []

    def build(row, machine):
        built.append((row.preset, row.quantize, row.length))
        if row.quantize == "nf4":
            raise ModuleNotFoundError("no kernels\nfor this card")
        model = torch.nn.Linear(1, 1, bias=False)
        return model, lambda ids: (model.weight * ids.numel()).sum()

    rows = benchmark.shrink(benchmark.COLUMNS, CPU)
    figures = list(peers.train_all(peers.Peer("one", build), rows, CPU, steps=2))
    assert built == [("llama-3.1-8b", "none", 128), ("llama-3.1-8b", "nf4", 128), ("llama-3.2-1b", "none", 32)]
    assert [f.get("failed") for f in figures] == [None, None] + ["ModuleNotFoundError: no kernels"] * 2 + [None]
    first, second = figures[0]["losses"], figures[1]["losses"]
    # AdamW takes 1e-4 off the weight with every step; the second column goes on where the first ended.
    assert first[0] - first[1] == pytest.approx(64 * 1e-4, abs=2e-6)
    assert second[0] / 128 == pytest.approx(first[1] / 64 - 1e-4, abs=1e-6)
    assert figures[4]["flops_per_token"] == measure.flops_per_token(
        rows[4], LlamaConfig.from_dict(CPU.config("llama-3.2-1b"))
    )


def test_a_process_that_dies_costs_only_its_rows(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    rows = benchmark.shrink(benchmark.COLUMNS[:2], CPU)
    assert list(peers.measure("liger", rows, CPU, steps=1)) == [
        (row, {"failed": "the process ended with 1"}) for row in rows
    ]


def test_tables_say_which_tool_in_which_version():
    settings = {"preset": "llama-3.1-8b", "batch": 2, "length": 2048, "quantize": "nf4", "rank": 16}
    versions = {"transformers": "5.17.0", "peft": "0.21.2", "liger-kernel": "0.8.5", "bitsandbytes": "0.50.2"}
    tools = {"transformers + peft": 7549.0, "transformers + peft + liger-kernel": 8794.0}
    rows = [
        {"settings": settings | {"peer": tool, "versions": versions}, "tokens_per_second": speed, "peak_gib": 7.4}
        for tool, speed in tools.items()
    ]
    table = report.tables({"machine": {"device": "a card"}, "runs": [{"date": "today"}], "peers": rows})
    assert "| transformers 5.17.0 + peft 0.21.2 | 7,549 / 7.4 |" in table
    assert "| transformers 5.17.0 + peft 0.21.2 + liger-kernel 0.8.5 | 8,794 / 7.4 |" in table


@pytest.mark.gpu
def test_a_cap_holds_on_cuda():
    device = torch.device("cuda", 0)
    torch.zeros(1, device=device)
    cap = card.outside_allocator_bytes(device) / GIB + 0.5
    card.limit_memory(cap, device)
    try:
        torch.cuda.reset_peak_memory_stats(device)
        torch.empty(2**28, dtype=torch.uint8, device=device)
        assert card.card_gib(device) <= cap
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**29, dtype=torch.uint8, device=device)
    finally:
        card.lift_limit(device)
    torch.empty(2**29, dtype=torch.uint8, device=device)
