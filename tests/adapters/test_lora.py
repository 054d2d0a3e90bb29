"""LoRA and its variants against their equations written out; packing, padding and the cache."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minipeft.adapters import LoRAConfig, add_adapter
from minipeft.adapters.lora import LoRALinear, find_lora_layers
from minipeft.adapters.lora_variants import choose_layer_class
from minipeft.errors import InputError
from minipeft.training.loop import TrainConfig, TrainState, train

CONFIGS = {
    "plain": LoRAConfig(rank=4, alpha=8.0),
    "default targets": LoRAConfig(rank=4, alpha=8.0, targets="default"),
    "rslora": LoRAConfig(rank=4, alpha=8.0, rslora=True),
    "dora": LoRAConfig(rank=4, alpha=8.0, dora=True),
    "pissa": LoRAConfig(rank=4, alpha=8.0, init="pissa"),
    "lora_bias": LoRAConfig(rank=4, alpha=8.0, lora_bias=True),
}
DROPPED = LoRAConfig(rank=4, alpha=8.0, dropout=0.3)
every = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))


class Literal(nn.Module):
    """A LoRALinear's equation in float64, each variant written out with W + s B A formed."""

    def __init__(self, layer: LoRALinear):
        super().__init__()
        double = lambda t: None if t is None else nn.Parameter(t.detach().double())
        self.W, self.b, self.A, self.B = (double(t) for t in (layer.weight, layer.bias, layer.lora_A, layer.lora_B))
        self.m, self.c = (
            double(getattr(layer, "lora_magnitude_vector", None)),
            double(getattr(layer, "lora_bias", None)),
        )
        self.fixed = layer.B0.double() @ layer.A0.double() if hasattr(layer, "A0") else 0.0
        self.s = layer.alpha / (math.sqrt(layer.rank) if layer.scale != layer.alpha / layer.rank else layer.rank)

    def forward(self, x):
        V = self.W + self.s * (self.B @ self.A - self.fixed)
        if self.m is not None:
            V = (self.m / V.norm(dim=1).detach())[:, None] * V
        y = x @ V.t()
        y = y if self.b is None else y + self.b
        return y if self.c is None else y + self.s * self.c


@pytest.mark.parametrize("bias", [True, False])
@every
def test_a_layer_computes_its_equation_and_its_derivative(config, bias):
    torch.manual_seed(3)
    linear = nn.Linear(21, 33, bias=bias).requires_grad_(False)
    layer = choose_layer_class(config)(linear, config.rank, config.alpha, config)
    layer.initialize(config.init, torch.Generator().manual_seed(0))
    own = [name for name, _ in layer.named_parameters() if name not in ("weight", "bias")]
    with torch.no_grad():
        for name in own:
            getattr(layer, name).add_(torch.randn_like(getattr(layer, name)) * 0.3)
    literal = Literal(layer)
    x, dy = torch.randn(2, 7, 21, requires_grad=True), torch.randn(2, 7, 33)
    wide = x.detach().double().requires_grad_()
    y, wanted = layer(x), literal(wide)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    y.backward(dy)
    wanted.backward(dy.double())
    twins = {"lora_A": "A", "lora_B": "B", "lora_bias": "c", "lora_magnitude_vector": "m"}
    pairs = [(x.grad, wide.grad), *((getattr(layer, n).grad, getattr(literal, twins[n]).grad) for n in own)]
    for mine, theirs in pairs:
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)
    assert linear.weight.grad is None


@every
def test_packed_is_separate_in_loss_and_gradients(model, packed, separate, gradients, apart, stir, config):
    add_adapter(model, config)
    stir(model)
    loss, together = gradients(model, [packed])
    alone, wanted = gradients(model, separate)
    assert loss == pytest.approx(alone, rel=1e-5)
    assert max(apart(together[name], wanted[name]) for name in wanted) <= 2e-5


def test_recomputation_gives_the_same_bits_with_dropout(model, packed, gradients, stir):
    add_adapter(model, DROPPED)
    stir(model)
    model.train()
    found = []
    for model.activation_checkpointing in (False, True, False):
        torch.manual_seed(11)
        found.append(gradients(model, [packed]))
    for loss, gradient in found[1:]:
        assert loss == found[0][0]
        assert all(torch.equal(gradient[name], found[0][1][name]) for name in gradient)
    torch.manual_seed(12)
    assert gradients(model, [packed])[0] != found[0][0]
    model.eval()
    quiet = {gradients(model, [packed])[0] for _ in range(2)}
    assert len(quiet) == 1


@pytest.mark.parametrize("config", [DROPPED, CONFIGS["dora"]], ids=["dropout", "dora"])
def test_a_run_taken_up_again_ends_with_the_same_bits(decoder, packed, config):
    settings = TrainConfig(5, learning_rate=1e-2, accumulate=2, activation_checkpointing=True)

    def begin():
        model = decoder("llama")
        add_adapter(model, config)
        return model, TrainState(model)

    whole, state = begin()
    losses = [step.loss for step in train(whole, [packed] * 10, settings, state)]
    first, state = begin()
    for step in train(first, [packed] * 10, settings, state):
        torch.manual_seed(step.number)  # a caller who draws numbers of his own
        if step.number == 2:
            break
    second, later = begin()
    second.load_state_dict(first.state_dict())
    later.step, later.exp_avg, later.exp_avg_sq = state.step, state.exp_avg, state.exp_avg_sq
    assert [step.loss for step in train(second, [packed] * 10, settings, later)] == losses[2:]
    ended = second.state_dict()
    assert all(torch.equal(t, ended[name]) for name, t in whole.state_dict().items())


@every
def test_cached_is_uncached_and_padded_is_alone(model, ids, stir, apart, config):
    add_adapter(model, config)
    stir(model)
    with torch.no_grad():
        whole = model(ids)
        cache = model.new_cache(2, 30)
        pieces = [model(ids[:, :7], cache=cache), model(ids[:, 7:12], cache=cache)]
        pieces += [model(ids[:, i : i + 1], cache=cache) for i in range(12, 30)]
        assert apart(torch.cat(pieces, dim=1), whole) <= 1e-5
        owners = torch.zeros_like(ids)
        owners[1, :9] = -1
        padded = model(ids, owners)
        assert apart(padded[1:, 9:], model(ids[1:, 9:])) <= 1e-5


def test_projections_of_one_input_share_a_pass_and_a_mask(decoder, ids):
    model = decoder("llama")
    add_adapter(model, LoRAConfig(rank=4, dropout=0.5, targets=("q_proj", "v_proj", "up_proj")))
    model.train()
    attention, x = model.blocks[0].self_attn, torch.randn(2, 5, 32)
    with torch.no_grad():
        for layer in find_lora_layers(model).values():
            layer.lora_B.normal_()
        torch.manual_seed(0)
        q, k, v = attention.q_proj.together(x, (attention.q_proj, attention.k_proj, attention.v_proj))
        assert torch.equal(k, attention.k_proj(x))
        for y, linear in ((q, attention.q_proj), (v, attention.v_proj)):
            torch.manual_seed(0)
            torch.testing.assert_close(y, linear(x), rtol=1e-5, atol=1e-5)
        torch.manual_seed(0)
        first = model(ids)
        torch.manual_seed(0)
        assert torch.equal(model(ids), first)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_twenty_steps_have_the_losses_of_plain_torch(decoder, family, packed, monkeypatch):
    def plain(self, x):
        s = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return F.linear(x, self.weight, self.bias) + self.scale * s

    def losses():
        model = decoder(family)
        add_adapter(model, LoRAConfig(rank=4))
        return [step.loss for step in train(model, [packed] * 20, TrainConfig(20, learning_rate=3e-3))]

    mine = losses()
    monkeypatch.setattr(LoRALinear, "forward", plain)
    monkeypatch.setattr(LoRALinear, "together", lambda self, x, linears: tuple(linear(x) for linear in linears))
    assert mine == pytest.approx(losses(), rel=1e-4)
    assert mine[-1] < 0.8 * mine[0]


BAD = {
    "rank 0": ({"rank": 0}, "rank: 0 must be an integer >= 1"),
    "rank -4": ({"rank": -4}, "rank: -4 must be"),
    "rank text": ({"rank": "4"}, "rank: '4' must be"),
    "rank true": ({"rank": True}, "rank: True must be"),
    "alpha nan": ({"alpha": math.nan}, "alpha: nan must be finite and > 0"),
    "alpha text": ({"alpha": "8"}, "alpha: '8' must be"),
    "alpha 0": ({"alpha": 0}, "alpha: 0 must be"),
    "dropout 1": ({"dropout": 1.0}, "dropout: 1.0 must be in [0, 1)"),
    "dropout text": ({"dropout": "0"}, "dropout: '0' must be"),
    "dropout too fine": ({"dropout": 1e-9}, "nearer to 0 or 1 than 1/65536"),
    "no targets": ({"targets": []}, "targets: () names no linear layer"),
    "a number": ({"targets": 3}, "targets: 3 must be text"),
    "layers": ({"layers": []}, "layers: () must be a list of block numbers"),
    "layer text": ({"layers": ["1"]}, "layers: '1' must be an integer"),
    "pattern rank": ({"rank_pattern": {"q": 0}}, "rank_pattern 'q': 0 must be"),
    "pattern alpha": ({"alpha_pattern": {"q": "1"}}, "alpha_pattern 'q': '1' must be"),
    "rslora": ({"rslora": 1}, "rslora: 1 must be true or false"),
    "init": ({"init": "eva"}, "init: 'eva' is not known (uniform, gaussian, orthogonal, pissa, olora)"),
    "backend": ({"backend": "fast"}, "backend: 'fast' is not known (auto, reference, "),
    "both": ({"dora": True, "init": "pissa"}, "dora and pissa cannot be combined"),
    "dora with bias": ({"dora": True, "lora_bias": True}, "dora and lora_bias cannot be combined"),
}


@pytest.mark.parametrize(("given", "said"), BAD.values(), ids=list(BAD))
def test_a_config_says_what_is_wrong_with_it(given, said):
    with pytest.raises(InputError, match=re.escape(said)):
        LoRAConfig(**given)


def test_a_kernel_that_cannot_run_here_is_refused_with_the_reason(decoder):
    model = decoder("gpt2")
    shown = repr(model)
    with pytest.raises(InputError, match=r"backend: backend='fused' cannot run here: "):
        add_adapter(model, LoRAConfig(backend="fused"))
    assert repr(model) == shown


class TestLoRAPlus:
    def test_b_moves_as_many_times_faster_as_its_rate_says(self, decoder, packed):
        """AdamW's first step moves each entry by the learning rate, whatever the gradient."""
        moved = {}
        for name, rates in (("plain", {}), ("plus", {"lora_B": 16.0})):
            model = decoder("llama")
            add_adapter(model, LoRAConfig(rank=2))
            before = {key: p.clone() for key, p in model.named_parameters() if p.requires_grad}
            config = TrainConfig(1, learning_rate=1e-3, eps=1e-12, lr_multipliers=rates)
            next(iter(train(model, [packed], config)))
            after = dict(model.named_parameters())
            moved[name] = {key: (after[key] - t).abs().max().item() for key, t in before.items()}
        for key, plain in moved["plain"].items():
            ratio = 16 if key.endswith("lora_B") else 1
            assert moved["plus"][key] == pytest.approx(ratio * plain, rel=1e-3)
            assert plain == pytest.approx(1e-3 if key.endswith("lora_B") else 0, rel=1e-3)

    def test_two_groups_equal_two_optimizers_of_torch(self, decoder, packed, gradients):
        mine, theirs = decoder("gpt2"), decoder("gpt2")
        for model in (mine, theirs):
            add_adapter(model, LoRAConfig(rank=2))
        # An eps well above rounding: else AdamW makes a whole step of a gradient that is zero but for its last bit.
        shared = {"weight_decay": 0.1, "eps": 1e-5}
        config = TrainConfig(
            4, learning_rate=1e-2, decay="constant", warmup=0, lr_multipliers={"lora_B": 4.0}, **shared
        )
        for _ in train(mine, [packed] * 4, config):
            pass
        named = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
        group = lambda end, rate: {"params": [p for name, p in named.items() if name.endswith(end)], "lr": rate}
        groups = [group("lora_A", 1e-2), group("lora_B", 4e-2)]
        adam = torch.optim.AdamW(groups, betas=(0.9, 0.99), **shared)
        for _ in range(4):
            gradients(theirs.train(), [packed])
            nn.utils.clip_grad_norm_(named.values(), 1.0)
            adam.step()
        for name, p in mine.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(p, named[name], rtol=1e-4, atol=1e-6)

    def test_a_rate_for_nothing_is_refused(self, decoder, packed):
        model = decoder("gpt2")
        add_adapter(model, LoRAConfig(rank=2))
        with pytest.raises(InputError, match=r"lr_multipliers: no trained tensor is named 'lora_b'.*lora_A.*lora_B"):
            train(model, [packed], TrainConfig(1, lr_multipliers={"lora_b": 16.0}))
        with pytest.raises(InputError, match=r"lr_multipliers 'lora_B': -1 must be finite and > 0"):
            TrainConfig(1, lr_multipliers={"lora_B": -1})


def test_padding_rows_of_nothing_else_stay_finite(model, stir):
    add_adapter(model, CONFIGS["plain"])
    stir(model)
    ids = torch.zeros(1, 5, dtype=torch.long)
    with torch.no_grad():
        assert torch.isfinite(model(ids, torch.full_like(ids, -1))).all()
