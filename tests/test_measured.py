"""The measurements that docs/performance.md, prefix.md and scores.md state are those of the committed rows."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PREFIX_ROWS = {  # (method, init, learning rate) -> its name
    ("prefix", "peft", 0.0002): "N(0, 1), as HF PEFT and the paper",
    ("prefix", "text", 0.005): "text",
    ("prefix", "text", 0.001): "text + Li & Liang's reparameterization MLP",
    ("prefix", "text", 0.03): "text",
    ("prompt", "text", 0.03): "prompt-tuning, text",
    ("lora", None, 0.001): "LoRA r16, all linears",
}


def read(file: str) -> Any:
    return json.loads((ROOT / file).read_text(encoding="utf-8"))


def read_page(name: str) -> str:
    """The page as one line of text."""
    return " ".join((ROOT / "docs" / name).read_text(encoding="utf-8").split())


@pytest.mark.parametrize("name", ["performance.md", "quantization.md"])
def test_the_tables_of_a_page_are_those_of_the_rows(name: str) -> None:
    """benchmarks/performance_table.py writes them."""
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert "<!-- rows" in page
    spec = importlib.util.spec_from_file_location("performance_table", ROOT / "benchmarks/performance_table.py")
    assert spec is not None
    assert spec.loader is not None
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    assert table.fill(page) == page


@pytest.mark.parametrize(
    ("name", "least", "beside", "bfloat16"),
    [
        ("training-cpu", 2.4, 1.4, 1.5),
        ("training-2-threads-cpu", 2.4, 1.4, 1.5),
        ("training-document-cpu", 1.9, 1.2, 1.2),
        ("training-gpt2-cpu", 1.8, 1.05, 1.2),
    ],
)
def test_a_training_step(name: str, least: float, beside: float, bfloat16: float) -> None:
    """A LoRA step against PEFT as installed and with the same switch, and on a base in bfloat16; and its memory."""
    rows = [row for row in read(f"benchmarks/results/{name}.json") if row["benchmark"].startswith("LoRA")]
    theirs, switched, _, ours = (row for row in rows if row["dtype"] == "float32")
    assert (theirs["variant"], switched["variant"], ours["variant"]) == ("PEFT", "PEFT, oneDNN", "minipeft")
    assert ours["ratio"] >= least
    assert switched["median"] / ours["median"] >= beside
    assert ours["memory_bytes"] < 0.7 * theirs["memory_bytes"]
    assert rows[-1]["dtype"] == "bfloat16"
    assert rows[-1]["ratio"] >= bfloat16


def test_what_bfloat16_weights_lose() -> None:
    page = read_page("performance.md")
    losses = {}
    for curve in read("results/full-bf16/curves.json")["curves"]:
        held = {step: loss for step, loss in curve["held_out"]}
        losses[curve["variant"]] = held[100]
        assert f"| {curve['variant']} | {held[0]:.3f} | {held[50]:.3f} | {held[100]:.3f} |" in page
    wide, rounded, pure = losses.values()
    assert abs(rounded - wide) < 0.01
    assert pure - wide > 1


def test_many_adapters_in_one_batch() -> None:
    ours = [row for row in read("benchmarks/results/bank-cpu.json") if row["variant"] == "minipeft, bank"]
    one, four, sixteen = (f"{row['ratio']:.2f}" for row in ours)
    said = f"{one}, {four} and {sixteen} times as fast as PEFT's mixed batch for 1, 4 and 16 adapters"
    assert said in read_page("performance.md")


def test_codebleu_against_the_package() -> None:
    rows = read("benchmarks/results/metrics-cpu.json")
    ratios = {row["benchmark"]: row["ratio"] for row in rows if row["variant"] == "strict (and compat)"}
    conala, functions = ratios["CoNaLa"], ratios["50-line functions"]
    assert f"{conala:.1f} times as fast on CoNaLa, {functions:.1f} times on functions" in read_page("scores.md")


def test_the_prefixes() -> None:
    groups = [group for group in read("results/prefix-135m/results.json")["groups"] if group["bleu"] is not None]
    found = {(group["method"], group["init"], group["learning_rate"]): group for group in groups}
    page = read_page("prefix.md")
    for key, name in PREFIX_ROWS.items():
        group = found[key]
        low, high = (100 * bound for bound in group["bleu_interval"])
        loss = f"{group['dev_loss_start']:.2f} | {group['dev_loss']:.3f} ± {group['dev_loss_sd']:.3f}"
        bleu = f"{100 * group['bleu']:.1f} [{low:.1f}, {high:.1f}]"
        assert f"| {name} | {key[2]:g} | {loss} | {bleu} | {group['stored']:,} |" in page


def test_what_a_quantized_base_costs():
    """A step, decoding and memory beside a bfloat16 base; the page states the goals that are met and missed."""
    rows = {(row["benchmark"], row["variant"]): row for row in read("benchmarks/results/quantized-cpu.json")}
    page = read_page("quantization.md")
    for kind, name in (("nf4", "NF4"), ("int8", "int8")):
        step, decoded, unpacked = (
            rows[job, f"{kind} in bf16"]["ratio"]
            for job in ("LoRA step", "16 tokens decoded", "16 tokens decoded, --no-pack")
        )
        assert f"{name}: a step takes {1 / step:.2f} times as long, decoding {1 / decoded:.2f}" in page
        assert f"without the copy {1 / unpacked:.1f}" in page
    found = read("benchmarks/results/quantized-memory-cpu.json")["variants"]
    plain = found["bf16"]
    for kind, name in (("nf4", "NF4"), ("int8", "int8")):
        held = found[f"{kind} in bf16"]
        share = (held["added"] - (plain["added"] - plain["held"])) / plain["held"]
        assert f"{name} {held['added'] / 1e6:,.0f} MB" in page
        assert f"({share:.2f} of the linears' bfloat16)" in page


def test_what_a_quantized_base_costs_in_quality():
    """LoRA on three bases, three seeds each: BLEU, held-out loss, and the differences to the bfloat16 base."""
    found, page = read("results/qlora/quality.json"), (ROOT / "docs/quantization.md").read_text(encoding="utf-8")
    for base, name in (("plain", "bfloat16"), ("int8", "int8"), ("nf4", "NF4")):
        row = found[base]
        assert len(row["bleu"]) == len(row["dev_loss"]) == 3
        scores = f"| {name} | {100 * sum(row['bleu']) / 3:.1f} | {sum(row['dev_loss']) / 3:.4f} |"
        bleu, (mean, low, high) = row["bleu_difference"], row["dev_loss_difference"]
        difference = f" {100 * bleu['value']:+.1f} [{100 * bleu['low']:.1f}, {100 * bleu['high']:.1f}] |"
        difference += f" {mean:+.4f} [{low:.4f}, {high:.4f}] |"
        assert scores + (" | |" if base == "plain" else difference) in page
