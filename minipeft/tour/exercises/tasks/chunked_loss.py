"""A loss without its logits.

    loss = sum over supervised t of  -log softmax(logits(h_t))[label_{t+1}]

With a vocabulary of 50,000 the logits of a row of 1024 tokens take 200 MB in float32, and their gradient as much. So
take the loss over chunks of tokens, and let each chunk's logits be computed again in backward instead of being kept:
`torch.utils.checkpoint.checkpoint(function, *tensors, use_reentrant=False)` (Chen et al. 2016).

`adapted_cross_entropy(hidden [B, T, C], logits, labels [B, T], vocabulary)`: `logits` maps [n, C] to [n, V], and may be
trained itself; the loss is of its result in float32. `select_supervised(hidden, labels)` shifts and selects: [N, C],
[N]. A chunk has CHUNK_LOGITS // vocabulary tokens, at least one. Return the sum, a scalar.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.documents import IGNORED
from minipeft.models.loss import CHUNK_LOGITS
from minipeft.tour.exercises.judging import require, require_close
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft.models.loss.adapted_cross_entropy",
    hints=(
        "hidden.split(rows) and targets.split(rows) are the chunks.",
        "An inner function of (part, target): F.cross_entropy(logits(part).float(), target, reduction='sum').",
        "Checkpoint it for each chunk, stack the losses and sum them.",
    ),
)


def make_problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [2, 7, 4], a head [9, 4] and labels [2, 7] with gaps."""
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 7, 4, dtype=dtype), torch.randn(9, 4, dtype=dtype)
    labels = torch.randint(9, (2, 7))
    labels[torch.rand(2, 7) < 0.3] = IGNORED
    return hidden.requires_grad_(), head.requires_grad_(), labels


def compare(answer: Answer, vocabulary: int) -> list[int]:
    """Compare loss and gradients with float32 logits formed at once; returns the sizes of the chunks, in order."""
    hidden, head, labels = make_problem()
    sizes: list[int] = []

    def logits(part: Tensor) -> Tensor:
        sizes.append(len(part))
        return part @ head.t()

    exact = (hidden[:, :-1] @ head.t()).flatten(0, 1)
    wanted = F.cross_entropy(exact, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
    expected = torch.autograd.grad(wanted, (hidden, head))
    loss = answer(hidden, logits, labels, vocabulary)
    require_close(loss, wanted, "the loss", 1e-5)
    forward = list(sizes)
    found = torch.autograd.grad(loss, (hidden, head))
    require_close(found[0], expected[0], "the gradient of the hidden states", 1e-5)
    require_close(found[1], expected[1], "the gradient of the head", 1e-5)
    require(len(sizes) == 2 * len(forward), "backward computes the logits of each chunk again, once")
    return forward


def check_one_chunk(adapted_cross_entropy: Answer) -> None:
    """A small vocabulary: one chunk; loss and gradients are those of the whole logits."""
    sizes = compare(adapted_cross_entropy, 9)
    require(len(sizes) == 1, f"{len(sizes)} chunks where one is enough")


def check_chunks(adapted_cross_entropy: Answer) -> None:
    """A large vocabulary: chunks of CHUNK_LOGITS // vocabulary tokens, and at least of one."""
    for vocabulary, most in ((CHUNK_LOGITS // 3, 3), (CHUNK_LOGITS // 2 - 1, 2), (CHUNK_LOGITS * 5, 1)):
        sizes = compare(adapted_cross_entropy, vocabulary)
        require(max(sizes) == most, f"the largest chunk has {max(sizes)} tokens, not {most}")
        require(len(sizes) == -(-sum(sizes) // most), f"{sum(sizes)} tokens make {len(sizes)} chunks of up to {most}")


def check_bfloat16(adapted_cross_entropy: Answer) -> None:
    """bfloat16 logits are widened before the softmax: the loss is float32, and not rounded to bfloat16."""
    hidden, head, labels = make_problem(torch.float32)
    h, w = hidden.detach().bfloat16(), head.detach().bfloat16()
    loss = adapted_cross_entropy(h, lambda part: part @ w.t(), labels, 9)
    logits = (h[:, :-1] @ w.t()).double().flatten(0, 1)
    wanted = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
    require(loss.dtype == torch.float32, f"the loss is {loss.dtype}")
    require_close(loss, wanted, "the loss of bfloat16 logits", 1e-5)
