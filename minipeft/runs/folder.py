"""The folder of a run: checks that it can be written, the lock, and the comparison with the run to resume.

DIR/run.json       arguments, versions and hashes of the run; compared at resume
DIR/log.jsonl      one object per step; a resumed run writes the same
DIR/checkpoints/   checkpoints.py
DIR/.lock          locked by the process that writes the folder
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from minipeft.errors import InputError, check_fields, format_value, option
from minipeft.files import lock_folder, make_folder, read_object, refuse_link, remove, sync_folder, write_json
from minipeft.training.processes import Processes

LOCK, RUN, LOG, RESULT, TIMING = ".lock", "run.json", "log.jsonl", "result.json", "timing.json"
OWN = (
    LOCK,
    RUN,
    LOG,
    f"{LOG}.damaged",
    RESULT,
    TIMING,
    "checkpoints",
    "adapter",
    "model",
)  # the files and folders of a run
KEPT_WHOLE = "Existing checkpoints stay whole: solve this, then continue with --resume"
PROBE_BYTES = 2**16  # written and removed before the run, to test that the folder and disk accept the run's first files


@dataclass(frozen=True)
class FolderConfig:
    """The folder of a run, and what to do with an existing run there."""

    out: Path = option(help="folder to write to, created with its parents")
    resume: bool = option(False, "continue the run in --out")
    overwrite: bool = option(False, "remove the run in --out and start again")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.resume and self.overwrite:
            problem = "cannot go together: one continues the run, the other removes it"
            raise InputError(problem, where="resume, overwrite")


def check_folder(folder: Path) -> None:
    """Check that a run can be written there, before any large file is read.

    Raises:
        InputError: it is a file, cannot be written, or lies on a full disk.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError("is a file; the run needs a folder", file=folder)
    held = any(folder.glob("checkpoints/*"))
    with writing(folder, PROBE_BYTES, KEPT_WHOLE if held else None):
        make_folder(folder)
        probe = folder / f".probe-{os.getpid()}"
        probe.unlink(missing_ok=True)  # left by a dead process with the same id
        try:
            with open(probe, "xb") as stream:
                stream.write(bytes(PROBE_BYTES))
                stream.flush()
                os.fsync(stream.fileno())
        finally:
            probe.unlink(missing_ok=True)


def claim_folder(
    folder: Path, identity: Mapping[str, Any], *, resume: bool, overwrite: bool, about: Mapping[str, Any]
) -> IO[str]:
    """Lock the folder of a new run, or with `resume` of an existing one; returns the lock.

    run.json gets `identity`, which must match at resume, and `about`, which may differ.

    Raises:
        InputError: the folder is in use, is not empty (without `resume` or `overwrite`), holds a run with other
            arguments, has a link in the place of a run's file, or cannot be written.
    """
    FolderConfig(folder, resume, overwrite)
    check_folder(folder)
    refuse_links(folder)
    lock = lock_folder(folder, LOCK)
    try:
        marker = folder / RUN
        remove_leftovers(folder)
        others = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
        if resume and marker.exists():
            compare_identity(read_object(marker), identity, marker)
        elif others and not (overwrite and marker.exists()):
            hint = "--resume continues a run, --overwrite starts it again"
            raise InputError(f"is not empty ({', '.join(others[:4])})", file=folder, hint=hint)
        else:
            remove_run(folder)
            write_json(marker, {**identity, **about})
        with writing(folder):
            (folder / "checkpoints").mkdir(exist_ok=True)
            sync_folder(folder)
        return lock
    except BaseException:
        lock.close()
        raise


def refuse_links(folder: Path) -> None:
    """Refuse a folder with links in the place of a run's files or folders: their targets may be somebody else's.

    A link among the checkpoints is renamed at resume and never followed (checkpoints.py).
    """
    for name in OWN:
        refuse_link(folder / name)


def remove_leftovers(folder: Path) -> None:
    """Remove the partial files of a dead process."""
    with writing(folder):
        for part in [*folder.glob("checkpoints/.tmp-*"), *folder.glob("checkpoints/.trash-*")]:
            remove(part)
        for place in (folder, folder / "adapter", folder / "model"):  # write_whole's, under mkstemp's names
            for ending in ("json", "safetensors", "md", "txt", "jinja"):
                for part in place.glob(f".*.{ending}.????????"):
                    remove(part)
        for part in folder.glob(".probe-*"):
            remove(part)


def remove_run(folder: Path) -> None:
    """Remove an earlier run's files and no others; run.json, which marks the folder as a run's, is removed last."""
    with writing(folder):
        for name in ("checkpoints", "adapter", "model"):
            if os.path.lexists(folder / name):
                remove(folder / name)
        for name in (RESULT, TIMING, LOG, f"{LOG}.damaged", RUN):
            (folder / name).unlink(missing_ok=True)


def withdraw_run(folder: Path, made: bool) -> None:
    """Remove a locked run that was refused before its first step; the folder too if this process made it."""
    remove_run(folder)
    if made:
        (folder / LOCK).unlink()
        with suppress(OSError):  # somebody else has written there
            folder.rmdir()


def compare_identity(before: Mapping[str, Any], now: Mapping[str, Any], file: Path) -> None:
    """Refuse to resume a run with arguments that change it; objects are compared key by key."""
    changed = list(find_differences(before, now))
    if changed:
        listed = ", ".join(f"{name}: {format_value(old)} -> {format_value(new)}" for name, old, new in changed)
        hint = "Give the run's own arguments, or another --out"
        raise InputError(f"this run was started differently ({listed})", file=file, hint=hint)


def check_alike(identity: Mapping[str, Any], processes: Processes) -> None:
    """Check that all processes of a training have the same arguments, data, model and versions.

    Raises:
        InputError: on all of them; names the first rank that differs from rank 0, and in what.
    """
    first, *others = processes.exchange(identity)
    for rank, other in enumerate(others, 1):
        if names := [name for name, _, _ in find_differences(first, other)]:
            hint = "All processes need the same arguments, files, torch and number of threads"
            raise InputError(f"differs from rank 0 in {', '.join(names)}", where=f"rank {rank}", hint=hint)


def find_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, old and new value of each entry of `now` that has another value in `before`."""
    for name, value in now.items():
        old = before.get(name)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            yield from find_differences(old, value)
        elif old != value:
            yield name, old, value


@contextmanager
def writing(file: Path, size: int | None = None, hint: str | None = KEPT_WHOLE) -> Iterator[None]:
    """Context manager: turn a failed write into an InputError with the path, the reason and the remedy."""
    try:
        yield
    except OSError as error:
        what = "" if size is None else f" {size:,} bytes"
        raise InputError(f"cannot write{what}: {error.strerror}", file=error.filename or file, hint=hint) from error
