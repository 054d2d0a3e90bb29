"""Every epoch in the order of the first.

huggingface/accelerate#2016: after a resume the data start over, or every epoch has the order of the first: the
shuffling is seeded with the run's seed alone. A model that sees the texts in one fixed order learns that order, too.

Write `probe`, a test without arguments that calls the library: it returns with the library as it is, and an assert
fails with the bug in it. --check runs it both ways.

    make_example("abc")                                  a document: the ids of the letters, and EOS
    batches = pack(examples, LETTERS, length=4, batch=1, seed=0)         batches[i], any i >= 0
    batches[i].ids                                       [B, T]; of epoch i // len(batches)
"""

from __future__ import annotations

from minipeft.data.packing import pack
from minipeft.tour.exercises.bugs import require_caught
from minipeft.tour.exercises.record import Answer, Bug, Exercise
from minipeft.tour.exercises.small_model import LETTERS, make_example

EXERCISE = Exercise(
    solution="minipeft.tour.exercises.tasks.bug_order.probe",
    hints=(
        "Make some ten documents that each fill a row, so that a batch is one document.",
        "List the ids of the first epoch, batches[0] ... batches[n - 1], and those of the second.",
        "Both hold the same documents, sorted; but not in the same order.",
    ),
    bug=Bug("minipeft.data.packing.draw_order", before='"order", seed, epoch', after='"order", seed'),
)


def probe() -> None:
    """The second epoch holds the rows of the first, in another order."""
    examples = [make_example(3 * letter) for letter in "abcdefghij"]
    batches = pack(examples, LETTERS, length=4, batch=1, seed=0)
    count = len(batches)
    epochs = [[batches[epoch * count + i].ids.tolist() for i in range(count)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


def check_sound(probe: Answer) -> None:
    """Your test passes with the library as it is."""
    probe()


def check_caught(probe: Answer) -> None:
    """Your test fails with the bug."""
    require_caught(probe, "bug_order")
