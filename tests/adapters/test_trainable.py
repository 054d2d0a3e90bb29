"""The one `_apply`: an adapter's own tensors keep float32 through casts and follow moves; a base's are cast with it."""

import torch
from torch import nn

from minipeft.adapters.trainable import TrainableModule


class Inner(TrainableModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1 / 3]))


class Outer(TrainableModule):
    """Stands in a linear's place: `weight` and `bias` are the base's."""

    adopts_linear = True
    bound = 0

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.tensor([1 / 3])), None
        self.own = nn.Parameter(torch.tensor([1 / 3]))
        self.register_buffer("fixed", torch.tensor([1 / 3]))
        self.register_buffer("empty", None)
        self.inner = Inner()
        self.plain = nn.Linear(1, 1)

    def bind(self) -> None:
        self.bound += 1


def test_what_the_adapter_brought_stays_float32_to_the_bit():
    module = Outer()
    kept = {name: t.clone() for name, t in module.state_dict().items()}
    for cast in (module.half, module.double, lambda: module.to(torch.bfloat16)):
        cast()
        dtypes = {name: t.dtype for name, t in module.state_dict().items()}
        own = {"own", "fixed", "inner.weight"}
        assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == own
        assert all(torch.equal(module.state_dict()[name], kept[name]) for name in own)
    assert set(module.own_tensors()) == {"own", "fixed"}
    assert set(module.inner.own_tensors()) == {"weight"}


def test_what_depends_on_the_device_is_chosen_again_after_a_move():
    module = Outer()
    module.to("meta")
    assert module.own.device.type == module.inner.weight.device.type == "meta"
    assert module.bound == 1
