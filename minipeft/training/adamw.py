"""AdamW (Loshchilov & Hutter 2019) on the trained tensors, in float32.

With g the gradient clipped to norm `clip`, and t = step + 1:

    m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2
    w = w - learning_rate * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * w)

A bfloat16 weight (full tuning with --dtype bf16) is updated in float32 and rounded stochastically (rounding.py), from a
generator that is seeded with (seed, step, name).
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from minipeft.documents import derive_seed
from minipeft.training.processes import own_shard
from minipeft.training.rounding import round_stochastically

PART = 2**20  # numbers of a bfloat16 tensor that are updated at a time


class Moments(Protocol):
    """The state of the optimizer (loop.TrainState): the step count, and both moments by parameter name."""

    step: int
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]


class Settings(Protocol):
    """The settings of the update (loop.TrainConfig)."""

    @property
    def beta1(self) -> float: ...
    @property
    def beta2(self) -> float: ...
    @property
    def eps(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def clip(self) -> float: ...
    @property
    def seed(self) -> int: ...


def update(
    parameters: dict[str, nn.Parameter], state: Moments, config: Settings, learning_rate: float, clip: float
) -> None:
    """One AdamW step (equations at the head of this file) on the gradients times `clip`."""
    with torch.no_grad():
        weights = [own_shard(p) for p in parameters.values()]
        gradients = [own_shard(p.grad) for p in parameters.values() if p.grad is not None]
        if clip < 1:
            torch._foreach_mul_(gradients, clip)
        adamw(
            weights,
            gradients,
            [own_shard(state.exp_avg[n]) for n in parameters],
            [own_shard(state.exp_avg_sq[n]) for n in parameters],
            [],
            [torch.tensor(float(state.step), device=p.device) for p in weights],
            fused=True,
            amsgrad=False,
            beta1=config.beta1,
            beta2=config.beta2,
            lr=learning_rate,
            weight_decay=config.weight_decay,
            eps=config.eps,
            maximize=False,
        )


def update_all(
    parameters: Mapping[str, nn.Parameter], state: Moments, config: Settings, rates: Mapping[str, float], norm: float
) -> None:
    """Update parameters, each at its learning rate, on their gradients clipped by the norm of all: float32 ones of one
    rate together, each bfloat16 one by itself."""
    clip = min(1.0, config.clip / (norm + 1e-6)) if config.clip else 1.0
    together: dict[float, dict[str, nn.Parameter]] = {}
    for name, p in parameters.items():
        if p.dtype == torch.float32:
            together.setdefault(rates[name], {})[name] = p
        else:
            update_rounded(name, p, state, config, rates[name], clip)
    for rate, group in together.items():
        update(group, state, config, rate, clip)


def update_rounded(
    name: str, p: nn.Parameter, state: Moments, config: Settings, learning_rate: float, clip: float
) -> None:
    """`update` of a bfloat16 parameter: in float32, PART numbers at a time, and rounded stochastically."""
    assert p.grad is not None
    generator = torch.Generator(p.device).manual_seed(derive_seed(config.seed, state.step, name))
    part, rows = copy(state), max(1, PART * len(p) // max(1, p.numel()))
    tensors = (p.detach(), p.grad, state.exp_avg[name], state.exp_avg_sq[name])
    for weight, grad, exp_avg, exp_avg_sq in zip(*(t.split(rows) for t in tensors)):
        wide = nn.Parameter(weight.float())
        wide.grad, part.exp_avg, part.exp_avg_sq = grad, {name: exp_avg}, {name: exp_avg_sq}
        update({name: wide}, part, config, learning_rate, clip)
        round_stochastically(wide.detach(), weight, generator)
