"""Documents of a row that see one another.

huggingface/trl#3910, huggingface/trl#1230, hiyouga/LlamaFactory#4224: documents are packed into one row, and without
FlashAttention each sees those before it. The loss is lower than it should be, and the model learns from texts that it
will not have.

Write `probe`, a test without arguments that calls the library: it returns with the library as it is, and an assert
fails with the bug in it. --check runs it both ways.

    make_model()                               a small Llama with 27 tokens
    make_example("abc")                        a document: the ids of the letters, and EOS
    pack(examples, LETTERS, length=32)         batches; batches[0] has ids, labels and documents, [B, T] each
    model.loss(ids, labels, documents)         the sum of the losses of the supervised tokens
"""

from __future__ import annotations

import torch

from minipeft.data.packing import pack
from minipeft.tour.exercises.bugs import require_caught
from minipeft.tour.exercises.record import Answer, Bug, Exercise
from minipeft.tour.exercises.small_model import LETTERS, make_example, make_model

EXERCISE = Exercise(
    solution="minipeft.tour.exercises.tasks.bug_packing.probe",
    hints=(
        "Pack two documents into one row, and each alone into a row of its own.",
        "The loss of the packed row is the sum of the two losses.",
        "A test that compares the packed row with itself in another order finds nothing: compare with separate rows.",
    ),
    bug=Bug(
        "minipeft.models.layout.lay_out",
        before="documents = torch.zeros_like(ids) if documents is None else documents",
        after="documents = torch.zeros_like(ids)",
    ),
)


def probe() -> None:
    """A packed row has the loss of its documents alone."""
    model, losses = make_model(), []
    for texts in (["hello", "packing"], ["hello"], ["packing"]):
        batch = pack([make_example(text) for text in texts], LETTERS, length=32, batch=1)[0]
        with torch.no_grad():
            losses.append(float(model.loss(batch.ids, batch.labels, batch.documents)))
    assert abs(losses[0] - losses[1] - losses[2]) < 1e-4


def check_sound(probe: Answer) -> None:
    """Your test passes with the library as it is."""
    probe()


def check_caught(probe: Answer) -> None:
    """Your test fails with the bug."""
    require_caught(probe, "bug_packing")
