"""A training run on disk: checkpoints that are whole or not there, exact resume, one process at a time.

    DIR/run.json                  what the run is: arguments, versions, hashes; held against the arguments at resume
    DIR/log.jsonl                 one object a step, nothing in it that a resumed run would do otherwise
    DIR/checkpoints/step-000100/  state.safetensors   the trained tensors and AdamW's two moments, by name
                                  meta.json           step, length of the log
                                  manifest.json       size and crc32 of both, and of itself: written last

A checkpoint is written to a folder of another name, each file synced, the manifest last; that folder is synced and
renamed, and its parent synced. Only then are old ones retired, the newest KEPT stay. So whatever is cut off at any
byte, the newest folder that verifies is a state the run was in. Loading goes from newest to oldest and says what it skips.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.files import parse_json, read_header, read_object, read_text, tensor_stream, write_json
from minipeft.models import Decoder
from minipeft.training.loop import TrainState, trained

KEPT = 2
FORMAT = 1
STATE, META, MANIFEST = "state.safetensors", "meta.json", "manifest.json"
PARTS = ("parameter", "exp_avg", "exp_avg_sq")


class Run:
    """An open, locked run folder. `notes` are the lines that a user should see (what was skipped, and why)."""

    def __init__(self, folder: Path, lock: IO[str]):
        self.folder, self.lock = folder, lock
        self.checkpoints = folder / "checkpoints"
        self.log_file = folder / "log.jsonl"
        self.notes: list[str] = []

    def close(self) -> None:
        """Let the folder go."""
        self.lock.close()

    def log(self, entry: Mapping[str, object]) -> None:
        """Add one line to the log; it counts from the next save on."""
        with open(self.log_file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry, allow_nan=False) + "\n")

    def save(self, model: Decoder, state: TrainState) -> None:
        """Commit the run as it stands after a step.

        Raises:
            InputError: a tensor is not finite (nothing is written), or the disk refuses (older checkpoints stay).
        """
        tensors = state_tensors(model, state)
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor.sum(dtype=torch.float64)):
                raise InputError("holds NaN or Inf; the checkpoint is not saved", where=name)
        final = self.checkpoints / f"step-{state.step:06d}"
        if final.exists():
            return
        try:
            self.commit(tensors, {"format": FORMAT, "step": state.step, "log_bytes": self.synced_log()}, final)
        except OSError as error:
            size = sum(t.numel() * t.element_size() for t in tensors.values())
            hint = "Older checkpoints are intact: make room and use --resume"
            raise InputError(f"cannot write {size:,} bytes: {error.strerror}", file=final, hint=hint) from error

    def synced_log(self) -> int:
        """Sync the log to disk; returns its length in bytes."""
        with open(self.log_file, "ab") as stream:
            os.fsync(stream.fileno())
            return stream.tell()

    def commit(self, tensors: Mapping[str, Tensor], meta: Mapping[str, object], final: Path) -> None:
        """Write the three files beside their place, sync, rename, sync; then retire what is too old."""
        self.checkpoints.mkdir(exist_ok=True)
        part = self.checkpoints / f".tmp-{final.name}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        files = {STATE: write_summed(part / STATE, tensor_stream(tensors))}
        text = json.dumps(meta).encode()
        files[META] = write_summed(part / META, lambda stream: stream.write(text))
        manifest = json.dumps({"files": files, "crc32": checksum_of(files)}).encode()
        write_summed(part / MANIFEST, lambda stream: stream.write(manifest))
        sync_folder(part)
        part.rename(final)
        sync_folder(self.checkpoints)
        for old in self.committed()[KEPT:]:
            trash = self.checkpoints / f".trash-{old.name}"
            old.rename(trash)
            shutil.rmtree(trash)

    def committed(self) -> list[Path]:
        """The checkpoints, newest first; by their number, never by their times."""
        return sorted(self.checkpoints.glob("step-*"), key=lambda path: path.name, reverse=True)

    def restore(self, model: Decoder, state: TrainState) -> None:
        """Put the newest checkpoint that verifies into model and state, and cut the log to its length.

        Without any checkpoint the run starts at step 0, and `notes` says so.

        Raises:
            InputError: there are checkpoints, but every one is damaged; lists each with its reason.
        """
        faults = []
        for folder in self.committed():
            try:
                meta = verified(folder)
            except InputError as error:
                faults.append(str(error))
                continue
            self.notes += [f"skipped a damaged checkpoint: {fault}" for fault in faults]
            load_tensors(folder / STATE, model, state)
            state.step = meta["step"]
            self.cut_log(meta["log_bytes"])
            return
        if faults:
            raise InputError("every checkpoint is damaged: " + "; ".join(faults), file=self.folder)
        self.notes.append("no checkpoint yet: starting at step 0")
        self.cut_log(0)

    def cut_log(self, length: int) -> None:
        """Forget the log lines after the checkpoint: the run will write them again."""
        if self.log_file.exists():
            os.truncate(self.log_file, length)


def open_run(folder: Path, identity: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Run:
    """Take the run folder for this process: new, or the same run again with `resume`.

    Raises:
        InputError: the folder is in use, is not empty (without `resume` or `overwrite`), belongs to a run with other
            arguments, or cannot be written.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError("is a file; the run needs a folder", file=folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (held as long as the run)
    except OSError as error:
        raise InputError(f"cannot write there: {error.strerror}", file=folder) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        raise InputError(f"in use by process {lock.read().strip() or 'unknown'}", file=folder) from error
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    run = Run(folder, lock)
    held = folder / "run.json"
    others = [path.name for path in folder.iterdir() if path.name != ".lock"]
    if resume and held.exists():
        compare(read_object(held), identity, held)
    elif others and not overwrite:
        hint = "--resume goes on with a run, --overwrite starts anew"
        raise InputError(f"is not empty ({', '.join(sorted(others)[:4])})", file=folder, hint=hint)
    else:
        clear(folder)
        write_json(held, {**identity})
    for leftover in [*run.checkpoints.glob(".tmp-*"), *run.checkpoints.glob(".trash-*")]:
        shutil.rmtree(leftover)
    return run


def clear(folder: Path) -> None:
    """Remove what an earlier run left, and nothing that is not a run's."""
    for name in ("checkpoints", "adapter", "model"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("run.json", "log.jsonl", "result.json"):
        (folder / name).unlink(missing_ok=True)


def compare(before: Mapping[str, Any], now: Mapping[str, Any], file: Path) -> None:
    """Refuse to go on with a run under arguments that would make it another run."""
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        told = ", ".join(f"{name}: {before.get(name)!r} -> {now[name]!r}" for name in changed)
        hint = "Give the run's own arguments, or another --out"
        raise InputError(f"this run was started differently ({told})", file=file, hint=hint)


def state_tensors(model: Decoder, state: TrainState) -> dict[str, Tensor]:
    """All tensors of a run by name: parameter/NAME, exp_avg/NAME, exp_avg_sq/NAME."""
    groups: tuple[Mapping[str, Tensor], ...] = (trained(model), state.exp_avg, state.exp_avg_sq)
    return {f"{part}/{name}": tensor for part, group in zip(PARTS, groups) for name, tensor in group.items()}


def load_tensors(file: Path, model: Decoder, state: TrainState) -> None:
    """Copy a checkpoint's tensors into model and state.

    Raises:
        InputError: they are not this model's (another adapter, rank, ...).
    """
    from safetensors import safe_open

    wanted = state_tensors(model, state)
    header = read_header(file)
    if {name: tuple(t.shape) for name, t in wanted.items()} != {name: info.shape for name, info in header.items()}:
        odd = sorted(set(wanted) ^ set(header)) or ["shapes differ"]
        raise InputError(f"holds the state of another model ({odd[0]})", file=file)
    with safe_open(file, framework="pt") as opened, torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(opened.get_tensor(name))


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
        self.bytes += len(data)
        self.crc32 = zlib.crc32(data, self.crc32)


def checksum_of(files: Mapping[str, Mapping[str, int]]) -> int:
    """The manifest's checksum of its own entries."""
    return zlib.crc32(json.dumps(files, sort_keys=True).encode())


def verified(folder: Path) -> dict[str, Any]:
    """The meta of a checkpoint whose every byte is as it was written.

    Raises:
        InputError: anything is missing or changed.
    """
    manifest = read_object(folder / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or set(files) != {STATE, META} or manifest.get("crc32") != checksum_of(files):
        raise InputError("the manifest is damaged", file=folder / MANIFEST)
    for name, entry in files.items():
        crc, size = 0, 0
        try:
            with open(folder / name, "rb") as stream:
                while data := stream.read(2**20):
                    crc, size = zlib.crc32(data, crc), size + len(data)
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", file=folder / name) from error
        if {"bytes": size, "crc32": crc} != entry:
            raise InputError(f"damaged: {size} bytes with crc32 {crc}, want {entry}", file=folder / name)
    meta = parse_json(read_text(folder / META), folder / META)
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise InputError(f"not of format {FORMAT}", file=folder / META)
    return meta


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
