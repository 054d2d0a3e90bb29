"""Data parallel training on torch.distributed: exact and fast sums of gradients, agreement, and lost processes.

Addition in floating point depends on its order: DDP's all-reduce gives other bits on 2 processes than on 1. One
process adds the gradients v_0 ... v_{K-1} of a step's micro-batches in their order, and so does the exact sum here.
Micro-batch k is rank k mod W's; in each round of W micro-batches every rank sends to rank s the s-th slice of its
gradient, and rank s adds what it gets to its part of the sum:

    rank 0   v_0 = [ a0 | b0 ]      all-to-all     part a = ((a0 + a1) + a2) + a3     all-gather
    rank 1   v_1 = [ a1 | b1 ]    ------------->   part b = ((b0 + b1) + b2) + b3   ------------>  [ a | b ] everywhere

With K = W that is the traffic of one all-reduce, 2 n (W - 1) / W numbers for n parameters; each further round adds
n (W - 1) / W. The fast sum is one all-reduce a step, in buckets that travel while backward still runs.

A collective that fails names the process that is missing (watch.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.models import Decoder
from minipeft.training.gradients import Buckets, flatten, unflatten
from minipeft.training.processes import ParallelConfig, sum_in_order
from minipeft.training.watch import LostProcess, Watch, first_line

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # of a collective whose processes all live


class Group:
    """The processes that torchrun started, as one of them sees them (processes.py says what each method does)."""

    def __init__(self, config: ParallelConfig, rank: int, size: int):
        self.config, self.rank, self.size = config, rank, size
        self.exact, self.shards = config.reduce == "exact", config.shard
        self.full = False  # whether the sharded base is trained

    def __enter__(self) -> Group:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise LostProcess(f"rank {self.rank} cannot join the others at {place}: {first_line(error)}") from error
        store = dist.distributed_c10d._get_default_store()
        self.watch = Watch(store, self.rank, self.size, self.config.lost_after)
        with self.watch.naming():
            dist.barrier()
        self.watch.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                with self.watch.naming():
                    dist.barrier()  # nobody leaves before all are done: a process that left would count as lost
        finally:
            self.watch.done.set()
        if kind is None:
            dist.destroy_process_group()

    def sum_gradients(
        self, parameters: Mapping[str, nn.Parameter], count: int, backward: Callable[[int], float]
    ) -> float:
        add = self.sum_shards if self.full else self.sum_exactly if self.exact else self.sum_fast
        with self.watch.naming() if self.shards else nullcontext():  # backward runs collectives, of sharded weights
            losses = add(list(parameters.values()), count, backward)
        return sum_in_order(self.collect(losses, count))

    def sum_exactly(self, parameters: list[nn.Parameter], count: int, backward: Callable[[int], float]) -> list[float]:
        """The exact sum; returns the losses of this rank's micro-batches. -0.0 is what changes no bit when added."""
        width = sum(p.numel() for p in parameters) + len(parameters)
        slice_width = -(-width // self.size)
        part = torch.full((slice_width,), -0.0, device=parameters[0].device)
        losses = []
        for first in range(0, count, self.size):
            for p in parameters:
                p.grad = None
            sent = torch.full((self.size * slice_width,), -0.0, device=part.device)
            if first + self.rank < count:
                losses.append(backward(first + self.rank))
                flatten(parameters, sent)
            received = torch.empty_like(sent)
            with self.watch.naming():
                dist.all_to_all_single(received, sent)
            for row in received.view(self.size, slice_width):  # of rank 0, 1, ...: of micro-batch first, first + 1, ...
                part += row
        unflatten(self.gather(part).flatten(), parameters)
        return losses

    def sum_fast(self, parameters: list[nn.Parameter], count: int, backward: Callable[[int], float]) -> list[float]:
        """The fast sum: a bucket of gradients leaves as soon as the last backward has computed them."""
        *early, last = range(self.rank, count, self.size)
        losses = [backward(number) for number in early]
        buckets = Buckets(parameters)
        with buckets.hooked():
            losses.append(backward(last))
        with self.watch.naming():
            buckets.finish()
        return losses

    def sum_shards(self, parameters: list[nn.Parameter], count: int, backward: Callable[[int], float]) -> list[float]:
        """The sum that FSDP makes: after each backward every rank adds the sum of its shard over all ranks."""
        return [backward(number) for number in range(self.rank, count, self.size)]

    def compute(self, count: int, function: Callable[[int], float]) -> list[float]:
        own = range(self.rank, count, self.size)
        rounds = -(-count // self.size) if self.shards else len(own)  # with sharded weights all take part in each
        with self.watch.naming() if self.shards else nullcontext():
            values = [function(min(self.rank + i * self.size, count - 1)) for i in range(rounds)]
        return self.collect(values[: len(own)], count)

    def collect(self, own: Sequence[float], count: int) -> list[float]:
        """The values of all ranks in the order of their numbers, where `own` are those of rank, rank + W, ..."""
        sent = torch.zeros(-(-count // self.size), dtype=torch.float64)
        sent[: len(own)] = torch.tensor(own, dtype=torch.float64)
        values: list[float] = self.gather(sent).t().flatten()[:count].tolist()
        return values

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks. [n] -> [W, n]"""
        rows = torch.empty((self.size, len(tensor)), dtype=tensor.dtype, device=tensor.device)  # [W, n]
        with self.watch.naming():
            dist.all_gather(list(rows), tensor)
        return rows

    def lead(self, action: Callable[[], T]) -> T:
        outcome: dict[str, Any] = {}
        error = None
        if self.rank == 0:
            try:
                outcome = {"value": action()}
            except InputError as raised:
                outcome, error = {"error": str(raised)}, raised
        if self.rank == 0 and outcome.get("value", "") is None:
            outcome = {}  # the usual case: one message of eight bytes
        outcome = self.tell(outcome)
        if error is not None or "error" in outcome:
            raise error or InputError(outcome["error"])
        return cast(T, outcome.get("value"))

    def tell(self, said: dict[str, Any]) -> dict[str, Any]:
        """What rank 0 says; an empty object has no second message."""
        text = to_bytes(said) if said else torch.empty(0)
        size = torch.tensor([len(text)])
        with self.watch.naming():
            dist.broadcast(size, 0)
            if not size.item():
                return {}
            text = text if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(text, 0)
        heard: dict[str, Any] = from_bytes(text)
        return heard

    def exchange(self, value: T) -> list[T]:
        said = to_bytes(value)
        sizes = self.gather(torch.tensor([len(said)])).flatten().tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(said)] = said
        return [from_bytes(row[:size]) for row, size in zip(self.gather(padded), sizes)]

    def agree(self, number: int) -> int:
        given = torch.tensor([number])
        with self.watch.naming():
            dist.all_reduce(given, dist.ReduceOp.MAX)
        return int(given)

    def share(self, tensors: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
        from minipeft.training.sharding import receive_shard

        with self.watch.naming(), torch.no_grad():
            for name in sorted(tensors):
                receive_shard(tensors[name], whole[name].detach())

    def gather_whole(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        from minipeft.training.sharding import gather_whole

        with self.watch.naming():
            return gather_whole(tensors) if self.full else tensors

    def combine_norms(self, norms: Tensor) -> Tensor:
        if not self.full:
            return norms
        squares = norms.double().square()  # NaN and Inf stay what they are
        with self.watch.naming():
            dist.all_reduce(squares)
        return squares.sqrt().to(norms.dtype)

    def shard(self, model: Decoder, device: str) -> None:
        if self.shards:
            from minipeft.training.sharding import shard_model

            with self.watch.naming():
                self.full = shard_model(model, torch.device(device))


def to_bytes(value: object) -> Tensor:
    """A value of JSON as a tensor: pickle, which torch's own functions for objects use, would run what it is sent."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def from_bytes(text: Tensor) -> Any:
    """The value that `to_bytes` wrote."""
    return json.loads(text.numpy().tobytes())
