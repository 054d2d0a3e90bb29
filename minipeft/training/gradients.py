"""Gradients: float32, freed as soon as they are used, as flat vectors, and summed while backward still runs.

    | gradient of p_0 | gradient of p_1 | ... | 1.0 for each parameter that has a gradient, else 0.0 |

The last part of a flat vector is summed with the rest: a parameter that no gradient reached on any process keeps none,
and is refused as in one process. Buckets: Li et al. 2020 (PyTorch Distributed).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 2**22  # numbers of an all-reduce: 16 MB


@contextmanager
def wide_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context manager: the gradients of bfloat16 parameters are float32, and end with it.

    A sum of bfloat16 micro-batches loses what is less than 2^-9 of it.
    """
    narrow = [p for p in parameters if p.dtype != torch.float32]
    for p in narrow:
        p.grad_dtype = torch.float32
    try:
        yield
    finally:
        for p in narrow:
            p.grad, p.grad_dtype = None, p.dtype


@contextmanager
def released(parameters: Mapping[str, nn.Parameter], use: Callable[[str, nn.Parameter], None]) -> Iterator[None]:
    """Context manager: when backward has computed a parameter's gradient, call use(name, p) and free the gradient."""

    def make_hook(name: str) -> Callable[[Tensor], None]:
        def run(p: Tensor) -> None:
            use(name, p)  # type: ignore[arg-type]  # a parameter
            p.grad = None

        return run

    hooks = [p.register_post_accumulate_grad_hook(make_hook(name)) for name, p in parameters.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def flatten(parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
    """Write the gradients of parameters, then for each whether it has one, to the head of a flat tensor."""
    place = 0
    for p in parameters:
        if p.grad is not None:
            flat[place : place + p.numel()] = p.grad.flatten()
        place += p.numel()
    flat[place : place + len(parameters)] = torch.tensor([float(p.grad is not None) for p in parameters])


def unflatten(flat: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Set the gradients that `flatten` wrote; a parameter that had none on any rank has none again."""
    sizes = [p.numel() for p in parameters]
    had = flat[sum(sizes) : sum(sizes) + len(sizes)].tolist()
    for p, grad, reached in zip(parameters, flat[: sum(sizes)].split(sizes), had):
        p.grad = grad.view_as(p).clone() if reached else None


class Buckets:
    """The parameters in buckets of about BUCKET numbers, in the order in which backward reaches them: the last first.

    All ranks send the buckets in this order, each once all of its gradients are there.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.buckets: list[list[nn.Parameter]] = [[]]
        for p in reversed(parameters):
            if sum(held.numel() for held in self.buckets[-1]) >= BUCKET:
                self.buckets.append([])
            self.buckets[-1].append(p)
        self.missing = [len(bucket) for bucket in self.buckets]
        self.sent: list[tuple[Tensor, Any]] = []

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Context manager: send each bucket when it is complete."""
        hooks = [
            p.register_post_accumulate_grad_hook(lambda _, number=number: self.count(number))
            for number, bucket in enumerate(self.buckets)
            for p in bucket
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def count(self, number: int) -> None:
        """Count a gradient of a bucket, and send the buckets whose turn it is."""
        self.missing[number] -= 1
        while len(self.sent) < len(self.buckets) and self.missing[len(self.sent)] <= 0:
            self.send()

    def send(self) -> None:
        """Start the all-reduce of the next bucket."""
        bucket = self.buckets[len(self.sent)]
        flat = torch.zeros(sum(p.numel() for p in bucket) + len(bucket), device=bucket[0].device)
        flatten(bucket, flat)
        self.sent.append((flat, dist.all_reduce(flat, async_op=True)))

    def finish(self) -> None:
        """Send the buckets with parameters that no gradient reached, wait for all, and set the gradients."""
        while len(self.sent) < len(self.buckets):
            self.send()
        for bucket, (flat, work) in zip(self.buckets, self.sent):
            work.wait()
            unflatten(flat, bucket)
