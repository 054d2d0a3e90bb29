"""Execution accuracy: programs run in a sandbox, and the unbiased pass@k of Chen et al. 2021 (arXiv:2107.03374), eq. 1.

    pass@k = mean over tasks of 1 - C(n - c, k) / C(n, k)         n answers to a task, of which c pass its tests

Nothing runs unless the caller asks for it. sandbox.py isolates each program; PROTECTION describes how far.
"""

import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from minipeft.errors import InputError, check_fields, format_value, option

SANDBOX = Path(__file__).with_name("sandbox.py")
PATIENCE = 60  # seconds that the sandbox may take in addition to a program's
PROTECTION = (
    "each program runs in Linux namespaces of its own: no network, no way to signal other processes, every mount "
    "read-only but an empty folder in memory, limits on time, address space, processes and file size. It can still "
    "read what you can read, use memory times processes, and attack the kernel; a program written to cheat can pass"
)


@dataclass(frozen=True)
class Limits:
    """The resource limits of a program."""

    seconds: int = option(10, "seconds that an executed program may run", flag="execute-seconds", least=1)
    memory: int = option(2**30, "bytes of address space of each of its processes", flag="", least=2**26)
    processes: int = option(32, "processes at a time; of root's programs 301", flag="", least=1)
    files: int = option(2**24, "total bytes of its files", flag="", least=2**12)

    def __post_init__(self) -> None:
        check_fields(self)


class Outcome(NamedTuple):
    """How a program ended: passed, failed or timeout; and the end of what it wrote to standard error."""

    status: str
    said: str


def run_program(program: str, limits: Limits | None = None) -> Outcome:
    """Run one program in the sandbox; it passes if it ends without an error.

    Raises:
        InputError: this machine cannot isolate it; it was not run.
    """
    if sys.platform != "linux":
        raise InputError(f"programs are not run on {sys.platform}", where="execute", hint="Isolation needs Linux")
    given, token = limits or Limits(), secrets.token_hex(16)
    text = f"{program}\nprint({token!r})\n".encode("utf-8", "replace")
    with tempfile.TemporaryDirectory(prefix="minipeft-") as folder:
        numbers = (given.seconds, given.memory, given.processes, given.files)
        words = [sys.executable, "-I", "-S", str(SANDBOX), os.path.realpath(folder), *map(str, numbers), token]
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={}, start_new_session=True
        )
        try:
            out, err = process.communicate(text, timeout=given.seconds + PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return Outcome("timeout", f"the sandbox did not end {PATIENCE} s later")
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    found = json.loads(out) if process.returncode == 0 else {"refused": err.decode("utf-8", "replace")[-500:]}
    if "refused" in found:
        problem = f"this machine cannot isolate programs ({found['refused']}); nothing was run"
        raise InputError(problem, where="execute", hint="It needs Linux with user namespaces, 5.12 or later")
    return Outcome(found["status"], found["said"])


def run_programs(programs: Sequence[str], limits: Limits | None = None) -> list[Outcome]:
    """Run programs, as many at a time as there are cores.

    Raises:
        InputError: this machine cannot isolate them.
    """
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        found = pool.map(lambda program: run_program(program, limits), programs)
        return list(tqdm(found, total=len(programs), unit="program", disable=None))


def count_trials(passed: Sequence[bool], questions: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Count answers and passes per question; each answer without a question is its own question."""
    found: dict[Hashable, tuple[int, int]] = {}
    for place, (right, question) in enumerate(zip(passed, questions, strict=True)):
        key = ("answer", place) if question is None else question
        n, c = found.get(key, (0, 0))
        found[key] = n + 1, c + right
    return list(found.values())


def pass_at_k(trials: Sequence[tuple[int, int]], k: int) -> float | None:
    """The mean over tasks of 1 - C(n - c, k) / C(n, k); None where a task has fewer than k answers.

    Raises:
        InputError: there is no task, or k < 1.
    """
    if not trials or k < 1:
        raise InputError(f"{format_value(k)} must be at least 1, of at least one task", where="k")
    if min(n for n, _ in trials) < k:
        return None
    return math.fsum(1 - math.comb(n - c, k) / math.comb(n, k) for n, c in trials) / len(trials)
