"""Checkpoints of a run, written atomically; a run resumes from the newest one that verifies.

    DIR/log.jsonl                 one object per step
    DIR/checkpoints/step-000100/  state.safetensors   parameter/NAME for each trained tensor, in its dtype; exp_avg and
                                                      exp_avg_sq, AdamW's moments of all of them, float32, in the
                                                      order of their names, flat
                                  manifest.json       step, size and crc32 of the state, of the log up to this step, and
                                                      of itself: written last

A checkpoint is written to a temporary folder, each file synced, the manifest last; the folder is synced and renamed,
and its parent synced. Only then are old checkpoints removed, except the newest KEPT. So if writing stops at any byte,
an older checkpoint or the new one is complete. Loading tries them from newest to oldest and reports the skipped ones.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.files import check_plain, open_plain, read_object, remove, sync_folder
from minipeft.models import Decoder
from minipeft.runs.folder import LOG, claim_folder, writing
from minipeft.tensor_files import DTYPES, check_header, make_tensor_writer, read_header
from minipeft.training.loop import TrainState, check_finite, trained

KEPT = 2
NAME = re.compile(r"step-[0-9]+")
FORMAT = 1
STATE, MANIFEST = "state.safetensors", "manifest.json"


def open_run(
    folder: Path, identity: Mapping[str, Any], *, resume: bool, overwrite: bool, about: Mapping[str, Any] | None = None
) -> Run:
    """Open the folder of a new run, or with `resume` of an existing one: `identity` must match, `about` may differ.

    Raises:
        InputError: the folder is in use, is not empty (without `resume` or `overwrite`), holds a run with other
            arguments, or cannot be written.
    """
    lock = claim_folder(folder, identity, resume=resume, overwrite=overwrite, about=about or {})
    try:
        with writing(folder):
            return Run(folder, lock, resume)
    except BaseException:
        lock.close()
        raise


class Run:
    """An open, locked run folder. `notes` are lines for the user: what was skipped, and why.

    Without a lock it is opened by another process of the training, and this one neither reads nor writes it.
    """

    def __init__(self, folder: Path, lock: IO[str] | None = None, resumed: bool = False):
        self.folder, self.lock, self.resumed = folder, lock, resumed
        self.checkpoints = folder / "checkpoints"
        self.log_file = folder / LOG
        self.written: Path | None = None  # the newest checkpoint, restored from or written by this run
        self.log_bytes, self.log_crc = 0, 0
        self.notes: list[str] = []
        if lock is None:
            return
        if os.path.lexists(self.log_file):
            check_plain(self.log_file)  # opening a named pipe would block
        with writing(folder):
            self.log_stream = open(self.log_file, "ab", opener=open_plain)  # noqa: SIM115 (open as long as the run)
            sync_folder(folder)  # the new log's directory entry must survive a power cut

    def close(self) -> None:
        """Unlock the folder."""
        if self.lock is None:
            return
        with suppress(OSError):  # a line that did not fit on the disk is still in the buffer
            self.log_stream.close()
        self.lock.truncate(0)
        self.lock.close()

    @property
    def is_untouched(self) -> bool:
        """Whether this process began the run and has logged and saved nothing yet."""
        return self.lock is not None and not self.resumed and self.written is None and not self.log_bytes

    def log(self, entry: Mapping[str, object]) -> None:
        """Append a line to the log; it survives a resume once the next checkpoint is written."""
        line = (json.dumps(entry, allow_nan=False) + "\n").encode()
        with writing(self.log_file, len(line)):
            self.log_stream.write(line)
            self.log_stream.flush()
        self.log_bytes += len(line)
        self.log_crc = zlib.crc32(line, self.log_crc)

    def save(self, model: Decoder, state: TrainState, whole: Mapping[str, Tensor] | None = None) -> None:
        """Write a checkpoint of the run after a step. `whole`: the trained tensors, if the model holds shards of them.

        Raises:
            InputError: a tensor is not finite (nothing is written), or the disk refuses (older checkpoints stay).
        """
        parameters = trained(model) if whole is None else whole
        check_finite(parameters, state)
        final = self.checkpoints / f"step-{state.step:06d}"
        if final == self.written:  # verified when the run was restored from it
            return
        if os.path.lexists(final):  # an entry of that name that is not this run's
            with writing(final):
                set_aside(final)
        order = sorted(parameters)
        tensors: dict[str, Tensor | Sequence[Tensor]] = {f"parameter/{name}": parameters[name] for name in order}
        tensors["exp_avg"] = [state.exp_avg[name] for name in order]
        tensors["exp_avg_sq"] = [state.exp_avg_sq[name] for name in order]
        with writing(final, sum(p.nbytes + 8 * p.numel() for p in parameters.values())):
            self.commit(tensors, state.step, final)

    def commit(self, tensors: Mapping[str, Tensor | Sequence[Tensor]], step: int, final: Path) -> None:
        """Write both files under a temporary name, sync, rename, sync; then remove old checkpoints."""
        part = self.checkpoints / f".tmp-{final.name}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            os.fsync(self.log_stream.fileno())
            files = {STATE: write_summed(part / STATE, make_tensor_writer(tensors))}
            log = {"bytes": self.log_bytes, "crc32": self.log_crc}
            text = seal({"format": FORMAT, "step": step, "files": files, "log": log})
            write_summed(part / MANIFEST, lambda stream: stream.write(text))
            sync_folder(part)
        except OSError:
            shutil.rmtree(part, ignore_errors=True)  # a partial checkpoint would keep a full disk full
            raise
        part.rename(final)
        self.written = final
        sync_folder(self.checkpoints)
        for old in self.list_committed()[KEPT:]:
            discard(old)

    def list_committed(self) -> list[Path]:
        """The checkpoints, newest first: by their numbers, not by file times."""
        named = [path for path in self.checkpoints.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(named, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)

    def restore(self, model: Decoder, state: TrainState) -> None:
        """Load the newest checkpoint that verifies into model and state, and cut the log to its length.

        Newer, damaged ones are removed: the run will write them again. Without any checkpoint the run starts at step 0,
        and `notes` says so. A file named like a checkpoint is renamed, and noted.

        Raises:
            InputError: every checkpoint is damaged; the text lists them with the reasons.
        """
        for path in sorted(self.checkpoints.iterdir()):
            if NAME.fullmatch(path.name) and not path.is_dir():
                with writing(path):
                    self.notes.append(f"{path}: is no folder, so no checkpoint: renamed {set_aside(path).name}")
        faults: dict[Path, str] = {}
        for folder in self.list_committed():
            try:
                manifest = verify(folder)
            except InputError as error:
                faults[folder] = str(error)
                continue
            load_tensors(folder / STATE, model, state)
            state.step, self.written = manifest["step"], folder
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
        """Remove the log lines after the checkpoint: the run will write them again.

        A log that has changed since the checkpoint is renamed and the run continues: no result depends on it.
        """
        with writing(self.log_file):
            held = self.log_file.read_bytes()[:length]
            if len(held) != length or zlib.crc32(held) != crc:
                aside = self.log_file.with_name(f"{LOG}.damaged")
                self.notes.append(f"{self.log_file}: damaged, kept as {aside.name}; the log continues from here")
                self.log_file.rename(aside)
                self.log_stream.close()
                self.log_stream = open(self.log_file, "ab", opener=open_plain)  # noqa: SIM115
                sync_folder(self.folder)
                length, crc = 0, 0
            self.log_stream.truncate(length)
        self.log_bytes, self.log_crc = length, crc


def check_space(folder: Path, parameters: int, more: int = 0) -> None:
    """Check that the disk has room for KEPT + 1 checkpoints of this many trained parameters, and `more` bytes."""
    needed, free = (KEPT + 1) * 12 * parameters + more, shutil.disk_usage(folder).free
    if free < needed:
        problem = f"the disk has {free:,} bytes free, but {KEPT + 1} checkpoints and the result take {needed:,}"
        raise InputError(problem, file=folder, hint="Free some space, or name an --out elsewhere")


def load_tensors(file: Path, model: Decoder, state: TrainState) -> None:
    """Copy a checkpoint's tensors into model and state.

    Raises:
        InputError: they belong to another model (another adapter, rank, ...).
    """
    from safetensors import safe_open

    parameters = trained(model)
    order = sorted(parameters)
    total = sum(p.numel() for p in parameters.values())
    wanted = {f"parameter/{name}": tuple(p.shape) for name, p in parameters.items()}
    wanted |= {"exp_avg": (total,), "exp_avg_sq": (total,)}
    hint = "It holds the state of another model"
    header = read_header(file)
    check_header(header, wanted, file, dtypes=tuple(DTYPES.values()), hint=hint)
    dtypes = {f"parameter/{name}": DTYPES[p.dtype] for name, p in parameters.items()}
    for name, info in header.items():
        if info.dtype != (want := dtypes.get(name, "F32")):  # the moments are float32
            raise InputError(f"dtype {info.dtype}, want {want}", file=info.file, where=f"tensor {info.name!r}")
    with safe_open(file, framework="pt") as opened, torch.no_grad():
        for name, p in parameters.items():
            p.copy_(opened.get_tensor(f"parameter/{name}"))
        for key, moments in (("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
            flat = opened.get_tensor(key).split([parameters[name].numel() for name in order])
            for name, moment in zip(order, flat):
                moments[name].copy_(moment.view_as(moments[name]))


def discard(folder: Path) -> None:
    """Rename a checkpoint, then remove it, so that a partly removed one is never taken for a checkpoint."""
    trash = folder.with_name(f".trash-{folder.name}")
    folder.rename(trash)
    remove(trash)


def set_aside(path: Path) -> Path:
    """Rename an entry that has a checkpoint's name to the first free NAME.aside-N, and return that path."""
    names = (path.with_name(f"{path.name}.aside-{number}") for number in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    path.rename(aside)
    return aside


def write_summed(file: Path, fill: Callable[[Any], object]) -> dict[str, int]:
    """Write and sync a new file; returns its size and crc32."""
    with open(file, "xb") as stream:
        summed = Summed(stream)
        fill(summed)
        stream.flush()
        os.fsync(stream.fileno())
    return {"bytes": summed.bytes, "crc32": summed.crc32}


class Summed:
    """A stream that counts the bytes written to it and keeps their crc32."""

    def __init__(self, stream: IO[bytes]):
        self.stream, self.bytes, self.crc32 = stream, 0, 0

    def write(self, data: bytes) -> None:
        self.stream.write(data)
        self.bytes += memoryview(data).nbytes
        self.crc32 = zlib.crc32(data, self.crc32)


def seal(manifest: Mapping[str, Any]) -> bytes:
    """Build the text of a manifest, with a checksum of itself."""
    crc = zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
    return json.dumps({**manifest, "crc32": crc}, sort_keys=True).encode()


def verify(folder: Path) -> dict[str, Any]:
    """Read every byte of a checkpoint and return its manifest.

    Raises:
        InputError: anything is missing or changed.
    """
    manifest = read_object(folder / MANIFEST)
    plain = {name: value for name, value in manifest.items() if name != "crc32"}
    if seal(plain) != (folder / MANIFEST).read_bytes():
        raise InputError("damaged: its checksum does not match its content", file=folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise InputError(f"format {manifest.get('format')!r}, want {FORMAT}", file=folder / MANIFEST)
    check_plain(folder / STATE)
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
