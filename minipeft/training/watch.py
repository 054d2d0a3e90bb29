"""Signs of life of the processes of a training: a process that gives none is named, and the others end.

Each process writes to the store of the process group four times a second. Without that, a process whose neighbour was
killed, stopped or cut off would wait for it in a collective: gloo for half an hour, NCCL longer.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BEAT, HURRY, GRACE = 0.25, 1.5, 5.0  # seconds: between signs of life; see Watch
LOST_STATUS = 75  # EX_TEMPFAIL of sysexits.h: start it again


class LostProcess(ConnectionError):
    """Another process of the training has ended, or gives no sign of life."""


class Watch(threading.Thread):
    """The signs of life of all ranks, in the store of the process group.

    Rank 0 watches all and writes whom it misses; the others watch rank 0 and read that. A rank is missed after
    `patience` seconds, or after HURRY once a collective has failed. A main thread that still waits in a collective
    GRACE seconds later will wait on: the process ends.
    """

    def __init__(self, store: Any, rank: int, size: int, patience: float):
        super().__init__(daemon=True)
        self.rank, self.size, self.patience = rank, size, patience
        self.store: Any = store.clone()  # a connection of its own
        self.done, self.found = threading.Event(), threading.Event()
        self.lost = ""
        self.store.set(f"who/{rank}", f"{socket.gethostname()}, process {os.getpid()}")
        self.store.set(f"beat/{rank}", "0")
        if rank == 0:
            self.store.set("lost", "")

    def run(self) -> None:
        watched = [rank for rank in (range(self.size) if self.rank == 0 else [0]) if rank != self.rank]
        seen = dict.fromkeys(watched, (b"0", time.monotonic()))
        number = 0
        while not self.done.wait(BEAT) and not self.lost:
            number += 1
            try:
                self.store.set(f"beat/{self.rank}", str(number))
                *beats, said = self.store.multi_get([*(f"beat/{rank}" for rank in watched), "lost"])
                now = time.monotonic()
                seen = {r: seen[r] if seen[r][0] == beat else (beat, now) for r, beat in zip(watched, beats)}
                silent = [rank for rank, (_, at) in seen.items() if now - at > self.patience]
                self.lost = said.decode() or ", ".join(map(self.describe, silent))
                if silent and self.rank == 0:
                    self.store.set("lost", self.lost)
            except RuntimeError as error:  # the process that holds the store is gone
                self.lost = f"the store at {os.environ['MASTER_ADDR']} (of torchrun, or rank 0): {first_line(error)}"
        self.found.set()
        if self.lost and not self.done.wait(GRACE):
            print(f"error: {self.explain()}", file=sys.stderr, flush=True)
            os._exit(LOST_STATUS)

    def describe(self, rank: int) -> str:
        """A rank with its host and process."""
        return f"rank {rank} ({self.store.get(f'who/{rank}').decode()})"

    def explain(self) -> str:
        """What happened, and what to do."""
        return f"{self.lost} has ended or gives no sign of life, so rank {self.rank} stops: continue with --resume"

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Context manager: a collective that fails names the rank that is missing.

        Raises:
            LostProcess: instead of the backend's RuntimeError; if nobody is missing, that error is passed on.
        """
        try:
            yield
        except RuntimeError as error:
            patience, self.patience = self.patience, HURRY
            self.found.wait(patience + GRACE)
            self.done.set()
            if not self.lost:
                raise
            raise LostProcess(f"{self.explain()} ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """The first sentence of an error's text; gloo adds advice."""
    return (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
