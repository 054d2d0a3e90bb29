"""The LoRA linear against HF PEFT's, one layer at a time: time, memory and error relative to the frozen linear.

    python benchmarks/lora_linear.py                                    # a CPU: GPT-2's shapes, 512 rows, 2 minutes
    python benchmarks/lora_linear.py --device cuda --quick --out benchmarks/results/lora-linear-h200.json
    python benchmarks/lora_linear.py --device cuda --tune               # rows for tiles.py and choice.py
    python benchmarks/lora_linear.py --nf4 --out benchmarks/results/lora-nf4-cpu.json      # on an NF4 weight

PEFT has three columns, because its default is its slowest setting: adapters in the base's dtype; the default (float32
adapters on a bfloat16 base); and the default under autocast. Each row holds the errors against float64 (float32 on a
GPU), PEFT's errors, and the norms of the gradients; if an error is above 1.25 times PEFT's, the row is a FAIL without a
ratio. On a GPU a second column replays a CUDA graph: kernel time without Python overhead. With --nf4 the weight is in 4
bits, PEFT's layer wraps bitsandbytes' Linear4bit, and the frozen linear has the dequantized weight.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import measure
import peft
import torch
import torch.nn.functional as F
from minipeft_kernels import Call, UnavailableBackend, choose_backend, lora_linear
from torch import Tensor, nn

from minipeft.models.quantized import QuantizedWeight, quantize_weight

GPT2 = [(768, 2304), (768, 3072), (3072, 768)]
LLAMA = [(4096, 4096), (4096, 11008), (11008, 4096), (4096, 1024), (4096, 14336)]
QUICK = [(768, 3072), (4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]  # 8192 rows: the protocol's quick set
REST = [(768, 768), (768, 50257), (4096, 6144), (14336, 4096), (4096, 32000)]  # only with --all
ALL_ROWS, ALL_RANKS = [1, 4, 16, 64, 512, 2048, 8192, 16384], [8, 16, 64, 128]
reasons_shown: set[str] = set()  # reasons why a backend is not measured, printed once


@dataclass(frozen=True)
class Problem:
    """One linear with its adapter and inputs."""

    weight: Tensor  # [N, K]
    bias: Tensor  # [N]
    lora_A: Tensor  # [r, K], float32
    lora_B: Tensor  # [N, r], float32
    inputs: list[tuple[Tensor, Tensor]]  # x [M, K] and dY [M, N]
    scale: float
    dropout: float
    drawn: Tensor | None = None  # with an NF4 weight: the weight before it was quantized, and its codes
    quantized: QuantizedWeight | None = None


def main() -> None:
    """Measure each shape, and write and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser, rounds=15)
    parser.add_argument("--rows", type=int, nargs="+", help="M; on a CPU 512, on a GPU 8192 and 2048")
    parser.add_argument("--rank", type=int, nargs="+", default=[16])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--dtypes", nargs="+", help="float32 and bfloat16 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--shapes", nargs="+", help="KxN ...; GPT-2's, on a GPU Llama's too")
    parser.add_argument("--compile", action="store_true", help="torch.compile'd PEFT too (always on a GPU)")
    parser.add_argument("--quick", action="store_true", help="five shapes with 8192 rows (512 on a CPU)")
    parser.add_argument("--all", action="store_true", help="every shape of the protocol, M 1 to 16384, ranks 8 to 128")
    parser.add_argument("--nf4", action="store_true", help="a frozen weight in NF4, beside bitsandbytes'")
    parser.add_argument("--tune", action="store_true", help="time every backend and tile instead, and print the tables")
    arguments = parser.parse_args()
    gpu = arguments.device.startswith("cuda")
    usual = QUICK if arguments.quick else GPT2 + LLAMA if gpu else GPT2
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes or []] or usual
    if arguments.all:
        shapes, arguments.rows, arguments.rank = [*shapes, *REST], ALL_ROWS if gpu else ALL_ROWS[:5], ALL_RANKS
    dtypes = arguments.dtypes or (["bfloat16"] if gpu else ["float32", "bfloat16"])
    default = [512] if not gpu else [8192] if arguments.quick else [8192, 2048]
    many = itertools.product(
        arguments.threads, arguments.rows or default, shapes, arguments.rank, dtypes, arguments.dropout
    )
    rows: list[measure.Row] = []
    for threads, m, (k, n), rank, dtype, dropout in many:
        torch.set_num_threads(threads)
        given = problem(m, k, n, rank, getattr(torch, dtype), dropout, arguments.device)
        if arguments.nf4:
            given = quantize(given)
        if arguments.tune:
            tune(given, arguments.device)
            continue
        found = compare(given, threads, arguments)
        measure.show_rows(found)
        rows += found
        if arguments.out:
            measure.write_rows(arguments.out, rows)


def problem(m: int, k: int, n: int, r: int, dtype: torch.dtype, dropout: float, device: str) -> Problem:
    """Draw a layer whose update has the size of its base output, and inputs to cycle through."""
    random = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random, device=device)
    sets = measure.count_input_sets(m * (k + n) * dtype.itemsize, device)
    return Problem(
        weight=(draw(n, k) / k**0.5).to(dtype),
        bias=draw(n).to(dtype),
        lora_A=(draw(r, k) / k**0.5).to(dtype).float(),
        lora_B=(draw(n, r) / r**0.5).to(dtype).float(),
        inputs=[(draw(m, k).to(dtype), draw(m, n).to(dtype)) for _ in range(sets)],
        scale=2.0,
        dropout=dropout,
    )


def quantize(given: Problem) -> Problem:
    """Return the same layer on a weight in NF4; `weight` becomes the dequantized values."""
    quantized = quantize_weight(given.weight, "nf4")
    weight = quantized.dequantize().to(given.weight.dtype)
    return dataclasses.replace(given, weight=weight, drawn=given.weight, quantized=quantized)


@dataclass(frozen=True)
class Variant:
    """An implementation of the layer, and the two matrices that it trains (none for the frozen linear)."""

    call: Callable[[Tensor], Tensor]
    trained: tuple[Tensor, ...] = ()


def compare(given: Problem, threads: int, arguments: argparse.Namespace) -> list[measure.Row]:
    """Time forward, and forward with backward, of every variant; each row holds its errors and norms."""
    (x, dy), *_ = given.inputs
    torch.compiler.reset()  # else the second shape compiles with dynamic sizes, and the ninth runs uncompiled
    variants = make_variants(given, arguments)
    plain = dataclasses.replace(given, dropout=0.0)  # PEFT draws another mask, so errors are compared without dropout
    checks = {
        name: check(variant, plain) for name, variant in make_variants(plain, arguments).items() if variant.trained
    }
    found = []
    for kind in ("forward", "forward + backward"):
        calls = {name: repeat_over_inputs(variant, given, kind != "forward") for name, variant in variants.items()}
        if kind == "forward" and not given.dropout and given.quantized is None:
            calls["k-concat"] = make_k_concat(given)
            checks["k-concat"] = Check({"y": relative(make_k_concat(given)(), exact(given)["y"])}, {})
        if x.is_cuda:
            calls |= record_graphs(calls, len(given.inputs))
        rows = measure.measure(
            calls,
            name=f"lora_linear {kind}",
            shape=f"{len(x)}x{x.shape[1]}x{dy.shape[1]} r{len(given.lora_A)}",
            dtype=str(x.dtype).removeprefix("torch."),
            device=arguments.device,
            rounds=arguments.rounds,
            seconds=0.02 if x.is_cuda else 0.0,
            threads=threads,
            busy=arguments.busy,
            packages=("peft", "triton") if given.quantized is None else ("peft", "triton", "bitsandbytes"),
            note=f"dropout {given.dropout}{', nf4' if given.quantized is not None else ''}",
        )
        found += [judge(row, checks) for row in rows]
    return found


def record_graphs(calls: dict[str, Callable[[], object]], sets: int) -> dict[str, Callable[[], object]]:
    """Return CUDA graphs of each call that can be captured, one for each set of inputs, as "NAME, graph"."""
    found = {}
    for name, call in calls.items():
        try:
            found[f"{name}, graph"] = measure.record_graph(call, sets)
        except RuntimeError as reason:
            print(f"# {name} cannot be captured: {str(reason).splitlines()[0]}")
            torch.cuda.synchronize()
    return found


def judge(row: measure.Row, checks: dict[str, Check]) -> measure.Row:
    """Add errors, norms and ratios to a row; if an error is above 1.25 times PEFT's: FAIL without a ratio."""
    graph = ", graph" if row.variant.endswith(", graph") else ""
    m, k, n = (int(part) for part in row.shape.split()[0].split("x"))
    tflops = 2e-12 * m * k * n * (2 if "backward" in row.benchmark else 1) / row.median  # of the frozen product alone
    extra: dict[str, object] = {"times_frozen": 1 / row.ratios[f"frozen{graph}"], "tflops": tflops}
    extra["of_ceiling"] = tflops / float(str(row.surroundings["ceiling_tflops"]))
    extra |= {f"faster than {name}": measure.compare_speed(row, name) for name in row.ratios if "peft" in name}
    variant = row.variant.removesuffix(graph) if graph else row.variant
    if variant not in checks:
        return dataclasses.replace(row, extra=extra)
    mine, peer = checks[variant], checks["peft, same dtype"]
    shown = {"errors": mine.errors, "peft_errors": peer.errors, "compute_gradient_norms": mine.norms}
    worse = [name for name in mine.errors if mine.errors[name] > 1.25 * peer.errors[name] + 1e-7]
    if worse or not all(norm > 0 for norm in mine.norms.values()):
        return dataclasses.replace(row, ratio=0.0, note=f"{row.note}; FAIL: {worse}", extra=shown)
    return dataclasses.replace(row, extra=extra | shown)


def make_variants(given: Problem, arguments: argparse.Namespace) -> dict[str, Variant]:
    """Return the frozen linear, PEFT's variants and the available backends, by name."""
    variants = {"frozen": Variant(lambda x: F.linear(x, given.weight, given.bias))}
    variants["peft, same dtype"] = make_peft_layer(given, upcast=False)
    if given.weight.dtype != torch.float32:  # in float32 the three are the same
        default = variants["peft, default"] = make_peft_layer(given, upcast=True)
        variants["peft, autocast"] = Variant(under_autocast(default.call), default.trained)
    if arguments.compile or given.weight.is_cuda:
        same = make_peft_layer(given, upcast=False)
        variants["peft, compiled"] = Variant(torch.compile(same.call, dynamic=False), same.trained)
    return variants | {backend: make_ours(given, backend) for backend in find_backends(given)}


def under_autocast(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the call under autocast to the dtype of x, as a trainer with bf16=True runs it."""

    def cast(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, x.dtype):
            return call(x)

    return cast


def find_backends(given: Problem) -> list[str]:
    """Return the training backends that can run on this device and dtype."""
    (x, dy), *_ = given.inputs
    call = Call(x.device, x.dtype, *x.shape, dy.shape[1], len(given.lora_A), given.dropout > 0, True)
    found = []
    for backend in ("reference", "hybrid", "fused"):
        try:
            found.append(choose_backend(backend, call))
        except UnavailableBackend as reason:
            if str(reason) not in reasons_shown:
                print(f"# not measured: {reason}")
            reasons_shown.add(str(reason))
    return found


def make_ours(given: Problem, backend: str) -> Variant:
    """Return the layer on one of this project's backends."""
    A, B = given.lora_A.clone().requires_grad_(), given.lora_B.clone().requires_grad_()
    weight = given.weight if given.quantized is None else given.quantized
    call = lambda x: lora_linear(x, weight, given.bias, A, B, given.scale, dropout=given.dropout, backend=backend)
    return Variant(call, (A, B))


def make_peft_layer(given: Problem, upcast: bool) -> Variant:
    """Return HF PEFT's layer with these weights, built as its users do, through get_peft_model."""
    model = nn.ModuleDict({"linear": make_linear4bit(given) if given.quantized is not None else make_linear(given)})
    r = len(given.lora_A)
    config = peft.LoraConfig(r=r, lora_alpha=given.scale * r, lora_dropout=given.dropout, target_modules=["linear"])
    peft.get_peft_model(model, config, autocast_adapter_dtype=upcast)
    layer, dtype = model["linear"], torch.float32 if upcast else given.weight.dtype
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    A.weight, B.weight = (nn.Parameter(t.clone().to(dtype)) for t in (given.lora_A, given.lora_B))
    return Variant(layer, (A.weight, B.weight))


def make_linear(given: Problem) -> nn.Module:
    """Return torch's linear with this weight and bias."""
    n, k = given.weight.shape
    linear = nn.Linear(k, n, device="meta")
    linear.weight, linear.bias = nn.Parameter(given.weight), nn.Parameter(given.bias)
    return linear


def make_linear4bit(given: Problem) -> nn.Module:
    """Return bitsandbytes' linear with this weight in NF4 and scales quantized in their turn."""
    import bitsandbytes

    assert given.drawn is not None
    (n, k), dtype = given.drawn.shape, given.drawn.dtype
    linear = bitsandbytes.nn.Linear4bit(k, n, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
    linear.load_state_dict({"weight": given.drawn, "bias": given.bias})
    return linear.to(given.drawn.device)


def repeat_over_inputs(variant: Variant, given: Problem, backward: bool) -> Callable[[], object]:
    """Return a function without arguments that cycles through the inputs; backward gives dX, dA and dB."""
    turn = itertools.cycle(given.inputs)

    def forward_only() -> Tensor:
        with torch.no_grad():
            return variant.call(next(turn)[0])

    def both() -> tuple[Tensor, ...]:
        x, dy = next(turn)
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(variant.call(leaf), [leaf, *variant.trained], dy)

    return both if backward else forward_only


def make_k_concat(given: Problem) -> Callable[[], object]:
    """Return forward as ONE torch product: [x | s] [W | scale B]^T, for a producer that leaves room beside x.

    The producer of x (a norm, an activation) would write rows of K + 64 entries, of which s takes r; B is copied beside
    W after each step of the optimizer. Nothing of size [M, N] is read again, and cuBLAS computes the product.
    """
    (n, k), r = given.weight.shape, len(given.lora_A)
    wide = torch.zeros(n, k + 64, dtype=given.weight.dtype, device=given.weight.device)  # [N, K + 64]
    wide[:, :k], wide[:, k : k + r] = given.weight, given.scale * given.lora_B
    A = given.lora_A.to(wide.dtype)
    rows = []
    for x, _ in given.inputs:
        rows.append(torch.zeros(len(x), k + 64, dtype=x.dtype, device=x.device))  # [M, K + 64]
        rows[-1][:, :k] = x
    turn = itertools.cycle(rows)

    def forward() -> Tensor:
        with torch.no_grad():
            both = next(turn)
            both[:, k : k + r] = both[:, :k] @ A.T  # [M, r]
            return F.linear(both, wide, given.bias)  # [M, N]

    return forward


def check(variant: Variant, given: Problem) -> Check:
    """Return the relative errors of y, dX, dA and dB against float64 (float32 on a GPU), and the gradients' norms."""
    x, dy = given.inputs[0]
    truth = exact(given)
    leaf = x.detach().requires_grad_()
    y = variant.call(leaf)
    got = dict(zip(truth, [y.detach(), *torch.autograd.grad(y, [leaf, *variant.trained], dy)]))
    errors = {name: relative(got[name], truth[name]) for name in truth}
    return Check(errors, {name: got[name].float().norm().item() for name in ("dX", "dA", "dB")})


def exact(given: Problem) -> dict[str, Tensor]:
    """Return y, dX, dA and dB of the first input without dropout, in float64 (float32 on a GPU)."""
    x, dy = (t.to(torch.float32 if t.is_cuda else torch.float64) for t in given.inputs[0])
    W, b, A, B = (t.to(x.dtype) for t in (given.weight, given.bias, given.lora_A, given.lora_B))
    s, dS = x @ A.T, given.scale * dy @ B  # [M, r] each
    y, dX = x @ W.T + b + given.scale * s @ B.T, dy @ W + dS @ A
    return {"y": y, "dX": dX, "dA": dS.T @ x, "dB": given.scale * dy.T @ s}


def relative(found: Tensor, truth: Tensor) -> float:
    """Return |found - truth| / |truth|."""
    return ((found.to(truth.dtype) - truth).norm() / truth.norm()).item()


@dataclass(frozen=True)
class Check:
    """The errors and gradient norms of a variant."""

    errors: dict[str, float]
    norms: dict[str, float]


def tune(given: Problem, device: str) -> None:
    """Time each tile of each kernel, then each backend; print rows for tiles.TUNED and choice.MEASURED."""
    from minipeft_kernels import launch, tiles

    (x, dy), *_ = given.inputs
    architecture, _ = launch._describe_gpu(x)
    rank, dropped = tiles.pad_rank(len(given.lora_A)), given.dropout > 0
    picked = tiles.pick
    for kernel in tiles.TILES:
        times, keys = {}, set()
        for tile in tiles.list_tiles(kernel, architecture, len(given.lora_A), dropped):

            def forced(name: str, *where: Any, tile: Any = tile, kernel: str = kernel, keys: set = keys) -> Any:
                if name != kernel:
                    return picked(name, *where)
                keys.add((architecture, kernel, where[2], where[3], rank, where[5]))  # as pick asks its table
                return tile

            tiles.pick = forced
            backend = "hybrid" if kernel == "expand_add" else "fused"
            times[tile] = measure_seconds(make_ours(given, backend), given, device)
        tiles.pick = picked
        best = min(times, key=lambda tile: times[tile])
        print(f"{kernel}: " + ", ".join(f"{tile} {1e3 * time:.3f} ms" for tile, time in times.items()))
        for key in sorted(keys):
            print(f"    TUNED: {key}: {best},")
    backends = {backend: measure_seconds(make_ours(given, backend), given, device) for backend in find_backends(given)}
    key = (architecture, 1 << (len(x) - 1).bit_length(), x.shape[1], dy.shape[1], rank, dropped)
    print(f"    MEASURED: {key}: {min(backends, key=lambda backend: backends[backend])!r},  # {backends}")


def measure_seconds(variant: Variant, given: Problem, device: str) -> float:
    """Return the median seconds of forward and backward."""
    call = repeat_over_inputs(variant, given, backward=True)
    rows = measure.measure({"it": call}, name="tune", shape="", dtype="bfloat16", device=device, rounds=7, seconds=0.01)
    return rows[0].median


if __name__ == "__main__":
    main()
