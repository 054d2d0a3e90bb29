"""The overhead of a call: a small LoRALinear, where products cost little, against plain torch operators and HF PEFT.

    python benchmarks/calls.py
    python benchmarks/calls.py --out benchmarks/results/lora-calls-cpu.json
    python benchmarks/calls.py --shapes 16x64 256x64 64x256 16x768 256x768 --counts one \\
        --passes "forward + backward" --rounds 15 --out benchmarks/results/lora-small-cpu.json

A shape is tokens x width: 32x64 is x [32, 64] and W [64, 64]; r is 8, float32. "one" is a single linear. "three" are
linears that share x, as q, k and v do: plain torch and PEFT call each in turn, minipeft computes them in one call
(`together`). Plain torch is the baseline:

    y = F.linear(x, W, b) + s * F.linear(F.linear(drop(x), A), B)

Each row holds the error of y against float64, without dropout.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Sequence

import measure
import torch
import torch.nn.functional as F
from lora_linear import Problem, exact, make_peft_layer, problem, relative
from torch import Tensor, nn

from minipeft.adapters.lora import LoRAConfig, LoRALinear

RANK = 8
COUNTS = {"one": 1, "three": 3}
PASSES = ("forward, no gradient", "forward", "forward + backward")
Call = Callable[[Tensor], Sequence[Tensor]]


def main() -> None:
    """Measure one linear and three, and write and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser, rounds=21)
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--shapes", nargs="+", default=["32x64"], help="tokens x width (default: %(default)s)")
    parser.add_argument("--counts", nargs="+", choices=COUNTS, default=list(COUNTS))
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    arguments = parser.parse_args()
    rows: list[measure.Row] = []
    many = itertools.product(arguments.threads, arguments.shapes, arguments.dropout, arguments.counts)
    for threads, shape, dropout, count in many:
        torch.set_num_threads(threads)
        m, width = map(int, shape.split("x"))
        given = problem(m, width, width, RANK, torch.float32, dropout, arguments.device)
        found = compare(given, count, threads, arguments)
        measure.show_rows(found)
        rows += found
        if arguments.out:
            measure.write_rows(arguments.out, rows)


def compare(given: Problem, count: str, threads: int, arguments: argparse.Namespace) -> list[measure.Row]:
    """Time each pass of every variant in interleaved rounds; each row holds its error and its ratio to plain torch."""
    layers, truth = [given] * COUNTS[count], exact(given)["y"]
    x, dy = given.inputs[0]
    plain = [dataclasses.replace(given, dropout=0.0)] * COUNTS[count]
    errors = {name: relative(call(x)[-1].detach(), truth) for name, call in make_variants(plain).items()}
    assert max(errors.values()) < 1e-6, errors  # float32 rounding: nothing else is timed
    found = []
    for passes in arguments.passes:
        calls = {name: repeat(call, passes, x, dy) for name, call in make_variants(layers).items()}
        rows = measure.measure(
            calls,
            name=f"{count}, {passes}",
            shape=f"{len(x)}x{x.shape[1]}x{x.shape[1]} r{RANK}",
            dtype="float32",
            device=arguments.device,
            rounds=arguments.rounds,
            seconds=0.02,
            threads=threads,
            busy=arguments.busy,
            packages=("peft",),
            note=f"dropout {given.dropout}",
        )
        for row in rows:
            row.extra.update(times_base=1 / row.ratios["plain torch"], error=errors[row.variant])
        found += rows
    return found


def make_variants(layers: list[Problem]) -> dict[str, Call]:
    """Return each way to compute the linears of one x, by name."""
    ours, plain = [make_layer(given) for given in layers], [make_plain(given) for given in layers]
    pefts = [make_peft_layer(given, upcast=False).call for given in layers]
    return {
        "plain torch": lambda x: [linear(x) for linear in plain],
        "peft": lambda x: [linear(x) for linear in pefts],
        "minipeft": (lambda x: ours[0].together(x, ours)) if len(ours) > 1 else (lambda x: [ours[0](x)]),
    }


def make_layer(given: Problem) -> LoRALinear:
    """Return minipeft's layer with these weights."""
    linear = nn.Linear(*given.weight.shape[::-1], device="meta")
    linear.weight, linear.bias = (nn.Parameter(t, requires_grad=False) for t in (given.weight, given.bias))
    layer = LoRALinear(linear, RANK, given.scale * RANK, LoRAConfig(RANK, given.scale * RANK, given.dropout))
    layer.lora_A.data, layer.lora_B.data = given.lora_A.clone(), given.lora_B.clone()
    return layer


def make_plain(given: Problem) -> Callable[[Tensor], Tensor]:
    """Return the equation in torch's own operators."""
    A, B = given.lora_A.clone().requires_grad_(), given.lora_B.clone().requires_grad_()

    def linear(x: Tensor) -> Tensor:
        s = F.linear(F.dropout(x, given.dropout) if given.dropout else x, A)  # [M, r]
        return F.linear(x, given.weight, given.bias) + given.scale * F.linear(s, B)  # [M, N]

    return linear


def repeat(call: Call, passes: str, x: Tensor, dy: Tensor) -> Callable[[], object]:
    """Return a pass as a call without arguments; backward reaches x, A and B."""

    def forward_only() -> object:
        with torch.no_grad():
            return call(x)

    leaf = x.clone().requires_grad_()
    if passes == "forward + backward":
        return lambda: torch.autograd.backward(ys := call(leaf), [dy] * len(ys))
    return forward_only if passes == "forward, no gradient" else lambda: call(leaf)


if __name__ == "__main__":
    main()
