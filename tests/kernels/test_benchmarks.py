"""The LoRA benchmarks run on a CPU too, on small shapes, so that they are ready when a GPU is there."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
COMMANDS = [
    "lora_linear --busy --rows 16 --shapes 32x48 --rounds 2 --dtypes bfloat16 --dropout 0 --threads 1 2"
    " --out {0}/lora-linear.json",
    "blocks --busy --rows 16 --rounds 1 --dropout 0.1 --dtypes bfloat16 --out {0}/lora-blocks.json",
    "decode --busy --batches 4 --shape 32x48 --rounds 2 --out {0}/lora-decode.json",
    "calls --busy --rounds 1 --dropout 0.1 --out {0}/lora-calls.json",
    "steps --busy --cases layer --length 8 --rounds 1 --steps 2 --out {0}/lora-steps.json",
    "steps --busy --cases gpt2 --layers 1 --length 8 --rounds 1 --steps 1 --dtype float32 --activation-checkpointing"
    " --dropout 0 --out {0}/lora-steps-2.json",
]
REFUSED = "steps --cases 7b"  # the last command: a 7B is not begun on a CPU
PROGRAM = """
import sys
for command in sys.argv[1:]:
    name, *sys.argv[1:] = command.split()
    __import__(name).main()
"""


def test_each_benchmark_writes_rows_with_errors_beside_ratios(tmp_path: Path) -> None:
    """One process for all, since importing peft takes seconds."""
    pytest.importorskip("peft")
    commands = [command.format(tmp_path) for command in [*COMMANDS, REFUSED]]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *commands], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.stderr.rstrip().endswith("InputError: --cases: 7b is not measured on cpu"), done.stderr[-3000:]
    rows = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert sorted(rows) == ["lora-blocks", "lora-calls", "lora-decode", "lora-linear", "lora-steps", "lora-steps-2"]
    ours = [row for found in rows.values() for row in found if row["variant"] == "reference"]
    ours += [row for row in rows["lora-calls"] if row["variant"] == "minipeft"]
    assert len({row["benchmark"] for row in rows["lora-calls"]}) == 6  # one linear and three, in three passes
    assert not [row for row in ours if "FAIL" in row["note"]]
    for row in ours:
        assert row["ratio"] > 0
        assert {"errors", "error", "loss_after_20_steps"} & row["extra"].keys()
        assert {"load", "noise", "ceiling_tflops", "ceiling_gb_per_s"} <= row["surroundings"].keys()
    casts = {"peft, default", "peft, autocast"}  # of bfloat16 alone
    for table, more in (("lora-linear", casts), ("lora-blocks", casts), ("lora-steps-2", set())):
        columns = {row["variant"] for row in rows[table]}
        assert {"frozen", "peft, same dtype", "reference"} | more <= columns
    assert {row["surroundings"]["threads"] for row in rows["lora-linear"]} == {1, 2}
    assert {row["note"] for row in rows["lora-steps"]} == {"dropout 0.0", "dropout 0.1"}
    assert "times_frozen" in rows["lora-blocks"][0]["extra"]
    assert all(row["calls"] == 128 for row in rows["lora-decode"])


def test_a_busy_machine_is_waited_for_and_then_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    measure = importlib.import_module("measure")
    loads, waits = [9.0], []
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (loads[0], 0.0, 0.0))
    monkeypatch.setattr(measure.time, "sleep", waits.append)
    with pytest.raises(SystemExit, match=r"not measured: the load average is 6\.5 above 2\.5 and .* give --busy"):
        measure.measure({"it": int}, name="", shape="", dtype="float32")
    assert waits == [15.0] * 20
    assert "waits for other work to end: the load average is 6.5 too high" in capsys.readouterr().out
    assert measure.measure({"it": int}, name="", shape="", dtype="float32", rounds=1, busy=True)[0].surroundings["busy"]
    loads[0] = 2.5
    assert not measure.measure({"it": int}, name="", shape="", dtype="float32", rounds=1)[0].surroundings["busy"]


def test_the_ceiling_of_a_slow_product_is_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded to 3 decimals of a TFLOP/s, less than 0.5 GFLOP/s was 0, and the benchmarks divided by it."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    measure = importlib.import_module("measure")
    rounds = []
    monkeypatch.setattr(measure, "_round", lambda *_: rounds.append(5.0) or 5.0)
    assert measure.measure_peak_rates.__wrapped__("cpu", "float32", 1) == {
        "ceiling_tflops": 0.000429,
        "ceiling_gb_per_s": 0.107,
    }
    assert len(rounds) == 2  # a slow one is not timed ten times


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident pages are counted on Linux")
def test_the_memory_of_a_call_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each variant's peak, not that of the one before it: 64 MB, then 16 MB, beside what stands."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    measure = importlib.import_module("measure")
    standing = torch.ones(32 << 20, dtype=torch.uint8)
    variants = {f"{size} MB": lambda size=size: int(torch.ones(size << 20, dtype=torch.uint8)[-1]) for size in (64, 16)}
    rows = measure.measure(variants, name="", shape="", dtype="uint8", rounds=2, busy=True)
    assert {row.variant: round(row.memory_bytes / 2**20, -1) for row in rows} == {"64 MB": 60, "16 MB": 20}
    assert len(standing)
