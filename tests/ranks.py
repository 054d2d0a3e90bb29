"""Several processes of one training, forked off the test's own; what torchrun sets is set here. And small runs."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minipeft.errors import InputError
from minipeft.runs import finetune as tuning
from minipeft.runs.config import find_methods, run_config
from minipeft.runs.finetune import finetune
from minipeft.training.launch import join
from minipeft.training.processes import ParallelConfig, Processes
from minipeft.training.watch import LOST_STATUS, LostProcess

SETTINGS = {"method": "lora", "targets": ("c_attn",), "rank": 2, "dropout": 0.2, "steps": 4, "accumulate": 4,
            "length": 64, "held_out": 3, "evaluate_every": 2, "save_every": 1}  # fmt: skip
IGNORED = {"timing.json", ".lock"}
LIMIT = 180.0  # seconds after which processes that hang are killed, and the test fails


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


def train(
    place: Path,
    out: Path,
    processes: Processes | None = None,
    resume: bool = True,
    say: Callable[[str], None] = lambda _: None,
    **changes: Any,
) -> dict[str, Any]:
    given = {"model": str(place / "model"), "data": str(place / "pairs.jsonl"), **SETTINGS, **changes}
    method = given.pop("method")
    own = {
        name: value
        for name, value in given.items()
        if name in changes or method in find_methods(name.replace("_", "-"))
    }
    return finetune(run_config(method, **own), out, resume=resume, say=say, processes=processes)


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a run with its newest checkpoint only: a stopped run may have one more."""
    found = (path for path in folder.rglob("*") if path.is_file())
    held = {str(p.relative_to(folder)): p.read_bytes() for p in found if p.name not in IGNORED}
    older = sorted({name.split("/")[1] for name in held if name.startswith("checkpoints/step-")})[:-1]
    return {name: data for name, data in held.items() if not any(f"/{step}/" in name for step in older)}


def same(one: Path, other: Path) -> None:
    first, second = files_of(one), files_of(other)
    assert set(first) == set(second)
    assert [name for name in first if first[name] != second[name]] == []


def kill_after(step: int, rank: int, number: int = signal.SIGKILL) -> None:
    """Send this process a signal after its update of a step, if it is that rank."""
    plain = tuning.make_log_entry

    def kill(done: Any) -> dict[str, Any]:
        if done.number == step and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), number)
        return plain(done)

    tuning.make_log_entry = kill


def joined(action: Callable[[Processes], object], **settings: Any) -> object:
    with join(ParallelConfig(**settings)) as processes:
        return action(processes)


def refused(place: Path, out: Path, reduce: str = "exact", shard: bool = False, **changes: Any) -> list[str]:
    """What each of two ranks says of a run that both of them refuse."""

    def act() -> object:
        try:
            joined(lambda processes: train(place, out / "run", processes, **changes), reduce=reduce, shard=shard)
        except InputError as error:
            print(error)
            return 2
        return None

    assert wait_all(start_all(2, out, act)) == [2, 2]
    return [(out / f"rank-{rank}.txt").read_text() for rank in (0, 1)]


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)
