"""What a run needs of the process around it: signals that stop it, a device, exactness on CUDA, and memory.

A signal only sets a flag that is read between steps: inside an optimizer step the parameters are half new.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from minipeft.errors import InputError


class Stopped(Exception):
    """A signal asked the run to stop; it was saved at its last finished step."""

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(number).name}; saved at step {step}")
        self.number = number


@contextmanager
def stopping() -> Iterator[list[int]]:
    """A list that SIGTERM or SIGINT puts its number into, read between steps. A second SIGINT stops at once.

    Only the main thread may say what a signal does: in another one the list stays empty.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    kept = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def check_device(name: str) -> None:
    """Refuse a device that is not here."""
    try:
        torch.zeros(1, device=name).item()  # on "meta" there are no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"{name!r} cannot be used: {str(error).splitlines()[0]}", where="device") from error


@contextmanager
def exactly(asked: bool, device: str) -> Iterator[None]:
    """Let the same run give the same bits, which it does on a CPU anyway.

    On CUDA: deterministic algorithms (what has none raises), cuBLAS with fixed workspaces, and attention without the
    fused kernels, whose backward adds in the order in which blocks happen to end.
    """
    if not asked:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        if device.startswith("cuda"):
            with sdpa_kernel(SDPBackend.MATH):
                yield
        else:
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def peak_memory(device: str) -> int:
    """The most bytes that this process held at once, on the device that it computes on."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def enough_memory(batch: int, length: int, device: str) -> Iterator[None]:
    """Say what a run that is out of memory asked for, and what asks for less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = str(error)  # CUDA's is torch.OutOfMemoryError; the CPU's allocator raises a plain RuntimeError
        refused = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in said
        if not refused:
            raise
        peak = peak_memory(device) / 2**30
        raise InputError(
            f"out of memory with batches of {batch} x {length} tokens (peak {peak:.1f} GiB)",
            where=device,
            hint="Take a smaller --batch with more --accumulate, a smaller --length, or --activation-checkpointing",
        ) from error
