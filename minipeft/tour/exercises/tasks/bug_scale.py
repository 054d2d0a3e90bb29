"""One scale to train with, another to merge with.

rasbt/LLMs-from-scratch#821, ml-explore/mlx-examples#982, Lightning-AI/litgpt#1224: the update is scaled by alpha /
rank in training and by alpha where it is merged, or the other way round.

Write `probe`, a test without arguments that calls the library: it returns with the library as it is, and an assert
fails with the bug in it. --check runs it both ways.

    make_model()                               a small Llama with 27 tokens
    add_adapter(model, LoRAConfig(rank=4, alpha=8.0))        lora_B is 0 at first, so that it changes nothing
    merge_adapter(model)
    model(ids)                                 logits; ids int64 [B, T]
    model.named_parameters()                   the names of the adapter end in lora_A and lora_B
"""

from __future__ import annotations

import torch

from minipeft.adapters import LoRAConfig, add_adapter, merge_adapter
from minipeft.tour.exercises.bugs import require_caught
from minipeft.tour.exercises.record import Answer, Bug, Exercise
from minipeft.tour.exercises.small_model import make_model

EXERCISE = Exercise(
    solution="minipeft.tour.exercises.tasks.bug_scale.probe",
    hints=(
        "Compare the logits before and after the merge.",
        "Give each lora_B numbers first: an adapter at its init hides every scale.",
        "With rank 1 alpha / rank is alpha: take rank 4.",
    ),
    bug=Bug("minipeft.adapters.lora.LoRALinear.merged", before="scale * (B", after="self.alpha * (B"),
)


def probe() -> None:
    """The merged model computes what the adapted one computed."""
    model = make_model()
    add_adapter(model, LoRAConfig(rank=4, alpha=8.0))
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            p.data.normal_(0, 0.1)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model(ids)
        merge_adapter(model)
        after = model(ids)
    assert float((before - after).abs().max()) < 1e-3 * float(before.abs().max())


def check_sound(probe: Answer) -> None:
    """Your test passes with the library as it is."""
    probe()


def check_caught(probe: Answer) -> None:
    """Your test fails with the bug."""
    require_caught(probe, "bug_scale")
