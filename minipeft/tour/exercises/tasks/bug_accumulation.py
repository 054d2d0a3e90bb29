"""Two short batches are not one long one.

huggingface/transformers#34191, axolotl-ai-cloud/axolotl#1100: gradient accumulation over micro-batches of unequal
length gives another loss than one batch with the same rows. The mean of each micro-batch was taken over its own
tokens, so that a token of a short text weighs more.

Write `probe`, a test without arguments that calls the library: it returns with the library as it is, and an assert
fails with the bug in it. --check runs it both ways.

    make_model()                                   a small Llama with 27 tokens
    Batch(ids, labels, documents)                  int64 [B, T] each; documents 0 where a token is, -1 where padding is;
                                                   labels: the ids, and -100 where no loss is taken
    step = next(train(model, batches, TrainConfig(steps=1, accumulate=2)))       batches: a list of Batch; step.loss,
                                                   step.grad_norm
"""

from __future__ import annotations

import torch

from minipeft.adapters import FullConfig, add_adapter
from minipeft.data.packing import Batch
from minipeft.tour.exercises.bugs import require_caught
from minipeft.tour.exercises.record import Answer, Bug, Exercise
from minipeft.tour.exercises.small_model import make_model
from minipeft.training.loop import TrainConfig, train

EXERCISE = Exercise(
    solution="minipeft.tour.exercises.tasks.bug_accumulation.probe",
    hints=(
        "Two rows of 8 tokens, of which the second has a loss on its last two tokens alone.",
        "Train one model with accumulate=2 on two batches of a row, another with accumulate=1 on one batch of both "
        "rows.",
        "step.loss and step.grad_norm of both must agree to about 1e-5. AdamW hides the size of a gradient in its "
        "first step: do not compare the weights.",
    ),
    bug=Bug(
        "minipeft.training.loop.backward",
        before="documents) / targets",
        after="documents) / count_targets(batch.labels)",
    ),
)


def probe() -> None:
    """Two micro-batches of unequal length train like one batch."""
    ids = torch.arange(16).view(2, 8)
    labels = ids.clone()
    labels[1, :6] = -100
    whole = Batch(ids, labels, torch.zeros_like(ids))
    parts = [Batch(*(t[row : row + 1] for t in (ids, labels, whole.documents))) for row in range(2)]
    steps = []
    for batches in ([whole], parts):
        model = make_model()
        add_adapter(model, FullConfig())
        steps.append(next(iter(train(model, batches, TrainConfig(steps=1, accumulate=len(batches))))))
    assert abs(steps[0].loss - steps[1].loss) < 1e-4
    assert abs(steps[0].grad_norm - steps[1].grad_norm) < 1e-3 * steps[0].grad_norm


def check_sound(probe: Answer) -> None:
    """Your test passes with the library as it is."""
    probe()


def check_caught(probe: Answer) -> None:
    """Your test fails with the bug."""
    require_caught(probe, "bug_accumulation")
