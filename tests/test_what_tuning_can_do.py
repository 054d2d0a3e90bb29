"""docs/what-tuning-can-do.md: each row of its tables is in the committed results, and its claims are true of them."""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "what-tuning-can-do.md").read_text(encoding="utf-8")
LABELS = {"lora": "LoRA", "prefix": "prefix-tuning", "prompt": "prompt-tuning"}


def read(folder: str) -> dict[str, Any]:
    found = json.loads((ROOT / "results" / folder / "results.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def row(name: str, scores: dict[str, Any], *more: str) -> str:
    """A row of the page: its name, BLEU with its interval, and what else it has."""
    low, high = scores["bleu_interval"]
    bleu = f"{100 * scores['bleu']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    return "| " + " | ".join([LABELS.get(name, name), bleu, *more]) + " |"


def count(scores: dict[str, Any], name: str) -> str:
    return f"{scores[name] * scores['pairs']:.0f}"


def taught() -> list[str]:
    groups = {group["method"]: group for group in read("demo")["groups"]}
    names = ("zero-shot", "nearest training pair", "prompt", "prefix", "lora", "full")
    size = lambda group: f"{group['trainable']:,}" if group["trainable"] else ""
    return [row(name, groups[name], count(groups[name], "pass_at_1"), size(groups[name])) for name in names]


def hard() -> list[str]:
    found = {entry["name"]: entry["scores"] for entry in read("demo-limits")["hard"]}
    names = ("zero-shot", "nearest training pair", "prompt", "prefix", "lora", "full")
    return [row(name, found[name], count(found[name], "pass_at_1")) for name in names]


def conala() -> list[str]:
    found = {entry["name"]: entry["scores"] for entry in read("conala-135m")["rows"]}
    cost = {entry["name"]: entry["training"] for entry in read("conala-135m")["rows"] if "training" in entry}
    lines = []
    for name in ("zero-shot", "full", "lora"):
        counts = [count(found[name], score) for score in ("exact_match", "valid_python")]
        codebleu = f"{found[name]['codebleu']:.3f} / {found[name]['codebleu_compat']:.3f}"
        lines.append(row(name, found[name], *counts, codebleu))
        if name in cost:
            speed, peak = cost[name]["tokens_per_second"], cost[name]["peak_memory_bytes"]
            lines[-1] += f" {speed:.0f} | {peak / 1e9:.1f} GB |"
    return lines


def rates() -> list[str]:
    """A row a method: the loss at a third of the study's rate, at it, and at three times it."""
    lines = []
    for group in read("demo")["groups"]:
        if group["trainable"]:
            found = {entry["learning_rate"]: entry["dev_loss"] for entry in read("demo-limits")["rates"]
                     if entry["method"] == group["method"]}  # fmt: skip
            assert sorted(found)[1] == group["learning_rate"]
            texts = [f"{found[rate]:.3f} at {rate:g}" for rate in sorted(found)]
            texts[1] = f"**{texts[1]}**"
            lines.append(f"| {LABELS.get(group['method'], group['method'])} | " + " | ".join(texts) + " |")
    return lines


def searched() -> list[str]:
    """A row a method: its held-out loss at each learning rate, the best in bold."""
    found = read("rates-demo")["searches"]
    all_rates = sorted({rate for one in found for rate in one["losses"]}, key=float)
    lines = ["| held-out loss | " + " | ".join(all_rates) + " |"]
    for one in found:
        show = lambda rate, one=one: (
            "" if (loss := one["losses"].get(rate)) is None
            else f"**{loss:.3f}**" if float(rate) == one["best"] else f"{loss:.3f}"
        )  # fmt: skip
        lines.append(f"| {one['name']} | " + " | ".join(map(show, all_rates)) + " |")
    return lines


def differing() -> list[str]:
    """A row a method: its difference to LoRA, each at its own best learning rate."""
    lines = []
    for one in read("rates-demo")["differences"]:
        value, low, high = (100 * one["bleu"][name] for name in ("value", "low", "high"))
        bleu = f"{value:+.1f} [{low:+.1f}, {high:+.1f}] | {100 * one['detectable']:.1f}"
        lines.append(f"| {one['name']} | {one['learning_rate']:g} | {bleu} | {one['verdict']} |")
    return lines


@pytest.mark.parametrize("make", [taught, hard, conala, rates, searched, differing])
def test_each_row_is_in_the_results(make):
    assert make()
    for line in make():
        assert line in TEXT, line


def test_the_claims():
    groups = {group["method"]: group for group in read("demo")["groups"]}
    assert groups["lora"]["behind"]["low"] < 0 < groups["lora"]["behind"]["high"]
    for name in ("prefix", "prompt"):
        assert groups[name]["effect"]["high"] < 0 < groups[name]["difference"]["low"]
    assert all(group["pass_at_1"] == group["exact_match"] for group in groups.values())
    hard_ones = {entry["name"]: entry["scores"] for entry in read("demo-limits")["hard"]}
    assert all(scores["pass_at_1"] == 0 for scores in hard_ones.values())
    for name in ("lora", "full"):
        assert hard_ones[name]["bleu_interval"][0] > hard_ones["nearest training pair"]["bleu_interval"][1]


def test_no_rate_of_the_study_is_far_from_the_best_of_three():
    for group in read("demo")["groups"]:
        losses = {entry["learning_rate"]: entry["dev_loss"] for entry in read("demo-limits")["rates"]
                  if entry["method"] == group["method"]}  # fmt: skip
        if losses:
            assert losses[group["learning_rate"]] <= min(losses.values()) + 0.05


def test_the_study_has_these_rates():
    from minipeft.study.presets import DEMO_SETTINGS

    rates_of = {group["method"]: group["learning_rate"] for group in read("demo")["groups"] if group["trainable"]}
    assert {name: given["learning_rate"] for name, given in DEMO_SETTINGS.items()} == rates_of
