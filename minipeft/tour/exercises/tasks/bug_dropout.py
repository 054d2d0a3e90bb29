"""An adapter that dropout switches off.

axolotl-ai-cloud/axolotl#3806: with dropout above 0 the fused path of LoRA is skipped for the projections that share an
input (q, k, v; gate, up), and the base alone answers. The loss falls a little all the same: other layers learn.

Write `probe`, a test without arguments that calls the library: it returns with the library as it is, and an assert
fails with the bug in it. --check runs it both ways.

    make_model()                               a small Llama with 27 tokens; model.train() is training mode
    add_adapter(model, LoRAConfig(rank=4, dropout=0.1))      `targets=("q_proj", "v_proj")` names the linears
    model.loss(ids, labels, documents)         the sum of the losses of the supervised tokens; int64 [B, T]
    model.named_parameters()                   the names of the adapter end in lora_A and lora_B
"""

from __future__ import annotations

import torch

from minipeft.adapters import LoRAConfig, add_adapter
from minipeft.tour.exercises.bugs import require_caught
from minipeft.tour.exercises.record import Answer, Bug, Exercise
from minipeft.tour.exercises.small_model import make_model

EXERCISE = Exercise(
    solution="minipeft.tour.exercises.tasks.bug_dropout.probe",
    hints=(
        "In eval mode there is no dropout: the bug shows in training mode alone.",
        "Take the loss in training mode, call backward(), and look at the gradient of each lora_B: A has none at "
        "first.",
        "Every parameter that requires a gradient and ends in lora_B must have one that is not 0.",
    ),
    bug=Bug(
        "minipeft.adapters.lora.LoRALinear.together",
        before="    parts = [linear",
        after="    if self.dropout and self.training:\n"
        "        return tuple(nn.functional.linear(x, l.weight, l.bias) for l in linears)\n    parts = [linear",
    ),
)


def probe() -> None:
    """With dropout, a gradient reaches every lora_B."""
    model = make_model().train()
    add_adapter(model, LoRAConfig(rank=4, dropout=0.1))
    ids = torch.arange(20)[None]
    model.loss(ids, ids, torch.zeros_like(ids)).backward()
    found = {name: p.grad for name, p in model.named_parameters() if name.endswith("lora_B")}
    assert found
    assert all(grad is not None and bool((grad != 0).any()) for grad in found.values())


def check_sound(probe: Answer) -> None:
    """Your test passes with the library as it is."""
    probe()


def check_caught(probe: Answer) -> None:
    """Your test fails with the bug."""
    require_caught(probe, "bug_dropout")
