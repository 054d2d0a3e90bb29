"""Gradient accumulation that equals one large batch.

    loss = ( sum over the supervised tokens of all micro-batches ) / ( their number in the whole step )

A step's batch may be too large for memory; then its micro-batches are run one after the other, and autograd adds up
their gradients. The mean of the micro-batches' means is another loss: it weighs a token of a short micro-batch more. In
2024 several trainers were found to compute that (huggingface/transformers#34191). So each micro-batch's sum is divided
by `targets`, the number of supervised tokens of the whole step.

`backward(model, batch, targets, seed)`: `model.loss(ids, labels, documents)` is the sum over the supervised tokens;
`batch` holds ids, labels and documents [B, T], to be moved to the device of `model.embedding.weight`. Add the gradient
of this micro-batch's part to what is there, and return its part of the loss as a float.

Dropout draws from torch's global generator. Seed it with `seed` before forward, so that the masks are a function of
(seed, step, micro-batch) and a resumed training draws the same ones; and give the caller its random state back
(`torch.random.fork_rng`). The backward pass may draw too, where activations are computed again. `DRAWING` is a lock:
hold it meanwhile, because other threads may train with the same generator.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.data.packing import Batch
from minipeft.documents import IGNORED
from minipeft.tour.exercises.judging import require, require_close
from minipeft.tour.exercises.record import Answer, Exercise
from minipeft.training.loop import DRAWING

EXERCISE = Exercise(
    solution="minipeft.training.loop.backward",
    hints=(
        "loss = model.loss(...) / targets; loss.backward() adds to .grad; loss.item() is the float.",
        "with torch.random.fork_rng(devices=[]): torch.manual_seed(seed), then forward and backward inside.",
        "with DRAWING, torch.random.fork_rng(...): takes the lock as well.",
    ),
)


class Small(nn.Module):
    """A model of an embedding, dropout and a head: logits of the next token."""

    def __init__(self, dropout: float):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head, self.dropout = nn.Embedding(11, 4), nn.Linear(4, 11), dropout

    def loss(self, ids: Tensor, labels: Tensor, documents: Tensor) -> Tensor:
        """The sum of the losses of the supervised tokens."""
        logits = self.head(F.dropout(self.embedding(ids), self.dropout))[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


def make_batches() -> list[Batch]:
    """Two micro-batches, of 9 and of 2 supervised tokens."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for kept in (10, 3):
        ids = torch.randint(11, (1, 10), generator=generator)
        labels = ids.clone()
        labels[:, kept:] = IGNORED
        batches.append(Batch(ids, labels, torch.zeros_like(ids)))
    return batches


def gradients(model: Any) -> list[Tensor]:
    """The gradients of a model, cloned."""
    return [p.grad.clone() for p in model.parameters()]


def check_one_batch(backward: Answer) -> None:
    """The gradient of two micro-batches of 9 and 2 tokens is that of one batch with 11."""
    model, (first, second) = Small(0.0), make_batches()
    ids, labels = torch.cat([first.ids, second.ids]), torch.cat([first.labels, second.labels])
    whole = model.loss(ids, labels, torch.zeros_like(ids)) / 11
    whole.backward()
    expected = gradients(model)
    model.zero_grad()
    parts = [backward(model, batch, 11, 0) for batch in (first, second)]
    for name, mine, theirs in zip(("the embedding", "the head", "the bias"), gradients(model), expected):
        require_close(mine, theirs, f"the summed gradient of {name}", 1e-5)
    require(all(isinstance(part, float) for part in parts), f"the parts of the loss are {parts}: return floats")
    require_close(sum(parts), whole.item(), "the sum of the two parts of the loss", 1e-5)


def check_divisor(backward: Answer) -> None:
    """The sum is divided by `targets`, whatever this batch holds."""
    model, (first, _) = Small(0.0), make_batches()
    total = float(model.loss(first.ids, first.labels, first.documents))
    require_close(backward(model, first, 9, 0), total / 9, "the loss with targets=9", 1e-5)
    require_close(backward(model, first, 36, 0), total / 36, "the loss with targets=36", 1e-5)


def check_dropout_seed(backward: Answer) -> None:
    """The same seed gives the same dropout, whatever was drawn before; another seed gives another."""
    model, (first, _) = Small(0.5), make_batches()
    losses = []
    for seed in (5, 5, 6):
        torch.rand(3)
        losses.append(backward(model, first, 9, seed))
    torch.manual_seed(5)
    require(losses[0] == losses[1], "two calls with one seed draw different dropout")
    require(losses[0] != losses[2], "another seed draws the same dropout")
    wanted = float(model.loss(first.ids, first.labels, first.documents)) / 9
    require_close(losses[0], wanted, "the loss with the dropout of torch.manual_seed(5)", 1e-6)


def check_random_state(backward: Answer) -> None:
    """The caller's random numbers go on as if nothing had been drawn."""
    model, (first, _) = Small(0.5), make_batches()
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    backward(model, first, 9, 3)
    require_close(torch.rand(4), expected, "what the caller draws afterwards", 0)


class DrawsInBackward(Small):
    """A model whose backward pass draws a number, as recomputed dropout does; it notes the number, and whether another
    thread could take the lock then."""

    def loss(self, ids: Tensor, labels: Tensor, documents: Tensor) -> Tensor:
        loss = super().loss(ids, labels, documents)
        loss.register_hook(self.draw)
        self.locked = [is_locked()]
        return loss

    def draw(self, gradient: Tensor) -> None:
        self.drawn = torch.rand(())
        self.locked.append(is_locked())


def is_locked() -> bool:
    """Whether DRAWING is held: another thread cannot take it."""
    taken: list[bool] = []

    def take() -> None:
        taken.append(DRAWING.acquire(blocking=False))
        if taken[0]:
            DRAWING.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return not taken[0]


def check_backward_draws(backward: Answer) -> None:
    """What is drawn in the backward pass is a function of the seed as well, and DRAWING is held in both passes."""
    model, (first, _) = DrawsInBackward(0.5), make_batches()
    drawn = []
    for _ in range(2):
        torch.rand(3)
        before = torch.random.get_rng_state()
        backward(model, first, 9, 5)
        drawn.append(model.drawn)
        require(torch.equal(before, torch.random.get_rng_state()), "the backward pass moves the caller's random state")
    require_close(drawn[1], drawn[0], "what the backward pass draws with the same seed", 0)
    for held, where in zip(model.locked, ("forward", "backward")):
        require(held, f"DRAWING is not held in {where}")
    require(not is_locked(), "DRAWING is still held afterwards")
