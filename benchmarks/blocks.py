"""Projections that share x, as a decoder has them: q, k and v; gate, up and down. Ours, HF PEFT's and the frozen ones.

    python benchmarks/blocks.py
    python benchmarks/blocks.py --device cuda --out benchmarks/results/lora-blocks-h200.json

One call of `lora_linears` reads and saves x once for all projections; PEFT's modules each read it, and each save a copy
where adapters are float32. Each row holds the bytes saved for backward, the norms of the gradients, their errors
against float64 (float32 on a GPU), PEFT's errors with adapters in the base's dtype, and the loss after 20 SGD steps. If
an error is more than 1.25 times PEFT's, or the loss differs from PEFT's (in bfloat16: under autocast) by more than 1e-3
of the initial loss, the row is a FAIL without a ratio.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import measure
import torch
import torch.nn.functional as F
from lora_linear import Problem, find_backends, make_peft_layer, problem, record_graphs, relative, under_autocast
from minipeft_kernels import Part, lora_linears
from torch import Tensor

CPU_SHAPES = {"qkv": (768, (768, 768, 768)), "mlp": (768, (2048, 2048))}  # K, and each N; mlp's down is N -> K
GPU_SHAPES = {"qkv": (4096, (4096, 1024, 1024)), "mlp": (4096, (14336, 14336))}
Linear = Callable[[Tensor], Tensor]
Build = Callable[[list[Problem]], "Block"]


@dataclass(frozen=True)
class Block:
    """A block as one function of x (q, k and v; or gate, up and down), with the matrices that it trains."""

    call: Callable[[Tensor], Sequence[Tensor]]
    trained: list[Tensor] = field(default_factory=list)


def main() -> None:
    """Measure both blocks, and write and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser, rounds=11)
    parser.add_argument("--rows", type=int, help="M; on a CPU 512, on a GPU 8192")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtypes", nargs="+", help="float32 and bfloat16 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--compile", action="store_true", help="torch.compile'd PEFT too (always on a GPU)")
    arguments = parser.parse_args()
    gpu = arguments.device.startswith("cuda")
    m = arguments.rows or (8192 if gpu else 512)
    dtypes = arguments.dtypes or (["bfloat16"] if gpu else ["float32", "bfloat16"])
    blocks = (GPU_SHAPES if gpu else CPU_SHAPES).items()
    rows: list[measure.Row] = []
    for threads, (name, (k, widths)), dtype, dropout in itertools.product(
        arguments.threads, blocks, dtypes, arguments.dropout
    ):
        torch.set_num_threads(threads)
        shapes = [(k, n) for n in widths] + ([(widths[0], k)] if name == "mlp" else [])
        layers = [problem(m, *s, arguments.rank, getattr(torch, dtype), dropout, arguments.device) for s in shapes]
        found = compare(name, layers, dtype, threads, arguments)
        measure.show_rows(found)
        rows += found
        if arguments.out:
            measure.write_rows(arguments.out, rows)


def compare(
    name: str, layers: list[Problem], dtype: str, threads: int, arguments: argparse.Namespace
) -> list[measure.Row]:
    """Time forward and backward of each way to compute a block; each row holds its saved bytes and its checks."""
    x = layers[0].inputs[0][0]
    build = list_builds(layers, arguments)
    plain = [dataclasses.replace(layer, dropout=0.0) for layer in layers]
    checks = {label: check(make(plain), plain) for label, make in build.items() if label != "frozen"}
    blocks = {label: make(layers) for label, make in build.items()}
    kept = {label: count_kept_bytes(block, layers) for label, block in blocks.items()}
    calls = {label: repeat_over_inputs(block, layers) for label, block in blocks.items()}
    calls |= record_graphs(calls, len(layers[0].inputs)) if x.is_cuda else {}
    shape = f"{len(x)}x{x.shape[1]} -> {' '.join(str(len(layer.weight)) for layer in layers)} r{arguments.rank}"
    found = measure.measure(
        calls,
        name=f"block {name}",
        shape=shape,
        dtype=dtype,
        device=arguments.device,
        rounds=arguments.rounds,
        seconds=0.02 if x.is_cuda else 0.0,
        threads=threads,
        busy=arguments.busy,
        packages=("peft", "triton"),
        note=f"dropout {layers[0].dropout}",
    )
    work = 4e-12 * len(x) * sum(layer.weight.numel() for layer in layers)  # TFLOP of the frozen products and their dX
    return [judge(row, kept, checks, work) for row in found]


def judge(row: measure.Row, kept: dict[str, int], checks: dict[str, dict[str, float]], work: float) -> measure.Row:
    """Add the checks and ratios to a row; if a check of ours is worse than PEFT's: FAIL without a ratio."""
    variant, graph, _ = row.variant.partition(", graph")
    extra: dict[str, object] = {"kept_bytes": kept[variant], **checks.get(variant, {})}
    if variant in checks:
        mine, peer, twin = checks[variant], checks["peft, same dtype"], checks.get("peft, autocast")
        extra |= {f"peft_{name}": peer[name] for name in ("error_of_dX", "error_of_adapters")}
        wanted = (twin or peer)[
            "loss_after_20_steps"
        ]  # of the same arithmetic: float32 adapters, cast for each product
        worse = [name for name in ("error_of_dX", "error_of_adapters") if mine[name] > 1.25 * peer[name] + 1e-7]
        worse += ["loss"] if abs(mine["loss_after_20_steps"] - wanted) > 1e-3 * mine["loss_at_start"] else []
        worse += [name for name in ("norm_of_dX", "smallest_norm_of_adapters") if not mine[name] > 0]
        if worse and "peft" not in variant:
            return dataclasses.replace(row, ratio=0.0, note=f"{row.note}; FAIL: {', '.join(worse)}", extra=extra)
    extra |= {"times_frozen": 1 / row.ratios[f"frozen{graph}"], "tflops": work / row.median}
    extra["of_ceiling"] = work / row.median / float(str(row.surroundings["ceiling_tflops"]))
    extra |= {f"faster than {name}": measure.compare_speed(row, name) for name in row.ratios if "peft" in name}
    return dataclasses.replace(row, extra=extra)


def list_builds(layers: list[Problem], arguments: argparse.Namespace) -> dict[str, Build]:
    """Return the builders of the frozen block, of PEFT's variants and of the available backends, by name."""
    build: dict[str, Build] = {"frozen": frozen, "peft, same dtype": lambda given: peft(given, upcast=False)}
    if layers[0].weight.dtype != torch.float32:  # in float32 the three are the same
        build["peft, default"] = lambda given: peft(given, upcast=True)
        build["peft, autocast"] = lambda given: peft(given, upcast=True, wrap=under_autocast)
    if arguments.compile or layers[0].weight.is_cuda:
        torch.compiler.reset()
        build["peft, compiled"] = lambda given: compiled(peft(given, upcast=False))
    return build | {
        backend: lambda given, backend=backend: ours(given, backend) for backend in find_backends(layers[0])
    }


def frozen(layers: list[Problem]) -> Block:
    """Return the block without adapters, the lower bound."""
    return Block(join([lambda x, given=given: F.linear(x, given.weight, given.bias) for given in layers], layers))


def peft(layers: list[Problem], upcast: bool, wrap: Callable[[Linear], Linear] = lambda call: call) -> Block:
    """Return the block of HF PEFT's linears, one module each."""
    variants = [make_peft_layer(given, upcast) for given in layers]
    calls = [wrap(variant.call) for variant in variants]
    return Block(join(calls, layers), [matrix for variant in variants for matrix in variant.trained])


def compiled(block: Block) -> Block:
    """Return the block compiled by torch.compile, as one graph."""
    return Block(torch.compile(block.call, dynamic=False), block.trained)


def ours(layers: list[Problem], backend: str) -> Block:
    """Return the block by lora_linears: the projections of one x in one call."""
    pairs = [(given.lora_A.clone().requires_grad_(), given.lora_B.clone().requires_grad_()) for given in layers]
    parts = [Part(given.weight, given.bias, A, B, given.scale) for given, (A, B) in zip(layers, pairs)]
    together = lambda x, some: lora_linears(x, some, dropout=layers[0].dropout, backend=backend)
    first, last = parts[: shared(layers)], parts[shared(layers) :]

    def call(x: Tensor) -> Sequence[Tensor]:
        ys = together(x, first)  # [M, N] each
        return together(F.silu(ys[0]) * ys[1], last) if last else ys

    return Block(call, [matrix for pair in pairs for matrix in pair])


def join(calls: Sequence[Linear], layers: list[Problem]) -> Callable[[Tensor], Sequence[Tensor]]:
    """Return a function of x that calls each linear: q, k and v; or down(silu(gate) up)."""
    first, last = calls[: shared(layers)], calls[shared(layers) :]

    def call(x: Tensor) -> Sequence[Tensor]:
        ys = [linear(x) for linear in first]  # [M, N] each
        return [last[0](F.silu(ys[0]) * ys[1])] if last else ys

    return call


def shared(layers: list[Problem]) -> int:
    """Return how many of the linears read the input of the block: all, or all but the last (down)."""
    return sum(layer.weight.shape[1] == layers[0].weight.shape[1] for layer in layers)


def repeat_over_inputs(block: Block, layers: list[Problem]) -> Callable[[], Sequence[Tensor]]:
    """Return forward and backward as a function without arguments that cycles through the inputs."""
    turn = itertools.cycle(range(len(layers[0].inputs)))
    return lambda: step(block, layers, next(turn))


def step(block: Block, layers: list[Problem], number: int) -> Sequence[Tensor]:
    """Run forward and backward: the gradients of x and of the trained matrices."""
    leaf = layers[0].inputs[number][0].detach().requires_grad_()  # [M, K]
    ys = block.call(leaf)
    return torch.autograd.grad(ys, [leaf, *block.trained], [given.inputs[number][1] for given in layers[-len(ys) :]])


def check(block: Block, layers: list[Problem]) -> dict[str, float]:
    """Return the errors and norms of the gradients of x and (the worst) of the adapters, and the loss of 20 steps."""
    truth = step(*exact(layers), 0)
    found = step(block, layers, 0)
    errors = [relative(mine, true) for mine, true in zip(found, truth, strict=True)]
    norms = [gradient.float().norm().item() for gradient in found]
    return {
        "error_of_dX": errors[0],
        "error_of_adapters": max(errors[1:]),
        "norm_of_dX": norms[0],
        "smallest_norm_of_adapters": min(norms[1:]),
        "loss_at_start": loss_after(0, block, layers),
        "loss_after_20_steps": loss_after(20, block, layers),
    }


def exact(layers: list[Problem]) -> tuple[Block, list[Problem]]:
    """Return PEFT's block in float64 (float32 on a GPU), and its layers, with the first input only."""
    wide = torch.float32 if layers[0].weight.is_cuda else torch.float64
    cast = lambda given: dataclasses.replace(
        given,
        weight=given.weight.to(wide),
        bias=given.bias.to(wide),
        inputs=[tuple(t.to(wide) for t in given.inputs[0])],
    )
    many = [cast(given) for given in layers]
    return peft(many, upcast=False), many


def loss_after(steps: int, block: Block, layers: list[Problem]) -> float:
    """Return the mean square of each token's mean output less a target, after some steps of plain SGD on one input."""
    x = layers[0].inputs[0][0]  # [M, K]
    target = torch.linspace(-1, 1, len(x), device=x.device)  # [M]
    compute_loss = lambda: (sum(y.float().mean(-1) for y in block.call(x)) - target).square().mean()
    for _ in range(steps):
        loss = compute_loss()
        for matrix, gradient in zip(block.trained, torch.autograd.grad(loss, block.trained)):
            matrix.data -= 0.005 * gradient / (gradient.norm() + 1e-12)
    with torch.no_grad():
        return compute_loss().item()


def count_kept_bytes(block: Block, layers: list[Problem]) -> int:
    """Return the bytes that forward saves for backward without the weights, each storage once."""
    own = {t.data_ptr() for layer in layers for t in (layer.weight, layer.bias)} | {t.data_ptr() for t in block.trained}
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        ys = block.call(layers[0].inputs[0][0].detach().requires_grad_())
    del ys
    return sum(size for place, size in kept.items() if place not in own)


if __name__ == "__main__":
    main()
