"""The training loop: a generator that yields after each optimizer step, with all of its state outside.

    for step in train(model, batches, config, state):       the caller's loop logs, evaluates, saves and stops
        ...

At each yield the trainable tensors and TrainState (the step count, AdamW's two moments by parameter name) are the whole
run. Everything else is a function of the arguments: the rate of the step, `batches[i]` of i, the dropout masks of
(seed, step, micro-batch). So a run that is stopped at any yield and taken up again ends with the same bits.

AdamW (Loshchilov & Hutter 2019), with g the gradient clipped to norm `clip` and t = step + 1:

    m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2
    w = w - rate * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * w)

`lr_multipliers` multiplies the rate of the tensors of a name: {"lora_B": 16.0} is LoRA+ (Hayou et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from minipeft.data.packing import Batch, derived_seed
from minipeft.errors import InputError
from minipeft.models import Decoder
from minipeft.models.loss import count_targets, cross_entropy

DECAYS = ("linear", "cosine", "constant")


class Batches(Protocol):
    """What `train` reads: batch i of the run, for any i >= 0, the same each time it is asked for."""

    def __getitem__(self, i: int, /) -> Batch: ...


@dataclass(frozen=True)
class TrainConfig:
    """How to train. `learning_rate` is the peak; `warmup` the share of the steps that climb to it."""

    steps: int
    learning_rate: float = 3e-4
    warmup: float = 0.06
    decay: str = "linear"  # to zero at the last step: linear, cosine, constant
    accumulate: int = 1  # batches per step
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    clip: float = 1.0  # the gradient's largest norm
    lr_multipliers: Mapping[str, float] = field(default_factory=dict)  # the end of a parameter's name -> multiplier
    seed: int = 0  # of the dropout masks
    activation_checkpointing: bool = False  # keep each block's input only, and run the block again in backward

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate"):
            if (
                isinstance(getattr(self, name), bool)
                or not isinstance(getattr(self, name), int)
                or getattr(self, name) < 1
            ):
                raise InputError(f"{getattr(self, name)!r} must be an integer >= 1", where=name)
        for name in ("learning_rate", "eps", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"{getattr(self, name)!r} must be finite and > 0", where=name)
        for name, factor in self.lr_multipliers.items():
            if isinstance(factor, bool) or not (math.isfinite(factor) and factor > 0):
                raise InputError(f"{factor!r} must be finite and > 0", where=f"lr_multipliers {name!r}")
        for name in ("warmup", "beta1", "beta2", "weight_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{getattr(self, name)!r} must be in [0, 1)", where=name)
        if self.decay not in DECAYS:
            raise InputError(f"{self.decay!r} is not known ({', '.join(DECAYS)})", where="decay")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"{self.seed} must be in [0, 2^63)", where="seed")


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """The learning rate of step 0, 1, ...: a climb over the warm-up, then the decay. Never 0 before the last step."""
    climb = max(1, round(config.warmup * config.steps))
    if step < climb:
        return config.learning_rate * (step + 1) / climb
    left = (config.steps - step) / max(1, config.steps - climb)  # 1 .. > 0
    shape = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
    return config.learning_rate * shape[config.decay]


@dataclass(frozen=True)
class Step:
    """What one optimizer step did."""

    number: int  # 1 after the first
    loss: float  # nats per supervised token
    learning_rate: float
    grad_norm: float  # of the gradient, before clipping
    tokens: int  # that are not padding
    targets: int  # supervised tokens


class TrainState:
    """All that a run is, apart from the trainable tensors: the step count and AdamW's moments by parameter name."""

    def __init__(self, model: nn.Module):
        self.step = 0
        self.exp_avg = {name: torch.zeros_like(p) for name, p in trained(model).items()}
        self.exp_avg_sq = {name: torch.zeros_like(p) for name, p in trained(model).items()}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, a tied one once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model: Decoder, batches: Batches, config: TrainConfig, state: TrainState | None = None) -> Iterator[Step]:
    """Train whatever requires gradients in `model`, from `state.step` to `config.steps`; yields after each step.

    Raises:
        InputError: nothing is trainable, a trained tensor is not float32, or `state` is of another model; later, a
            loss or gradient that is not finite, or a trained tensor that no gradient reaches. Checked at the call.
    """
    parameters = trained(model)
    if not parameters:
        raise InputError("nothing is trainable", where="train", hint="add_adapter(model, ...) first")
    for name, p in parameters.items():
        if p.dtype != torch.float32:
            hint = "Load the model with dtype=torch.float32: updates of a bfloat16 weight round away"
            raise InputError(f"is {p.dtype}, but trained tensors must be float32", where=name, hint=hint)
    state = TrainState(model) if state is None else state
    shapes = {name: p.shape for name, p in parameters.items()}
    if {name: m.shape for name, m in state.exp_avg.items()} != shapes:
        raise InputError("holds the moments of other tensors than this model trains", where="state")
    return steps(model, parameters, by_rate(parameters, config), batches, config, state)


def by_rate(parameters: dict[str, nn.Parameter], config: TrainConfig) -> dict[float, list[str]]:
    """The names of the trained parameters by learning-rate multiplier; the first key of `lr_multipliers` to fit counts.

    Raises:
        InputError: an entry of `lr_multipliers` names no trained tensor.
    """
    groups: dict[float, list[str]] = {}
    for key in config.lr_multipliers:
        if not any(name == key or name.endswith("." + key) for name in parameters):
            known = sorted({name.rsplit(".", 1)[-1] for name in parameters})
            raise InputError(f"no trained tensor is named {key!r}; there are {known}", where="lr_multipliers")
    for name in parameters:
        factors = [factor for key, factor in config.lr_multipliers.items() if name == key or name.endswith("." + key)]
        groups.setdefault(factors[0] if factors else 1.0, []).append(name)
    return groups


def steps(
    model: Decoder,
    parameters: dict[str, nn.Parameter],
    groups: dict[float, list[str]],
    batches: Batches,
    config: TrainConfig,
    state: TrainState,
) -> Iterator[Step]:
    """The generator behind `train`."""
    silent = dict.fromkeys(parameters, 0)  # updates in a row that a tensor had an all-zero gradient
    while state.step < config.steps:
        model.train()
        model.activation_checkpointing = config.activation_checkpointing
        model.zero_grad(set_to_none=True)
        torch.clear_autocast_cache()  # a caller's torch.autocast would go on with the low-precision copies of step 0
        first = state.step * config.accumulate
        micro = [batches[first + i] for i in range(config.accumulate)]
        targets = sum(count_targets(batch.labels) for batch in micro)
        if not targets:
            raise InputError("no token of this step's batches is supervised", where=f"step {state.step + 1}")
        loss = 0.0
        for i, batch in enumerate(micro):
            loss += backward(model, batch, targets, derived_seed(config.seed, state.step, i))
        norms = gradient_norms(parameters, loss, state.step, silent)
        norm = norms.norm().item()
        rate = learning_rate_at(state.step, config)
        clip = min(1.0, config.clip / (norm + 1e-6))
        for factor, names in groups.items():
            update({name: parameters[name] for name in names}, state, config, rate * factor, clip)
        state.step += 1
        check_finite(parameters, state)
        tokens = sum(int((batch.documents >= 0).sum()) for batch in micro)
        yield Step(state.step, loss, rate, norm, tokens, targets)


def backward(model: Decoder, batch: Batch, targets: int, seed: int) -> float:
    """Add one micro-batch's share of the step's gradient; returns its share of the loss.

    Losses are summed over supervised tokens and divided once by the step's count: k micro-batches are one batch of k.
    Dropout is drawn from `seed`, around backward too (recomputation draws again); the caller's stream is untouched.
    """
    device = model.embedding.weight.device
    ids, labels, documents = (t.to(device) for t in (batch.ids, batch.labels, batch.documents))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        hidden = model.hidden(ids, documents)  # [B, T, C]
        loss = cross_entropy(hidden, model.lm_head.weight, labels) / targets
        loss.backward()
    return loss.item()


def gradient_norms(parameters: dict[str, nn.Parameter], loss: float, step: int, silent: dict[str, int]) -> Tensor:
    """The norm of each gradient, [number of tensors], after the checks that say when training is not training.

    Raises:
        InputError: the loss or a gradient is not finite; no gradient reached a tensor; it was all zero three times.
    """
    where = f"step {step + 1}"
    if not math.isfinite(loss):
        raise InputError(f"the loss is {loss}", where=where, hint="Lower the learning rate or look at the data")
    for name, p in parameters.items():
        if p.grad is None:
            raise InputError(f"no gradient reached {name!r}: it takes no part in the loss", where=where)
    norms = torch.stack(torch._foreach_norm([p.grad for p in parameters.values() if p.grad is not None]))
    for name, norm in zip(parameters, norms.tolist()):
        if not math.isfinite(norm):
            raise InputError(f"the gradient of {name!r} is not finite", where=where, hint="Lower the learning rate")
        silent[name] = silent[name] + 1 if norm == 0 else 0
        if silent[name] >= 3:  # LoRA's A is rightly silent at the first: B is zero
            raise InputError(f"the gradient of {name!r} was zero in three steps: it is not being trained", where=where)
    return norms


def check_finite(parameters: dict[str, nn.Parameter], state: TrainState) -> None:
    """Hold that no weight and no moment is NaN or Inf, by the largest of each tensor: a pass over them, no copy.

    Raises:
        InputError: one is; names the tensor.
    """
    kinds: tuple[tuple[str, Mapping[str, Tensor]], ...] = (
        ("", parameters),
        ("exp_avg of ", state.exp_avg),
        ("exp_avg_sq of ", state.exp_avg_sq),
    )
    with torch.no_grad():
        for kind, tensors in kinds:
            largest = torch.stack(torch._foreach_norm(list(tensors.values()), float("inf")))
            if not torch.isfinite(largest).all():
                name = next(name for name, norm in zip(tensors, largest.tolist()) if not math.isfinite(norm))
                hint = "Lower the learning rate, and go on from the last checkpoint"
                raise InputError(f"{kind}{name!r} holds NaN or Inf", where=f"step {state.step}", hint=hint)


def update(
    parameters: dict[str, nn.Parameter], state: TrainState, config: TrainConfig, rate: float, clip: float
) -> None:
    """One AdamW step, as written at the head of this file, on gradients times `clip`."""
    weights: list[Tensor] = list(parameters.values())
    gradients = [p.grad for p in weights if p.grad is not None]
    with torch.no_grad():
        if clip < 1:
            torch._foreach_mul_(gradients, clip)
        adamw(
            weights,
            gradients,
            [state.exp_avg[n] for n in parameters],
            [state.exp_avg_sq[n] for n in parameters],
            [],
            [torch.tensor(float(state.step), device=p.device) for p in weights],
            fused=True,
            amsgrad=False,
            beta1=config.beta1,
            beta2=config.beta2,
            lr=rate,
            weight_decay=config.weight_decay,
            eps=config.eps,
            maximize=False,
        )


@torch.no_grad()
def evaluate(model: Decoder, batches: list[Batch]) -> float:
    """Mean loss in nats per supervised token over `batches`, in eval mode; the model's mode is put back."""
    was_training, device = model.training, model.embedding.weight.device
    model.eval()
    loss, targets = 0.0, 0
    for batch in batches:
        hidden = model.hidden(batch.ids.to(device), batch.documents.to(device))
        loss += cross_entropy(hidden, model.lm_head.weight, batch.labels.to(device)).item()
        targets += count_targets(batch.labels)
    model.train(was_training)
    if not targets:
        raise InputError("no token is supervised", where="evaluate")
    if not math.isfinite(loss):
        raise InputError(f"the held-out loss is {loss}", where="evaluate", hint="Lower the learning rate")
    return loss / targets
