"""The LoRA benchmarks run on a CPU too, on small shapes, so that they are ready when a GPU is there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
COMMANDS = [
    "lora_linear --rows 16 --shapes 32x48 --rounds 2 --dtypes bfloat16 --dropout 0 --out {0}/lora-linear.json",
    "blocks --rows 16 --rounds 1 --dropout 0.1 --dtype bfloat16 --out {0}/lora-blocks.json",
    "decode --batches 4 --shape 32x48 --rounds 2 --out {0}/lora-decode.json",
    "steps --cases layer --length 8 --rounds 1 --steps 2 --out {0}/lora-steps.json",
    "steps --cases gpt2 --layers 1 --length 8 --rounds 1 --steps 1 --dtype bfloat16 --checkpointing"
    " --out {0}/lora-steps-2.json",
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
        [sys.executable, "-c", PROGRAM, *commands], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stderr.rstrip().endswith("InputError: --cases: 7b is not measured on cpu"), done.stderr[-3000:]
    rows = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert sorted(rows) == ["lora-blocks", "lora-decode", "lora-linear", "lora-steps", "lora-steps-2"]
    ours = [row for found in rows.values() for row in found if row["variant"] == "reference"]
    assert not [row for row in ours if "FAIL" in row["note"]]
    for row in ours:
        assert row["ratio"] > 0
        assert {"errors", "error", "loss_after_20_steps"} & row["extra"].keys()
        assert {"load", "noise", "ceiling_tflops", "ceiling_gb_per_s"} <= row["surroundings"].keys()
    for table in ("lora-linear", "lora-blocks", "lora-steps-2"):
        columns = {row["variant"] for row in rows[table]}
        assert {"frozen", "peft, same dtype", "peft, default", "peft, autocast", "reference"} <= columns
    assert "times_frozen" in rows["lora-blocks"][0]["extra"]
    assert all(row["calls"] == 128 for row in rows["lora-decode"])
