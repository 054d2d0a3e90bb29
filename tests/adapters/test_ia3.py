"""(IA)3: its equation, and what its config refuses; what every method has is in test_adapters.py."""

import pytest
import torch
import torch.nn.functional as F

from minipeft.adapters import IA3Config, add_adapter
from minipeft.adapters.ia3 import find_ia3_layers
from minipeft.errors import InputError


def test_each_site_computes_its_equation(model, stir):
    report = add_adapter(model, IA3Config())
    layers = find_ia3_layers(stir(model))
    assert list(layers) == report.modules
    assert {path.rsplit(".", 1)[-1] for path, layer in layers.items() if layer.feedforward} <= {"c_proj", "down_proj"}
    for layer in layers.values():
        x = torch.randn(2, 5, layer.weight.shape[1])
        if layer.feedforward:
            wanted = F.linear(x, layer.weight * layer.ia3_l, layer.bias)
        else:
            wanted = layer.ia3_l * F.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)


def test_what_a_config_refuses(decoder):
    with pytest.raises(InputError, match=r"targets: \(\) names no linear layer"):
        IA3Config(targets=[])
    with pytest.raises(InputError, match=r"feedforward: 'model.layers.0.mlp.up_proj' is not among the targets"):
        add_adapter(decoder("llama"), IA3Config(targets=["k_proj"], feedforward=["up_proj"]))
    with pytest.raises(InputError, match="no linear layer is named 'nope'"):
        add_adapter(decoder("llama"), IA3Config(targets=["nope"], feedforward=()))
