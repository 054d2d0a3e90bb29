"""Packed weights: exact where they are used, left alone where float16 does not hold a weight, gone afterwards."""

import pytest
import torch
import torch.nn.functional as F

import minipeft
from minipeft import generation
from minipeft.generation import GenerateConfig, generate
from minipeft.models import FAMILIES, packed
from minipeft.models.config import parse_config
from minipeft.models.packed import ROWS, PackedModel, PackedWeight, pack_weight
from minipeft.models.quantized import QuantizedWeight, quantize_model
from tests.test_generation import MAKERS, PROMPTS, SIZES, Letters

METHODS = {
    "none": None,
    "lora": minipeft.LoRAConfig(rank=4, alpha=8),
    "dora": minipeft.LoRAConfig(rank=4, dora=True),
    "ia3": minipeft.IA3Config(),
    "vera": minipeft.VeRAConfig(rank=4),
    "prefix": minipeft.PrefixConfig(length=5, init="peft"),
    "prompt": minipeft.PromptConfig(length=5, init="normal"),
}
LONG = GenerateConfig(max_new_tokens=20, temperature=0)


@pytest.fixture(autouse=True)
def packed_from(monkeypatch):
    """Short answers are packed too: PACKED_FROM says only where it pays."""
    monkeypatch.setattr(generation, "PACKED_FROM", 20)


def make(family, method="none", dtype=torch.float32):
    """A small decoder with bfloat16's values, and an adapter away from its init."""
    model = MAKERS[family]()
    generator = torch.Generator().manual_seed(0)
    model.initialize(generator)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    model.to(dtype).eval()
    if METHODS[method] is not None:
        minipeft.add_adapter(model, METHODS[method])
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_answers_equal_those_of_plain_weights(family, method):
    """And the products are those of float32: at every weight, against float64."""
    model = make(family, method)
    held = PackedModel(model)
    assert len(held.held) == held.weights > 0
    draw = torch.Generator().manual_seed(1)
    for module, copy in held.held:
        x = torch.randn(3, copy.shape[1], generator=draw)
        exact = x.double() @ module.weight.detach().double().T
        with torch.no_grad():
            y, plain = F.linear(x, copy), F.linear(x, module.weight)
        scale = exact.abs().max()
        assert (y - exact).abs().max() < 2e-6 * scale
        assert not torch.equal(y, plain) or copy.shape[0] < 100  # another order of summation: the copy was read
    plain = GenerateConfig(max_new_tokens=20, temperature=0, pack=False)
    assert generate(model, Letters(), PROMPTS, LONG) == generate(model, Letters(), PROMPTS, plain)


def test_the_copies_are_read_and_then_gone(monkeypatch):
    model = make("llama", "lora")
    before = dict(model.named_parameters())
    calls = []
    multiply = packed.multiply
    monkeypatch.setattr(packed, "multiply", lambda *args: (calls.append(args[0].shape), multiply(*args))[1])
    generate(model, Letters(), PROMPTS, LONG)
    assert calls
    assert all(before[name] is p for name, p in model.named_parameters())
    calls.clear()
    generate(model, Letters(), PROMPTS, GenerateConfig(max_new_tokens=20, pack=False))
    generate(model, Letters(), PROMPTS, GenerateConfig(max_new_tokens=15))
    assert not calls
    generate(model, Letters(), PROMPTS, GenerateConfig(max_new_tokens=15, batch=1))  # 15 steps of each prompt
    assert calls


def test_weights_that_float16_does_not_hold_stay_as_they_are():
    model = MAKERS["llama"]()
    model.initialize(torch.Generator().manual_seed(0))  # 24 bits each
    assert str(PackedModel(model)).startswith("0 of 22 weights packed")
    weight = torch.full((4, 8), 3.0)
    assert pack_weight(weight) is not None
    weight[3, 7] = 1 + 2**-12
    assert pack_weight(weight) is None
    assert pack_weight(torch.zeros(4, 8)) is not None


@pytest.mark.parametrize("size", [2.0**-100, 2.0**-20, 1.0, 2.0**60])
def test_a_power_of_two_is_taken_out_where_that_makes_the_weight_exact(size):
    draw = torch.Generator().manual_seed(0)
    weight = (torch.randn(64, 48, generator=draw) * size).bfloat16()
    copy = pack_weight(weight.float())
    x = torch.randn(5, 48, generator=draw)
    exact = x.double() @ weight.double().T
    with torch.no_grad():
        assert (F.linear(x, copy) - exact).abs().max() < 2e-6 * exact.abs().max()
        bias = torch.ones(64) * size
        assert (F.linear(x, copy, bias) - exact - bias).abs().max() < 2e-6 * exact.abs().max()


def test_bfloat16_rounds_once():
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 300, generator=draw).bfloat16(), torch.randn(5, 300, generator=draw).bfloat16()
    with torch.no_grad():
        y = F.linear(x, pack_weight(weight))
    exact = x.double() @ weight.double().T
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-4).all()


def test_many_rows_and_gradients_take_the_plain_weight():
    weight = torch.ones(4, 8, requires_grad=True)
    copy = pack_weight(weight)
    with torch.no_grad():
        weight.mul_(2)  # so that the copy would answer 8, the weight 16
        assert F.linear(torch.ones(ROWS, 8), copy).eq(8).all()
        assert F.linear(torch.ones(ROWS + 1, 8), copy).eq(16).all()
    F.linear(torch.ones(2, 8), copy).sum().backward()
    assert weight.grad.eq(2).all()
    assert type(copy + 1) is torch.Tensor
    assert isinstance(copy, PackedWeight)


def test_a_weight_that_changed_since_is_not_read_from_its_copy():
    model = make("llama")
    held = PackedModel(model)
    first, second = model.blocks[0].self_attn.q_proj, model.blocks[1].self_attn.q_proj
    with torch.no_grad():
        first.weight.add_(1)
    second.weight = torch.nn.Parameter(torch.ones_like(second.weight))
    with held.used():
        assert type(first.weight) is type(second.weight) is torch.nn.Parameter
        assert type(model.lm_head.weight) is PackedWeight


def test_configs_of_other_sizes_pack_too():
    config = parse_config(FAMILIES["llama"].config, {**SIZES, "tie_word_embeddings": True})
    model = FAMILIES["llama"].decoder(config)
    model.initialize(torch.Generator().manual_seed(0))
    model.bfloat16().float()
    held = PackedModel(model)
    assert held.bytes == 2 * sum(module.weight.numel() for module, _ in held.held)
    assert model.lm_head.weight is model.embedding.weight
    with held.used():
        assert type(model.embedding.weight) is torch.nn.Parameter


@pytest.mark.parametrize("method", ["none", "lora", "dora", "prefix"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_quantized_weight_is_dequantized_once_a_call(format, dtype, method, monkeypatch):
    """In bfloat16 its values are packed in float16; in float32, and in a short call, they are copied as they are."""
    model = make("llama", "none", dtype)
    quantize_model(model, format)
    if METHODS[method] is not None:
        minipeft.add_adapter(model, METHODS[method])
    held = PackedModel(model)
    assert len(held.held) == held.weights
    half = {path: not isinstance(copy.copy, torch.Tensor) for path, copy in held.held}
    quantized = [module for module, _ in held.held if isinstance(module.weight, QuantizedWeight)]
    assert len(quantized) == held.weights - 1  # all but the head
    assert all(half[module] == (dtype == torch.bfloat16) for module in quantized)
    assert held.bytes == sum(w.numel() * (2 if half[m] else 4) for m in half for w in [m.weight])
    draw = torch.Generator().manual_seed(1)
    for copies in (held, PackedModel(model, half=False)):
        for module, copy in copies.held:
            x = torch.randn(3, copy.shape[1], generator=draw).to(dtype)
            exact = x.double() @ module.weight.dequantize().double().T
            with torch.no_grad():
                error = (F.linear(x, copy).double() - exact).abs().max()
            assert error < (2e-6 if dtype == torch.float32 else 5e-3) * exact.abs().max()
    dequantized = []
    dense = QuantizedWeight.dense
    monkeypatch.setattr(QuantizedWeight, "dense", lambda self, *rows: (dequantized.append(1), dense(self, *rows))[1])
    counts, answers = [], []
    for config in (LONG, GenerateConfig(max_new_tokens=19, temperature=0), GenerateConfig(20, 0, pack=False)):
        dequantized.clear()
        answers.append([text[:19] for text in generate(model, Letters(), PROMPTS, config)])
        counts.append(len(dequantized))
    if method != "dora":  # its norm reads the whole weight in each pass
        assert counts[0] == counts[1] <= 3 * len(quantized) < counts[2]
    if dtype == torch.float32:
        assert answers[0] == answers[1] == answers[2]
