"""Strict reading and atomic writing of files: JSON, safetensors headers, the folder lock.

A safetensors file is  N (8 bytes, little-endian) | N bytes of JSON, name -> dtype, shape, data_offsets | the data.
Its header is read and checked against the file's size before any tensor is allocated.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from minipeft.errors import InputError

LARGEST_JSON = 256 * 2**20  # bytes; the largest tokenizer.json known is 35 MB
LARGEST_HEADER = 100 * 2**20  # bytes; safetensors' own limit
MOST_CONTAINERS = 1_000_000  # lists and objects in a JSON value; the largest known tokenizer has 514,906 merges
MOST_VALUES = 5_000_000  # values of a JSON value
MOST_TENSORS = 100_000  # of one safetensors file
SMALL_JSON = 2**20  # characters; parsing a shorter text is faster than counting its values
QUOTED = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)  # a JSON text, or the rest where it does not end
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
         "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip

FLOATS = ("F32", "F16", "BF16")
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
          torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's entry in a safetensors header; `start` and `stop` are byte offsets in the data."""

    file: Path
    name: str  # in the file
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_text(file: Path) -> str:
    """Read a UTF-8 file.

    Raises:
        InputError: missing, a folder, not a plain file, too large, or not UTF-8 (with the byte).
    """
    check_plain(file)
    if file.stat().st_size > LARGEST_JSON:
        raise InputError(f"has {file.stat().st_size:,} bytes, more than {LARGEST_JSON:,}", file=file)
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}", file=file) from error


def check_plain(file: Path) -> None:
    """Refuse a path that is missing, a folder, a device, or not readable."""
    if file.is_dir():
        raise InputError("is a directory, not a file", file=file)
    if not file.exists():
        folder = file.parent
        found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else None
        held = "its folder does not exist" if found is None else f"its folder holds: {', '.join(found) or 'nothing'}"
        raise InputError(f"no such file ({held})", file=file)
    if not file.is_file():
        raise InputError("is not a plain file", file=file)
    if not os.access(file, os.R_OK):
        raise InputError("may not be read (permission denied)", file=file)


def check_inside(file: Path, folder: Path) -> None:
    """Refuse a link that leaves the model's folder, except into the `blobs` folder of a hub cache."""
    check_plain(file)
    target = file.resolve()
    homes = [folder.resolve()]
    if folder.parent.name == "snapshots":
        homes.append(folder.resolve().parent.parent / "blobs")
    if target.parent not in homes:
        raise InputError(f"is a link that leaves the model folder, to {target}", file=file)


def read_object(file: Path) -> dict[str, Any]:
    """Read the JSON object in a file; duplicate keys, NaN and trailing text are errors."""
    value = parse_json(read_text(file), file)
    if not isinstance(value, dict):
        raise InputError(f"must hold a JSON object, but holds {name_type(value)}", file=file)
    return value


def parse_json(text: str, file: Path | str, where: str | None = None, line: int = 1) -> Any:
    """Parse the JSON value in `text`, found in `file` at `where`, starting at line `line`.

    Python needs 100 bytes and a microsecond for an empty list of two characters, so the values are counted before
    the text is parsed.

    Raises:
        InputError: not JSON (with line and column), a key given twice, NaN or Infinity, nested too deep, more than
            MOST_CONTAINERS lists and objects or MOST_VALUES values.
    """
    check_count(text, file, where)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise InputError(f"key {twice!r} given twice", file=file, where=where)
        for key, value in pairs:
            if strange := find_non_finite(value):
                raise InputError(f"{strange} is not JSON (key {key!r})", file=file, where=where)
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
        if strange := find_non_finite(value):
            raise InputError(f"{strange} is not JSON", file=file, where=where)
        return value
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1} column {error.colno}"
        raise InputError(f"not valid JSON: {place}: {error.msg}", file=file, where=where) from error
    except RecursionError as error:
        raise InputError("JSON nested too deep", file=file, where=where) from error
    except InputError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(f"not usable JSON: {error}", file=file, where=where) from error


def check_count(text: str, file: Path | str, where: str | None) -> None:
    """Limit the number of lists, objects and values in a JSON text, counted by the punctuation outside strings.

    Raises:
        InputError: more than MOST_CONTAINERS, or MOST_VALUES.
    """
    if len(text) <= SMALL_JSON:
        return
    bare = QUOTED.sub("", text)
    containers = bare.count("[") + bare.count("{")
    for count, most, what in (
        (containers, MOST_CONTAINERS, "lists and objects"),
        (containers + bare.count(","), MOST_VALUES, "values"),
    ):
        if count > most:
            hint = "Pairs and answers may be given as JSON lines, where each line is a separate value"
            raise InputError(f"holds {count:,} {what}, more than {most:,}", file=file, where=where, hint=hint)


def find_non_finite(value: object) -> str | None:
    """Name the first number that is not valid JSON: Python's parser accepts NaN, Infinity and 1e999."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity, or a number beyond 1.8e308,"
    return next(filter(None, map(find_non_finite, value)), None) if isinstance(value, list) else None


def name_type(value: object) -> str:
    """Name the type of a JSON value for an error."""
    names: dict[type, str] = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read a safetensors file's header and check it against the file's size; no tensor data is read.

    Raises:
        InputError: not a safetensors file (the error says what it looks like), truncated, overlapping offsets,
            malformed, or more than MOST_TENSORS tensors.
    """
    check_plain(file)
    size = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise InputError(guess_format(start + stream.read(248), size, length), file=file)
        raw = stream.read(length)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"header is not UTF-8 at byte {8 + error.start}: not safetensors", file=file) from error
    check_tensors(text.count('"data_offsets"'), file)  # before any entry is parsed
    header = parse_json(text, file, "header")
    if not isinstance(header, dict):
        raise InputError(f"header must be an object, but is {name_type(header)}", file=file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise InputError("must map text to text", file=file, where="header: __metadata__")
    check_tensors(len(header), file)
    tensors = {name: check_entry(name, entry, file) for name, entry in header.items()}
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            fault = "overlap" if info.start < end else "leave a gap"
            raise InputError(f"offsets {info.start}..{info.stop} {fault}", file=file, where=f"tensor {name!r}")
        end = info.stop
    if end != size - 8 - length:
        fault = "data incomplete" if end > size - 8 - length else "trailing bytes"
        raise InputError(f"{fault}: needs {8 + length + end} bytes, has {size} (download broken?)", file=file)
    return tensors


def check_tensors(count: int, file: Path) -> None:
    """Refuse a file of more than MOST_TENSORS tensors."""
    if count > MOST_TENSORS:
        raise InputError(f"{count:,} tensors, more than {MOST_TENSORS:,}", file=file, where="header")


def check_entry(name: str, entry: object, file: Path) -> TensorInfo:
    """Check one entry of the header and return it."""
    where = f"tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError("header entry must have dtype, shape and data_offsets", file=file, where=where)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise InputError(f"unknown dtype {dtype!r}", file=file, where=where)
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise InputError(
                f"shape and data_offsets must be lists of integers >= 0, not {numbers!r}", file=file, where=where
            )
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * BYTES[dtype]:
        raise InputError(f"offsets {offsets} do not fit {dtype} of shape {shape}", file=file, where=where)
    return TensorInfo(file, name, dtype, tuple(shape), offsets[0], offsets[1])


def check_header(
    header: Mapping[str, TensorInfo],
    wanted: Mapping[str, tuple[int, ...]],
    file: Path,
    *,
    dtypes: Sequence[str] = FLOATS,
    optional: Collection[str] = (),
    hint: str | None = None,
) -> None:
    """Check tensor names, shapes and dtypes against the expected ones, before any data is read.

    Both mappings use our names; errors quote the file's names. `file` is named when a tensor is missing; tensors in
    `optional` may be absent. `hint` is added to a shape error.

    Raises:
        InputError: a tensor is missing, unexpected, of the wrong shape, or of a dtype not in `dtypes`.
    """
    missing = [name for name in wanted if name not in header and name not in optional]
    if missing:
        raise InputError(f"missing tensors: {', '.join(missing[:5])} ({len(missing)} in all)", file=file)
    unexpected = [info for name, info in header.items() if name not in wanted]
    if unexpected:
        names = ", ".join(info.name for info in unexpected[:5])
        raise InputError(f"unexpected tensors: {names} ({len(unexpected)} in all)", file=unexpected[0].file)
    for name, info in header.items():
        where = f"tensor {info.name!r}"
        if info.shape != tuple(wanted[name]):
            problem = f"shape {list(info.shape)}, want {list(wanted[name])}"
            raise InputError(problem, file=info.file, where=where, hint=hint)
        if info.dtype not in dtypes:
            raise InputError(f"dtype {info.dtype}, want {'/'.join(dtypes)}", file=info.file, where=where)


def guess_format(start: bytes, size: int, length: int) -> str:
    """Say what a file that is not safetensors looks like."""
    text = start.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the weights: run `git lfs pull`"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "looks like an HTML page, not safetensors (download broken?)"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "looks like a pickle (.bin), not safetensors; pickle is not read"
    if size < 8:
        return f"too short to be safetensors: {size} bytes"
    return f"not safetensors, or truncated: its header says {length} bytes, the file has {size}"


def write_whole(file: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Write a temporary file, sync it and rename it: readers see the old file or the complete new one.

    The file is never rewritten in place: a reader that has it mapped would crash or see its tensors change. The folder
    is synced too: otherwise a power cut may undo the rename.

    Raises:
        InputError: the write fails; names the path, the reason and the number of bytes.
    """
    tried = 0
    try:
        make_folder(file.parent)
        handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                os.fchmod(stream.fileno(), 0o666 & ~read_umask())
                try:
                    fill(stream)
                finally:
                    tried = stream.tell()
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(name, file)
            sync_folder(file.parent)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        size = f" (for {tried:,} bytes)" if tried else ""
        raise InputError(f"cannot write: {error.strerror}{size}", file=file) from error


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, and sync them, so that they survive a power cut."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in absent:
        sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file, a link (not its target) or a folder with its contents."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that its directory entries survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_link(file: Path) -> None:
    """Refuse to write through a link: its target is outside the run folder."""
    if file.is_symlink():
        raise InputError("is a link", file=file, hint="A run is written in its own folder alone: remove it")


def open_plain(name: str, flags: int) -> int:
    """Open without following a link that was created after `refuse_link` checked."""
    return os.open(name, flags | os.O_NOFOLLOW, 0o666)


def read_umask() -> int:
    """Read the process's umask (mkstemp ignores it).

    The only way to read it is to set it; the temporary value keeps files that other threads create meanwhile private.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_json(file: Path, value: object) -> None:
    """Write a JSON file atomically, keys in the order given."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(file, lambda stream: stream.write(text.encode("utf-8")))


def make_tensor_writer(tensors: Mapping[str, Tensor | Sequence[Tensor]]) -> Callable[[IO[bytes]], None]:
    """Return a function that writes these tensors to a stream as safetensors, one at a time, without copying all.

    A sequence of tensors of one dtype is written as one flat tensor.
    """
    parts = {name: [t] if isinstance(t, Tensor) else list(t) for name, t in tensors.items()}
    order = sorted(
        parts, key=lambda name: (-parts[name][0].element_size(), name)
    )  # as the safetensors library: by alignment, then by name
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        count = sum(t.numel() for t in parts[name])
        shape = list(parts[name][0].shape) if isinstance(tensors[name], Tensor) else [count]
        start, end = end, end + count * parts[name][0].element_size()
        header[name] = {"dtype": DTYPES[parts[name][0].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)

    def write(stream: IO[bytes]) -> None:
        stream.write(len(text).to_bytes(8, "little") + text)
        for t in (t for name in order for t in parts[name]):
            stream.write(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    return write


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file with Hugging Face's metadata atomically."""
    write_whole(file, make_tensor_writer(tensors))


def lock_folder(folder: Path, name: str = ".lock") -> IO[str]:
    """Lock a folder until the returned file is closed or the process ends, by any means.

    Raises:
        InputError: another process holds the lock (its id is given), or the lock is a link or cannot be written.
    """
    file = folder / name
    refuse_link(file)
    try:
        lock = open(file, "a+", encoding="utf-8", opener=open_plain)  # noqa: SIM115 (open as long as it is locked)
    except OSError as error:
        raise InputError(f"cannot write: {error.strerror}", file=file) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise InputError(f"in use by process {holder}", file=folder, hint="One process at a time") from error
    number = str(os.getpid())
    try:
        lock.truncate(0)
        lock.write(number)
        lock.flush()
    except OSError as error:
        with suppress(OSError):  # the unwritten bytes are still in the buffer
            lock.close()
        raise InputError(f"cannot write {len(number)} bytes: {error.strerror}", file=file) from error
    return lock
