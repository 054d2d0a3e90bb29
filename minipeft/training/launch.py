"""The processes that torchrun has started, from the environment variables that it sets in each of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from minipeft.errors import InputError
from minipeft.training.processes import Alone, ParallelConfig, Processes

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCH = "Start the processes with torchrun --nproc_per_node=N -m minipeft train ..."


@contextmanager
def join(config: ParallelConfig | None = None) -> Iterator[Processes]:
    """Context manager: the processes that torchrun has started, this one among them; without torchrun, this one alone.

    Raises:
        InputError: torchrun's environment variables are incomplete.
        LostProcess: another process has ended, or gives no sign of life.
    """
    given = [name for name in VARIABLES if name in os.environ]
    config = config or ParallelConfig()
    if not {"RANK", "WORLD_SIZE"} & set(given):
        for name in ("reduce", "shard"):
            if getattr(config, name) != getattr(ParallelConfig(), name):
                raise InputError("has no effect on a process that trains alone", where=name, hint=LAUNCH)
        yield Alone()
        return
    if missing := [name for name in VARIABLES if name not in given]:
        raise InputError(f"is not set, but {given[0]} is", where=missing[0], hint=LAUNCH)
    from minipeft.training.distributed import Group

    with Group(config, read_number("RANK"), read_number("WORLD_SIZE")) as group:
        yield group


def read_number(name: str) -> int:
    """The number in an environment variable.

    Raises:
        InputError: it holds something else.
    """
    text = os.environ[name]
    if not text.isascii() or not text.isdigit():
        raise InputError(f"{text!r} must be an integer >= 0", where=name)
    return int(text)
