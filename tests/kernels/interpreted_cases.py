"""The Triton backends on the CPU, through Triton's interpreter. Run by test_triton_backends.py in a process of its own.

The interpreter runs each program of a kernel in NumPy, so shapes are small and ragged. bfloat16 is widened after each
load (see triton_blocks.py); these tests check the arithmetic of the kernels, masks and edges, not the tensor cores.
"""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from minipeft_kernels import (
    Part,
    choice,
    launch,
    lora_linear,
    lora_linears,
    lora_rows,
    make_dropout,
    make_keep_mask,
    tiles,
    vector_add,
)
from test_lora_linear import compute_gradients, compute_peft, problem
from test_lora_linear import exact as exact_by_autograd
from torch import Tensor

import minipeft
from minipeft.adapters.lora import find_lora_layers
from minipeft.models import FAMILIES
from minipeft.models.quantized import QuantizedWeight, quantize_weight
from minipeft.runs.comparison import CompareConfig, compare

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPSILON = torch.finfo(torch.float32).eps  # about the difference of two orders of summation
SHAPES = [(70, 96, 130, 1), (130, 64, 48, 16), (33, 136, 97, 24), (20, 70, 65, 128)]  # M, K, N, r


@pytest.fixture(autouse=True)
def _poison() -> object:
    """Fill uninitialized memory with NaN, so that an entry that no program writes fails."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def part(k: int, n: int, r: int, seed: int, dtype: torch.dtype, bias: bool = True) -> Part:
    """Return a projection with float32 adapters whose update has the size of its base output."""
    weight = draw(n, k, seed=seed, dtype=dtype) / k**0.5
    A, B = draw(r, k, seed=seed + 1, dtype=torch.float32) / k**0.5, draw(n, r, seed=seed + 2, dtype=torch.float32)
    return Part(weight, draw(n, seed=seed + 3, dtype=dtype) if bias else None, A, B / r**0.5, 1.3)


def run(backend: str, x: Tensor, parts: list[Part], dropout: float) -> list[Tensor]:
    """Return each y, then dx, dA and dB, for a fixed dY."""
    leaves = [x.clone().requires_grad_()]
    for p in parts:
        leaves += [p.lora_A.clone().requires_grad_(), p.lora_B.clone().requires_grad_()]
    trained = [p._replace(lora_A=leaves[2 * i + 1], lora_B=leaves[2 * i + 2]) for i, p in enumerate(parts)]
    ys = lora_linears(leaves[0], trained, dropout=dropout, seed=17, backend=backend)
    dys = [draw(*y.shape, seed=50 + i, dtype=y.dtype) for i, y in enumerate(ys)]
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, dys)]


def exact(x: Tensor, parts: list[Part], dropout: float) -> list[Tensor]:
    """Return the same in float64, by the reference backend (which test_lora_linear.py checks)."""
    wide = [Part(*(None if t is None else t.double() for t in p[:4]), p.scale) for p in parts]  # type: ignore[arg-type]
    return run("reference", x.double(), wide, dropout)


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["hybrid", "fused"])
def test_error_is_no_larger_than_pefts(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """y, dX, dA and dB against float64, with and without dropout, in 16 bits with no allowance.

    In float32, which these backends do not run on a GPU, short sums in the interpreter's order have a larger error than
    MKL's: there the limit is 1.25 times the reference's error (about 2e-7).
    """
    x, W, b, A, B, dy = problem(*shape, dtype, seed=0)
    bias = None if shape[3] == 16 else b
    b = torch.zeros_like(b) if bias is None else b
    for dropout in (0.0, 0.25):
        drop = make_dropout(dropout, 17)
        given = (torch.ones(x.shape), 1.0) if drop is None else (make_keep_mask(drop, *x.shape).float(), drop.keep)
        call = lambda backend: (
            lambda x, A, B: lora_linear(x, W, bias, A, B, 1.3, dropout=dropout, seed=17, backend=backend)  # noqa: B023
        )
        got, reference = (compute_gradients(call(p), dy, x, A.float(), B.float()) for p in (backend, "reference"))
        peers, want = compute_peft(x, W, b, A, B, dy, *given), exact_by_autograd(x, W, b, A, B, dy, *given)
        for name, a, r, peer, true in zip(("y", "dX", "dA", "dB"), got, reference, peers, want):
            limit = 1.25 * error(r, true) + 2 * EPSILON if dtype == torch.float32 else error(peer, true)
            assert error(a, true) <= limit, (name, dropout)


@pytest.mark.parametrize(("tile", "dropout"), [(0, 0.5), (1, 0.0), (2, 0.5), (3, 0.5)])
def test_every_tile_size_gives_the_same_answer(tile: int, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs in each direction, and three projections in one product for dX."""
    monkeypatch.setattr(
        tiles, "pick", lambda kernel, *_, **__: tiles.TILES[kernel][min(tile, len(tiles.TILES[kernel]) - 1)]
    )
    x = draw(130, 136, seed=0, dtype=torch.float32)
    parts = [part(136, n, r, n, torch.float32) for n, r in [(258, 20), (40, 4), (40, 4)]]
    for a, b in zip(run("fused", x, parts, dropout), exact(x, parts, dropout)):
        assert error(a, b) < 4 * EPSILON


@pytest.mark.parametrize("backend", ["hybrid", "fused"])
@pytest.mark.parametrize(("count", "rank"), [(2, 80), (4, 4), (1, 150)])
def test_projections_that_share_x(backend: str, count: int, rank: int) -> None:
    """Up to three share the product for dX; ranks that add up to more than 64 are taken 64 at a time."""
    x, parts = (
        draw(3, 11, 40, seed=0, dtype=torch.float32),
        [part(40, 24, rank, 10 * i, torch.float32) for i in range(count)],
    )
    for a, b in zip(run(backend, x, parts, 0.25), exact(x, parts, 0.25)):
        assert error(a, b) < 4 * EPSILON


@pytest.mark.parametrize("backend", ["hybrid", "fused"])
@pytest.mark.parametrize(("format", "k", "count"), [("nf4", 70, 2), ("nf4", 128, 4), ("nf4", 65, 1), ("int8", 70, 2)])
def test_a_quantized_weight_gives_what_its_values_give(backend: str, format: str, k: int, count: int) -> None:
    """Up to four projections of one x; with 70 columns a block of 64 lies in two rows, with 65 a byte does."""
    for dtype, limit in [(torch.float32, 20 * EPSILON), (torch.bfloat16, 4e-3)]:  # 4e-3: another order of summation
        x = draw(33, k, seed=3, dtype=dtype)
        plain = [part(k, n, 8, seed=n, dtype=dtype) for n in (65, 40, 33, 24)[:count]]
        packed = [p._replace(weight=quantize_weight(p.weight, format)) for p in plain]
        values = [p._replace(weight=q.weight.dequantize().to(dtype)) for p, q in zip(plain, packed)]
        for ours, wanted in zip(run(backend, x, packed, 0.1), run(backend, x, values, 0.1), strict=True):
            assert error(ours, wanted.double()) <= limit
        with torch.no_grad():
            y, wanted = (lora_linear(x[:5], *p[0], backend="decode") for p in (packed, values))
        assert error(y, wanted.double()) <= limit


def test_the_fused_backend_never_dequantizes_a_whole_nf4_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product reads codes and scales: an eighth of float32's bytes for W, and no call of `dequantize`."""
    monkeypatch.setattr(QuantizedWeight, "dequantize", None)
    k = n = 128
    x = draw(32, k, seed=0, dtype=torch.float32)
    p = part(k, n, 8, 1, torch.float32)._replace(weight=quantize_weight(draw(n, k, seed=9, dtype=torch.float32), "nf4"))
    plain = p._replace(weight=draw(n, k, seed=9, dtype=torch.float32))
    for count in (1, 3):
        names, read = count_launches(monkeypatch, lambda: run("fused", x, [p] * count, 0.1))  # noqa: B023
        assert (names.count("seeded_forward"), names.count("seeded_backward")) == (count, 1)
        whole = count_launches(monkeypatch, lambda: run("fused", x, [plain] * count, 0.1))[1]  # noqa: B023
        saved = n * k * (4 - 0.5 - 4 / 64)  # bytes of one product
        assert whole - read == pytest.approx((count + 1) * saved, rel=0.02)  # `count` products forward, one backward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_dequantizes_to_the_bit(dtype: torch.dtype) -> None:
    """An identity times W^T, and times W, is the dequantized weight."""
    n, k = 70, 96
    weight = quantize_weight(draw(n, k, seed=1, dtype=dtype), "nf4")
    codes = Part(weight, None, torch.zeros(1, k), torch.zeros(n, 1), 1.0).nf4()
    assert codes is not None
    none = torch.zeros(k, 0, dtype=dtype), torch.zeros(n, 0, dtype=dtype)
    y = launch.seeded_forward(torch.eye(k, dtype=dtype), codes, None, *none, 1.0)  # W^T
    assert torch.equal(y.t(), weight.dequantize().to(dtype))
    dx = launch.seeded_backward([torch.eye(n, dtype=dtype)], [codes], torch.zeros(n, 0, dtype=dtype), none[0].t(), None)
    assert torch.equal(dx, weight.dequantize().to(dtype))


def test_two_runs_agree_to_the_bit() -> None:
    x, parts = draw(150, 64, seed=0, dtype=torch.bfloat16), [part(64, 130, 8, 0, torch.bfloat16)]
    assert all(torch.equal(a, b) for a, b in zip(run("fused", x, parts, 0.1), run("fused", x, parts, 0.1)))


def test_the_mask_is_the_published_one() -> None:
    """With identity matrices, shrink, gradient_A and expand_add return the mask."""
    for dropout, seed in [(0.1, 0), (0.5, 2**40 + 1), (0.9, -5)]:
        drop = make_dropout(dropout, seed)
        assert drop is not None
        m, k = 70, 48
        want = make_keep_mask(drop, m, k).float()
        ones, eye = torch.ones(m, k), torch.eye(k)
        assert torch.equal(launch.shrink(ones, eye, drop), want)
        assert torch.equal(launch.gradient_A(ones, torch.eye(m), drop), want)
        assert torch.equal(launch.expand_add(torch.zeros(m, k), ones, eye, drop), want)
        assert torch.equal(launch.seeded_backward([torch.zeros(m, 1)], [torch.zeros(1, k)], ones, eye, drop), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode(dtype: torch.dtype) -> None:
    for m, k, n, r in [(1, 96, 130, 4), (5, 600, 257, 24), (3, 70, 40, 100)]:
        x, W, b, A, B, dy = problem(m, k, n, r, dtype, seed=0)
        with torch.no_grad():
            got, reference = (
                lora_linear(x, W, b, A.float(), B.float(), 1.3, backend=p) for p in ("decode", "reference")
            )
        given = (x, W, b, A, B, dy, torch.ones(x.shape), 1.0)
        peer, want = compute_peft(*given)[0], exact_by_autograd(*given)[0]
        limit = 1.1 * error(reference, want) + 2 * EPSILON if dtype == torch.float32 else error(peer, want)
        assert error(got, want) <= limit


@pytest.mark.parametrize("tokens", [1, 3])
def test_decode_with_an_adapter_for_each_row(tokens: int) -> None:
    """Rows with -1 equal the base bit for bit, and an adapter that no row uses may hold NaN."""
    x, base = draw(6, tokens, 300, seed=0, dtype=torch.float32), part(300, 140, 4, 1, torch.float32)
    A, B = draw(4, 3, 300, seed=5, dtype=torch.float32), draw(4, 140, 3, seed=6, dtype=torch.float32)
    A[1], B[1] = torch.nan, torch.inf
    rows, scales = torch.tensor([2, -1, 0, 3, 0, -1]), torch.tensor([0.5, 9.0, 2.0, -1.0])
    got = lora_rows(x, base.weight, base.bias, A, B, rows, scales, backend="decode")
    want = lora_rows(x, base.weight, base.bias, A, B, rows, scales, backend="reference")
    assert error(got, want.double()) < 10 * EPSILON  # two float32 sums of 300
    assert torch.equal(got[rows < 0], F.linear(x, base.weight, base.bias)[rows < 0])


def test_the_readmes_first_kernel_runs(tmp_path: Path) -> None:
    """The code block of the README, in a file, since Triton reads a kernel's source."""
    readme = (Path(__file__).resolve().parents[2] / "kernels" / "README.md").read_text()
    script = tmp_path / "add.py"
    script.write_text(readme.split("```python\n")[1].split("```")[0])
    result = runpy.run_path(str(script))
    assert torch.equal(result["out"], result["x"] + result["y"])


def count_launches(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> tuple[list[str], int]:
    """Return the kernels that a call launches, and the bytes of their tensor arguments."""
    names: list[str] = []
    total = 0
    launched = launch.launch_kernel

    def count(kernel: object, grid: tuple[int, ...], *arguments: object, **settings: object) -> None:
        nonlocal total
        names.append(kernel.fn.__name__)  # type: ignore[attr-defined]
        tensors = {t.data_ptr(): t for t in arguments if isinstance(t, Tensor)}
        total += sum(t.numel() * t.element_size() for t in tensors.values())
        launched(kernel, grid, *arguments, **settings)

    monkeypatch.setattr(launch, "launch_kernel", count)
    call()
    return names, total


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_launches_and_bytes_of_the_fused_backend(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory traffic of the fused backend, in passes over one [M, K] matrix (M = K = N, so W is one too).

    Forward: x for s; x, W and y for the product: 4 passes in 2 kernels. Backward: dY for dS and dB; x for dA; dY, W and
    dX: 5 passes in 6 kernels, three of which add up small parts. The reference takes 6 and 8, PEFT 9 and 12.
    """
    monkeypatch.setattr(launch, "_describe_gpu", lambda x: (90, 4))  # so few multiprocessors that no sum is divided
    m = k = n = 256
    x, p = draw(m, k, seed=0, dtype=torch.float32).requires_grad_(), part(k, n, 1, 1, torch.float32, bias=False)
    leaves = [x, p.lora_A.requires_grad_(), p.lora_B.requires_grad_()]
    y = []
    forward, forward_bytes = count_launches(
        monkeypatch, lambda: y.append(lora_linear(x, *p, dropout=dropout, seed=0, backend="fused"))
    )
    assert forward == ["shrink", "seeded_forward"]
    backward, backward_bytes = count_launches(
        monkeypatch, lambda: torch.autograd.grad(y[0], leaves, torch.ones_like(y[0]))
    )
    assert backward == ["gradient_B", "reduce", "reduce", "gradient_A", "reduce", "seeded_backward"]
    assert forward_bytes / (m * k * 4) == pytest.approx(4, abs=0.1)
    assert backward_bytes / (m * k * 4) == pytest.approx(5, abs=0.25)


def test_backends_that_cannot_take_a_call_say_why() -> None:
    x, p = draw(4, 8, seed=0, dtype=torch.float32), part(8, 6, 2, 1, torch.float32)
    with pytest.raises(choice.UnavailableBackend, match="keeps nothing for backward"):
        lora_linear(x.requires_grad_(), *p, backend="decode")
    with pytest.raises(choice.UnavailableBackend, match="'reference' and 'decode'"):
        lora_rows(
            x, p.weight, None, p.lora_A[None], p.lora_B[None], torch.zeros(4).long(), torch.ones(1), backend="fused"
        )


GPT2 = {"vocab_size": 31, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
LLAMA = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 16}  # fmt: skip


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_twenty_training_steps_have_the_losses_of_the_reference(family: str) -> None:
    """Through minipeft.train, with dropout; LoRALinear computes q and v, which share x, in one call."""
    losses = {backend: train_losses(family, backend) for backend in ("reference", "hybrid", "fused")}
    assert losses["reference"][-1] < losses["reference"][0] - 0.1
    for backend in ("hybrid", "fused"):
        assert losses[backend] == pytest.approx(losses["reference"], rel=2e-5)


@pytest.mark.parametrize("backend", ["hybrid", "fused"])
def test_compare_runs_both_backends_and_names_the_module_in_which_one_is_wrong(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`minipeft compare --backend reference --backend-b BACKEND`, right and with a planted fault."""
    model = FAMILIES["gpt2"].decoder(FAMILIES["gpt2"].config(**GPT2))
    random, calls = torch.Generator().manual_seed(0), []
    model.initialize(random)
    minipeft.save_model(model, tmp_path / "model")
    minipeft.add_adapter(model, minipeft.LoRAConfig(rank=4, targets="all-linear"))
    for layer in find_lora_layers(model).values():
        layer.lora_B.data.normal_(0, 0.3, generator=random)
    minipeft.save_adapter(model, tmp_path / "adapter")
    source, module = str(tmp_path / "model"), choice.import_backend(backend)
    config = CompareConfig(source, source, adapter=str(tmp_path / "adapter"), backend="reference", backend_b=backend,
                           ids=tuple(range(1, 6)))  # fmt: skip
    forward, factor = module.forward, [1.0]

    def watched(x: Tensor, parts: list[Part], drop: object) -> tuple[list[Tensor], Tensor]:
        calls.append(parts[0].weight.shape)
        found, s = forward(x, parts, drop)
        return [y * factor[0] if y.shape[1] == 64 else y for y in found], s  # of c_fc alone

    monkeypatch.setattr(module, "forward", watched)
    found = compare(config)
    assert found.equal
    assert len(calls) == 4
    assert {row.stage for row in found.rows} == {"weight", "forward", "backward"}
    factor[0] = 1.01
    parted = compare(config)
    assert parted.first("weight") is None
    assert parted.first("forward").name == "transformer.h.0.mlp.c_fc"


def train_losses(family: str, backend: str) -> list[float]:
    """Train a tiny model for 20 steps, from one start, on one backend."""
    config, decoder = FAMILIES[family].config, FAMILIES[family].decoder
    model = decoder(
        config(**(GPT2 if family == "gpt2" else LLAMA | ({"sliding_window": 4} if family == "mistral" else {})))
    )
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=random).add_(1.0 if parameter.ndim == 1 else 0.0)  # norms, biases
    report = minipeft.add_adapter(
        model, minipeft.LoRAConfig(rank=4, alpha=8, dropout=0.1, targets="default", backend=backend), seed=0
    )
    assert report.backend == backend
    ids = torch.randint(0, 31, (2, 10), generator=random)
    batch = minipeft.Batch(ids, ids, torch.zeros_like(ids))
    config_ = minipeft.TrainConfig(steps=20, learning_rate=3e-2, seed=3)
    return [step.loss for step in minipeft.train(model, [batch] * 20, config_)]


@pytest.mark.parametrize("length", [1, 255, 256, 700])
def test_the_first_kernel_adds_vectors_of_any_length(length: int) -> None:
    x, y = draw(length, seed=1, dtype=torch.float32), draw(length, seed=2, dtype=torch.float32)
    assert torch.equal(vector_add.add(x, y), x + y)
