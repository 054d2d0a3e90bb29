"""A toy method in one file and one record: a trained vector added to the output of each targeted linear."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minipeft.adapters.method import Method, PeftFormat, Recipe
from minipeft.adapters.surgery import merge, replace, restore
from minipeft.adapters.targets import Targets, check_targets, find_targets
from minipeft.adapters.trainable import TrainableModule
from minipeft.errors import check_fields, option
from minipeft.models.products import linear as base_product

ROOT = "base_model.model."


@dataclass(frozen=True)
class ShiftConfig:
    """Where to shift."""

    targets: Targets = option("default", "linears to shift")
    shift_init: float = option(0.0, "initial shift, the toy's own option")

    def __post_init__(self) -> None:
        check_fields(self)
        check_targets(self)


class ShiftLinear(TrainableModule):
    """y = x W^T + b + shift"""

    adopts_linear = True

    def __init__(self, linear: nn.Linear, start: float):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.shift = nn.Parameter(torch.full(linear.weight.shape[:1], start, device=linear.weight.device))  # [out]

    def forward(self, x: Tensor) -> Tensor:
        return base_product(x, self.weight, self.bias) + self.shift.to(x.dtype)  # [B, T, out]

    def merged(self) -> tuple[Tensor, Tensor | None]:
        return self.weight.float(), self.shift if self.bias is None else self.bias.float() + self.shift


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, ShiftLinear)}


def paths_of(model, config):
    return find_targets(model, config.targets, model.family.default_targets["lora"], None)


def add(model, config, tokenizer, generator):
    paths = paths_of(model, config)
    for path in paths:
        replace(model, path, ShiftLinear(model.get_submodule(path), config.shift_init))
    return paths


def fill(model, tensors, folder):
    with torch.no_grad():
        for path, layer in layers(model).items():
            layer.shift.copy_(tensors[f"{ROOT}{path}.shift"])


FORMAT = PeftFormat(
    types=("TOY_SHIFT",),
    to_json=lambda config, model: {"peft_type": "TOY_SHIFT", "target_modules": config.targets},
    from_json=lambda given: ShiftConfig(given["target_modules"]),
    shapes=lambda model, config: {
        f"{ROOT}{path}.shift": (model.get_parameter(f"{path}.weight").shape[0],) for path in paths_of(model, config)
    },
    tensors=lambda model: {f"{ROOT}{path}.shift": layer.shift for path, layer in layers(model).items()},
    fill=fill,
    known=frozenset({"target_modules"}),
)
METHOD = Method(
    name="toy",
    label="toy shift",
    config=ShiftConfig,
    add=add,
    remove=lambda model: restore(model, layers(model)),
    recipe=lambda config, parameters, family: Recipe(1e-2, source="a toy"),
    merge=lambda model: merge(model, layers(model)),
    peft=FORMAT,
)
