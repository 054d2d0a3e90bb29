"""A model whose weights are sharded over the processes (FSDP2); an adapter stays whole on each of them.

    rank 0     W[0:n/2]   adapter         Before a block runs, its weights are gathered, and after it dropped again.
    rank 1     W[n/2:n]   adapter         Nothing of them is summed: a frozen weight has no gradient.

The gathered weights have the bits that were loaded, so a step has the bits of an unsharded one. Rank 0 alone loads the
model and adds the adapter; the others build both without values (meta) and get one block at a time, of which each keeps
its shard. So no rank but 0 ever holds more than its shards and one block; rank 0 holds the loaded files too, which are
memory-mapped where no dtype changes.

With full tuning all weights are sharded, and their float32 masters, gradients and moments with them: each rank gets the
sum of its shard's gradients (reduce-scatter) and updates it. Checkpoints and the saved model are gathered on rank 0.

Source: Zhao et al. 2023; torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from minipeft.models import Decoder


def shard_model(model: Decoder, device: torch.device) -> bool:
    """Send rank 0's model to all, and keep of its base this rank's shards alone; returns whether the base is trained.

    Every rank calls it.
    """
    full = all(p.requires_grad for p in model.parameters())
    whole = [p for p in model.parameters() if p.requires_grad and not full]  # of the adapter
    for t in [*whole, *model.buffers()]:
        receive(t)
        t.data = t.data.to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for unit in [*model.blocks, model]:
        for p in unit.parameters():
            if not is_sharded(p) and (full or not p.requires_grad):
                receive(p)  # in host memory; fully_shard moves the shard
        fully_shard(unit, mesh=mesh, ignored_params=set(whole), reshard_after_forward=True)
        unit.set_gradient_divide_factor(1.0)  # a sum: the loss is divided by the supervised tokens of all ranks
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    register_fsdp_forward_method(model, "loss")  # the forward pass of training, which FSDP's hooks surround
    for module in model.modules():
        if callable(bind := getattr(module, "bind", None)):  # an adapter's module chooses its kernels by the device
            bind()
    return full


def is_sharded(p: Tensor) -> bool:
    """Whether a parameter is a shard already, that of a block."""
    return isinstance(p, DTensor)


def receive(tensor: Tensor) -> None:
    """Fill a tensor in host memory with rank 0's values; one without values is first given memory, in place."""
    if tensor.is_meta:
        empty: Any = torch.empty_like(tensor, device="cpu")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        torch.utils.swap_tensors(tensor, empty)
    whole = tensor.detach().contiguous()
    dist.broadcast(whole, 0)
    if whole.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(whole)


def receive_shard(shard: Tensor, whole: Tensor) -> None:
    """Fill a tensor, or this rank's shard of it, from rank 0's whole one; that of another rank may have no values."""
    if whole.is_meta:
        whole = torch.empty_like(whole, device="cpu")
    dist.broadcast(whole, 0)
    if isinstance(shard, DTensor):
        rank, own = dist.get_rank(), shard.to_local()
        parts = whole.chunk(dist.get_world_size())  # as fully_shard cuts: by rows, the last ranks may have none
        whole = parts[rank] if rank < len(parts) else whole[:0]
        shard = own
    shard.detach().copy_(whole)


def gather_whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors in rank 0's host memory, one at a time from all; an empty dict on the others."""
    held = {}
    for name in sorted(tensors):
        t = tensors[name].detach()
        whole = t.full_tensor() if isinstance(t, DTensor) else t
        if dist.get_rank() == 0:
            held[name] = whole.cpu()
    return held
