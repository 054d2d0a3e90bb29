"""LoRA and its variants against their equations written out, and the places where who-sees-whom could go wrong."""

import math
import re
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minipeft.adapters import LoRAConfig, add_adapter, remove_adapter
from minipeft.adapters import linears as linears_module
from minipeft.adapters.dora import row_norms
from minipeft.adapters.linears import linear_paths
from minipeft.adapters.lora import LoRALinear, lora_layers
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
        self.m, self.c = double(layer.lora_magnitude_vector), double(layer.lora_bias)
        self.fixed = 0.0 if layer.A0 is None else layer.B0.double() @ layer.A0.double()
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
    layer = LoRALinear(linear, config.rank, config.alpha, config)
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
    for model.recompute in (False, True, False):
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
    settings = TrainConfig(5, learning_rate=1e-2, accumulate=2, checkpointing=True)

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
        for layer in lora_layers(model).values():
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


class Sizes(TorchDispatchMode):
    """Remembers the largest tensor that an operation made, views apart."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.largest = max(self.largest, out.numel())
        return out


class TestDora:
    def test_the_norm_is_that_of_the_sum_and_makes_nothing_as_large(self, monkeypatch):
        torch.manual_seed(0)
        W, A, B = torch.randn(300, 200), torch.randn(4, 200), torch.randn(300, 4)
        with Sizes() as made:
            norms = row_norms(W, A, B, 0.7)
        wanted = (W.double() + 0.7 * B.double() @ A.double()).norm(dim=1)
        torch.testing.assert_close(norms.double(), wanted, rtol=1e-5, atol=0)
        assert made.largest == B.numel()
        monkeypatch.setattr("minipeft.adapters.dora.BLOCK", 64)
        half = W.bfloat16()
        with Sizes() as made:
            narrow = row_norms(half, A, B, 0.7)
        torch.testing.assert_close(narrow, row_norms(half.float(), A, B, 0.7), rtol=1e-5, atol=0)
        assert made.largest == 64 * 200

    def test_a_trained_length_is_the_merged_rows_length(self, decoder, stir):
        model = decoder("gpt2")
        add_adapter(model, CONFIGS["dora"])
        for layer in lora_layers(stir(model)).values():
            torch.testing.assert_close(layer.merged()[0].norm(dim=1), layer.lora_magnitude_vector, rtol=1e-5, atol=1e-5)


class TestPissa:
    def test_it_starts_from_the_largest_singular_values(self, decoder):
        model = decoder("llama")
        add_adapter(model, CONFIGS["pissa"])
        for layer in lora_layers(model).values():
            update = layer.scale * layer.lora_B.double() @ layer.lora_A.double()
            values = torch.linalg.svdvals(layer.weight.double())
            rest = torch.linalg.matrix_norm(layer.weight - update, 2)
            torch.testing.assert_close(rest, values[4], rtol=1e-5, atol=0)
            torch.testing.assert_close(torch.linalg.svdvals(update)[:4], values[:4], rtol=1e-5, atol=1e-5)

    def test_a_rank_beyond_the_singular_values_is_refused_before_anything_changes(self, decoder):
        model = decoder("llama")
        shown = repr(model)
        with pytest.raises(
            InputError, match=r"rank: 17 exceeds the 16 singular values of 'model\.layers\.0\.self_attn"
        ):
            add_adapter(model, LoRAConfig(rank=17, init="pissa"))
        assert repr(model) == shown


MATCHLESS = {
    "no such name": ({"targets": ["q_proj", "qproj"]}, "targets: no linear layer is named 'qproj'; this model has"),
    "half a name": ({"targets": ["proj"]}, "no linear layer is named 'proj'"),
    "no match": ({"targets": r"h\.\d+"}, "matches no linear layer, such as 'model.layers.0"),
    "plain name as text": ({"targets": "q_proj"}, "give plain names as a list"),
    "invalid": ({"targets": "(q_proj"}, "'(q_proj' is not a regular expression: missing )"),
    "embedding": ({"targets": ["embed_tokens"]}, "is an embedding: a table that is looked up"),
    "embedding by pattern": ({"targets": r".*(embed_tokens|q_proj)"}, "is an embedding"),
    "head": ({"targets": ["lm_head"]}, "'lm_head' is not adapted"),
    "everything": ({"targets": ".*"}, "'model.embed_tokens' is an embedding"),
    "no such layer": ({"layers": [1, 3]}, "layers: no layer 3: this model has 0 to 2"),
    "layers of a pattern": ({"targets": ".*q_proj", "layers": [1]}, "layers: cannot be combined"),
    "rank pattern": ({"rank_pattern": {"k_proj": 2, "kproj": 3}}, "rank_pattern: 'kproj' matches none"),
    "outside": ({"targets": ["q_proj"], "alpha_pattern": {"k_proj": 2}}, "alpha_pattern: 'k_proj' matches none"),
}  # fmt: skip


class TestTargets:
    GPT2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")

    def paths(self, model, **given):
        add_adapter(model, LoRAConfig(rank=2, **given))
        found = list(lora_layers(model))
        remove_adapter(model)
        return found

    def test_each_way_to_name_them(self, decoder):
        model = decoder("gpt2")
        of = lambda *ends, layers=(0, 1, 2): [f"transformer.h.{i}.{end}" for i in layers for end in ends]
        assert self.paths(model) == of(*self.GPT2) == linear_paths(model)
        assert self.paths(model, targets="default") == of("attn.c_attn")
        assert self.paths(model, targets=["c_proj"]) == of("attn.c_proj", "mlp.c_proj")
        assert self.paths(model, targets=["mlp.c_proj", "c_fc"]) == of("mlp.c_fc", "mlp.c_proj")
        assert self.paths(model, targets=["transformer.h.1.mlp.c_fc"]) == of("mlp.c_fc", layers=(1,))
        assert self.paths(model, layers=[2, 0]) == of(*self.GPT2, layers=(0, 2))
        assert self.paths(model, targets=r".*\.[02]\.(attn|mlp)\.c_(attn|fc)") == of(
            "attn.c_attn", "mlp.c_fc", layers=(0, 2)
        )
        llama = decoder("llama")
        assert len(self.paths(llama)) == 21
        assert {path.rsplit(".", 1)[1] for path in self.paths(llama, targets="default")} == {"q_proj", "v_proj"}

    @pytest.mark.parametrize(("given", "said"), MATCHLESS.values(), ids=list(MATCHLESS))
    def test_what_matches_nothing_is_an_error_and_touches_nothing(self, decoder, given, said):
        model = decoder("llama")
        shown = repr(model)
        with pytest.raises(InputError, match=re.escape(said)):
            add_adapter(model, LoRAConfig(rank=2, **given))
        assert repr(model) == shown
        assert model.adapter is None

    @pytest.mark.parametrize("field", ["targets", "rank_pattern"])
    def test_a_pattern_that_would_take_years_is_stopped(self, decoder, field, monkeypatch):
        monkeypatch.setattr(linears_module, "DEADLINE", 0.5)
        evil = r"(([a-z]|\d|_|\.)+)+!"
        given = {"targets": evil} if field == "targets" else {"rank_pattern": {evil: 2}}
        start = time.monotonic()
        with pytest.raises(InputError, match=rf"{field}: .* took longer than 0\.5 s to match"):
            add_adapter(decoder("llama"), LoRAConfig(**given))
        assert time.monotonic() - start < 5

    def test_patterns_give_each_target_its_rank_and_alpha_and_the_first_match_counts(self, decoder):
        model = decoder("llama")
        patterns = {"0.self_attn.q_proj": 3, "q_proj": 5, r"^model\.layers\.[12]\.mlp.*": 7}
        add_adapter(model, LoRAConfig(rank=2, alpha=4, rank_pattern=patterns, alpha_pattern={"mlp.up_proj": 32}))
        layers = lora_layers(model)
        at = lambda path: (layers[f"model.layers.{path}"].lora_A.shape[0], layers[f"model.layers.{path}"].scale)
        assert at("0.self_attn.q_proj") == (3, 4 / 3)
        assert at("1.self_attn.q_proj") == (5, 4 / 5)
        assert at("0.mlp.up_proj") == (2, 32 / 2)
        assert at("2.mlp.up_proj") == (7, 32 / 7)
        assert at("2.mlp.down_proj") == (7, 4 / 7)
        assert at("2.self_attn.k_proj") == (2, 2.0)


BAD = {
    "rank 0": ({"rank": 0}, "rank: 0 must be an integer >= 1"),
    "rank -4": ({"rank": -4}, "rank: -4 must be"),
    "rank text": ({"rank": "4"}, "rank: '4' must be"),
    "rank true": ({"rank": True}, "rank: True must be"),
    "alpha nan": ({"alpha": math.nan}, "alpha: nan must be a finite number > 0"),
    "alpha text": ({"alpha": "8"}, "alpha: '8' must be"),
    "alpha 0": ({"alpha": 0}, "alpha: 0 must be"),
    "dropout 1": ({"dropout": 1.0}, "dropout: 1.0 must be in [0, 1)"),
    "dropout text": ({"dropout": "0"}, "dropout: '0' must be"),
    "dropout too fine": ({"dropout": 1e-9}, "nearer to 0 or 1 than 1/65536"),
    "no targets": ({"targets": []}, "targets: () names no linear layer"),
    "a number": ({"targets": 3}, "targets: 3 names no linear layer"),
    "layers": ({"layers": []}, "layers: () must be a list of block numbers"),
    "layer text": ({"layers": ["1"]}, "must be a list of block numbers"),
    "pattern rank": ({"rank_pattern": {"q": 0}}, "rank_pattern 'q': 0 must be"),
    "pattern alpha": ({"alpha_pattern": {"q": "1"}}, "alpha_pattern 'q': '1' must be"),
    "rslora": ({"rslora": 1}, "rslora: 1 must be true or false"),
    "init": ({"init": "olora"}, "init: 'olora' is not known (uniform, gaussian, pissa)"),
    "path": ({"path": "fast"}, "path: 'fast' is not known (auto, reference, "),
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
    with pytest.raises(InputError, match=r"path: path='fused' cannot run here: "):
        add_adapter(model, LoRAConfig(path="fused"))
    assert repr(model) == shown


class TestLoRAPlus:
    def test_b_moves_as_many_times_faster_as_its_rate_says(self, decoder, packed):
        """AdamW's first step moves each entry by the rate, whatever the gradient."""
        moved = {}
        for name, rates in (("plain", {}), ("plus", {"lora_B": 16.0})):
            model = decoder("llama")
            add_adapter(model, LoRAConfig(rank=2))
            before = {key: p.clone() for key, p in model.named_parameters() if p.requires_grad}
            config = TrainConfig(1, learning_rate=1e-3, eps=1e-12, rates=rates)
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
        config = TrainConfig(4, learning_rate=1e-2, decay="constant", warmup=0, weight_decay=0.1, rates={"lora_B": 4.0})
        for _ in train(mine, [packed] * 4, config):
            pass
        named = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
        group = lambda end, rate: {"params": [p for name, p in named.items() if name.endswith(end)], "lr": rate}
        groups = [group("lora_A", 1e-2), group("lora_B", 4e-2)]
        adam = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.1)
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
        with pytest.raises(InputError, match=r"rates: no trained tensor is named 'lora_b'.*lora_A.*lora_B"):
            train(model, [packed], TrainConfig(1, rates={"lora_b": 16.0}))
        with pytest.raises(InputError, match=r"rates 'lora_B': -1 must be finite and > 0"):
            TrainConfig(1, rates={"lora_B": -1})


def test_padding_rows_of_nothing_else_stay_finite(model, stir):
    add_adapter(model, CONFIGS["plain"])
    stir(model)
    ids = torch.zeros(1, 5, dtype=torch.long)
    with torch.no_grad():
        assert torch.isfinite(model(ids, torch.full_like(ids, -1))).all()
