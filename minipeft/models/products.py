"""The product x W^T with a base weight, and oneDNN's float32 products on a CPU with AVX-512.

torch multiplies float32 matrices on a CPU with MKL, which takes AVX2 on AMD's processors even where they have AVX-512.
oneDNN, which torch ships too, takes AVX-512: 2.2 times as fast on a Zen 5, forward and in both gradients
(docs/performance.md). Its public switch is named after what it permits, not after what it does:

    torch.backends.mkldnn.matmul.fp32_precision = "bf16"

With AVX-512 alone oneDNN still multiplies and adds in float32. With AMX it may multiply in bfloat16: `is_exact`
compares products of numbers that no bfloat16 holds with float64's, and a processor that rounds them keeps MKL. The
answer depends on the processor and torch alone, never on a measured time, so that a run has the same bits each time.

Training steps, evaluation and prefill enter `fast_products`. Decoding does not: for a few rows oneDNN is slower. The
switch belongs to the process: one thread at a time is within `fast_products`, but a product that another thread
computes meanwhile, outside of it, may have oneDNN's bits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

MATMUL = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
LARGEST_ERROR = 5e-6  # of a float32 product, relative to its largest value; bfloat16's is 3e-3
SWITCHING = threading.RLock()  # held within fast_products


class Switch:
    """The state of the switch in this process."""

    wanted = True  # may be used at all; `use_onednn` sets it, as torch.set_num_threads sets the threads
    on = False  # a thread is within fast_products


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias; a quantized weight brings its own product (quantized.py).

    x [..., in], weight [out, in], bias [out] -> [..., out]
    """
    return F.linear(x, weight, bias)


def use_onednn(wanted: bool) -> None:
    """Allow oneDNN's float32 products in this process where they are exact, or turn them off."""
    Switch.wanted = wanted


def uses_onednn() -> bool:
    """Whether `fast_products` changes anything here."""
    return Switch.wanted and is_exact()


def name_products(device: str) -> str:
    """What multiplies float32 matrices within `fast_products`: oneDNN, or what torch takes."""
    return "onednn" if device.startswith("cpu") and uses_onednn() else "torch"


@contextmanager
def fast_products() -> Iterator[None]:
    """Context manager: multiply float32 matrices with oneDNN, in backward too, where `uses_onednn`; else do nothing."""
    if not uses_onednn():
        yield
        return
    with SWITCHING, set_precision("bf16"):
        outer, Switch.on = Switch.on, True
        try:
            yield
        finally:
            Switch.on = outer


def is_switched() -> bool:
    """Whether a thread is within `fast_products`; False while torch.compile traces."""
    return Switch.on and not torch.compiler.is_compiling()


@contextmanager
def set_precision(precision: str) -> Iterator[None]:
    """Context manager: "bf16" turns oneDNN's float32 products on, "ieee" turns them off."""
    before = MATMUL.fp32_precision
    MATMUL.fp32_precision = precision
    try:
        yield
    finally:
        MATMUL.fp32_precision = before


def multiply_with_mkl(compute: Callable[[], Tensor]) -> Tensor:
    """Call one operator, and have it compute its gradients, with MKL's products even within `fast_products`."""
    if not is_switched():
        return compute()
    with set_precision("ieee"):
        y = compute()
    if (node := y.grad_fn) is not None:
        before: list[str] = []

        def turn_off(gradients: object) -> None:
            before.append(MATMUL.fp32_precision)
            MATMUL.fp32_precision = "ieee"

        def restore(inputs: object, outputs: object) -> None:
            MATMUL.fp32_precision = before.pop()

        node.register_prehook(turn_off)
        node.register_hook(restore)
    return y


@cache
def is_exact() -> bool:
    """Whether this processor has AVX-512 and oneDNN's float32 products are float32's there; tested once a process."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    generator = torch.Generator().manual_seed(0)
    for m, k, n in ((64, 256, 128), (7, 48, 16)):
        x, w = (1 + 2**-8 * torch.rand(shape, generator=generator) for shape in ((m, k), (n, k)))
        with set_precision("bf16"):
            found = ((x @ w.T, x.double() @ w.T.double()), (w @ x.T, w.double() @ x.T.double()))
        if any(((y - exact).abs().amax() / exact.abs().amax()).item() > LARGEST_ERROR for y, exact in found):
            return False
    return True
