"""The product with a base weight, and oneDNN's float32 products: exact, on within a step alone, off where slower."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.nn import functional as F

from minipeft import LoRAConfig, TrainConfig, add_adapter, load_model, load_tokenizer, train
from minipeft.data.packing import Batch
from minipeft.generation import GenerateConfig, answer
from minipeft.models import products
from minipeft.models.products import MATMUL, fast_products, is_exact, linear, multiply_with_mkl, uses_onednn
from minipeft.training.loop import evaluate
from tests.small import write_small_model

needs_avx512 = pytest.mark.skipif(not is_exact(), reason="this processor has no AVX-512, or multiplies in bfloat16")


@pytest.fixture
def wanted():
    """The tests may turn the switch off; it is restored."""
    before = products.Switch.wanted
    products.use_onednn(True)
    yield
    products.use_onednn(before)


@pytest.fixture
def forced(wanted, monkeypatch):
    """The switch is used on any processor, so that its places are tested everywhere."""
    monkeypatch.setattr(products, "is_exact", lambda: True)


def test_linear_is_x_times_w_transposed_plus_the_bias():
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=draw) for shape in ((2, 5, 8), (3, 8), (3,)))
    exact = x.double() @ weight.double().T
    assert torch.allclose(linear(x, weight).double(), exact, atol=1e-5)
    assert torch.allclose(linear(x, weight, bias).double(), exact + bias.double(), atol=1e-5)


@needs_avx512
@pytest.mark.parametrize("rows", [1, 8, 17, 64, 512])
def test_products_and_gradients_are_float32s(wanted, rows):
    """y, dX and dW of a linear against float64, of operands that no bfloat16 holds; twice the same bits."""
    generator = torch.Generator().manual_seed(rows)
    x, W, dy = (torch.randn(shape, generator=generator) for shape in ((rows, 192), (320, 192), (rows, 320)))
    assert not torch.equal(x.bfloat16().float(), x)

    def compute(x, W, dy):
        x, W = x.clone().requires_grad_(), W.clone().requires_grad_()
        y = F.linear(x, W)
        return (y, *torch.autograd.grad(y, (x, W), dy))

    with fast_products():
        found, again = compute(x, W, dy), compute(x, W, dy)
    exact = compute(x.double(), W.double(), dy.double())
    for a, b, want in zip(found, again, exact, strict=True):
        assert torch.equal(a, b)
        assert (a - want).abs().max() <= products.LARGEST_ERROR * want.abs().max()


@needs_avx512
def test_the_switch_changes_the_product(wanted):
    """Without this control the test above would pass where the switch does nothing."""
    x, W = torch.randn(512, 768, generator=torch.Generator().manual_seed(0)), torch.eye(768)[:256] + 1e-3
    plain = F.linear(x, W)
    with fast_products():
        assert not torch.equal(F.linear(x, W), plain)
    assert torch.equal(F.linear(x, W), plain)


def test_a_processor_that_multiplies_in_bfloat16_keeps_torchs_product(monkeypatch):
    """As with AMX, where the same switch rounds the operands: the probe sees it."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    product = torch.Tensor.__matmul__

    def rounded(a, b):
        low = a.dtype == torch.float32
        return product(a.bfloat16().float(), b.bfloat16().float()) if low else product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not is_exact.__wrapped__()
    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    assert is_exact.__wrapped__() or torch.cpu.get_capabilities().get("amx_bf16")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    assert not is_exact.__wrapped__()


def test_it_is_on_within_a_step_alone(forced, tmp_path):
    """Forward, backward, evaluation, prefill; off at each yield, in decoding, after an error and with --no-onednn."""
    model, seen = load_model(write_small_model(tmp_path, "llama")), []
    add_adapter(model, LoRAConfig(rank=2))
    ids = torch.arange(24).view(2, 12) % 7
    batch = Batch(ids, ids, torch.zeros_like(ids))
    model.norm.register_forward_hook(lambda *_: seen.append(("forward", MATMUL.fp32_precision)))
    model.norm.register_full_backward_hook(lambda *_: seen.append(("backward", MATMUL.fp32_precision)))
    before = MATMUL.fp32_precision
    for _ in train(model, [batch] * 2, TrainConfig(steps=2)):
        assert MATMUL.fp32_precision == before
    assert seen == [("forward", "bf16"), ("backward", "bf16")] * 2
    seen.clear()
    evaluate(model, [batch])
    list(answer(model, load_tokenizer(tmp_path), [[1, 2, 3]], GenerateConfig(max_new_tokens=3, temperature=0.0)))
    assert [precision for _, precision in seen] == ["bf16", "bf16", *[before] * (len(seen) - 2)]
    with pytest.raises(RuntimeError, match="shape"), fast_products():
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert MATMUL.fp32_precision == before
    assert not products.Switch.on
    seen.clear()
    products.use_onednn(False)
    evaluate(model, [batch])
    assert seen == [("forward", before)]
    assert not uses_onednn()


def test_attention_over_few_columns_keeps_mkl(forced, monkeypatch):
    """Forward and backward, also where backward runs outside; over many columns the switch stays on."""
    seen = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(MATMUL.fp32_precision)
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            seen.append(MATMUL.fp32_precision)
            return dy

    x = torch.ones(3, requires_grad=True)
    with fast_products():
        y = multiply_with_mkl(lambda: Spy.apply(x))
        assert MATMUL.fp32_precision == "bf16"
        y.sum().backward()
        assert MATMUL.fp32_precision == "bf16"
        late = multiply_with_mkl(lambda: Spy.apply(x))
    before = MATMUL.fp32_precision
    late.sum().backward()
    assert MATMUL.fp32_precision == before
    Spy.apply(x)
    multiply_with_mkl(lambda: Spy.apply(x))
    assert seen == ["ieee"] * 4 + [before] * 2


def test_two_threads_take_turns(forced):
    """One is within the context at a time; the setting that the caller had comes back."""
    before, inside, most = MATMUL.fp32_precision, [0], [0]

    def work():
        for _ in range(50):
            with fast_products():
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                assert MATMUL.fp32_precision == "bf16"
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert MATMUL.fp32_precision == before


def test_losses_with_and_without_differ_by_rounding_alone(wanted, tmp_path):
    """A row of one document, and one of several."""
    documents = torch.tensor([[0] * 12, [0] * 5 + [1] * 7])
    batch = Batch(torch.arange(24).view(2, 12) % 7, torch.arange(24).view(2, 12) % 7, documents)
    found = []
    for onednn in (True, False):
        products.use_onednn(onednn)
        model = load_model(write_small_model(tmp_path, "llama"))
        add_adapter(model, LoRAConfig(rank=2))
        found.append([step.loss for step in train(model, [batch] * 4, TrainConfig(steps=4, learning_rate=1e-2))])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("onednn", [True, False])
def test_the_report_says_what_multiplies(forced, tmp_path, onednn):
    products.use_onednn(onednn)
    report = str(add_adapter(load_model(write_small_model(tmp_path, "llama")), LoRAConfig(rank=2)))
    assert ("products   float32 by oneDNN" in report) == onednn
