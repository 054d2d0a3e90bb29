"""Which hidden state predicts which label.

    loss = sum over supervised t of  -log softmax(h_t W^T)[label_{t+1}]

The hidden state of token t predicts token t + 1, and `labels` [B, T] are aligned with the ids: labels[t] is ids[t], or
IGNORED (-100) where no loss is taken. So the shift by one happens here, and nowhere else. The first label of a row is
predicted from nothing, and the last hidden state predicts nothing.

Return the hidden states that predict a supervised label, [N, C], and these labels, [N], row by row in order. Where
values are not known there is nothing to select by: if `labels.is_meta` (a plan without data) or
`torch.compiler.is_compiling()`, return all B (T - 1) of both.
"""

from __future__ import annotations

import torch

from minipeft.documents import IGNORED
from minipeft.tour.exercises.judging import require_close, require_equal
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft.models.loss.select_supervised",
    hints=(
        "Shift first: hidden[:, :-1] beside labels[:, 1:].",
        "A bool mask [B, T - 1] selects from both: hidden[mask] is [N, C].",
        "On the meta device: flatten(0, 1) of the hidden states and flatten() of the labels.",
    ),
)


def check_loops(select_supervised: Answer) -> None:
    """Random labels with gaps, in loops."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(3, 6, 2), torch.randint(5, (3, 6))
    labels[torch.rand(3, 6) < 0.4] = IGNORED
    pairs = [(hidden[b, t], labels[b, t + 1]) for b in range(3) for t in range(5) if int(labels[b, t + 1]) != IGNORED]
    states, targets = select_supervised(hidden, labels)
    require_close(targets, torch.stack([label for _, label in pairs]), "the labels", 0)
    require_close(states, torch.stack([state for state, _ in pairs]), "the hidden states", 0)


def check_ends(select_supervised: Answer) -> None:
    """A label at the first token of a row is not predicted; label 0 is a label like another."""
    hidden, labels = torch.arange(8.0).reshape(2, 4, 1), torch.tensor([[7, IGNORED, IGNORED, 0], [7, 0, 3, IGNORED]])
    states, targets = select_supervised(hidden, labels)
    require_close(targets, torch.tensor([0, 0, 3]), "the labels", 0)
    require_close(states, torch.tensor([[2.0], [4.0], [5.0]]), "the hidden states", 0)


def check_none(select_supervised: Answer) -> None:
    """Without a supervised label both are empty."""
    states, targets = select_supervised(torch.zeros(2, 3, 4), torch.full((2, 3), IGNORED))
    require_equal((list(states.shape), list(targets.shape)), ([0, 4], [0]), "the shapes")


def check_meta(select_supervised: Answer) -> None:
    """On the meta device all are returned."""
    hidden, labels = torch.empty(2, 3, 4, device="meta"), torch.empty(2, 3, dtype=torch.int64, device="meta")
    states, targets = select_supervised(hidden, labels)
    require_equal((list(states.shape), list(targets.shape)), ([4, 4], [4]), "the shapes on the meta device")
