"""Float32 products on a CPU: torch's own beside oneDNN's, with their errors against float64; and attention.

    OMP_NUM_THREADS=1 python benchmarks/products.py --out benchmarks/results/products-cpu.json

The shapes [M, K, N] are those of linears of SmolLM2-135M and GPT-2 124M. The note gives GFLOP/s and the largest
error over the largest value of the float64 product. The switch is the one that minipeft turns on within a training step
(minipeft/models/products.py); bfloat16 is there for comparison. Attention is causal, forward and backward, with
SmolLM2's heads: torch's fused product, the same with oneDNN, and ours, which chooses by the number of columns.
"""

import argparse
import dataclasses
from collections.abc import Callable

import measure
import torch
from torch import Tensor
from torch.nn import functional as F

from minipeft.models import attention
from minipeft.models.products import fast_products, is_exact

SHAPES = ((1024, 576, 1536), (1024, 576, 192), (512, 768, 3072), (128, 576, 1536), (17, 576, 1536), (1, 576, 1536))
Product = Callable[[Tensor, Tensor, Tensor], Tensor]
COLUMNS = (34, 128, 256, 512, 1024)  # of attention
PRODUCTS: dict[str, Product] = {
    "forward": lambda x, W, dy: F.linear(x, W),
    "dX": lambda x, W, dy: dy @ W,
    "dW": lambda x, W, dy: dy.T @ x,
}


def main() -> None:
    """Measure each shape and product, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser, rounds=15)
    options = parser.parse_args()
    if not is_exact():
        print("# no AVX-512 here, or the switch means bfloat16: both variants are torch's own product")
    rows = []
    for shape in SHAPES:
        for name, product in PRODUCTS.items():
            rows += compare(name, product, shape, options)
    for columns in COLUMNS:
        rows += compare_attention(columns, options)
    measure.show_rows(rows)
    if options.out:
        measure.write_rows(options.out, rows)


def compare(name: str, product: Product, shape: tuple[int, int, int], options: argparse.Namespace) -> list[measure.Row]:
    """The rows of one product."""
    m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(size, generator=generator) for size in ((m, k), (n, k), (m, n))]
    low = [t.bfloat16() for t in given]

    def switched() -> Tensor:
        with fast_products():
            return product(*given)

    variants: dict[str, Callable[[], Tensor]] = {
        "torch": lambda: product(*given),
        "oneDNN": switched,
        "bfloat16": lambda: product(*low),
    }
    exact = product(*(t.double() for t in given))
    errors = {v: ((call().double() - exact).abs().amax() / exact.abs().amax()).item() for v, call in variants.items()}
    rows = measure.measure(
        variants,
        name=f"product, {name}",
        shape=f"{m} x {k} x {n}",
        dtype="float32",
        rounds=options.rounds,
        seconds=0.02,
        threads=options.threads[0],
        busy=options.busy,
    )
    rates = [2e-9 * m * k * n / row.median for row in rows]
    return [
        dataclasses.replace(row, note=f"{rate:.0f} GFLOP/s, off by {errors[row.variant]:.0e}")
        for row, rate in zip(rows, rates)
    ]


def compare_attention(columns: int, options: argparse.Namespace) -> list[measure.Row]:
    """The rows of attention over so many columns."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dy = (torch.randn(1, heads, columns, 64, generator=generator) for heads in (9, 3, 3, 9))
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def attend() -> list[Tensor]:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return list(torch.autograd.grad(y, leaves, dy))

    def switched() -> list[Tensor]:
        with fast_products():
            return attend()

    def ours() -> list[Tensor]:
        with fast_products():
            return list(torch.autograd.grad(attention.product(q, k, v, None, True, 0.0, None), leaves, dy))

    return measure.measure(
        {"torch": attend, "oneDNN": switched, "minipeft": ours},
        name="attention, forward + backward",
        shape=f"{columns} columns, 9 heads",
        dtype="float32",
        rounds=options.rounds,
        seconds=0.02,
        threads=options.threads[0],
        busy=options.busy,
    )


if __name__ == "__main__":
    main()
