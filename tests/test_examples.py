"""Each example runs as its first lines say, in a process of its own, and prints what it promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROMISES = {
    "prefix_from_scratch.py": [
        "a prefix equals that text:",
        "init DOWN DOWN DOWN  learning rate 5e-02   0.000 -> 0.000",
        "init N(0, 1)         learning rate 2e-04",
    ],
    "lora_from_scratch.py": ["logits change by 0.0", "the parameters of the base are unchanged", "differ from step 3"],
    "why_codebleu_says_025.py": [
        "nothing at all           0.000   0.000   0.000   0.000     0.250   0.000",
        "the reference itself     0.9",
    ],
    "dpo_from_scratch.py": ["step   0: held-out loss 0.6931", "step  30: held-out loss 0.1", "100% of the pairs"],
    "peft_roundtrip.py": ["PEFT loads it", "28 tensors, every byte equal"],
}


DATA_PARALLEL = "data_parallel_from_scratch.py"


def run(name):
    command = [sys.executable, str(ROOT / "examples" / name)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", PROMISES)
def test_it_runs_and_keeps_its_promises(name):
    said = run(name)
    for promise in PROMISES[name]:
        assert promise in said


def test_exact_sums_have_the_same_bits_on_any_number_of_processes_and_fast_ones_do_not():
    rows = [line.rsplit(" ", 1) for line in run(DATA_PARALLEL).splitlines()]
    kinds = [(f"{size} processes, {add}: weights", add) for add in ("exact_sum", "fast_sum") for size in (1, 2, 4)]
    assert [row[0] for row in rows] == [text for text, _ in kinds]
    exact, fast = {row[1] for row in rows[:3]}, [row[1] for row in rows[3:]]
    assert exact == {fast[0]}
    assert len(set(fast)) == 3


@pytest.mark.parametrize("name", [*PROMISES, DATA_PARALLEL])
def test_it_is_a_page_long(name):
    assert len((ROOT / "examples" / name).read_text().splitlines()) <= 120
