"""A model that never stops.

unslothai/unsloth#416, huggingface/trl#976, mlabonne/llm-course#33: the tokenizer has no padding token, so EOS is used
for it; labels of the padding token are masked, and with them the EOS that ends each text. The model is never taught to
stop, and no error says so.

Write `probe`, a test without arguments that calls the library: it returns with the library as it is, and an assert
fails with the bug in it. --check runs it both ways.

    make_example("abc")                        a document: the ids of the letters, and EOS
    LETTERS                                    the tokenizer; its `pad` is its `eos`
    pack(examples, LETTERS, length=8)          batches; batches[0] has ids, labels and documents, [B, T] each
"""

from __future__ import annotations

from minipeft.data.packing import pack
from minipeft.tour.exercises.bugs import require_caught
from minipeft.tour.exercises.record import Answer, Bug, Exercise
from minipeft.tour.exercises.small_model import EOS, LETTERS, make_example

EXERCISE = Exercise(
    solution="minipeft.tour.exercises.tasks.bug_eos.probe",
    hints=(
        "labels are the ids where a loss is taken, and -100 elsewhere.",
        "The first token of a document never has a label; its EOS has one.",
        "Padding has none, although its id is EOS too: documents == -1 says which columns are padding.",
    ),
    bug=Bug(
        "minipeft.data.packing.Batches.batch_of",
        before="= tokens, targets, place",
        after="= tokens, np.where(tokens == self.pad, IGNORED, targets), place",
    ),
)


def probe() -> None:
    """The EOS of each document is a label, and padding is none."""
    batch = pack([make_example("ab"), make_example("cde")], LETTERS, length=10, batch=1, shuffle=False)[0]
    ends = (batch.ids == EOS) & (batch.documents >= 0)
    assert int(ends.sum()) == 2
    assert (batch.labels[ends] == EOS).all()
    assert (batch.labels[batch.documents < 0] == -100).all()


def check_sound(probe: Answer) -> None:
    """Your test passes with the library as it is."""
    probe()


def check_caught(probe: Answer) -> None:
    """Your test fails with the bug."""
    require_caught(probe, "bug_eos")
