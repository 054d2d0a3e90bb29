"""The reference backend against float64, HF PEFT and finite differences; its operators and saved tensors."""

import copy
import itertools
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import FrameType

import peft
import pytest
import torch
import torch.nn.functional as F
from minipeft_kernels import (
    Part,
    UnavailableBackend,
    group_rows,
    lora_linear,
    lora_linear_reference,
    lora_linears,
    lora_linears_reference,
    lora_rows,
    make_dropout,
    make_keep_mask,
    make_lora_linear,
    make_lora_linears,
)
from minipeft_kernels.dropout import GUESSED, make_small_mask
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

SHAPES = [(70, 96, 130, 1), (33, 64, 48, 8), (128, 256, 192, 16), (65, 130, 97, 64), (40, 200, 160, 128)]  # M, K, N, r


@pytest.fixture(autouse=True)
def _poison() -> object:
    """Fill uninitialized memory with NaN, so that an entry that is not written fails."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(m: int, k: int, n: int, r: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Return x, W, b, A, B and dY scaled so that y, s and the update are all near 1."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)
    x, W, b, A = draw(m, k), draw(n, k) / k**0.5, draw(n), draw(r, k) / k**0.5
    return tuple(t.to(dtype) for t in (x, W, b, A, draw(n, r) / r**0.5, draw(m, n)))


def compute_gradients(call: Callable[..., Tensor], dy: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Return the call's output and its gradient with respect to each input."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


class FixedMask(torch.nn.Module):
    """Dropout with a given mask, so that PEFT's layer and ours drop the same entries."""

    def __init__(self, mask: Tensor, keep: float) -> None:
        super().__init__()
        self.mask, self.keep = mask, keep

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.mask.to(x.dtype) / self.keep)


def make_peft_layer(W: Tensor, b: Tensor, A: Tensor, B: Tensor, scale: float) -> torch.nn.Module:
    """Return HF PEFT's LoRA linear with these weights, adapters in the dtype of W."""
    base = torch.nn.Linear(W.shape[1], W.shape[0], dtype=W.dtype)
    base.load_state_dict({"weight": W, "bias": b})
    config = peft.LoraConfig(r=len(A), lora_alpha=scale * len(A))
    layer = peft.tuners.lora.Linear(base, "a", config, r=len(A), lora_alpha=scale * len(A)).to(W.dtype)
    layer.lora_A["a"].weight.data, layer.lora_B["a"].weight.data = A.clone(), B.clone()
    return layer


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def exact(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, dy: Tensor, mask: Tensor, keep: float) -> list[Tensor]:
    """Return y, dX, dA and dB in float64, by autograd on equation 3."""
    W, b, mask = W.double(), b.double(), mask.double() / keep
    call = lambda x, A, B: x @ W.T + b + 1.3 * ((x * mask) @ A.T) @ B.T
    return compute_gradients(call, dy.double(), x.double(), A.double(), B.double())


def compute_peft(
    x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, dy: Tensor, mask: Tensor, keep: float
) -> list[Tensor]:
    """Return the same as HF PEFT computes it, in the dtype of the inputs."""
    layer = make_peft_layer(W, b, A, B, 1.3)
    layer.lora_dropout["a"] = FixedMask(mask, keep)
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, layer.lora_A["a"].weight, layer.lora_B["a"].weight], dy)]


def shuffle(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, dy: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Return the same problem with permuted rows, columns and ranks, so that every sum has another order."""
    random = torch.Generator().manual_seed(0)
    m, k, n, r = (torch.randperm(size, generator=random) for size in (*x.shape, *B.shape))
    return x[m][:, k], W[n][:, k], b[n], A[r][:, k], B[n][:, r], dy[m][:, n], mask[m][:, k]


def measure_log_errors(shape: tuple[int, ...], dtype: torch.dtype, dropout: float) -> Tensor:
    """Return log errors [seed, variant, quantity]: ours, PEFT's, and PEFT's with permuted sums."""
    rows = []
    for seed in range(10):
        x, W, b, A, B, dy = problem(*shape, dtype, seed)
        drop = make_dropout(dropout, seed)
        mask = torch.ones(x.shape) if drop is None else make_keep_mask(drop, *x.shape).float()
        given, keep = (x, W, b, A, B, dy, mask), 1.0 if drop is None else drop.keep
        call = lambda x, A, B: lora_linear(x, W, b, A, B, 1.3, dropout=dropout, seed=seed)  # noqa: B023
        ours = compute_gradients(call, dy, x, A.float(), B.float())
        assert [t.dtype for t in ours] == [dtype, dtype, torch.float32, torch.float32]
        again = shuffle(*given)
        want, want_again = exact(*given, keep), exact(*again, keep)
        found = [(ours, want), (compute_peft(*given, keep), want), (compute_peft(*again, keep), want_again)]
        rows.append([[relative_error(*pair) for pair in zip(got, true)] for got, true in found])
    return torch.tensor(rows).log()


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mean_error_in_16_bits_is_no_larger_than_pefts(
    shape: tuple[int, ...], dtype: torch.dtype, dropout: float
) -> None:
    """y, dX, dA and dB against float64, without tolerance: PEFT rounds each operator to 16 bits, we s and results."""
    ours, peers, _ = measure_log_errors(shape, dtype, dropout).exp().mean(0)
    assert (ours <= peers).all(), ours / peers


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_mean_error_in_float32_is_pefts_but_for_the_order_of_sums(dropout: float) -> None:
    """Both round only in their sums, so the order of summation decides at random which error is larger.

    The standard error of that is measured: PEFT's error against PEFT's error on the same problem permuted. Over 50
    draws the mean log ratio may exceed 0 by four standard errors.
    """
    errors = torch.cat(
        [measure_log_errors(shape, torch.float32, dropout) for shape in SHAPES]
    )  # [draw, whose, quantity]
    ours, peers, again = errors.unbind(1)
    chance = (again - peers).std(0) / len(errors) ** 0.5
    assert (chance < 0.03).all()
    assert ((ours - peers).mean(0) <= 4 * chance).all(), ((ours - peers).mean(0), chance)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_derivative_against_finite_differences(dropout: float, bias: bool) -> None:
    """Three projections of one x with different widths, ranks and scales; every input is trained, W and b too."""
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    flat, scales = [], []
    for n, r, scale in [(4, 2, 0.7), (3, 1, 2.0), (4, 3, -1.0)]:
        _, W, b, A, B, _ = problem(1, 5, n, r, torch.float64, n + r)
        flat += [t.requires_grad_() for t in (W, b, A, B)]
        scales.append(scale)

    def call(x: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        rows = [flat[4 * i : 4 * i + 4] for i in range(3)]
        parts = [Part(W, b if bias else None, A, B, scale) for (W, b, A, B), scale in zip(rows, scales)]
        return tuple(lora_linears(x, parts, dropout=dropout, seed=7))

    assert torch.autograd.gradcheck(call, (x, *flat))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_projections_that_share_x_equal_one_call_each(dropout: float) -> None:
    parts = [Part(*problem(9, 12, n, r, torch.float64, n)[1:5], 1.5) for n, r in [(8, 2), (6, 3)]]
    x = problem(9, 12, 1, 1, torch.float64, 0)[0].view(3, 3, 12).requires_grad_()
    together = lora_linears(x, parts, dropout=dropout, seed=3)
    apart = [lora_linear(x, *part, dropout=dropout, seed=3) for part in parts]
    for a, b in zip(together, apart):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(sum(y.sin().sum() for y in ys), x)[0] for ys in (together, apart)]
    torch.testing.assert_close(*grads)


def test_without_gradients_equals_with_them() -> None:
    x, W, b, A, B, _ = problem(5, 8, 6, 2, torch.float32, 0)
    with torch.no_grad():
        free = lora_linear(x, W, b, A, B, 0.5)
    assert free.grad_fn is None
    assert torch.equal(free, lora_linear(x.requires_grad_(), W, b, A, B, 0.5))
    assert lora_linear(x[:0], W, b, A, B, 0.5).shape == (0, 6)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_function_of_a_layer_gives_lora_linears_bits(dtype: torch.dtype, dropout: float) -> None:
    """y, dX, dA, dB and the base's own gradients, for one row, many, and none; as a matrix and as a batch."""
    product = make_lora_linear("auto", torch.device("cpu"))
    for shape, size in (((33,), 33), ((3, 11), 33), ((1,), 1), ((0,), 0)):
        x, W, b, A, B, dy = problem(size, 20, 12, 4, dtype, 3)
        x, dy = x.view(*shape, 20), dy.view(*shape, 12)
        leaves = (x, W, b, A.to(torch.promote_types(dtype, torch.float32)), B)
        got = compute_gradients(lambda *five: product(*five, 1.3, dropout, 5), dy, *leaves)
        want = compute_gradients(lambda *five: lora_linear(*five, 1.3, dropout=dropout, seed=5), dy, *leaves)
        assert all(torch.equal(a, b_) and a.dtype == b_.dtype for a, b_ in zip(got, want, strict=True))
        with torch.no_grad():
            assert torch.equal(product(*leaves, 1.3, dropout, 5), want[0])
    with torch.autocast("cpu", torch.bfloat16):
        x, W, b, A, B, _ = problem(5, 8, 6, 2, torch.float32, 0)
        assert torch.equal(product(x, W, b, A, B, 2.0), lora_linear(x, W, b, A, B, 2.0))
    assert product(*(t.to("meta") for t in (x, W, b, A, B)), 2.0).shape == (5, 6)


def test_the_backend_is_chosen_before_the_call() -> None:
    """A layer on a CPU gets the reference; on a GPU, and for another backend, the choice depends on the call."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert make_lora_linear("auto", cpu) is make_lora_linear("reference", cuda) is lora_linear_reference
    for backend, device in (("auto", cuda), ("fused", cpu)):
        assert make_lora_linear(backend, device) is not lora_linear_reference
    with pytest.raises(ValueError, match="no backend is named 'fast'"):
        make_lora_linear("fast", cpu)
    with pytest.raises(UnavailableBackend, match="backend='decode' cannot run here"):
        make_lora_linear("decode", cpu)(*problem(5, 8, 6, 2, torch.float32, 0)[:5], 1.0, 0.5)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_layers_that_share_x_get_lora_linears_bits(dropout: float) -> None:
    """The unchecked function: y, dX, dA and dB of three projections, with and without gradients, under autocast too."""
    products = make_lora_linears("auto", torch.device("cpu"))
    assert products is lora_linears_reference
    x = problem(33, 20, 1, 1, torch.float32, 0)[0].view(3, 11, 20)
    parts = [Part(*problem(1, 20, n, r, torch.float32, n)[1:5], 1.3) for n, r in [(12, 4), (8, 2), (12, 1)]]
    leaves = [x, *(t for part in parts for t in part[2:4])]

    def run(compute: Callable[..., Sequence[Tensor]], *leaves: Tensor) -> list[Tensor]:
        given = [p._replace(lora_A=A, lora_B=B) for p, A, B in zip(parts, leaves[1::2], leaves[2::2])]
        return list(compute(leaves[0], given, dropout, 5))

    trained = [t.clone().requires_grad_() for t in leaves]
    got, want = run(products, *trained), run(lora_linears, *trained)
    free = run(products, *leaves)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(got, want, free, strict=True))
    grads = [torch.autograd.grad(sum(y.sin().sum() for y in ys), trained) for ys in (got, want)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        low = run(products, *leaves)
        assert all(a.dtype == torch.bfloat16 and torch.equal(a, b) for a, b in zip(low, run(lora_linears, *leaves)))
    meta = [Part(*(t.to("meta") for t in p[:4]), p.scale) for p in parts]  # type: ignore[union-attr]
    assert [y.shape for y in products(x.to("meta"), meta)] == [(3, 11, 12), (3, 11, 8), (3, 11, 12)]


def list_calls(call: Callable[[], object]) -> list[str]:
    """Return the functions of minipeft_kernels that are called, in order."""
    names: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_globals["__name__"].startswith("minipeft_kernels."):
            names.append(frame.f_code.co_name)

    sys.setprofile(note)
    call()
    sys.setprofile(None)
    return names


def test_the_product_is_two_calls_away() -> None:
    """The functions between a layer and x W^T, in order."""
    x, W, b, A, B, _ = problem(5, 8, 6, 2, torch.float32, 0)
    product = make_lora_linear("auto", x.device)
    names = list_calls(lambda: product(x.requires_grad_(), W, b, A, B, 2.0))
    assert names == ["lora_linear_reference", "forward", "shrink", "matmul_weight_t", "compute_scale"]


def test_a_layers_call_checks_nothing() -> None:
    """lora_linears checks shapes, dtypes and the backend; the function of a layer does not."""
    x, *four, _ = problem(5, 8, 6, 2, torch.float32, 0)
    checks = {"_check", "_choose", "import_backend", "check_name"}
    parts = [Part(*four, 2.0)] * 3
    products = make_lora_linears("auto", x.device)
    assert not checks & set(list_calls(lambda: products(x, parts)))
    assert {"_check", "_choose"} <= set(list_calls(lambda: lora_linears(x, parts)))
    with pytest.raises(ValueError, match="no backend is named 'fast'"):
        make_lora_linears("fast", x.device)
    with pytest.raises(UnavailableBackend, match="backend='decode' cannot run here"):
        make_lora_linears("decode", x.device)(x, parts, 0.5)


def test_the_weight_of_a_part_as_a_plain_tensor() -> None:
    _, W, b, A, B, _ = problem(5, 8, 6, 2, torch.bfloat16, 0)
    part = Part(W, b, A, B, 1.0)
    assert part.dense(torch.bfloat16) is W
    assert torch.equal(part.dense(torch.float32), W.float())


def test_zero_b_changes_no_bit() -> None:
    """A new adapter: y equals the frozen linear's output bit for bit."""
    for dtype, dropout in itertools.product([torch.float32, torch.bfloat16], [0.0, 0.5]):
        x, W, b, A, B, _ = problem(33, 64, 48, 8, dtype, 1)
        assert torch.equal(lora_linear(x, W, b, A, torch.zeros_like(B), 2.0, dropout=dropout), F.linear(x, W, b))


def test_autocast_casts_as_linear_does() -> None:
    x, W, b, A, B, dy = problem(6, 8, 4, 2, torch.float32, 0)
    low = torch.bfloat16
    with torch.autocast("cpu", low):
        got = compute_gradients(lambda x, A, B: lora_linear(x, W, b, A, B, 2.0), dy.to(low), x, A, B)
    cast = lambda x, A, B: lora_linear(x.to(low), W.to(low), b.to(low), A, B, 2.0)
    for a, b_ in zip(got, compute_gradients(cast, dy.to(low), x, A, B)):
        assert torch.equal(a, b_)
    assert got[0].dtype == low
    assert got[1].dtype == torch.float32


@pytest.mark.parametrize("seed", [None, 11])
def test_checkpointing_changes_no_bit(seed: int | None) -> None:
    """Recomputation uses the same mask, with a given seed or one drawn from torch's generator."""
    x, W, b, A, B, dy = problem(40, 32, 24, 4, torch.float32, 0)
    block = lambda x, A, B: lora_linear(x.sin(), W, b, A, B, 2.0, dropout=0.4, seed=seed).cos()
    torch.manual_seed(5)
    plain = compute_gradients(block, dy, x, A, B)
    torch.manual_seed(5)
    again = compute_gradients(lambda *leaves: checkpoint(block, *leaves, use_reentrant=False), dy, x, A, B)
    for a, b_ in zip(plain, again):
        assert torch.equal(a, b_)


def test_two_runs_are_the_same_to_the_bit_and_a_deep_copy_too() -> None:
    x, W, b, A, B, dy = problem(65, 130, 97, 8, torch.bfloat16, 0)
    call = lambda x, A, B: lora_linear(x, W, b, A, B, 2.0, dropout=0.1, seed=1)
    first = compute_gradients(call, dy, x, A, B)
    for again in (compute_gradients(call, dy, x, A, B), compute_gradients(call, dy, *copy.deepcopy((x, A, B)))):
        assert all(torch.equal(a, b_) for a, b_ in zip(first, again))


# Dropout


def plain_mask(seed: int, rows: int, columns: int, drops: int) -> Tensor:
    """Return the mask in Python's integers: a second implementation of README's definition."""
    wrap = (1 << 32) - 1

    def mix(h: int, key: int = 0) -> int:
        h = ((h ^ h >> 16) * 0x7FEB352D + key) & wrap
        h = ((h ^ h >> 15) * 0x846CA68B) & wrap
        return h ^ h >> 16

    z, m64 = (seed + 0x9E3779B97F4A7C15), (1 << 64) - 1
    z = ((z & m64 ^ (z & m64) >> 30) * 0xBF58476D1CE4E5B9) & m64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & m64
    z ^= z >> 31
    mask = torch.empty(rows, columns, dtype=torch.bool)
    for i, j in itertools.product(range(rows), range(columns)):
        key = mix((i * 0x9E3779B1 + (z & wrap)) & wrap)
        h = mix((j // 2 * 0x9E3779B1 + key) & wrap, mix(key ^ z >> 32))
        level = h >> 16 if j % 2 else h & 0xFFFF
        mask[i, j] = (level ^ 0x8000) >= drops  # flipping the sign bit maps signed order to unsigned order
    return mask


@pytest.mark.parametrize("seed", [0, 1, 2**61 + 12345, -3])
def test_mask_is_the_published_hash(seed: int) -> None:
    drop = make_dropout(0.3, seed)
    assert torch.equal(make_keep_mask(drop, 7, 11), plain_mask(seed, 7, 11, drop.drops))
    assert torch.equal(make_keep_mask(drop, 3, 11, first=4), make_keep_mask(drop, 7, 11)[4:])
    small = make_small_mask(drop, 7, 11, torch.float32)  # NumPy's operators; above, torch's
    assert torch.equal(small, plain_mask(seed, 7, 11, drop.drops).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_masks_that_are_computed_ahead_are_those_of_the_next_seeds(dtype: torch.dtype) -> None:
    """40 draws, some of another shape or after a number that someone else drew: each mask is that of its seed alone,
    and the guesses draw nothing from torch's generator."""
    torch.manual_seed(3)
    shapes = [(6, 2000) if i % 7 == 3 else (60, 101) for i in range(40)]
    got, drops, found = [], [], 0
    for i, shape in enumerate(shapes):
        torch.rand(int(i % 10 == 9))
        drops.append(make_dropout(0.3, None))
        found += (drops[-1], *shape, dtype) in GUESSED
        got.append(make_small_mask(drops[-1], *shape, dtype))
    after = torch.get_rng_state()
    torch.manual_seed(3)
    seeds = []
    for i in range(40):
        torch.rand(int(i % 10 == 9))
        seeds.append(int(torch.randint(2**62, ())))
    assert torch.equal(after, torch.get_rng_state())
    assert found > 15
    for mask, seed, shape in zip(got, seeds, shapes):
        assert torch.equal(mask, make_keep_mask(make_dropout(0.3, seed), *shape, dtype=dtype))


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_mask_is_uniform_and_independent(dropout: float) -> None:
    """10^6 decisions within 5 standard deviations: overall, by parity, row and column, between neighbours and seeds."""
    rows, columns = 1000, 1000
    drop = make_dropout(dropout, 0)
    keep = drop.keep
    mask = make_keep_mask(drop, rows, columns).double() - keep
    deviation = (keep * (1 - keep)) ** 0.5
    assert abs(mask.mean()) < 5 * deviation / mask.numel() ** 0.5
    for half in (mask[:, ::2], mask[:, 1::2]):
        assert abs(half.mean()) < 5 * deviation / half.numel() ** 0.5
    assert mask.mean(0).abs().max() < 5 * deviation / rows**0.5
    assert mask.mean(1).abs().max() < 5 * deviation / columns**0.5
    neighbours = [(mask[:, :-d], mask[:, d:]) for d in (1, 2, 3, 8)] + [(mask[:-d], mask[d:]) for d in (1, 2, 8)]
    others = [make_keep_mask(make_dropout(dropout, seed), rows, columns).double() - keep for seed in (1, 2, 2**32)]
    neighbours += [(mask, other) for other in others]
    for a, b in neighbours:
        assert abs((a * b).mean()) < 5 * deviation**2 / a.numel() ** 0.5


def test_dropout_keeps_the_mean_and_drops_only_the_adapters_input() -> None:
    x, W, b, A, B, _ = problem(64, 96, 8, 4, torch.float64, 0)
    base, full = F.linear(x, W, b), lora_linear(x, W, b, A, B, 2.0)
    seeds = range(300)
    runs = torch.stack([lora_linear(x, W, b, A, B, 2.0, dropout=0.2, seed=seed) for seed in seeds])
    assert (runs.mean(0) - full).norm() < 5 * (runs.std(0) / len(seeds) ** 0.5).norm()
    drop = make_dropout(0.2, 9)
    want = base + 2.0 / drop.keep * ((x * make_keep_mask(drop, 64, 96)) @ A.T) @ B.T
    torch.testing.assert_close(lora_linear(x, W, b, A, B, 2.0, dropout=0.2, seed=9), want)


def test_a_mask_computed_in_blocks_equals_one_mask() -> None:
    """On a CPU the mask is computed in blocks of rows; this shape takes several."""
    x, W, b, A, B, dy = problem(600, 1024, 16, 4, torch.float64, 0)
    drop = make_dropout(0.5, 2)
    mask = make_keep_mask(drop, 600, 1024)
    plain = lambda x, A, B: F.linear(x, W, b) + 2.0 / drop.keep * ((x * mask) @ A.T) @ B.T
    got = compute_gradients(lambda x, A, B: lora_linear(x, W, b, A, B, 2.0, dropout=0.5, seed=2), dy, x, A, B)
    for a, b_ in zip(got, compute_gradients(plain, dy, x, A, B)):
        torch.testing.assert_close(a, b_)


# The bank's rows


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_rows_equal_one_call_each(tokens: int) -> None:
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)
    x, W, b, A, B = draw(6, tokens, 10), draw(7, 10), draw(7), draw(4, 3, 10), draw(4, 7, 3)
    A[2, 1:], B[2, :, 1:] = 0, 0  # an adapter of rank 1 among those of rank 3
    rows, scales = torch.tensor([2, -1, 0, 3, 0, -1]), torch.tensor([0.5, 9.0, 2.0, -1.0])
    y = lora_rows(x, W, b, A, B, rows, scales)
    for i, j in enumerate(rows.tolist()):
        want = F.linear(x[i], W, b) if j < 0 else lora_linear(x[i], W, b, A[j], B[j], scales[j].item())
        torch.testing.assert_close(y[i], want)
    torch.testing.assert_close(lora_rows(x[:, 0], W, b, A, B, rows, scales), y[:, 0])
    alone, both = torch.tensor([-1, 0, 0, 0, -1, 0]), torch.cat([A[:1], A[:1]])
    want = lora_rows(x, W, b, both, torch.cat([B[:1], B[:1]]), alone, scales[:1].expand(2))
    torch.testing.assert_close(lora_rows(x, W, b, A[:1], B[:1], alone, scales[:1]), want)


def test_rows_are_grouped_by_adapter() -> None:
    groups = group_rows([3, 0, -1, 3, 3])
    assert groups.present == (0, 3)
    assert groups.places.tolist() == [1, 0, 0, 0, 3, 4]
    assert groups.slots.tolist() == [0, 3, 4, 5]
    assert groups.targets.tolist() == [1, 0, 3, 4]
    assert not groups.in_order
    assert group_rows([0, 0, 1, 1]).in_order


def test_rows_are_independent() -> None:
    """A row without an adapter equals the base bit for bit, and an adapter that no row uses may hold NaN."""
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random)
    x, W, A, B = draw(5, 2, 10), draw(7, 10), draw(4, 3, 10), draw(4, 7, 3)
    A[2], B[1] = torch.nan, torch.inf
    rows = torch.tensor([3, -1, 0, -1, 3])
    y = lora_rows(x, W, None, A, B, rows)
    assert torch.equal(y[rows < 0], F.linear(x, W)[rows < 0])
    for i, j in enumerate(rows.tolist()):
        if j >= 0:
            torch.testing.assert_close(y[i], lora_linear(x[i], W, None, A[j], B[j], 1.0))
    assert torch.equal(lora_rows(x, W, None, A, B, group_rows(rows.tolist())), y)
    assert torch.equal(lora_rows(x, W, None, A, B, torch.full((5,), -1)), F.linear(x, W))
    with torch.autocast("cpu", torch.bfloat16):
        assert lora_rows(x, W, None, A, B, rows).dtype == torch.bfloat16


# Operators, memory traffic and saved tensors


class Counter(TorchDispatchMode):
    """Counts operators, and the bytes of the tensors that they read and write; views are free."""

    FREE = ("view", "t", "transpose", "slice", "split", "expand", "detach", "unsqueeze", "alias", "empty", "as_strided")

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: dict | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name != "promote_types" and name.lstrip("_") not in self.FREE and not name.startswith(("split", "empty")):
            outs = out if isinstance(out, tuple | list) else [out]
            tensors = [t for t in (*args, *outs) if isinstance(t, Tensor)]
            self.operators.append(name)
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


def test_operators_and_bytes_of_forward_and_backward() -> None:
    """Operators of forward and backward, and their memory traffic in passes over one [M, K] matrix.

    M = K = N, so W is one pass too. Forward: x, W and y for the base, x again for s, y read and written again for the
    update: 6. Backward: dY and W and dX for the base, dY twice more (dS, dB), x once (dA), dX twice (its update): 8.
    PEFT, counted in the same way, has 9 and 12, and more operators.
    """
    m = k = n = 512
    x, W, b, A, B, dy = problem(m, k, n, 4, torch.float32, 0)
    leaves = [t.requires_grad_() for t in (x, A, B)]
    layer = make_peft_layer(W, b, A.detach(), B.detach(), 2.0).requires_grad_(False)
    weights = [layer.lora_A["a"].weight.requires_grad_(), layer.lora_B["a"].weight.requires_grad_()]
    cost = {}
    for who, call, wanted in (
        ("ours", lambda: lora_linear(x, W, b, A, B, 2.0), leaves),
        ("peft", lambda: layer(x), [x, *weights]),
    ):
        with Counter() as forward:
            y = call()
        with Counter() as backward:
            torch.autograd.grad(y, wanted, dy)
        cost[who] = [forward, backward]
    passes = {who: [counter.bytes / (m * k * 4) for counter in counters] for who, counters in cost.items()}
    forward, backward = cost["ours"]
    assert forward.operators == ["mm", "addmm", "addmm_"]
    assert sorted(backward.operators) == ["addmm_", "addmm_", "mm", "mm", "mm", "mul_"]
    assert passes["ours"] == pytest.approx([6, 8], abs=0.3)
    assert [len(c.operators) for c in cost["peft"]] > [3, 8]
    assert passes["peft"][0] >= 8.9
    assert passes["peft"][1] >= 11.9


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_only_x_and_s_are_saved_for_backward(dropout: float) -> None:
    """x is saved once for all projections; the only new tensor is s, [M, R]."""
    m, k = 256, 64
    x = problem(m, k, 1, 1, torch.float32, 0)[0].requires_grad_()
    parts = [Part(*problem(1, k, n, 4, torch.float32, n)[1:5], 2.0) for n in (64, 32, 32)]
    own = {t.data_ptr() for part in parts for t in part[:4]}
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        lora_linears(x, parts, dropout=dropout, seed=0)
    assert sorted(t.numel() for p, t in kept.items() if p not in own) == [m * 12, m * k]


# Refusals


def test_mismatched_arguments_are_refused() -> None:
    x, W, b, A, B, _ = problem(5, 8, 6, 2, torch.float32, 0)
    with pytest.raises(ValueError, match=r"shapes do not fit: x \(5, 7\)"):
        lora_linear(x[:, :7], W, b, A, B, 1.0)
    with pytest.raises(ValueError, match=r"bias \(5,\) must be \[6\]"):
        lora_linear(x, W, b[:5], A, B, 1.0)
    with pytest.raises(ValueError, match=r"x is torch\.bfloat16 and the weight torch\.float32"):
        lora_linear(x.bfloat16(), W, b, A, B, 1.0)
    for dropout in (1.0, -0.1, 1e-6, float("nan")):
        with pytest.raises(ValueError, match="cannot be honoured"):
            lora_linear(x, W, b, A, B, 1.0, dropout=dropout)
    with pytest.raises(ValueError, match="no backend is named 'fast'"):
        lora_linear(x, W, b, A, B, 1.0, backend="fast")
    with pytest.raises(ValueError, match="one adapter for each row"):
        lora_rows(x, W, b, A[None], B[None], torch.zeros(4, dtype=torch.int64), torch.ones(1))
    with pytest.raises(ValueError, match=r"must be \[adapters"):
        lora_rows(x, W, b, A[None], B[None, :3], torch.zeros(5, dtype=torch.int64), torch.ones(1))
    for wrong in (1, -2):
        with pytest.raises(ValueError, match=rf"rows names adapter {wrong}, and there are 1; -1 means none"):
            lora_rows(x, W, b, A[None], B[None], torch.tensor([0, 0, wrong, 0, 0]), torch.ones(1))


def test_importing_imports_no_triton() -> None:
    code = "import sys, minipeft_kernels; print([m for m in ('triton', 'minipeft') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
