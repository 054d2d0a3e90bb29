"""docs/scaling.md is what benchmarks/scaling.py writes, and its models have their published sizes."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = {
    "GPT-2": 124_439_808,
    "GPT-2 XL": 1_557_611_200,
    "CodeLlama-7B": 6_738_546_688,
    "Mistral-7B": 7_241_732_096,
    "Qwen3-32B": 32_762_123_264,
    "Llama-70B": 70_553_706_496,
}


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks/scaling.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cases(scaling):
    return list(scaling.make_cases())


def test_the_page_is_what_the_script_writes(scaling, cases):
    assert scaling.write_page(cases) == (ROOT / "docs/scaling.md").read_text(encoding="utf-8")


def test_the_models_have_their_published_sizes(cases):
    assert {case.model: case.total for case in cases if case.method == "full"}.items() >= PUBLISHED.items()


def test_the_bytes_of_a_sum_and_of_sharded_weights(scaling):
    """By hand: 100 parameters, 10 of them trained, on 4 processes."""
    case = scaling.Case("m", "LoRA r16", 100, 10, layers=2, flops=scaling.PEAK * scaling.UTILIZATION)
    assert case.seconds == 1
    assert case.sum_bytes(4) == 2 * 4 * 10 * 3 / 4
    assert case.shard_bytes(4) == 2 * 2 * 90 * 3 / 4
    network = scaling.Network("n", bandwidth=15.0, latency=0.5)
    assert case.sum_share(4, network) == pytest.approx(60 / 12 + 6 * 0.5)
    assert case.shard_share(4, network) == pytest.approx(270 / 12 + 2 * 2 * 3 * 0.5)
