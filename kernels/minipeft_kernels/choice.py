"""Choose the backend of a call: by what can run here, then by a table of measurements, then by a rule."""

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import NamedTuple

import torch

BACKENDS = ("reference", "hybrid", "fused", "decode")
HALF_DTYPES = (torch.bfloat16, torch.float16)
DECODE_TOKENS = 64  # up to this the base product is bound by reading W, and launches determine the time
TENSOR_CORE_TOKENS = 128  # below this a tile of the Triton product is mostly padding
L2_BYTES = 40e6  # a y up to this size is read again from the L2 cache, nearly free (computed for an H200)
FLOPS_PER_BYTE = {80: 165.0, 90: 184.0}  # tensor-core throughput over memory bandwidth, bf16 (A100; H200)
TRITON_SPEED = {80: 0.95, 90: 0.92}  # speed of the Triton product relative to cuBLAS: an assumption until measured

# (architecture, M rounded up to a power of two, K, N, rank block, dropout) -> backend: benchmarks/lora_linear.py --tune
# prints the rows. Empty, since nothing has been measured on a GPU yet: the rule decides.
MEASURED: dict[tuple[int, int, int, int, int, bool], str] = {}


class UnavailableBackend(RuntimeError):
    """The named backend cannot run here; the message gives the reason."""


class Call(NamedTuple):
    """The properties of a call that the choice depends on. n and r are sums over the projections that share x."""

    device: torch.device
    dtype: torch.dtype
    m: int
    k: int
    n: int
    r: int
    dropout: bool
    needs_grad: bool
    grouped: bool = False  # one adapter for each row: lora_rows


def is_always_reference(backend: str, device_type: str) -> bool:
    """Whether every call on this device takes the reference backend: "auto" chooses another only on CUDA."""
    return backend == "reference" or (backend == "auto" and device_type != "cuda")


def choose_backend(backend: str, call: Call) -> str:
    """Return the backend of a call: the named one, or for "auto" the one that the table or the rule chooses.

    The answer depends on the arguments and the device alone, so a run repeats to the bit.

    Raises:
        ValueError: no backend has this name.
        UnavailableBackend: the named backend cannot run here; the message gives the reason.
    """
    check_name(backend)
    if is_always_reference(backend, call.device.type):
        return "reference"
    if backend == "auto":
        return _choose_on_cuda(call)
    reason = explain_unavailable(backend, call)
    if reason is not None:
        raise UnavailableBackend(f"backend={backend!r} cannot run here: {reason}")
    return backend


def check_name(backend: str) -> None:
    """Raise ValueError for an unknown backend."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"no backend is named {backend!r}; there are {('auto', *BACKENDS)}")


def explain_unavailable(backend: str, call: Call) -> str | None:
    """Return why a backend other than the reference cannot compute a call, or None if it can."""
    if backend == "decode" and (call.needs_grad or call.dropout):
        return "it keeps nothing for backward and has no dropout; call it under torch.no_grad()"
    if call.grouped and backend != "decode":
        return "adapters by row have the backends 'reference' and 'decode'"
    if not _triton_is_installed():
        return "Triton is not installed (pip install 'minipeft[kernels]'); backend='auto' does without"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None  # Triton's interpreter: any dtype, on the CPU, for tests
    if call.device.type != "cuda":
        return f"x is on {call.device}, and Triton needs a CUDA device; backend='auto' does without"
    if call.dtype not in HALF_DTYPES:
        return f"x is {call.dtype}, and the tensor cores compute that in full precision no faster than torch"
    if _get_architecture(call.device) < 80:
        return f"the GPU is sm_{_get_architecture(call.device)}, and the kernels are checked from sm_80 on"
    return None


@functools.cache
def import_backend(backend: str) -> ModuleType:
    """Return the module of a backend: forward, backward, forward_rows. Only a Triton backend imports Triton."""
    return importlib.import_module(f"{__package__}.{backend}")


def choose_by_bytes(architecture: int, m: int, k: int, n: int) -> str:
    """Return "fused" or "hybrid" for a training call, by the bytes that each moves beyond the frozen product.

    `hybrid` reads and writes y and dX once more: 2 c / K and 2 c / N of the product's time, with c the GPU's flops per
    byte; nothing if they fit the L2 cache. `fused` loses what Triton's product is slower than cuBLAS's, in both passes.
    """
    c = FLOPS_PER_BYTE.get(architecture, 184.0)
    again = (2 * c / k if 2 * m * n > L2_BYTES else 0.0) + (2 * c / n if 2 * m * k > L2_BYTES else 0.0)
    slower = 2 * (1 / TRITON_SPEED.get(architecture, 0.92) - 1)
    return "fused" if again > slower else "hybrid"


def _choose_on_cuda(call: Call) -> str:
    """Return the backend of a call on a CUDA device for "auto"."""
    few = call.m <= DECODE_TOKENS
    if explain_unavailable("decode" if call.grouped or few else "hybrid", call) is not None or (
        call.grouped and not few
    ):
        return "reference"
    if few:
        return "decode"
    if call.m < TENSOR_CORE_TOKENS:
        return "reference"
    architecture = _get_architecture(call.device)
    rank = next((block for block in (16, 32) if call.r <= block), 64)
    key = (architecture, 1 << (call.m - 1).bit_length(), call.k, call.n, rank, call.dropout)
    return MEASURED.get(key) or choose_by_bytes(architecture, call.m, call.k, call.n)


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _get_architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor
