"""The soak's short form: after half a minute of faults every byte equals that of an undisturbed run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parents[1] / "benchmarks/soak.py"
MINUTES = os.environ.get("MINIPEFT_SOAK_MINUTES", "0.4")


@pytest.mark.skipif(sys.platform != "linux", reason="limits another process: prlimit is Linux's")
def test_half_a_minute_of_kills_and_pressure(tmp_path: Path) -> None:
    command = [sys.executable, str(SOAK), "--minutes", MINUTES, "--out", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["wrong"] == []
    assert summary["rounds"] >= 1
    assert summary["neighbour"]["cycles"] >= 1
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {row["harm"] for row in rows if "harm" in row} - {"none"}, "nothing was harmed"
    compared = [row for row in rows if "round" in row]
    assert all(row["files"] >= 8 and not row["differ"] for row in compared), "the run, its answers and their scores"
    wanted = next(row["wanted"] for row in rows if "wanted" in row)
    assert {row["digest"] for row in rows if "cycle" in row} == {wanted}
