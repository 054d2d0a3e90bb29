"""The interface of the processes that share a training, and its implementation for a single process.

Data parallel training: each of W processes (rank 0 ... W - 1) holds the whole model and computes the gradients of
every W-th micro-batch of a step; the sums reach all of them, and all take the same optimizer step. Rank 0 alone reads
and writes the run's folder. Several processes are distributed.py's; torchrun starts them (launch.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor, nn

from minipeft.errors import InputError, check_fields, check_methods, option
from minipeft.models import Decoder

T = TypeVar("T")
REDUCES = ("exact", "fast")


@dataclass(frozen=True)
class ParallelConfig:
    """Settings of a training on several processes; a process that trains alone ignores them."""

    reduce: str = option(
        "exact", "how processes sum gradients: exact (the bits of one process) or fast (within 1e-6)", choices=REDUCES
    )
    shard: bool = option(False, "shard the base over the processes (FSDP2): each holds 1 / N of its weights")
    lost_after: float = option(20.0, "seconds without a sign of life after which a process counts as lost", least=1)

    def __post_init__(self) -> None:
        check_fields(self)


class Processes(Protocol):
    """The interface between the training loop and the processes that share a training."""

    rank: int
    size: int
    exact: bool  # whether gradients are summed in the order of one process
    shards: bool  # whether the base is sharded: then every forward pass needs all processes

    def sum_gradients(
        self, parameters: Mapping[str, nn.Parameter], count: int, backward: Callable[[int], float]
    ) -> float:
        """Set each `.grad` to the sum over `backward(0)` ... `backward(count - 1)`; returns the sum of their losses."""

    def compute(self, count: int, function: Callable[[int], float]) -> list[float]:
        """[function(0), ..., function(count - 1)], each computed by one process."""

    def lead(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 alone; every process returns its value (JSON) or raises its InputError."""

    def exchange(self, value: T) -> list[T]:
        """Gather a JSON value from every process, in rank order."""

    def agree(self, number: int) -> int:
        """Return the largest number that any process passes."""

    def share(self, tensors: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
        """Copy rank 0's `whole` tensors into `tensors`, of a sharded one each its shard."""

    def gather_whole(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The whole tensors, if they are sharded on rank 0 alone."""

    def combine_norms(self, norms: Tensor) -> Tensor:
        """The norms of whole tensors from those of this process's shards."""

    def shard(self, model: Decoder, device: str) -> None:
        """Send rank 0's model to the others, and keep of its base this process's shards (sharding.py)."""


class Alone:
    """A single process, which trains alone."""

    rank, size, exact, shards = 0, 1, True, False

    def sum_gradients(
        self, parameters: Mapping[str, nn.Parameter], count: int, backward: Callable[[int], float]
    ) -> float:
        """autograd adds each micro-batch's gradient to `.grad` in their order."""
        return sum_in_order([backward(number) for number in range(count)])

    def compute(self, count: int, function: Callable[[int], float]) -> list[float]:
        return [function(number) for number in range(count)]

    def lead(self, action: Callable[[], T]) -> T:
        return action()

    def exchange(self, value: T) -> list[T]:
        return [value]

    def agree(self, number: int) -> int:
        return number

    def share(self, tensors: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
        pass

    def gather_whole(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return tensors

    def combine_norms(self, norms: Tensor) -> Tensor:
        return norms

    def shard(self, model: Decoder, device: str) -> None:
        pass


def own_shard(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor; another tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def sum_in_order(values: Sequence[float]) -> float:
    """The sum from the first to the last; Python's `sum` compensates rounding since 3.12, which gives other bits."""
    total = 0.0
    for value in values:
        total += value
    return total


def check_processes(processes: Processes | None) -> Processes:
    """The processes of a training; without any, this one alone.

    Raises:
        InputError: the argument is something else.
    """
    if processes is None:
        return Alone()
    check_methods(processes, ("rank", "size", "sum_gradients", "compute"), "Processes", "processes")
    return processes


def check_accumulation(accumulate: int, processes: Processes) -> None:
    """Check that each process has a micro-batch in every step, and with sharded weights as many as the others.

    Raises:
        InputError: there are more processes than micro-batches, or the number of these is no multiple.
    """
    size = processes.size
    if accumulate < size:
        hint = f"Give --accumulate {size} with a smaller --batch, or start {accumulate} processes"
        problem = f"{accumulate} micro-batches a step leave {size - accumulate} of {size} processes without any"
        raise InputError(problem, where="accumulate", hint=hint)
    if processes.shards and accumulate % size:
        problem = f"{accumulate} is no multiple of {size} processes, which run sharded weights together"
        raise InputError(problem, where="accumulate", hint=f"Give --accumulate {accumulate // size * size}")
