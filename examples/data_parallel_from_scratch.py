"""Data parallel training on one page: 1, 2 and 4 processes train the same weights, to the last bit.

    python examples/data_parallel_from_scratch.py        # some seconds on a CPU

A step is 8 micro-batches. (a + b) + c is not a + (b + c) in floating point, so the all-reduce, which adds each
process's own sum, has other bits than one process. The exact sum adds the gradients of the micro-batches in the order
of one process. minipeft/training/distributed.py does the same for any adapter, and sends less: a slice to each process.
"""

import hashlib
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

STEPS, MICRO_BATCHES, RATE = 20, 8, 0.1


def gradient(model: nn.Module, step: int, k: int) -> Tensor:
    """The gradient of micro-batch k of a step, as one flat vector v_k; data and dropout depend on (step, k) alone."""
    torch.manual_seed(1000 * step + k)
    x = torch.randn(16, 8)  # [B, C]
    loss = F.mse_loss(model(x), x.flip(1)) / MICRO_BATCHES
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])  # [n]


def exact_sum(model: nn.Module, step: int, rank: int, size: int) -> Tensor:
    """((v_0 + v_1) + v_2) + ...: micro-batch k is that of rank k mod W; in each round all ranks get W vectors."""
    total = None
    for first in range(0, MICRO_BATCHES, size):
        vectors = [torch.empty(sum(p.numel() for p in model.parameters())) for _ in range(size)]
        dist.all_gather(vectors, gradient(model, step, first + rank))
        for v in vectors:
            total = v if total is None else total + v
    return total


def fast_sum(model: nn.Module, step: int, rank: int, size: int) -> Tensor:
    """(v_0 + v_2 + ...) + (v_1 + v_3 + ...): each rank adds its own, then one all-reduce, as DDP does."""
    total = sum(gradient(model, step, k) for k in range(rank, MICRO_BATCHES, size))
    dist.all_reduce(total)
    return total


def train(rank: int, size: int, add: str, folder: str) -> None:
    """One process: the same model on each, and each takes the same step with the whole gradient."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 8))
    for step in range(STEPS):
        total = globals()[add](model, step, rank, size)
        with torch.no_grad():
            for p, g in zip(model.parameters(), total.split([p.numel() for p in model.parameters()])):
                p -= RATE * g.view_as(p)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    if rank == 0:
        digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:12]
        print(f"{size} processes, {add}: weights {digest}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    for add in ("exact_sum", "fast_sum"):
        for size in (1, 2, 4):
            with tempfile.TemporaryDirectory() as folder:
                mp.start_processes(train, (size, add, folder), nprocs=size, start_method="fork")
