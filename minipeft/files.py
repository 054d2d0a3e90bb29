"""Strict reading and atomic writing of files: text, JSON, the folder lock. Tensors: tensor_files.py."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from minipeft.errors import InputError

LARGEST_JSON = 256 * 2**20  # bytes; the largest tokenizer.json known is 35 MB
MOST_CONTAINERS = 1_000_000  # lists and objects in a JSON value; the largest known tokenizer has 514,906 merges
MOST_VALUES = 5_000_000  # values of a JSON value
SMALL_JSON = 2**20  # characters; parsing a shorter text is faster than counting its values
QUOTED = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)  # a JSON text, or the rest where it does not end


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


def hash_file(file: Path) -> str:
    """The sha256 of a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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


def lock_folder(folder: Path, name: str = ".lock", *, wait: bool = False) -> IO[str]:
    """Lock a folder until the returned file is closed or the process ends, by any means; with `wait` after any other
    process that holds the lock.

    Raises:
        InputError: another process holds the lock (its id and host are given), or it is a link or cannot be written.
    """
    file = folder / name
    refuse_link(file)
    try:
        lock = open(file, "a+", encoding="utf-8", opener=open_plain)  # noqa: SIM115 (open as long as it is locked)
    except OSError as error:
        raise InputError(f"cannot write: {error.strerror}", file=file) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read(300).strip() or "unknown"
        lock.close()
        raise InputError(f"in use by process {holder}", file=folder, hint="One process at a time") from error
    holder = f"{os.getpid()} on {socket.gethostname()}"
    try:
        lock.truncate(0)
        lock.write(holder)
        lock.flush()
    except OSError as error:
        with suppress(OSError):  # the unwritten bytes are still in the buffer
            lock.close()
        raise InputError(f"cannot write {len(holder)} bytes: {error.strerror}", file=file) from error
    return lock
