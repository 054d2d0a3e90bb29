"""Several processes of one training, forked off the test's own; what torchrun sets is set here."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from minipeft.training.launch import join
from minipeft.training.processes import ParallelConfig, Processes
from minipeft.training.watch import LOST_STATUS, LostProcess

LIMIT = 60.0  # seconds after which processes that hang are killed, and the test fails


def start(rank: int, size: int, port: int, out: Path, action: Callable[[], object]) -> int:
    """Fork a process as this rank, with its output in `out`; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        with open(out / f"rank-{rank}.txt", "a", buffering=1) as stream:
            sys.stdout = sys.stderr = stream
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            torch.set_num_threads(1)
            try:
                done = action()
                status = done if isinstance(done, int) else 0
            except LostProcess as lost:
                print(lost)
                status = LOST_STATUS
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
    finally:
        os._exit(status)


def find_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
        return port


def start_all(size: int, out: Path, action: Callable[[], object]) -> list[int]:
    """Fork `size` ranks; returns their process ids."""
    out.mkdir(parents=True, exist_ok=True)
    port = find_port()
    return [start(rank, size, port, out, action) for rank in range(size)]


def wait_all(children: list[int], limit: float = LIMIT) -> list[int]:
    """The statuses of processes, -9 of those that the test killed because they hung."""
    statuses: dict[int, int] = {}
    until = time.monotonic() + limit
    while len(statuses) < len(children):
        for child in set(children) - set(statuses):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                statuses[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            for child in set(children) - set(statuses):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [statuses[child] for child in children]


def run_ranks(size: int, out: Path, action: Callable[[], object]) -> str:
    """Run an action on each of `size` ranks; returns what rank 0 printed. All must succeed."""
    statuses = wait_all(start_all(size, out, action))
    said = "\n".join(f"{file.name}: {file.read_text()}" for file in sorted(out.glob("rank-*.txt")))
    assert statuses == [0] * size, said
    return (out / "rank-0.txt").read_text()


def run_joined(size: int, out: Path, action: Callable[[Processes], object], **settings: object) -> str:
    """As run_ranks, for an action on the joined processes."""

    def joined() -> object:
        with join(ParallelConfig(**settings)) as processes:  # type: ignore[arg-type]
            return action(processes)

    return run_ranks(size, out, joined)
