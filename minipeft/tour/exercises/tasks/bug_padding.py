"""A short prompt in a batch.

tloen/alpaca-lora#315, huggingface/transformers#25790: prompts of different lengths are padded on the left, and the
positions count the padding. A short prompt is then answered as if it stood far down a text.

Write `probe`, a test without arguments that calls the library: it returns with the library as it is, and an assert
fails with the bug in it. --check runs it both ways.

    make_model()                                   a small Llama with 27 tokens
    pad_left([[5, 6, 7], [8]], 0)                  ids and documents, [B, T] each
    model(ids, documents)                          logits [B, T, V]; documents may be left out for a single row

With rotary positions, shifting all tokens of a row changes nothing that can be seen: only distances count. So look at
`positions_in(documents)`, [B, T], from which models with a table of positions (GPT-2) take theirs.
"""

from __future__ import annotations

import torch

from minipeft.decoding import pad_left
from minipeft.documents import positions_in
from minipeft.tour.exercises.bugs import require_caught
from minipeft.tour.exercises.record import Answer, Bug, Exercise

EXERCISE = Exercise(
    solution="minipeft.tour.exercises.tasks.bug_padding.probe",
    hints=(
        "positions_in is a function of documents alone.",
        "The positions of a row of three tokens, padded to five, are 0 0 0 1 2: padding has 0, and the text begins "
        "at 0.",
    ),
    bug=Bug(
        "minipeft.documents.positions_in",
        before="documents[:, 1:] != documents[:, :-1]",
        after="(documents[:, 1:] != documents[:, :-1]) & (documents[:, :-1] != PADDING)",
    ),
)


def probe() -> None:
    """The text of a left-padded row begins at position 0."""
    _, documents = pad_left([[5, 6, 7, 8, 9], [5, 6, 7]], 0)
    expected = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])
    assert torch.equal(positions_in(documents), expected)


def check_sound(probe: Answer) -> None:
    """Your test passes with the library as it is."""
    probe()


def check_caught(probe: Answer) -> None:
    """Your test fails with the bug."""
    require_caught(probe, "bug_padding")
