"""A merge that rounds twice.

unslothai/unsloth#3091, huggingface/peft#1035: an adapter that is merged into bfloat16 weights loses a part of its
update. Some of it must go: the sum has to be rounded to 8 bits of mantissa once. Here the update is rounded first, and
the sum again.

Write `probe`, a test without arguments that calls the library: it returns with the library as it is, and an assert
fails with the bug in it. --check runs it both ways.

    make_model(torch.bfloat16)                 a small Llama
    report = add_adapter(model, LoRAConfig(rank=2))          report.modules: the names of the LoRALinears
    model.get_submodule(name)                  a LoRALinear: weight, lora_A, lora_B (0 at first), scale
    merge_adapter(model)                       then it is a plain linear again
"""

from __future__ import annotations

from typing import Any

import torch

from minipeft.adapters import LoRAConfig, add_adapter, merge_adapter
from minipeft.tour.exercises.bugs import require_caught
from minipeft.tour.exercises.record import Answer, Bug, Exercise
from minipeft.tour.exercises.small_model import make_model

EXERCISE = Exercise(
    solution="minipeft.tour.exercises.tasks.bug_merge.probe",
    hints=(
        "lora_B is 0 at first: give it numbers before you merge.",
        "The right result is (W.float() + s B A) in float32, rounded to bfloat16 once: exactly equal, bit by bit.",
        "A tolerance of bfloat16's size passes both: compare with torch.equal.",
    ),
    bug=Bug(
        "minipeft.adapters.lora.LoRALinear.merged",
        before="weight.float() + scale * (B.float() @ A.float())",
        after="(weight + (scale * (B @ A)).to(weight.dtype)).float()",
    ),
)


def probe() -> None:
    """Each merged weight is the float32 sum, rounded once."""
    model = make_model(torch.bfloat16)
    report = add_adapter(model, LoRAConfig(rank=2))
    torch.manual_seed(0)
    expected = {}
    for path in report.modules:
        layer: Any = model.get_submodule(path)
        layer.lora_B.data.normal_()
        update = layer.scale * (layer.lora_B.detach() @ layer.lora_A.detach())
        expected[path] = (layer.weight.detach().float() + update).bfloat16()
    merge_adapter(model)
    for path, weight in expected.items():
        assert torch.equal(model.get_parameter(f"{path}.weight"), weight)


def check_sound(probe: Answer) -> None:
    """Your test passes with the library as it is."""
    probe()


def check_caught(probe: Answer) -> None:
    """Your test fails with the bug."""
    require_caught(probe, "bug_merge")
