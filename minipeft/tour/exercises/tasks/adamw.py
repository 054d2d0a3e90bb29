"""One step of AdamW.

    m = b1 m + (1 - b1) g                   v = b2 v + (1 - b2) g^2                        g: the gradient times `clip`
    w = w - learning_rate * ( m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * w )          t = step + 1

Source: Loshchilov and Hutter 2019, "Decoupled weight decay regularization", algorithm 2. The weight decay uses w as it
was before the step.

`update(parameters, state, config, learning_rate, clip)`: `parameters` by name, each with its `.grad`; `state.step` is
the number of steps before this one (the caller counts it up, not you); `state.exp_avg[name]` is m, and
`state.exp_avg_sq[name]` is v; `config` has beta1, beta2, eps and weight_decay; `clip` in (0, 1] scales the gradient.
Change parameters and moments in place, and let no gradient flow. torch.optim's functional `adamw` is imported, as the
library uses it; the equations by hand are shorter. `own_shard(t)` is t itself in a training on one process.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from minipeft.tour.exercises.judging import require, require_close
from minipeft.tour.exercises.record import Answer, Exercise
from minipeft.training.loop import TrainConfig, TrainState

EXERCISE = Exercise(
    solution="minipeft.training.adamw.update",
    hints=(
        "Within torch.no_grad(), for each name: g = clip * p.grad, then m and v in place (mul_, add_).",
        "t = state.step + 1. The correction divides m by 1 - b1^t and v by 1 - b2^t; m and v themselves are kept "
        "without.",
        "eps is outside the square root. p.mul_(1 - learning_rate * weight_decay) first, then subtract the Adam part.",
    ),
)


def make_model() -> nn.Linear:
    """Two parameters, of other sizes of gradient."""
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def set_gradients(model: nn.Module, step: int) -> None:
    """A gradient for each parameter: a function of the step."""
    generator = torch.Generator().manual_seed(100 + step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def step_in_loops(w: list[float], gs: list[list[float]], clip: list[float], c: TrainConfig, rate: float) -> list[float]:
    """The equations for each number, in Python's float64."""
    found = []
    for i, value in enumerate(w):
        m = v = 0.0
        for t, (g, factor) in enumerate(zip(gs, clip), 1):
            m = c.beta1 * m + (1 - c.beta1) * factor * g[i]
            v = c.beta2 * v + (1 - c.beta2) * (factor * g[i]) ** 2
            part = m / (1 - c.beta1**t) / (math.sqrt(v / (1 - c.beta2**t)) + c.eps)
            value -= rate * (part + c.weight_decay * value)
        found.append(value)
    return found


def run_steps(update: Answer, config: TrainConfig, clips: list[float], rate: float) -> None:
    """Take steps and compare each parameter with the loops."""
    model = make_model()
    state, parameters = TrainState(model), dict(model.named_parameters())
    start = {name: p.detach().flatten().tolist() for name, p in parameters.items()}
    seen: dict[str, list[list[float]]] = {name: [] for name in parameters}
    for step, clip in enumerate(clips):
        set_gradients(model, step)
        for name, p in parameters.items():
            assert p.grad is not None
            seen[name].append(p.grad.flatten().tolist())
        update(parameters, state, config, rate, clip)
        require(state.step == step, "state.step changed: the caller counts the steps")
        state.step += 1
        for name, p in parameters.items():
            expected = step_in_loops(start[name], seen[name], clips[: step + 1], config, rate)
            require_close(p.flatten(), torch.tensor(expected), f"{name} after step {step + 1}", 1e-5)


def check_one_step(update: Answer) -> None:
    """The first step: every number moves by the learning rate, against the sign of its gradient."""
    model = make_model()
    set_gradients(model, 0)
    before = model.weight.detach().clone()
    update(dict(model.named_parameters()), TrainState(model), TrainConfig(steps=9), 0.01, 1.0)
    grad = model.weight.grad
    assert grad is not None
    require_close(model.weight, before - 0.01 * grad.sign(), "the weight after one step", 1e-4)


def check_steps(update: Answer) -> None:
    """Four steps, without and with weight decay."""
    for decay in (0.0, 0.3):
        run_steps(update, TrainConfig(steps=9, weight_decay=decay, beta1=0.8, beta2=0.95), [1.0] * 4, 0.05)


def check_eps(update: Answer) -> None:
    """A large eps, outside of the square root."""
    run_steps(update, TrainConfig(steps=9, eps=0.5), [1.0] * 3, 0.1)


def check_clip(update: Answer) -> None:
    """Gradients are scaled by clip, also before they are squared."""
    run_steps(update, TrainConfig(steps=9, eps=0.1), [0.5, 1.0, 0.25], 0.1)


def check_moments(update: Answer) -> None:
    """The moments are kept without the correction, in the state's own tensors."""
    model = make_model()
    state, config = TrainState(model), TrainConfig(steps=9, beta1=0.9, beta2=0.99)
    m, v = state.exp_avg["bias"], state.exp_avg_sq["bias"]
    set_gradients(model, 0)
    assert model.bias.grad is not None
    g = model.bias.grad.clone()
    update(dict(model.named_parameters()), state, config, 0.01, 1.0)
    require(state.exp_avg["bias"] is m and state.exp_avg_sq["bias"] is v, "the moments must be changed in place")
    require_close(m, 0.1 * g, "m after one step", 1e-5)
    require_close(v, 0.01 * g**2, "v after one step", 1e-5)
    require(not m.requires_grad, "the moments have a gradient")


def check_resumed(update: Answer) -> None:
    """The correction depends on state.step, so that a resumed training goes on where it was."""
    model = make_model()
    state = TrainState(model)
    state.step = 3
    set_gradients(model, 0)
    assert model.bias.grad is not None
    before, g = model.bias.detach().clone(), model.bias.grad.clone()
    update(dict(model.named_parameters()), state, TrainConfig(steps=9), 0.01, 1.0)
    m, v = 0.1 * g / (1 - 0.9**4), 0.01 * g**2 / (1 - 0.99**4)
    require_close(model.bias, before - 0.01 * m / (v.sqrt() + 1e-8), "the bias after step 4", 1e-4)
