"""The numbers of the stops on virtual tokens: prefixes from noise and from text, and a prompt beside a prefix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from minipeft.adapters import PrefixConfig, PromptConfig, add_adapter
from minipeft.adapters.prefix import list_attentions, list_prefixes
from minipeft.models import Decoder
from minipeft.study.curves import Curve, draw_losses
from minipeft.tour.bench import Bench
from minipeft.tour.values import Drawing, Table, Value, claim

STEPS = 45
LENGTH = 8  # virtual tokens
SLOW, FAST = 2e-4, 3e-2


def measure_prefix(bench: Bench) -> Mapping[str, Value]:
    """Prefixes from noise and from text: softmax mass, loss, movement."""
    base = bench.held_out_loss(bench.model())
    inits = {"N(0, 1)": PrefixConfig(length=LENGTH, init="peft"), "text": PrefixConfig(length=LENGTH)}
    before, mass = {}, {}
    for name, config in inits.items():
        model = bench.model()
        add_adapter(model, config, bench.tokenizer)
        before[name], mass[name] = bench.held_out_loss(model), 100 * measure_mass(model, bench)
    rows, curves, after = [], [], {}
    for name, rate in (("N(0, 1)", SLOW), ("N(0, 1)", FAST), ("text", FAST)):
        model, steps = bench.tune(inits[name], STEPS, rate)
        loss, moved = bench.held_out_loss(model), measure_movement(model, inits[name], bench)
        after[name, rate] = loss
        rows.append((name, f"{rate:g}", before[name], loss, moved))
        title = f"{name} at {rate:g}"
        curves.append(Curve(title, [(s.number, s.loss) for s in steps], [(0, before[name]), (steps[-1].number, loss)]))
    noise, fast, text = after.values()
    claim(abs(before["text"] - base) < 0.5 < before["N(0, 1)"] - base, "noise costs far more than text before step 1")
    claim(mass["N(0, 1)"] > mass["text"], "noise takes more of the softmax than text")
    claim(
        text < fast < noise and noise > base, "only the slow rate leaves noise as it is, and text wins at the fast one"
    )
    words = "; ".join(f"{curve.name}: held-out loss {curve.held_out[-1][1]:.3f}" for curve in curves)
    head = ("init", "learning rate", "loss before step 1", f"after {len(steps)} steps", "mean movement of an entry")
    return {
        "length": LENGTH,
        "base": base,
        "noise_before": before["N(0, 1)"],
        "text_before": before["text"],
        "noise_mass": mass["N(0, 1)"],
        "text_mass": mass["text"],
        "slow": f"{SLOW:g}",
        "fast": f"{FAST:g}",
        "steps": len(steps),
        "moved": rows[0][4],
        "table": Table(head, rows),
        "plot": Drawing(draw_losses(curves, 260), words),
    }


@torch.no_grad()
def measure_mass(model: Decoder, bench: Bench) -> float:
    """The share of the softmax that the last token of a row gives to the prefix, mean of all heads and layers."""
    inputs: list[tuple[Any, torch.Tensor]] = []
    hooks = [a.register_forward_pre_hook(lambda a, given: inputs.append((a, given[0]))) for a in list_attentions(model)]
    batch = bench.pack(bench.pairs[-1:], model.virtual_tokens)[0]
    model.hidden(batch.ids[:, : int((batch.documents[0] == 0).sum())])
    for hook in hooks:
        hook.remove()
    shares = []
    for attention, x in inputs:
        q, k, v = attention.c_attn(x).unflatten(2, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, T, D]
        keys, _ = attention.prefix(k, v)  # [B, H, P + T, D]
        weights = (q[:, :, -1:] @ keys.transpose(2, 3) * attention.scale).softmax(dim=-1)  # [B, H, 1, P + T]
        shares.append(weights[..., : model.virtual_tokens].sum(dim=-1).mean())
    return torch.stack(shares).mean().item()


def measure_movement(tuned: Decoder, config: PrefixConfig, bench: Bench) -> float:
    """The mean absolute change of an entry of the prefix since its init."""
    fresh = bench.model()
    add_adapter(fresh, config, bench.tokenizer)
    pairs = zip(list_prefixes(tuned), list_prefixes(fresh))
    moved = [torch.cat([(a.key - b.key).abs().flatten(), (a.value - b.value).abs().flatten()]) for a, b in pairs]
    return torch.cat(moved).mean().item()


def measure_prompt(bench: Bench) -> Mapping[str, Value]:
    """A prompt and a prefix of one text: size, and loss before and after training."""
    found: dict[str, tuple[int, float, float]] = {}
    for name, config in (("prefix", PrefixConfig(length=LENGTH)), ("prompt", PromptConfig(length=LENGTH))):
        model = bench.model()
        report = add_adapter(model, config, bench.tokenizer)
        before = bench.held_out_loss(model)
        tuned, steps = bench.tune(config, STEPS, FAST)
        found[name] = (report.trainable, before, bench.held_out_loss(tuned))
    gap = abs(found["prefix"][1] - found["prompt"][1])
    claim(gap < 1e-4, "the same text as a prefix and as a prompt gives the same loss")
    rows = [(name, *values) for name, values in found.items()]
    return {
        "gap": gap,
        "ratio": found["prefix"][0] / found["prompt"][0],
        "steps": len(steps),
        "table": Table(("method", "trained parameters", "loss before step 1", "loss after"), rows),
    }
