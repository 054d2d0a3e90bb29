"""VeRA: its equation, PEFT's gradients and projections; what every method has is in test_adapters.py."""

import warnings

import peft
import pytest
import torch
import transformers

from minipeft.adapters import LoRAConfig, VeRAConfig, add_adapter
from minipeft.adapters.vera import find_vera_layers
from minipeft.errors import InputError

transformers.logging.set_verbosity_error()
warnings.filterwarnings("ignore", module="peft")
CONFIG = VeRAConfig(rank=8, targets="all-linear")


def test_each_site_computes_its_equation_with_its_part_of_the_shared_pair(model, stir):
    add_adapter(model, CONFIG)
    stir(model)
    layers = find_vera_layers(model)
    projection = next(iter(layers.values())).projection
    assert all(layer.projection is projection for layer in layers.values())
    assert projection.A.shape[1] == max(layer.weight.shape[1] for layer in layers.values())
    assert projection.B.shape[0] == max(layer.weight.shape[0] for layer in layers.values())
    for layer in layers.values():
        out, width = layer.weight.shape
        A, B, b, d = (t.double() for t in (projection.A, projection.B, layer.vera_lambda_b, layer.vera_lambda_d))
        W = layer.weight.double() + torch.diag(b) @ B[:out] @ torch.diag(d) @ A[:, :width]
        x = torch.randn(2, 3, width)
        wanted = x.double() @ W.T + (0 if layer.bias is None else layer.bias.double())
        torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", ["default", "all-linear"])
def test_projections_and_gradients_are_pefts(model, family, ids, apart, stir, targets, twin):
    given = {} if targets == "default" else {"target_modules": targets}
    theirs = peft.get_peft_model(
        twin(model), peft.VeraConfig(task_type="CAUSAL_LM", r=8, projection_prng_key=3, **given)
    )
    add_adapter(model, VeRAConfig(8, targets=targets, projection_prng_key=3))
    stir(model)
    modules = dict(theirs.named_modules())
    twins = {path: modules[f"base_model.model.{path}"] for path in find_vera_layers(model)}
    for path, layer in find_vera_layers(model).items():
        assert torch.equal(layer.projection.A, twins[path].vera_A["default"])
        assert torch.equal(layer.projection.B, twins[path].vera_B["default"])
        with torch.no_grad():
            for name in ("vera_lambda_b", "vera_lambda_d"):
                getattr(twins[path], name)["default"].copy_(getattr(layer, name))
    mine, wanted = model(ids), theirs(ids).logits
    assert apart(mine, wanted) <= 1e-5
    mine.logsumexp(dim=-1).sum().backward()
    wanted.logsumexp(dim=-1).sum().backward()
    for path, layer in find_vera_layers(model).items():
        for name in ("vera_lambda_b", "vera_lambda_d"):
            assert apart(getattr(layer, name).grad, getattr(twins[path], name)["default"].grad) <= 2e-4, (path, name)


def test_the_seed_of_the_projection_decides_and_nothing_else(decoder):
    made = []
    for key, seed in ((0, 0), (0, 1), (1, 0)):
        model = decoder("llama")
        add_adapter(model, VeRAConfig(8, projection_prng_key=key), seed=seed)
        made.append(next(iter(find_vera_layers(model).values())).projection.A)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_it_trains_fewer_parameters_than_lora_of_rank_one(decoder):
    count = lambda config: add_adapter(decoder("gpt2").to("meta"), config).trainable
    assert count(VeRAConfig(8, targets="default")) == 3 * (96 + 8)
    assert count(VeRAConfig(8, targets="default")) < count(LoRAConfig(1, targets="default"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rank": 0}, "rank: 0 must be an integer >= 1"),
        ({"dropout": 1.0}, r"dropout: 1.0 must be in \[0, 1\)"),
        ({"projection_prng_key": -1}, "projection_prng_key: -1 must be an integer >= 0"),
        ({"save_projection": 1}, "save_projection: 1 must be true or false"),
        ({"targets": ()}, r"targets: \(\) names no linear layer"),
        ({"layers": ()}, r"layers: \(\) must be a list of block numbers"),
    ],
)
def test_what_a_config_refuses(given, said):
    with pytest.raises(InputError, match=said):
        VeRAConfig(**given)
