"""(IA)3: its equation, packed as separate, and what its config refuses; its files are in test_peft_format.py."""

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


def test_packed_is_separate_and_cached_is_uncached(model, packed, separate, gradients, apart, stir, ids):
    add_adapter(model, IA3Config())
    stir(model)
    loss, together = gradients(model, [packed])
    alone, wanted = gradients(model, separate)
    assert loss == pytest.approx(alone, rel=1e-5)
    assert max(apart(together[name], wanted[name]) for name in wanted) <= 2e-5
    with torch.no_grad():
        cache = model.new_cache(2, 30)
        pieces = [model(ids[:, :12], cache=cache), *(model(ids[:, i : i + 1], cache=cache) for i in range(12, 30))]
        assert apart(torch.cat(pieces, dim=1), model(ids)) <= 1e-5


def test_what_a_config_refuses(decoder):
    with pytest.raises(InputError, match=r"targets: \(\) names no linear layer"):
        IA3Config(targets=[])
    with pytest.raises(InputError, match=r"feedforward: 'model.layers.0.mlp.up_proj' is not among the targets"):
        add_adapter(decoder("llama"), IA3Config(targets=["k_proj"], feedforward=["up_proj"]))
    with pytest.raises(InputError, match="no linear layer is named 'nope'"):
        add_adapter(decoder("llama"), IA3Config(targets=["nope"], feedforward=()))
