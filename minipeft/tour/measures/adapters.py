"""The numbers of the stops on methods that change weights: LoRA, its init and merge, (IA)3, DoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from minipeft.adapters import IA3Config, LoRAConfig, add_adapter, merge_adapter
from minipeft.adapters.dora import compute_row_norms
from minipeft.adapters.lora import find_lora_layers
from minipeft.study.curves import Curve, draw_losses
from minipeft.tour.bench import Bench
from minipeft.tour.values import Drawing, Output, Table, Value, claim


def draw(*shape: int, seed: int) -> torch.Tensor:
    """Normal random numbers in float64, so that two ways to compute one thing agree to rounding."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference."""
    return (a - b).abs().max().item()


def measure_lora(bench: Bench) -> Mapping[str, Value]:
    """The derivative by hand beside autograd's, and the parameters that LoRA trains."""
    x, W, A, B, s = draw(7, 12, seed=0), draw(9, 12, seed=1), draw(2, 12, seed=2), draw(9, 2, seed=3), 1.5
    dy = draw(7, 9, seed=4)
    leaves = [t.clone().requires_grad_() for t in (x, A, B)]
    (leaves[0] @ W.T + s * (leaves[0] @ leaves[1].T) @ leaves[2].T).backward(dy)
    dS = s * dy @ B  # [T, r]
    by_hand = (dy @ W + dS @ A, dS.T @ x, s * dy.T @ (x @ A.T))
    errors = [largest(hand, leaf.grad) for hand, leaf in zip(by_hand, leaves) if leaf.grad is not None]
    claim(len(errors) == 3 and max(errors) < 1e-12, "the derivatives by hand are autograd's")
    model = bench.model()
    report = add_adapter(model, LoRAConfig(rank=8))
    path, layer = next(iter(find_lora_layers(model).items()))
    out, width = layer.weight.shape
    return {
        "rank": layer.rank,
        "path": path,
        "out": out,
        "width": width,
        "full": out * width,
        "low": layer.rank * (out + width),
        "ratio": out * width / (layer.rank * (out + width)),
        "percent": report.percent,
        "errors": Table(("gradient", "largest difference to autograd"), list(zip(("dx", "dA", "dB"), errors))),
        "report": Output(str(report)),
    }


def measure_zero_b(bench: Bench) -> Mapping[str, Value]:
    """Loss and gradients before the first step, for three inits of A and B."""
    base = bench.held_out_loss(bench.model())
    found: dict[str, dict[str, Any]] = {}
    for name in ("B = 0", "A = B = 0", "A, B random"):
        model = bench.model()
        add_adapter(model, LoRAConfig(rank=8))
        for number, layer in enumerate(find_lora_layers(model).values()):
            if name == "A = B = 0":
                torch.nn.init.zeros_(layer.lora_A)
            elif name == "A, B random":
                torch.nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(number))
        batch = bench.pack(bench.pairs[:24])[0]
        model.loss(batch.ids, batch.labels, batch.documents).backward()
        grads = {kind: max(p.grad.abs().max().item() for name, p in model.named_parameters()
                 if kind in name and p.grad is not None) for kind in ("lora_A", "lora_B")}  # fmt: skip
        found[name] = {"loss": bench.held_out_loss(model), **grads}
    usual, dead, noisy = found.values()
    claim(usual["loss"] == base == dead["loss"], "at B = 0 the model is the base, to the bit")
    claim(usual["lora_A"] == 0 and usual["lora_B"] > 0, "B moves first")
    claim(dead["lora_A"] == dead["lora_B"] == 0, "two zeros never move")
    claim(noisy["loss"] > base, "random B hurts")
    rows = [(name, one["loss"], one["lora_A"], one["lora_B"]) for name, one in found.items()]
    return {
        "base": base,
        "noisy": noisy["loss"],
        "table": Table(("init", "held-out loss", "largest gradient of A", "largest gradient of B"), rows),
    }


def measure_merge(bench: Bench) -> Mapping[str, Value]:
    """What a merge loses in three dtypes, in weights and in answers."""
    tuned, steps = bench.tune(LoRAConfig(rank=8), 20, 3e-3)
    state = {name: p.detach().clone() for name, p in tuned.named_parameters() if "lora_" in name}
    prompts = [f"### Instruction:\n{pair.intent}\n### Response:\n" for pair in bench.pairs[-2 if bench.quick else -6 :]]
    rows, reports = [], {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = bench.model(dtype)
        add_adapter(model, LoRAConfig(rank=8))
        model.load_state_dict(state, strict=False)
        report = merge_adapter(model, check=prompts, tokenizer=bench.tokenizer, new_tokens=8)
        name = str(dtype).removeprefix("torch.")
        reports[name] = report
        rows.append(
            (name, 100 * report.relative_error, report.mean_kl or 0.0, f"{report.changed_tokens} of {report.tokens}")
        )
    claim(reports["float32"].relative_error < reports["float16"].relative_error < reports["bfloat16"].relative_error,
          "the update loses more, the fewer bits the weight has")  # fmt: skip
    unit = 1.0
    half = torch.tensor(unit + 0.003).to(torch.bfloat16).item()
    claim(half == unit, "an update of 0.003 to a weight of 1 vanishes in bfloat16")
    return {
        "steps": len(steps),
        "update": 0.003,
        "unit": unit,
        "result": half,
        "spacing": torch.finfo(torch.bfloat16).eps,
        "lost": 100 * reports["bfloat16"].relative_error,
        "table": Table(("weights in", "update lost, %", "KL, nats per token", "top-1 tokens changed"), rows),
    }


def measure_ia3(bench: Bench) -> Mapping[str, Value]:
    """(IA)3's size, its loss before and after training, and after a merge."""
    model = bench.model()
    report = add_adapter(model, IA3Config())
    lora = add_adapter(bench.model(), LoRAConfig(rank=8))
    before = bench.held_out_loss(bench.model())
    claim(bench.held_out_loss(model) == before, "scales of one change nothing")
    tuned, steps = bench.tune(IA3Config(), 40, 2e-2)
    after = bench.held_out_loss(tuned)
    claim(after < before, "(IA)3 learns")
    plain = merge_adapter(tuned)
    merged = bench.held_out_loss(tuned)
    claim(abs(merged - after) < 1e-4, "a merge changes nothing but rounding")
    return {
        "trainable": report.trainable,
        "lora": lora.trainable,
        "rank": 8,
        "ratio": lora.trainable / report.trainable,
        "before": before,
        "after": after,
        "steps": len(steps),
        "merged": merged,
        "modules": plain.modules,
    }


def measure_dora(bench: Bench) -> Mapping[str, Value]:
    """The row norms without the sum, and a short training beside LoRA's."""
    W, A, B, s = draw(9, 12, seed=1), draw(2, 12, seed=2), draw(9, 2, seed=3), 1.5
    formed = (W + s * B @ A).norm(dim=1)
    error = largest(compute_row_norms(W, A, B, s).double(), formed)
    claim(error < 1e-4, "the norms agree without forming the sum")
    curves, losses = [], {}
    for name, dora in (("LoRA", False), ("DoRA", True)):
        tuned, steps = bench.tune(LoRAConfig(rank=8, dora=dora), 36, 5e-3)
        losses[name] = bench.held_out_loss(tuned)
        curves.append(Curve(name, [(step.number, step.loss) for step in steps], [(steps[-1].number, losses[name])]))
    lora, dora_report = (add_adapter(bench.model(), LoRAConfig(rank=8, dora=dora)) for dora in (False, True))
    words = "; ".join(f"{name}: held-out loss {loss:.3f} after {len(steps)} steps" for name, loss in losses.items())
    return {
        "error": error,
        "more": dora_report.trainable - lora.trainable,
        "share": 100 * (dora_report.trainable - lora.trainable) / lora.trainable,
        "steps": len(steps),
        "plot": Drawing(draw_losses(curves, 220), words),
        "lora": losses["LoRA"],
        "dora": losses["DoRA"],
    }
