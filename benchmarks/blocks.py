"""Projections that share x, as a decoder has them: q, k and v; gate, up and down. Ours, HF PEFT's and the frozen ones.

    python benchmarks/blocks.py
    python benchmarks/blocks.py --device cuda --out benchmarks/results/lora-blocks-h200.json        # 2 minutes

One call of `lora_linears` reads x once for all its projections and keeps it once; PEFT's modules each read it, and each
keep a copy of their own where adapters are float32. Each row carries the bytes that backward keeps, and the loss after
20 steps of SGD from one start: it must be PEFT's to 1e-3, or there is no ratio.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import measure
import torch
import torch.nn.functional as F
from lora_linear import Problem, paths_here, peft_layer, problem
from minipeft_kernels import Part, lora_linears
from torch import Tensor

CPU_SHAPES = {"qkv": (768, (768, 768, 768)), "mlp": (768, (2048, 2048))}  # K, and each N; mlp's down is N -> K
GPU_SHAPES = {"qkv": (4096, (4096, 1024, 1024)), "mlp": (4096, (14336, 14336))}
Linear = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Block:
    """A block as one call of x, with the matrices that it trains."""

    call: Callable[[Tensor], Tensor]
    trained: list[Tensor] = field(default_factory=list)


def main() -> None:
    """Measure both blocks, and write and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, help="M; on a CPU 512, on a GPU 8192")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", help="float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="where the rows go, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    gpu = arguments.device.startswith("cuda")
    m, dtype = arguments.rows or (8192 if gpu else 512), arguments.dtype or ("bfloat16" if gpu else "float32")
    rows: list[measure.Row] = []
    for name, (k, widths) in (GPU_SHAPES if gpu else CPU_SHAPES).items():
        for dropout in arguments.dropout:
            shapes = [(k, n) for n in widths] + ([(widths[0], k)] if name == "mlp" else [])
            layers = [problem(m, *s, arguments.rank, getattr(torch, dtype), dropout, arguments.device) for s in shapes]
            found = compare(name, layers, dtype, arguments)
            measure.show_rows(found)
            rows += found
    if arguments.out:
        measure.write_rows(arguments.out, rows)


def compare(name: str, layers: list[Problem], dtype: str, arguments: argparse.Namespace) -> list[measure.Row]:
    """Time forward and backward of each way to compute a block; each row carries its kept bytes and its 20th loss."""
    build = {"frozen": frozen, "peft, same dtype": lambda given: peft(given, upcast=False)}
    if dtype != "float32":
        build["peft, default"] = lambda given: peft(given, upcast=True)
    for path in paths_here(layers[0]):
        build[path] = lambda given, path=path: ours(given, path)
    plain = [dataclasses.replace(layer, dropout=0.0) for layer in layers]
    losses = {label: loss_after(20, make(plain), plain) for label, make in build.items() if label != "frozen"}
    blocks = {label: make(layers) for label, make in build.items()}
    kept = {label: kept_bytes(block, layers) for label, block in blocks.items()}
    x = layers[0].inputs[0][0]
    shape = f"{len(x)}x{x.shape[1]} -> {' '.join(str(len(layer.weight)) for layer in layers)} r{arguments.rank}"
    found = measure.measure(
        {label: lambda block=block: step(block, layers) for label, block in blocks.items()},
        name=f"block {name}", shape=shape, dtype=dtype, device=arguments.device, rounds=arguments.rounds,
        seconds=0.02 if x.is_cuda else 0.0, packages=("peft", "triton"), note=f"dropout {layers[0].dropout}",
    )  # fmt: skip
    peer, times = losses["peft, same dtype"], {row.variant: row.median for row in found}
    rows = []
    for row in found:
        extra: dict[str, object] = {
            "times_frozen": row.median / times["frozen"],
            "kept_bytes": kept[row.variant],
        }
        extra |= {f"faster than {label}": t / row.median for label, t in times.items() if "peft" in label}
        loss = losses.get(row.variant)
        extra["loss_after_20_steps"] = loss
        fails = loss is not None and abs(loss - peer) > 1e-3 * abs(peer) and "peft" not in row.variant
        changes = {"ratio": 0.0, "note": row.note + "; FAIL: loss"} if fails else {"extra": extra}
        rows.append(dataclasses.replace(row, **changes))
    return rows


def frozen(layers: list[Problem]) -> Block:
    """Return the block without adapters: the floor."""
    calls = [lambda x, given=given: F.linear(x, given.weight, given.bias) for given in layers]
    return Block(lambda x: joined(lambda x: [call(x) for call in calls[: shared(layers)]], calls, x))


def peft(layers: list[Problem], upcast: bool) -> Block:
    """Return the block of HF PEFT's linears, one module each."""
    variants = [peft_layer(given, upcast) for given in layers]
    calls = [variant.call for variant in variants]
    trained = [matrix for variant in variants for matrix in variant.trained]
    return Block(lambda x: joined(lambda x: [call(x) for call in calls[: shared(layers)]], calls, x), trained)


def ours(layers: list[Problem], path: str) -> Block:
    """Return the block by lora_linears: the projections of one x in one call."""
    pairs = [(given.lora_A.clone().requires_grad_(), given.lora_B.clone().requires_grad_()) for given in layers]
    parts = [Part(given.weight, given.bias, A, B, given.scale) for given, (A, B) in zip(layers, pairs)]
    together = lambda x, some: lora_linears(x, some, dropout=layers[0].dropout, path=path)
    last: list[Callable[[Tensor], Tensor]] = [lambda x, part=part: together(x, [part])[0] for part in parts]
    return Block(
        lambda x: joined(lambda x: together(x, parts[: shared(layers)]), last, x), [t for pair in pairs for t in pair]
    )


def shared(layers: list[Problem]) -> int:
    """Return how many of the linears read the block's own x: all, or all but the last (down)."""
    return sum(layer.weight.shape[1] == layers[0].weight.shape[1] for layer in layers)


def joined(first: Linear, calls: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    """Return one number a token: of q, k and v their sum; of gate and up, silu(gate) up, and then down."""
    ys = first(x)
    if len(ys) == len(calls):
        return torch.cat([y.float().mean(-1, keepdim=True) for y in ys], -1).sum(-1)  # [M]
    return calls[-1](F.silu(ys[0]) * ys[1]).float().mean(-1)  # [M]


def step(block: Block, layers: list[Problem]) -> Sequence[Tensor]:
    """Do forward and backward once: the gradients of x and of what the block trains."""
    leaf = layers[0].inputs[0][0].detach().requires_grad_()
    return torch.autograd.grad(block.call(leaf).square().mean(), [leaf, *block.trained])


def loss_after(steps: int, block: Block, layers: list[Problem]) -> float:
    """Return the loss after some steps of plain SGD on one input."""
    x, target = (
        layers[0].inputs[0][0],
        torch.linspace(-1, 1, len(layers[0].inputs[0][0]), device=layers[0].weight.device),
    )
    for _ in range(steps):
        loss = (block.call(x) - target).square().mean()
        for matrix, gradient in zip(block.trained, torch.autograd.grad(loss, block.trained)):
            matrix.data -= 0.02 * gradient / (gradient.norm() + 1e-12)
    with torch.no_grad():
        return (block.call(x) - target).square().mean().item()


def kept_bytes(block: Block, layers: list[Problem]) -> int:
    """Return the bytes that forward keeps for backward, weights apart, each memory once."""
    own = {t.data_ptr() for layer in layers for t in (layer.weight, layer.bias)} | {t.data_ptr() for t in block.trained}
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        block.call(layers[0].inputs[0][0].detach().requires_grad_())
    return sum(size for place, size in kept.items() if place not in own)


if __name__ == "__main__":
    main()
