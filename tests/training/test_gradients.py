"""Gradients there and back as a flat vector, and the order of the buckets."""

from typing import Any

import pytest
import torch
from torch import nn

from minipeft.training import gradients
from minipeft.training.gradients import Buckets, flatten, unflatten


def parameters() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((2, 3), (4,), (3, 2), (5,))]


def test_flat_gradients_come_back_and_a_missing_one_stays_missing() -> None:
    """-0.0 is the number that changes no bit when it is added: -0.0 + -0.0 = -0.0, and 0.0 + -0.0 = 0.0."""
    held = parameters()
    for p in held[:3]:
        p.grad = torch.randn_like(p)
    held[0].grad[0, 0] = -0.0  # type: ignore[index]
    wanted = [None if p.grad is None else p.grad.clone() for p in held]
    flat = torch.full((21 + 4 + 3,), -0.0)
    flatten(held, flat)
    total = torch.full_like(flat, -0.0) + flat
    assert torch.equal(total.view(torch.int32), flat.view(torch.int32))
    for p in held:
        p.grad = None
    unflatten(total, held)
    assert held[3].grad is None
    for p, grad in zip(held[:3], wanted):
        assert p.grad is not None
        assert grad is not None
        assert torch.equal(p.grad.view(torch.int32), grad.view(torch.int32))


def test_buckets_are_sent_in_their_order_once_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first bucket holds the last parameters. A later one that is complete earlier waits for it."""
    sent: list[int] = []

    def reduce(flat: torch.Tensor, async_op: bool) -> Any:
        assert async_op
        sent.append(len(flat))
        return type("Work", (), {"wait": lambda self: None})()

    monkeypatch.setattr(gradients, "BUCKET", 6)
    monkeypatch.setattr(gradients.dist, "all_reduce", reduce)
    held = parameters()
    buckets = Buckets(held)
    assert [[p.numel() for p in bucket] for bucket in buckets.buckets] == [[5, 6], [4, 6]]
    with buckets.hooked():
        (held[0].sum() + held[1].sum()).backward()
        assert sent == [], "the second bucket waits for the first"
        held[2].sum().backward()
        assert sent == []
    buckets.finish()  # the last parameter has no gradient
    assert sent == [5 + 6 + 2, 4 + 6 + 2]
    assert held[3].grad is None
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in held[:3] if p.grad is not None)
