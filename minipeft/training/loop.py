"""The training loop: a generator that yields after each optimizer step and keeps all state outside.

    for step in train(model, batches, config, state):       the caller's loop logs, evaluates, saves and stops
        ...

At each yield the trainable tensors and TrainState (the step count, AdamW's two moments by parameter name) are the whole
state. Everything else is a function of the arguments: the learning rate of the step, `batches[i]` of i, the dropout
masks of (seed, step, micro-batch, or with `batch_invariant` document). Training that stops at any yield and is resumed
therefore ends with the same bits.

`lr_multipliers` multiplies the learning rate of parameters by name: {"lora_B": 16.0} is LoRA+ (Hayou et al. 2024).

With `optimizer_in_backward` each parameter is updated as soon as backward has its gradient, which is then freed (Lv et
al. 2023, LOMO). Clipping needs the norm of all gradients first: a first backward measures and frees them, a second one
with the same bits updates. Without clipping (`clip` 0) one backward does.

Gradients and moments are float32, also those of bfloat16 weights (adamw.py).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn

from minipeft.data.packing import Batch
from minipeft.documents import derive_seed
from minipeft.errors import InputError, check_fields, check_items, check_kind, check_value, format_value, option
from minipeft.models import Decoder
from minipeft.models.layout import check_rows
from minipeft.models.loss import count_targets
from minipeft.models.products import fast_products
from minipeft.training.adamw import update_all
from minipeft.training.gradients import released, wide_gradients
from minipeft.training.invariant import split_documents
from minipeft.training.processes import Processes, check_accumulation, check_processes, own_shard, sum_in_order

DECAYS = ("linear", "cosine", "constant")
LOWEST_RATE = 1e-12  # a lower learning rate changes no float32 weight of relevant size
DRAWING = threading.RLock()  # dropout draws from torch's global generator, which all threads share
STEPPING: WeakSet[nn.Module] = WeakSet()  # models in the middle of a step
ENTERING = threading.Lock()  # of STEPPING


class Batches(Protocol):
    """The batches of `train`: batch i for any i >= 0, the same on every call."""

    def __getitem__(self, i: int, /) -> Batch: ...


@dataclass(frozen=True)
class TrainConfig:
    """Training settings. `learning_rate` is the peak; `warmup` the share of the steps before it."""

    steps: int | None = option(None, "optimizer steps", least=1)  # None: not set yet; `train` needs a number
    learning_rate: float = option(3e-4, "peak learning rate of AdamW", above=0, aliases=("lr",))
    warmup: float = option(0.06, "share of the steps over which the learning rate rises to its peak", least=0, below=1)
    decay: str = option("linear", "learning-rate schedule after the warm-up, to zero at the last step", choices=DECAYS)
    accumulate: int = option(1, "batches per optimizer step (gradient accumulation)", least=1, limit=2**16)
    weight_decay: float = option(0.0, "weight decay of AdamW", least=0, below=1)
    beta1: float = option(0.9, "AdamW's beta1: decay rate of the first moment", least=0, below=1)
    beta2: float = option(0.99, "AdamW's beta2: decay rate of the second moment", least=0, below=1)
    eps: float = option(1e-8, "epsilon of AdamW", above=0)
    clip: float = option(1.0, "gradient clipping: largest norm of the gradient; 0 turns it off", least=0)
    lr_multipliers: Mapping[str, float] = option(
        factory=dict,
        help="learning-rate multiplier of the parameters whose name ends in NAME; lora_B=16 is LoRA+",
        above=0,
        flag="lr-multiplier",
    )
    seed: int = option(0, "seed of initialization, packing order and dropout", least=0, below=2**63)
    activation_checkpointing: bool = option(
        False,
        "save only each block's input and recompute the block in backward: less memory, more time",
        aliases=("checkpointing",),
    )
    optimizer_in_backward: bool = option(
        False,
        "update each tensor in backward and free its gradient at once: less memory; with gradient clipping every step "
        "runs forward and backward twice",
    )
    batch_invariant: bool = option(
        False,
        "compute each document alone: its loss and gradient have the same bits in any batch, row length and place; "
        "slower",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.optimizer_in_backward and self.accumulate > 1:
            problem = f"the gradients of {self.accumulate} micro-batches must be summed before the update"
            raise InputError(problem, where="optimizer_in_backward", hint="Give --accumulate 1 and a larger --batch")
        if self.optimizer_in_backward and self.batch_invariant:
            problem = "the gradients of the documents must be summed before the update"
            raise InputError(problem, where="optimizer_in_backward", hint="Leave out --batch-invariant")
        if self.learning_rate < LOWEST_RATE:
            problem = f"{self.learning_rate:g} trains nothing: it must be >= {LOWEST_RATE:g}"
            raise InputError(problem, where="learning_rate")

    @property
    def passes(self) -> int:
        """How often a step runs forward and backward."""
        return 2 if self.optimizer_in_backward and self.clip else 1


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """The learning rate of step 0, 1, ...: a linear warm-up, then the decay. Above 0 at every step."""
    assert config.steps is not None  # `train` refuses it
    climb = max(1, round(config.warmup * config.steps))
    if step < climb:
        return config.learning_rate * (step + 1) / climb
    left = (config.steps - step) / max(1, config.steps - climb)  # 1 .. > 0
    shape = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
    return config.learning_rate * shape[config.decay]


@dataclass(frozen=True)
class Step:
    """The results of one optimizer step."""

    number: int  # 1 after the first
    loss: float  # nats per supervised token
    learning_rate: float
    grad_norm: float  # of the gradient, before clipping
    tokens: int  # tokens without padding
    targets: int  # supervised tokens

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        rate, norm = f"learning rate {self.learning_rate:.3g}", f"gradient norm {self.grad_norm:.3g}"
        printer.text(f"Step({self.number}: loss {self.loss:.3f}, {rate}, {norm}, {self.tokens:,} tokens)")


class TrainState:
    """The training state besides the trainable tensors: the step count and AdamW's moments by parameter name."""

    def __init__(self, model: nn.Module):
        check_kind(model, nn.Module, "model")
        self.step = 0
        self.within_step = False  # an update of weights and moments has begun and not ended
        zeros = lambda: {n: torch.zeros_like(p, dtype=torch.float32) for n, p in trained(model).items()}
        self.exp_avg, self.exp_avg_sq = zeros(), zeros()

    def __repr__(self) -> str:
        return f"TrainState(step {self.step:,}, {len(self.exp_avg)} trained tensors)"


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, a tied one once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(
    model: Decoder,
    batches: Batches,
    config: TrainConfig,
    state: TrainState | None = None,
    processes: Processes | None = None,
    progress: bool = False,
) -> Iterator[Step]:
    """Train the parameters that require gradients, from `state.step` to `config.steps`; yields after each step.

    `processes` (processes.py): those that share each step's micro-batches; None: this one trains alone. All of them
    call `train` with the same arguments and get the same steps. `progress`: show a bar with the loss.

    If a step raises, the model's mode (train or eval) and activation checkpointing are restored. Trainings of two
    models in two threads alternate at each micro-batch, so that each draws the same dropout as alone.

    Raises:
        InputError: at the call: `config.steps` is None, nothing is trainable, a trained tensor is neither float32 nor
            bfloat16 (if sharded: not float32), gradients are off, `state` belongs to another model or was interrupted
            while it changed, or the processes do not suit the settings; in a step: a batch does not fit the model, a
            tensor of the model was cast, moved, frozen or replaced since the last step, a loss, gradient, weight or
            moment is not finite, a trained tensor gets no gradient, or another thread is in a step of this model.
    """
    for name, given, kind in (("model", model, Decoder), ("config", config, TrainConfig)):
        check_kind(given, kind, name)
    if not hasattr(batches, "__getitem__") or isinstance(batches, str | bytes | Mapping):
        raise InputError(f"{format_value(batches)} must be what pack returns, or a list of Batch", where="batches")
    check_value(progress, bool, {}, "progress")
    check_gradients_on(model, "train")
    if config.steps is None:
        raise InputError("must be set to train: it is None", where="steps", hint="TrainConfig(steps=...)")
    parameters, processes = trained(model), check_processes(processes)
    if not parameters:
        raise InputError("nothing is trainable", where="train", hint="add_adapter(model, ...) first")
    for name, p in parameters.items():
        if p.dtype not in (torch.float32, torch.bfloat16):
            problem = f"is {p.dtype}, but trained tensors must be float32 or bfloat16"
            raise InputError(problem, where=name, hint="Load the model with dtype=torch.float32")
        if p.dtype == torch.bfloat16 and processes.shards:
            problem = "is bfloat16, but weights that are sharded and trained must be float32"
            raise InputError(problem, where=name, hint="Load the model with dtype=torch.float32")
    state = TrainState(model) if state is None else state
    check_kind(state, TrainState, "state")
    shapes = {name: p.shape for name, p in parameters.items()}
    if {name: m.shape for name, m in state.exp_avg.items()} != shapes:
        raise InputError("holds the moments of other tensors than this model trains", where="state")
    if state.within_step:
        problem = f"step {state.step + 1} was interrupted while it changed weights and moments"
        raise InputError(problem, where="state", hint="Go on from a checkpoint")
    if config.optimizer_in_backward and (processes.size > 1 or processes.shards):
        raise InputError("takes one process, which holds whole weights", where="optimizer_in_backward")
    if config.batch_invariant and (processes.shards or not processes.exact):
        hint = "Give --reduce exact, without --shard"
        raise InputError("takes gradients that are summed in order", where="batch_invariant", hint=hint)
    check_accumulation(config.accumulate, processes)
    first, groups = state.step, group_by_multiplier(parameters, config)
    steps = take_steps(model, parameters, groups, batches, config, state, processes)
    return show_progress(steps, first, config.steps) if progress else steps


def show_progress(steps: Iterator[Step], first: int, last: int) -> Iterator[Step]:
    """Pass the steps on under a progress bar: a widget in a notebook that has ipywidgets, elsewhere text."""
    from tqdm.auto import tqdm  # in a notebook without ipywidgets the import warns

    with tqdm(total=last, initial=first, unit="step") as bar:
        for step in steps:
            bar.set_postfix(loss=f"{step.loss:.3f}", refresh=False)
            bar.update()
            yield step


def group_by_multiplier(parameters: dict[str, nn.Parameter], config: TrainConfig) -> dict[float, list[str]]:
    """Group the trained parameters by learning-rate multiplier; the first matching key of `lr_multipliers` applies.

    Raises:
        InputError: an entry of `lr_multipliers` names no trained tensor.
    """
    groups: dict[float, list[str]] = {}
    for key in config.lr_multipliers:
        if not any(name == key or name.endswith("." + key) for name in parameters):
            known = sorted({name.rsplit(".", 1)[-1] for name in parameters})
            raise InputError(f"no trained tensor is named {key!r}; there are {known}", where="lr_multipliers")
    for name in parameters:
        own = [by for key, by in config.lr_multipliers.items() if name == key or name.endswith("." + key)]
        groups.setdefault(own[0] if own else 1.0, []).append(name)
    return groups


def take_steps(
    model: Decoder,
    parameters: dict[str, nn.Parameter],
    groups: dict[float, list[str]],
    batches: Batches,
    config: TrainConfig,
    state: TrainState,
    processes: Processes,
) -> Iterator[Step]:
    """The generator behind `train`."""
    assert config.steps is not None
    was_training, was_checkpointing = model.training, model.activation_checkpointing
    silent = dict.fromkeys(parameters, 0)  # consecutive steps in which a tensor's gradient was zero
    before = describe_tensors(model)
    while state.step < config.steps:
        try:
            with claim_step(model, state.step):
                check_unchanged(before, describe_tensors(model), f"step {state.step + 1}")
                step = take_step(model, parameters, groups, batches, config, state, silent, processes)
        except BaseException:
            model.train(was_training)
            model.activation_checkpointing = was_checkpointing
            raise
        yield step


def check_gradients_on(model: nn.Module, where: str) -> None:
    """Check that autograd records gradients.

    Raises:
        InputError: within torch.no_grad or inference_mode, or with a model that was created in inference mode.
    """
    if not torch.is_grad_enabled():
        raise InputError("gradients are off: torch.no_grad or torch.inference_mode is in effect", where=where)
    for name, p in model.named_parameters():
        if p.is_inference():
            raise InputError(f"{name!r} was made within torch.inference_mode and cannot be trained", where=where)


Tensors = dict[str, tuple[int, torch.dtype, torch.device, bool]]  # of each parameter: id, dtype, device, trained


def describe_tensors(model: nn.Module) -> Tensors:
    """The properties of parameters that must not change between steps."""
    return {name: (id(p), p.dtype, p.device, p.requires_grad) for name, p in model.named_parameters()}


def check_unchanged(before: Tensors, now: Tensors, where: str) -> None:
    """Check that the caller has not changed the model's tensors between two steps.

    Raises:
        InputError: a parameter was cast, moved, frozen, made trainable, added, removed or replaced.
    """
    if before == now:
        return
    for name in before.keys() | now.keys():
        if name not in before or name not in now:
            raise InputError(f"{name!r} was {'added' if name in now else 'removed'} since the last step", where=where)
    for name, (held, dtype, device, trained) in now.items():
        was = before[name]
        if (dtype, device) != was[1:3]:
            old, new = (was[1], dtype) if dtype != was[1] else (was[2], device)
            raise InputError(f"{name!r} was {old} and is {new} since the last step", where=where)
        if trained != was[3]:
            raise InputError(
                f"{name!r} was {'made trainable' if trained else 'frozen'} since the last step", where=where
            )
        if held != was[0]:
            raise InputError(f"{name!r} is another tensor since the last step", where=where)


@contextmanager
def claim_step(model: nn.Module, step: int) -> Iterator[None]:
    """Context manager: mark the model as being in a step.

    Raises:
        InputError: another thread is in a step of this model.
    """
    with ENTERING:
        if model in STEPPING:
            raise InputError("another training of this model is within a step", where=f"step {step + 1}")
        STEPPING.add(model)
    try:
        yield
    finally:
        STEPPING.discard(model)


def check_batch(model: Decoder, batch: object, where: str) -> Batch:
    """Check that the model can be trained on a batch's rows.

    Raises:
        InputError: not a Batch; the rows are not integers of one shape, hold unknown ids, or are too long.
    """
    check_kind(batch, Batch, where)
    assert isinstance(batch, Batch)
    try:
        check_rows(model.config.vocab_size, batch.ids, batch.labels, batch.documents)
        model.check_context(batch.documents)
    except InputError as error:
        raise InputError(str(error), where=where) from error
    return batch


def take_batch(model: Decoder, batches: Batches, number: int, where: str) -> Batch:
    """Fetch and check batch `number`.

    Raises:
        InputError: it does not exist, or does not fit the model.
    """
    try:
        batch = batches[number]
    except (IndexError, KeyError) as error:
        raise InputError(f"there is no batch {number}", where=where) from error
    return check_batch(model, batch, where)


def take_step(
    model: Decoder,
    parameters: dict[str, nn.Parameter],
    groups: dict[float, list[str]],
    batches: Batches,
    config: TrainConfig,
    state: TrainState,
    silent: dict[str, int],
    processes: Processes,
) -> Step:
    """One optimizer step: the gradient of `accumulate` batches, the checks, AdamW."""
    where = f"step {state.step + 1}"
    check_gradients_on(model, where)
    model.train()
    model.activation_checkpointing = config.activation_checkpointing
    model.zero_grad(set_to_none=True)
    torch.clear_autocast_cache()  # a caller's torch.autocast would reuse its copies of step 0's weights
    first = state.step * config.accumulate
    micro = [take_batch(model, batches, first + i, where) for i in range(config.accumulate)]
    parts = [(batch, derive_seed(config.seed, state.step, i)) for i, batch in enumerate(micro)]
    if config.batch_invariant:
        documents = split_documents(micro, where)
        parts = [(one.batch, derive_seed(config.seed, state.step, *one.name)) for one in documents]
    targets = sum(count_targets(batch.labels) for batch, _ in parts)
    if not targets:
        raise InputError("no token of this step's batches is supervised", where=where)
    divisor = 1 if config.batch_invariant else targets

    def add_gradient(i: int) -> float:
        batch, seed = parts[i]
        return backward(model, batch, divisor, seed)

    rate = learning_rate_at(state.step, config)
    rates = {name: rate * multiplier for multiplier, names in groups.items() for name in names}
    with wide_gradients(parameters.values()):
        if config.optimizer_in_backward:
            loss, norm = update_in_backward(parameters, rates, config, state, silent, lambda: add_gradient(0))
        else:
            loss = processes.sum_gradients(parameters, len(parts), add_gradient)
            if config.batch_invariant:
                loss = divide_gradients(parameters, loss, targets)
            norm = check_norms(compute_gradient_norms(parameters, loss, state, processes), state, silent)
            state.within_step = True
            update_all(parameters, state, config, rates, norm)
            state.within_step = False
    state.step += 1
    check_finite(parameters, state, processes)
    tokens = sum(int((batch.documents >= 0).sum()) for batch in micro)
    return Step(state.step, loss, rate, norm, tokens, targets)


def divide_gradients(parameters: Mapping[str, nn.Parameter], loss: float, targets: int) -> float:
    """Divide the sum over a step's documents by the number of supervised tokens; returns the mean loss.

    Not before the sum: a document's part would depend on how many tokens the others have.
    """
    with torch.no_grad():
        torch._foreach_div_([p.grad for p in parameters.values() if p.grad is not None], float(targets))
    return loss / targets


def backward(model: Decoder, batch: Batch, targets: int, seed: int) -> float:
    """Add one micro-batch's part of the step's gradient; returns its part of the loss.

    Losses are summed over supervised tokens and divided by `targets`, the step's count, so that k micro-batches equal
    one of k; batch-invariant training passes 1 and divides later. Dropout is seeded with `seed`, also in backward,
    where recomputation draws again; the caller's random state is restored.
    """
    device = model.embedding.weight.device
    ids, labels, documents = (t.to(device) for t in (batch.ids, batch.labels, batch.documents))
    with DRAWING, fast_products(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        loss = model.loss(ids, labels, documents) / targets
        loss.backward()
    return loss.item()


def update_in_backward(
    parameters: dict[str, nn.Parameter],
    rates: Mapping[str, float],
    config: TrainConfig,
    state: TrainState,
    silent: dict[str, int],
    backward: Callable[[], float],
) -> tuple[float, float]:
    """Update each parameter as soon as `backward` has its gradient; returns the loss and the norm of the gradient."""
    norms: dict[str, Tensor] = {}

    def measure(name: str, p: nn.Parameter) -> None:
        assert p.grad is not None
        norms[name] = compute_norms([p.grad])[0]

    def apply(name: str, p: nn.Parameter) -> None:
        if not config.clip:  # not measured before; what is not finite is refused before it changes this parameter
            measure(name, p)
            check_norm(name, norms[name].item(), state)
        update_all({name: p}, state, config, rates, norm)

    def check(loss: float) -> float:
        check_reached(norms, parameters, loss, state)
        return check_norms({name: norms[name] for name in parameters}, state, silent)

    norm = 0.0
    if config.clip:
        with released(parameters, measure):
            loss = backward()
        norm = check(loss)
    state.within_step = True
    with released(parameters, apply):
        loss = backward()
    if not config.clip:
        norm = check(loss)
    state.within_step = False
    return loss, norm


def check_reached(reached: Container[str], parameters: Iterable[str], loss: float, state: TrainState) -> None:
    """Check that the loss is finite and that a gradient reached every parameter.

    Raises:
        InputError: the loss is not finite, or a parameter has no gradient.
    """
    where = f"step {state.step + 1}"
    if not math.isfinite(loss):
        raise InputError(f"the loss is {loss}", where=where, hint="Lower the learning rate or look at the data")
    for name in parameters:
        if name not in reached:
            raise InputError(f"no gradient reached {name!r}: it takes no part in the loss", where=where)


def compute_gradient_norms(
    parameters: Mapping[str, nn.Parameter], loss: float, state: TrainState, processes: Processes
) -> dict[str, Tensor]:
    """Compute the norm of each gradient.

    Raises:
        InputError: as `check_reached`.
    """
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    check_reached(gradients, parameters, loss, state)
    return dict(zip(gradients, processes.combine_norms(compute_norms(list(gradients.values())))))


def check_norms(norms: Mapping[str, Tensor], state: TrainState, silent: dict[str, int]) -> float:
    """Check that each gradient is finite and is not always zero, by its norm; returns the global norm.

    Raises:
        InputError: a gradient is not finite, or was zero in three steps.
    """
    stacked = torch.stack(list(norms.values()))  # [number of tensors]
    for name, norm in zip(norms, stacked.tolist()):
        check_norm(name, norm, state)
        silent[name] = silent[name] + 1 if norm == 0 else 0
        if silent[name] >= 3:  # LoRA's A has none at the first step: B is zero
            problem = f"the gradient of {name!r} was zero in three steps: it is not being trained"
            raise InputError(problem, where=f"step {state.step + 1}")
    return stacked.norm().item()


def check_norm(name: str, norm: float, state: TrainState) -> None:
    """Check that a gradient is finite, by its norm.

    Raises:
        InputError: it is not.
    """
    if not math.isfinite(norm):
        problem = f"the gradient of {name!r} is not finite"
        raise InputError(problem, where=f"step {state.step + 1}", hint="Lower the learning rate")


def compute_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of each tensor, or of this process's shard of it. [number of tensors]"""
    return torch.stack(torch._foreach_norm(own_shards(tensors), 2.0, torch.float32))


def compute_largest(tensors: Sequence[Tensor]) -> Tensor:
    """The largest absolute value of each tensor, or of this process's shard of it; NaN if it holds NaN.

    [number of tensors]
    """
    shards = own_shards(tensors)
    if shards[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(shards, math.inf, torch.float32))
    lows, highs = zip(*map(torch.aminmax, shards))  # torch's infinity norm takes sixteen times as long on a CPU
    return torch.maximum(-torch.stack(lows), torch.stack(highs)).float()


def own_shards(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This process's shard of each tensor; a zero in place of an empty one."""
    shards = [own_shard(t) for t in tensors]
    return [t if t.numel() else t.new_zeros(1) for t in shards]


def check_finite(parameters: Mapping[str, Tensor], state: TrainState, processes: Processes | None = None) -> None:
    """Check that no weight and no moment is NaN or Inf, by each tensor's largest value: one pass, no copy.

    Raises:
        InputError: names the tensor that is.
    """
    kinds: tuple[tuple[str, Mapping[str, Tensor]], ...] = (
        ("", parameters),
        ("exp_avg of ", state.exp_avg),
        ("exp_avg_sq of ", state.exp_avg_sq),
    )
    with torch.no_grad():
        for kind, tensors in kinds:
            largest = check_processes(processes).combine_norms(compute_largest(list(tensors.values())))
            if not torch.isfinite(largest).all():
                name = next(name for name, norm in zip(tensors, largest.tolist()) if not math.isfinite(norm))
                hint = "Lower the learning rate, and go on from the last checkpoint"
                raise InputError(f"{kind}{name!r} holds NaN or Inf", where=f"step {state.step}", hint=hint)


@torch.no_grad()
def evaluate(
    model: Decoder, batches: Sequence[Batch], processes: Processes | None = None, batch_invariant: bool = False
) -> float:
    """Compute the mean loss over `batches` in nats per supervised token, in eval mode; the model's mode is restored.

    `processes`: those that share the batches, and all get the loss. `batch_invariant`: each document alone, as in
    training (invariant.py).

    Raises:
        InputError: a batch does not fit the model, no token is supervised, or the loss is not finite.
    """
    check_kind(model, Decoder, "model")
    batches = check_items(batches, Batch, "batches")
    processes = check_processes(processes)
    was_training, device = model.training, model.embedding.weight.device
    for batch in batches:
        check_batch(model, batch, "evaluate")
    if batch_invariant:
        batches = [document.batch for document in split_documents(batches, "evaluate")]
    targets = sum(count_targets(batch.labels) for batch in batches)

    def compute(i: int) -> float:
        ids, labels, documents = (t.to(device) for t in (batches[i].ids, batches[i].labels, batches[i].documents))
        with fast_products():
            return model.loss(ids, labels, documents).item()

    model.eval()
    try:
        loss = sum_in_order(processes.compute(len(batches), compute))
    finally:
        model.train(was_training)
    if not targets:
        raise InputError("no token is supervised", where="evaluate")
    if not math.isfinite(loss):
        raise InputError(f"the held-out loss is {loss}", where="evaluate", hint="Lower the learning rate")
    return loss / targets
