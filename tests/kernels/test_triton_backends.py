"""The Triton backends, run in the interpreter in a separate process, and the rule that chooses a backend."""

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from minipeft_kernels import Call, UnavailableBackend, choose_backend, lora_linear
from minipeft_kernels.choice import choose_by_bytes

HERE = Path(__file__).resolve().parent


def test_interpreted_kernels() -> None:
    """TRITON_INTERPRET must be set before Triton is imported, hence the process; see interpreted_cases.py."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted_cases.py"]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 40


def test_compiled_code_is_recorded_for_the_present_sources() -> None:
    """compile_check.py compiles what changed since compiled.json and a small sample, and rejects stale rows."""
    pytest.importorskip("triton")
    script = HERE.parents[1] / "kernels" / "compile_check.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    done = subprocess.run(
        [sys.executable, str(script), "--sample", "1"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = json.loads(script.with_name("compiled.json").read_text())
    assert {(row["triton"], row["architecture"]) for row in rows} >= set(product(("3.6.0", "3.9.0"), (80, 90, 100)))


def test_asking_for_triton_without_a_gpu_says_why() -> None:
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET"):
        pytest.skip("Triton can run here")
    x, W, A, B = torch.ones(3, 4), torch.ones(5, 4), torch.ones(2, 4), torch.ones(5, 2)
    for backend in ("hybrid", "fused", "decode"):
        with pytest.raises(
            UnavailableBackend, match=f"backend='{backend}' cannot run here: (x is on cpu|Triton is not installed)"
        ):
            lora_linear(x, W, None, A, B, 1.0, backend=backend)
    assert torch.equal(lora_linear(x, W, None, A, B, 1.0), lora_linear(x, W, None, A, B, 1.0, backend="reference"))


def test_auto_on_a_cpu_is_the_reference() -> None:
    call = Call(torch.device("cpu"), torch.float32, 4096, 4096, 4096, 16, dropout=False, needs_grad=True)
    assert choose_backend("auto", call) == "reference"


@pytest.mark.parametrize(
    ("m", "k", "n", "backend"),
    [
        (8192, 768, 3072, "fused"),  # reading y again costs 48 % of the product
        (8192, 4096, 4096, "fused"),  # 9 % + 9 %, against 17 % that Triton's product is taken to lose
        (8192, 11008, 4096, "hybrid"),  # 3 % + 9 %
        (1024, 4096, 4096, "hybrid"),  # y fits the L2 cache, so reading it again is free
    ],
)
def test_the_rule_weighs_bytes_against_the_speed_of_the_product(m: int, k: int, n: int, backend: str) -> None:
    assert choose_by_bytes(90, m, k, n) == backend
