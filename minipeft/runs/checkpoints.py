"""A training run on disk: checkpoints that are whole or not there, exact resume, one process at a time.

    DIR/run.json                  what the run is: arguments, versions, hashes; held against the arguments at resume
    DIR/log.jsonl                 one object a step, nothing in it that a resumed run would do otherwise
    DIR/checkpoints/step-000100/  state.safetensors   parameter/NAME for each trained tensor; exp_avg and exp_avg_sq,
                                                      AdamW's moments of all of them in the order of their names, flat
                                  manifest.json       step, size and crc32 of the state, of the log up to this step, and
                                                      of itself: written last

A checkpoint is written to a folder of another name, each file synced, the manifest last; that folder is synced and
renamed, and its parent synced. Only then are old ones retired, the newest KEPT stay. So whatever is cut off at any
byte, the newest folder that verifies is a state the run was in. Loading goes from newest to oldest and says what it
skips.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.files import make_folder, read_header, read_object, sync_folder, tensor_stream, write_json
from minipeft.models import Decoder
from minipeft.training.loop import TrainState, check_finite, trained

KEPT = 2
FORMAT = 1
STATE, MANIFEST = "state.safetensors", "manifest.json"
LOCK, RUN, LOG, RESULT = ".lock", "run.json", "log.jsonl", "result.json"
PROBE_BYTES = (
    2**16
)  # written and removed again before anything else: a folder that takes them takes a run's first files


class Run:
    """An open, locked run folder. `notes` are the lines that a user should see (what was skipped, and why)."""

    def __init__(self, folder: Path, lock: IO[str], resumed: bool):
        self.folder, self.lock, self.resumed = folder, lock, resumed
        self.checkpoints = folder / "checkpoints"
        self.log_file = folder / LOG
        self.log_stream = open(self.log_file, "ab")  # noqa: SIM115 (held as long as the run)
        self.log_bytes, self.log_crc = 0, 0
        self.notes: list[str] = []

    def close(self) -> None:
        """Let the folder go."""
        with suppress(OSError):  # a line that a full disk refused is still in the buffer
            self.log_stream.close()
        self.lock.truncate(0)
        self.lock.close()

    def log(self, entry: Mapping[str, object]) -> None:
        """Add one line to the log; it counts from the next save on."""
        line = (json.dumps(entry, allow_nan=False) + "\n").encode()
        with writing(self.log_file, len(line)):
            self.log_stream.write(line)
            self.log_stream.flush()
        self.log_bytes += len(line)
        self.log_crc = zlib.crc32(line, self.log_crc)

    def save(self, model: Decoder, state: TrainState) -> None:
        """Commit the run as it stands after a step.

        Raises:
            InputError: a tensor is not finite (nothing is written), or the disk refuses (older checkpoints stay).
        """
        parameters = trained(model)
        check_finite(parameters, state)
        final = self.checkpoints / f"step-{state.step:06d}"
        if final.exists():  # restored from it: it verified
            return
        order = sorted(parameters)
        tensors: dict[str, Tensor | Sequence[Tensor]] = {f"parameter/{name}": parameters[name] for name in order}
        tensors["exp_avg"] = [state.exp_avg[name] for name in order]
        tensors["exp_avg_sq"] = [state.exp_avg_sq[name] for name in order]
        with writing(final, 12 * sum(p.numel() for p in parameters.values())):
            self.commit(tensors, state.step, final)

    def commit(self, tensors: Mapping[str, Tensor | Sequence[Tensor]], step: int, final: Path) -> None:
        """Write the two files beside their place, sync, rename, sync; then retire what is too old."""
        part = self.checkpoints / f".tmp-{final.name}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            os.fsync(self.log_stream.fileno())
            files = {STATE: write_summed(part / STATE, tensor_stream(tensors))}
            log = {"bytes": self.log_bytes, "crc32": self.log_crc}
            text = sealed({"format": FORMAT, "step": step, "files": files, "log": log})
            write_summed(part / MANIFEST, lambda stream: stream.write(text))
            sync_folder(part)
        except OSError:
            shutil.rmtree(part, ignore_errors=True)  # on a full disk half a checkpoint is in the way
            raise
        part.rename(final)
        sync_folder(self.checkpoints)
        for old in self.committed()[KEPT:]:
            discard(old)

    def committed(self) -> list[Path]:
        """The checkpoints, newest first; by their number, never by their times."""
        numbered = [path for path in self.checkpoints.glob("step-*") if path.name.removeprefix("step-").isdigit()]
        return sorted(numbered, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)

    def restore(self, model: Decoder, state: TrainState) -> None:
        """Put the newest checkpoint that verifies into model and state, and cut the log to its length.

        The damaged ones that are newer are removed: the run will write them again. Without any checkpoint the run
        starts at step 0, and `notes` says so.

        Raises:
            InputError: there are checkpoints, but every one is damaged; lists each with its reason.
        """
        faults: dict[Path, str] = {}
        for folder in self.committed():
            try:
                manifest = verified(folder)
            except InputError as error:
                faults[folder] = str(error)
                continue
            load_tensors(folder / STATE, model, state)
            state.step = manifest["step"]
            self.notes += [f"skipped a damaged checkpoint: {fault}" for fault in faults.values()]
            with writing(self.checkpoints):
                for damaged in faults:
                    discard(damaged)
            self.cut_log(manifest["log"]["bytes"], manifest["log"]["crc32"])
            return
        if faults:
            raise InputError("every checkpoint is damaged: " + "; ".join(faults.values()), file=self.folder)
        if self.resumed:
            self.notes.append("no checkpoint yet: starting at step 0")
        self.cut_log(0, 0)

    def cut_log(self, length: int, crc: int) -> None:
        """Forget the log lines after the checkpoint: the run will write them again.

        A log that is not what it was at the checkpoint is put aside, and the run goes on: it decides nothing.
        """
        with writing(self.log_file):
            held = self.log_file.read_bytes()[:length]
            if len(held) != length or zlib.crc32(held) != crc:
                aside = self.log_file.with_name(f"{LOG}.damaged")
                self.notes.append(f"{self.log_file}: damaged, kept as {aside.name}; the log goes on from here")
                self.log_file.rename(aside)
                self.log_stream.close()
                self.log_stream = open(self.log_file, "ab")  # noqa: SIM115
                sync_folder(self.folder)
                length, crc = 0, 0
            os.truncate(self.log_file, length)
        self.log_bytes, self.log_crc = length, crc


def check_folder(folder: Path) -> None:
    """Find out whether a run could be written there, before anything large is read.

    Raises:
        InputError: it is a file, may not be written, or lies on a full disk.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError("is a file; the run needs a folder", file=folder)
    with writing(folder, PROBE_BYTES):
        make_folder(folder)
        probe = folder / f".probe-{os.getpid()}"
        probe.unlink(missing_ok=True)  # of a process that died, whose number this one has now
        try:
            write_summed(probe, lambda stream: stream.write(bytes(PROBE_BYTES)))
        finally:
            probe.unlink(missing_ok=True)


def check_space(folder: Path, numbers: int, more: int = 0) -> None:
    """Refuse a disk without room for KEPT + 1 checkpoints of so many trained numbers, and `more` bytes."""
    needed, free = (KEPT + 1) * 12 * numbers + more, shutil.disk_usage(folder).free
    if free < needed:
        problem = f"the disk has {free:,} bytes free, but {KEPT + 1} checkpoints and the result take {needed:,}"
        raise InputError(problem, file=folder, hint="Make room, or name an --out elsewhere")


def open_run(
    folder: Path, identity: Mapping[str, Any], *, resume: bool, overwrite: bool, about: Mapping[str, Any] | None = None
) -> Run:
    """Take the run folder for this process: new, or the same run again with `resume`. `about` may differ then.

    Raises:
        InputError: the folder is in use, is not empty (without `resume` or `overwrite`), belongs to a run with other
            arguments, or cannot be written.
    """
    if resume and overwrite:
        raise InputError("cannot go together: one goes on with a run, the other removes it", where="resume, overwrite")
    check_folder(folder)
    lock = take_lock(folder)
    try:
        held = folder / RUN
        remove_leftovers(folder)
        others = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
        if resume and held.exists():
            compare(read_object(held), identity, held)
        elif others and not (overwrite and held.exists()):
            hint = "--resume goes on with a run, --overwrite starts a run anew"
            raise InputError(f"is not empty ({', '.join(others[:4])})", file=folder, hint=hint)
        else:
            clear(folder)
            write_json(held, {**identity, **(about or {})})
        with writing(folder):
            (folder / "checkpoints").mkdir(exist_ok=True)
            run = Run(folder, lock, resume)
            sync_folder(folder)
        return run
    except BaseException:
        lock.close()
        raise


def take_lock(folder: Path) -> IO[str]:
    """Lock the folder for this process; the kernel lets go of it when the process ends, however it ends."""
    with writing(folder):
        lock = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (held as long as the run)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise InputError(f"in use by process {holder}", file=folder, hint="One process at a time") from error
    number = str(os.getpid())
    try:
        with writing(folder / LOCK, len(number)):
            lock.truncate(0)
            lock.write(number)
            lock.flush()
    except InputError:
        with suppress(OSError):  # what the disk refused is still in the buffer
            lock.close()
        raise
    return lock


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that died left half-written."""
    with writing(folder):
        for part in [*folder.glob("checkpoints/.tmp-*"), *folder.glob("checkpoints/.trash-*")]:
            shutil.rmtree(part)
        for place in (folder, folder / "adapter", folder / "model"):  # write_whole's, under mkstemp's names
            for part in [*place.glob(".*.json.????????"), *place.glob(".*.safetensors.????????")]:
                part.unlink()
        for part in folder.glob(".probe-*"):
            part.unlink()


def clear(folder: Path) -> None:
    """Remove what an earlier run left, and nothing that is not a run's; what says that it is a run's goes last."""
    with writing(folder):
        for name in ("checkpoints", "adapter", "model"):
            if (folder / name).exists():
                shutil.rmtree(folder / name)
        for name in (RESULT, "timing.json", LOG, f"{LOG}.damaged", RUN):
            (folder / name).unlink(missing_ok=True)


def compare(before: Mapping[str, Any], now: Mapping[str, Any], file: Path) -> None:
    """Refuse to go on with a run under arguments that would make it another run; objects are compared by their keys."""
    changed = list(differences(before, now))
    if changed:
        told = ", ".join(f"{name}: {old!r} -> {new!r}" for name, old, new in changed)
        hint = "Give the run's own arguments, or another --out"
        raise InputError(f"this run was started differently ({told})", file=file, hint=hint)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, old and new value of each entry of `now` that is another in `before`."""
    for name, value in now.items():
        old = before.get(name)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            yield from differences(old, value)
        elif old != value:
            yield name, old, value


def load_tensors(file: Path, model: Decoder, state: TrainState) -> None:
    """Copy a checkpoint's tensors into model and state.

    Raises:
        InputError: they are not this model's (another adapter, rank, ...).
    """
    from safetensors import safe_open

    parameters = trained(model)
    order = sorted(parameters)
    total = sum(p.numel() for p in parameters.values())
    wanted = {f"parameter/{name}": tuple(p.shape) for name, p in parameters.items()}
    wanted |= {"exp_avg": (total,), "exp_avg_sq": (total,)}
    held = {name: info.shape for name, info in read_header(file).items()}
    if held != wanted:
        odd = sorted(set(held.items()) ^ set(wanted.items()))[0][0]
        raise InputError("holds the state of another model", file=file, where=f"tensor {odd!r}")
    with safe_open(file, framework="pt") as opened, torch.no_grad():
        for name, p in parameters.items():
            p.copy_(opened.get_tensor(f"parameter/{name}"))
        for key, moments in (("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
            flat = opened.get_tensor(key).split([parameters[name].numel() for name in order])
            for name, moment in zip(order, flat):
                moments[name].copy_(moment.view_as(moments[name]))


@contextmanager
def writing(file: Path, size: int | None = None) -> Iterator[None]:
    """Say what the disk refused, in the form of all errors."""
    try:
        yield
    except OSError as error:
        what = "" if size is None else f" {size:,} bytes"
        hint = "Checkpoints that are there stay whole: put it right, then go on with --resume"
        raise InputError(f"cannot write{what}: {error.strerror}", file=error.filename or file, hint=hint) from error


def discard(folder: Path) -> None:
    """Remove a checkpoint: first its name, so that no part of one is ever taken for one."""
    trash = folder.with_name(f".trash-{folder.name}")
    folder.rename(trash)
    shutil.rmtree(trash)


def write_summed(file: Path, fill: Any) -> dict[str, int]:
    """Write and sync a new file; returns its size and crc32."""
    with open(file, "xb") as stream:
        summed = Summed(stream)
        fill(summed)
        stream.flush()
        os.fsync(stream.fileno())
    return {"bytes": summed.bytes, "crc32": summed.crc32}


class Summed:
    """A stream that counts and sums what passes through."""

    def __init__(self, stream: IO[bytes]):
        self.stream, self.bytes, self.crc32 = stream, 0, 0

    def write(self, data: bytes) -> None:
        self.stream.write(data)
        self.bytes += memoryview(data).nbytes
        self.crc32 = zlib.crc32(data, self.crc32)


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """The one text of a manifest, with its own checksum."""
    crc = zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
    return json.dumps({**manifest, "crc32": crc}, sort_keys=True).encode()


def verified(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every byte is as it was written.

    Raises:
        InputError: anything is missing or changed.
    """
    manifest = read_object(folder / MANIFEST)
    plain = {name: value for name, value in manifest.items() if name != "crc32"}
    if sealed(plain) != (folder / MANIFEST).read_bytes():
        raise InputError("damaged: its checksum is not its own", file=folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise InputError(f"format {manifest.get('format')!r}, want {FORMAT}", file=folder / MANIFEST)
    crc, size = 0, 0
    try:
        with open(folder / STATE, "rb") as stream:
            while data := stream.read(2**20):
                crc, size = zlib.crc32(data, crc), size + len(data)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=folder / STATE) from error
    if {"bytes": size, "crc32": crc} != manifest["files"][STATE]:
        want = manifest["files"][STATE]
        raise InputError(f"damaged: {size} bytes with crc32 {crc}, want {want}", file=folder / STATE)
    return manifest
