"""Process settings of a run: threads, signals, device, determinism on CUDA, memory and standard error.

A signal handler only sets a flag, which is read between steps: within an optimizer step the update is incomplete.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from minipeft.errors import InputError, check_fields, option
from minipeft.models.products import use_onednn

MOST_THREADS = 1024  # with more, torch aborts the process


@dataclass(frozen=True)
class ProcessConfig:
    """CPU settings of a command; they change only the last digits of results."""

    threads: int | None = option(None, "CPU threads; default all cores", least=1, most=MOST_THREADS)
    onednn: bool = option(
        True, "multiply float32 matrices with oneDNN where the processor has AVX-512 and its products are float32's"
    )

    def __post_init__(self) -> None:
        check_fields(self)

    def apply(self) -> None:
        """Set torch's number of threads, and what multiplies float32 matrices, in this process."""
        use_onednn(self.onednn)
        if self.threads is not None:
            torch.set_num_threads(self.threads)


class Stopped(Exception):
    """A signal stopped the run after its last finished step, and it is saved."""

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(number).name}; saved at step {step}")
        self.number = number


@contextmanager
def stopping(
    handle: Callable[[int], object] | None = None, numbers: Sequence[int] = (signal.SIGTERM, signal.SIGINT)
) -> Iterator[list[int]]:
    """Context manager: a list of the received signals, for a loop to read; a second SIGINT interrupts at once.

    `handle` is called with each signal number too, and may raise. Only the main thread can set handlers: in another
    thread the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if handle is not None:
            handle(number)

    before = {number: signal.getsignal(number) for number in {*numbers, signal.SIGINT}}
    for number in numbers:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def lossy_stderr() -> Iterator[None]:
    """Context manager: ignore failed writes to standard error (closed, a full disk, a broken pipe).

    If it was closed before the process began, its file descriptor is opened on /dev/null: otherwise the next opened
    file would get that descriptor and the output of libraries.
    """
    stream: Any = sys.stderr
    opened = None
    if stream is None:
        null = os.open(os.devnull, os.O_WRONLY)
        if null != 2:
            os.dup2(null, 2)
            os.close(null)
        stream = opened = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    with redirect_stderr(LossyStream(stream)):
        yield
    if opened is not None:
        opened.close()


class LossyStream:
    """A text stream that ignores failed writes."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def make_deterministic(wanted: bool, device: str) -> Iterator[None]:
    """Context manager: if wanted, make a run bit-identical on CUDA, as it always is on a CPU.

    On CUDA: deterministic algorithms (an operator without one raises), cuBLAS with fixed workspaces, and attention
    without the fused kernels, whose backward sums in the order in which blocks finish.
    """
    if not wanted:
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
    """The process's peak memory in bytes, on the device that it computes on."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory: CUDA raises torch.OutOfMemoryError, the CPU allocator a RuntimeError, the
    loader of shared libraries an ImportError, and a system call an OSError."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    known = known or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    said = ("allocate memory", "failed to map segment", "std::bad_alloc")
    return known or (isinstance(error, RuntimeError | ImportError) and any(text in str(error) for text in said))


@contextmanager
def explain_memory(batch: int, length: int, device: str) -> Iterator[None]:
    """Context manager: turn out-of-memory into an InputError with the peak and the flags that lower it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        peak = peak_memory(device) / 2**30
        raise InputError(
            f"out of memory with batches of {batch} x {length} tokens (peak {peak:.1f} GiB)",
            where=device,
            hint="Try a smaller --batch with more --accumulate, a smaller --length, or --activation-checkpointing",
        ) from error
