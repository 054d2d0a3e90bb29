"""AdamW: its equation in float64, torch's optimizer, and bfloat16 tensors in parts."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minipeft.training import loop
from minipeft.training.adamw import update, update_all
from minipeft.training.loop import TrainConfig, learning_rate_at, train, trained
from tests.training.test_loop import Rows, tuned

CONFIG = TrainConfig(weight_decay=0.1, beta1=0.8, beta2=0.95, eps=1e-3, clip=0.5)


def test_the_equation_in_float64() -> None:
    """Three steps of four numbers, against the lines at the head of the file."""
    draw = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(4, generator=draw))
    state = SimpleNamespace(step=0, exp_avg={"p": torch.zeros(4)}, exp_avg_sq={"p": torch.zeros(4)})
    w, m, v = p.tolist(), [0.0] * 4, [0.0] * 4
    for t in (1, 2, 3):
        p.grad = torch.randn(4, generator=draw)
        g = [0.5 * entry for entry in p.grad.tolist()]
        update({"p": p}, state, CONFIG, 0.1, 0.5)
        state.step = t
        for i in range(4):
            m[i] = 0.8 * m[i] + 0.2 * g[i]
            v[i] = 0.95 * v[i] + 0.05 * g[i] ** 2
            rise = m[i] / (1 - 0.8**t) / (math.sqrt(v[i] / (1 - 0.95**t)) + 1e-3)
            w[i] -= 0.1 * (rise + 0.1 * w[i])
        assert p.tolist() == pytest.approx(w, abs=1e-6)


def test_each_tensor_has_its_learning_rate_and_all_one_clipping() -> None:
    """Two tensors with the same weights and gradients: one moves three times as far as the other."""
    pair = {name: nn.Parameter(torch.ones(3)) for name in ("a", "b")}
    for p in pair.values():
        p.grad = torch.tensor([3.0, -4.0, 0.0])
    zeros = lambda: {name: torch.zeros(3) for name in pair}
    state = SimpleNamespace(step=0, exp_avg=zeros(), exp_avg_sq=zeros())
    update_all(pair, state, TrainConfig(clip=1.0), {"a": 1e-3, "b": 3e-3}, 50**0.5)
    a, b = (pair[name].detach() - 1 for name in ("a", "b"))
    torch.testing.assert_close(b, 3 * a, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(state.exp_avg["a"], 0.1 * torch.tensor([3.0, -4.0, 0.0]) / 50**0.5, rtol=1e-5, atol=0)


def test_the_update_is_adamws() -> None:
    """As torch.optim.AdamW does it, with clipping and the schedule."""
    config = TrainConfig(steps=5, learning_rate=1e-2, weight_decay=0.1, clip=0.05)
    ours, theirs = tuned("full"), tuned("full")
    list(train(ours, Rows(), config))
    optimizer = torch.optim.AdamW(theirs.parameters(), betas=(config.beta1, config.beta2), weight_decay=0.1)
    for step in range(5):
        theirs.train()
        theirs.zero_grad()
        batch = Rows()[step]
        loop.backward(theirs, batch, loop.count_targets(batch.labels), loop.derive_seed(0, step, 0))
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, config)
        optimizer.step()
    for name, p in trained(ours).items():
        assert torch.allclose(p, trained(theirs)[name], rtol=0, atol=1e-5), name  # 5 steps of at most 1e-2
