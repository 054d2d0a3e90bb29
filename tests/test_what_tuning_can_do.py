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
    for name in ("zero-shot", "prompt", "full", "prefix", "lora"):
        counts = [count(found[name], score) for score in ("exact_match", "valid_python")]
        codebleu = f"{found[name]['codebleu']:.3f} / {found[name]['codebleu_compat']:.3f}"
        lines.append(row(name, found[name], *counts, codebleu))
        if name in cost:
            speed, peak = cost[name]["tokens_per_second"], cost[name]["peak_memory_bytes"]
            lines[-1] += f" {speed:.0f} | {peak / 1e9:.1f} GB |"
    return lines


def epochs() -> list[str]:
    """A row a method: its held-out loss before training and after each epoch."""
    found = {entry["name"]: entry for entry in read("conala-135m")["rows"]}
    losses = {name: [f"{loss:.3f}" for loss in found[name]["dev_loss_by_epoch"]] for name in LABELS}
    return [f"| {LABELS[name]} | " + " | ".join(one) + " |" for name, one in losses.items()]


def recipes() -> list[str]:
    """A row a library and recipe."""
    found = json.loads((ROOT / "results" / "conala-135m" / "recipes.json").read_text(encoding="utf-8"))["rows"]
    counts = [[count(one["scores"], score) for score in ("exact_match", "valid_python")] for one in found]
    return [row(one["name"], one["scores"], *some) for one, some in zip(found, counts)]


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
        loss = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*one["loss"])
        lines.append(f"| {one['name']} | {one['learning_rate']:g} | {bleu} | {one['verdict']} | {loss} |")
    return lines


@pytest.mark.parametrize("make", [taught, hard, conala, epochs, recipes, searched, differing])
def test_each_row_is_in_the_results(make):
    assert make()
    for line in make():
        assert line in TEXT, line


def test_the_claims():
    groups = {group["method"]: group for group in read("demo")["groups"]}
    (behind,) = [found for name in ("lora", "full") if (found := groups[name]["behind"])]  # the other is the best
    assert behind["low"] < 0 < behind["high"]
    for name in ("prefix", "prompt"):
        assert groups[name]["effect"]["high"] < 0 < groups[name]["difference"]["low"]
    assert all(group["pass_at_1"] == group["exact_match"] for group in groups.values())
    hard_ones = {entry["name"]: entry["scores"] for entry in read("demo-limits")["hard"]}
    assert all(scores["pass_at_1"] == 0 for scores in hard_ones.values())
    for name in ("lora", "full"):
        assert hard_ones[name]["bleu_interval"][0] > hard_ones["nearest training pair"]["bleu_interval"][1]


def test_the_prefix_ends_close_to_lora_at_135m():
    found = {entry["name"]: entry for entry in read("conala-135m")["rows"]}
    best = {name: min(found[name]["dev_loss_by_epoch"]) for name in LABELS}
    gap = best["prefix"] - best["lora"]
    assert f"Each at its best epoch, the prefix is {gap:.3f} nats above LoRA" in TEXT
    sizes = [found[name]["training"]["trainable"] for name in ("prefix", "lora")]
    assert "with {:,} parameters against {:,}".format(*sizes) in TEXT
    last = {name: found[name]["dev_loss_by_epoch"][-2:] for name in LABELS}
    assert last["lora"][1] - last["lora"][0] > last["prefix"][1] - last["prefix"][0] > 0


def test_the_differences_between_neighbours_are_those_of_the_ranking():
    above = {place["name"]: place["above"] for place in read("demo")["ranking"]}
    for name, told in (("prefix-tuning", "the prefix is {} BLEU above"), ("prompt-tuning", "and the prompt {} above")):
        value, low, high = (100 * above[name][key] for key in ("value", "low", "high"))
        assert told.format(f"{value:.1f} [{low:.1f}, {high:.1f}]") in " ".join(TEXT.split())
        assert low > 0
    named = [place["name"] for place in read("demo")["ranking"]]
    assert named[2:] == ["nearest training pair", "prefix-tuning", "prompt-tuning", "zero-shot"]


def test_the_study_has_the_rates_that_the_search_chose():
    from minipeft.study.presets import DEMO_SETTINGS

    rates_of = {group["method"]: group["learning_rate"] for group in read("demo")["groups"] if group["trainable"]}
    best = {one["name"]: one["best"] for one in read("rates-demo")["searches"]}
    assert {name: best[LABELS.get(name, name)] for name in DEMO_SETTINGS} == rates_of
    assert {name: given["learning_rate"] for name, given in DEMO_SETTINGS.items()} == rates_of


def test_both_libraries_reach_one_loss_with_one_recipe():
    found = json.loads((ROOT / "results" / "conala-135m" / "recipes.json").read_text(encoding="utf-8"))["rows"]
    ours, theirs = (one["training"]["dev_loss"] for one in found if one["recipe"] == "ours")
    assert abs(ours - theirs) < 0.005
    assert f"the losses on held-out pairs are {ours:.3f} and {theirs:.3f} nats" in TEXT
    (a, peer, b), earlier = (100 * one["scores"]["bleu"] for one in found), 27.5
    gaps = [one - other for one in (a, peer) for other in (b, earlier)]
    assert f"the recipe makes {min(gaps):.1f} to {max(gaps):.1f} BLEU" in TEXT
    assert max(abs(a - peer), abs(b - earlier)) < 1
