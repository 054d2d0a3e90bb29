"""Merging in the weight's dtype: its report, what it refuses, and that each weight is computed once."""

import math

import pytest
import torch

import minipeft
from minipeft.adapters import IA3Config, LoRAConfig, add_adapter
from minipeft.adapters.ia3 import find_ia3_layers
from minipeft.adapters.lora import find_lora_layers
from minipeft.errors import InputError


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", [LoRAConfig(rank=2), IA3Config()], ids=["lora", "ia3"])
def test_a_merge_that_overflows_the_weights_dtype_touches_nothing(model, dtype, config):
    """65504 is float16's largest; bfloat16's, 3.39e38, is below float32's 3.40e38."""
    add_adapter(model.to(dtype), config)
    with torch.no_grad():
        if isinstance(config, LoRAConfig):
            last = list(find_lora_layers(model).values())[-1]
            last.weight.zero_()
            largest = 7e4 if dtype == torch.float16 else 3.4e38
            last.lora_A.fill_(math.sqrt(largest / (2 * last.scale)))
            last.lora_B.fill_(math.sqrt(largest / (2 * last.scale)))
        else:
            last = list(find_ia3_layers(model).values())[-1]
            last.weight.fill_(1.0)
            last.ia3_l.fill_(7e4 if dtype == torch.float16 else 3.4e38)
        assert torch.isfinite(last.merged()[0]).all()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(InputError, match=r"cannot merge into '.*': the merged weight would not be finite"):
        minipeft.merge_adapter(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [LoRAConfig(rank=4, alpha=8.0), IA3Config()], ids=["lora", "ia3"])
def test_the_report_is_that_of_float64(model, stir, dtype, config):
    """The update that each equation asks for, in float64, against the change that the weights really show."""
    add_adapter(model.to(dtype), config)
    stir(model, scale=0.02)
    wanted = {}
    for path, layer in find_lora_layers(model).items():
        update = layer.scale * (layer.lora_B.double() @ layer.lora_A.double())
        wanted[f"{path}.weight"] = update
    for path, layer in find_ia3_layers(model).items():
        gain = layer.ia3_l.double() - 1
        wanted[f"{path}.weight"] = layer.weight.double() * (gain if layer.feedforward else gain[:, None])
        if layer.bias is not None and not layer.feedforward:
            wanted[f"{path}.bias"] = layer.bias.double() * gain
    before = {name: model.get_parameter(name).detach().double() for name in wanted}
    report = minipeft.merge_adapter(model)
    changes = {name: model.get_parameter(name).detach().double() - before[name] for name in wanted}
    missed = sum((changes[name] - wanted[name]).square().sum() for name in wanted)
    error = float((missed / sum(update.square().sum() for update in wanted.values())).sqrt().detach())
    assert report.largest_change == pytest.approx(max(float(c.abs().max()) for c in changes.values()), rel=1e-6)
    if dtype == torch.float32:  # the sum's roundings (2^-24 of weights fifty times the update), which a report in
        assert error < 1e-5  # float32 cannot see
        assert report.relative_error < 1e-6
    else:  # 2^-8 or 2^-11 of weights that are ten times the update
        assert error > 1e-3
        assert report.relative_error == pytest.approx(error, rel=1e-3)


def test_each_merged_weight_is_computed_twice(decoder, monkeypatch):
    """Once for the check, once for the write; all are checked before the first is written."""
    model = decoder("llama")
    add_adapter(model, LoRAConfig(rank=2))
    kind = type(next(iter(find_lora_layers(model).values())))
    calls, merged = [], kind.merged
    monkeypatch.setattr(kind, "merged", lambda self: calls.append(id(self)) or merged(self))
    minipeft.merge_adapter(model)
    assert len(set(calls)) == 21
    assert calls == [*dict.fromkeys(calls)] * 2
