"""A base whose frozen weights are sharded over the processes (FSDP2); the adapter stays whole on each of them.

    rank 0     W[0:n/2]   adapter         Before a block runs, its weights are gathered, and after it dropped again.
    rank 1     W[n/2:n]   adapter         Nothing of them is summed: a frozen weight has no gradient.

The gathered weights have the bits that were loaded, so a step has the bits of an unsharded one. Rank 0 alone loads the
model and adds the adapter; the others build both without values (meta) and get one block at a time, of which each keeps
its shard. So no rank but 0 ever holds more than its shards and one block; rank 0 holds the loaded files too, which are
memory-mapped where no dtype changes.

Source: Zhao et al. 2023; torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from minipeft.models import Decoder


def shard_base(model: Decoder, device: torch.device) -> None:
    """Send rank 0's base and adapter to all, and keep of the base this rank's shards alone. Every rank calls it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for t in [*trained, *model.buffers()]:
        receive(t, device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for unit in [*model.blocks, model]:
        for p in unit.parameters():
            if not p.requires_grad and not is_sharded(p):
                receive(p, device)
        fully_shard(unit, mesh=mesh, ignored_params=set(trained), reshard_after_forward=True)
    register_fsdp_forward_method(model, "loss")  # the forward pass of training, which FSDP's hooks surround
    for module in model.modules():
        if callable(bind := getattr(module, "bind", None)):  # an adapter's module chooses its kernels by the device
            bind()


def is_sharded(p: Tensor) -> bool:
    """Whether a parameter is a shard already, that of a block."""
    return isinstance(p, dist.tensor.DTensor)


def receive(tensor: Tensor, device: torch.device) -> None:
    """Fill a tensor with rank 0's values; one without values is first given memory, as the same object."""
    if tensor.is_meta:
        empty: Any = torch.empty_like(tensor, device=device)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        torch.utils.swap_tensors(tensor, empty)
    whole = tensor.detach().contiguous()
    dist.broadcast(whole, 0)
    if whole.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(whole)
