"""A file that is never half written.

A training may be killed at any moment, and the disk may be full. Whoever reads the file must see the old content or the
whole new one. `write_whole(file, fill)` calls `fill(stream)`, which writes bytes to a binary stream:

    0  make the folder, if there is none (`make_folder(folder)`)
    1  make a temporary file in the folder of `file` (another file system cannot be renamed from), and fill it
    2  flush it and os.fsync it: the rename may reach the disk before the data otherwise
    3  give it the mode of a new file, 0o666 without the bits of the umask: mkstemp makes it 0o600 (`read_umask()`)
    4  rename it over `file` (os.replace): atomic on POSIX
    5  sync the folder (`sync_folder(folder)`): the rename itself may be lost in a power cut otherwise

If anything fails, also a KeyboardInterrupt within fill, the temporary file is removed and `file` stays as it was. An
OSError, also one that fill raises, becomes InputError(PROBLEM, file=file), whose problem gives the reason
(error.strerror) and, if fill had written any, how many bytes (stream.tell(), before the stream is closed). Any other
exception goes on as it is. Source: Pillai et al. 2014, "All file systems are not created equal".
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from minipeft.errors import InputError
from minipeft.tour.exercises.judging import require, require_equal
from minipeft.tour.exercises.record import Answer, Exercise

EXERCISE = Exercise(
    solution="minipeft.files.write_whole",
    hints=(
        "descriptor, name = tempfile.mkstemp(dir=file.parent); os.fdopen(descriptor, 'wb') is the stream.",
        "try: fill, flush, fsync, chmod, replace. except OSError: raise InputError(...) from error. "
        "finally: remove the temporary file if it is still there.",
        "try: fill(stream), finally: tried = stream.tell(): where fill raises, the number is known too.",
    ),
)


@contextmanager
def folder_with_file() -> Iterator[Path]:
    """A file of old content in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "state.json")
        file.write_bytes(b"old")
        yield file


def require_untouched(file: Path, when: str) -> None:
    """The file is the old one, and nothing else lies in its folder."""
    require_equal(file.read_bytes(), b"old", f"the file {when}")
    require_equal([path.name for path in file.parent.iterdir()], ["state.json"], f"what lies in the folder {when}")


def check_written(write_whole: Answer) -> None:
    """The new content is there, for a new file and over an old one, and nothing else lies beside it."""
    with folder_with_file() as file:
        write_whole(file, lambda stream: stream.write(b"new" * 1000))
        require_equal(file.read_bytes(), b"new" * 1000, "the file")
        other = file.with_name("other")
        write_whole(other, lambda stream: stream.write(b""))
        require_equal(other.read_bytes(), b"", "a new empty file")
        require_equal(len(list(file.parent.iterdir())), 2, "the number of files in the folder")
        inner = file.parent / "a" / "b" / "file"
        write_whole(inner, lambda stream: stream.write(b"new"))
        require_equal(inner.read_bytes(), b"new", "a file in a new folder")


def check_readers(write_whole: Answer) -> None:
    """While it is written, readers see the old content; a reader that has it open keeps the old file."""
    with folder_with_file() as file, file.open("rb") as reader:

        def fill(stream: Any) -> None:
            stream.write(b"new")
            stream.flush()
            require_equal(file.read_bytes(), b"old", "the file while it is written")

        write_whole(file, fill)
        require_equal(reader.read(), b"old", "what a reader sees who opened the file before")


def check_disk_full(write_whole: Answer) -> None:
    """On a full disk: an InputError that names the file, the reason and the bytes; the old file stays, alone."""
    with folder_with_file() as file:

        def fill(stream: Any) -> None:
            stream.write(b"x" * 123)
            stream.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

        try:
            write_whole(file, fill)
        except InputError as error:
            text = str(error)
            for part in (file.name, "No space left on device", "123"):
                require(part in text, f"the error does not hold {part!r}: {text}")
        else:
            raise AssertionError("a full disk was not noticed")
        require_untouched(file, "after a full disk")


def check_interrupted(write_whole: Answer) -> None:
    """Another exception within fill goes on as it is; the old file stays, alone."""
    for kind in (KeyboardInterrupt, ZeroDivisionError):
        with folder_with_file() as file:

            def fill(stream: Any, kind: type[BaseException] = kind) -> None:
                stream.write(b"half")
                raise kind

            try:
                write_whole(file, fill)
            except kind:
                require_untouched(file, f"after a {kind.__name__}")
            else:
                raise AssertionError(f"{kind.__name__} within fill was swallowed")


def check_order(write_whole: Answer) -> None:
    """The data is synced before the rename, and the folder after it."""
    events: list[str] = []
    sync = os.fsync

    def count(descriptor: Any) -> None:
        status = os.fstat(descriptor)
        events.append("folder" if stat.S_ISDIR(status.st_mode) else f"{status.st_size} bytes")
        sync(descriptor)

    listening = [True]

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and listening[0]:
            source, target = (Path(os.fsdecode(path)).resolve().parent for path in arguments[:2])
            events.append("rename" if source == target else "rename from another folder")

    sys.addaudithook(listen)
    with mock.patch.object(os, "fsync", count), folder_with_file() as file:
        write_whole(file, lambda stream: stream.write(b"new content"))
        listening[0] = False
    require_equal(events, ["11 bytes", "rename", "folder"], "the order of syncs and rename")


def check_mode(write_whole: Answer) -> None:
    """The file has the mode of a new one under the umask."""
    for mask in (0o022, 0o077):
        kept = os.umask(mask)
        try:
            with folder_with_file() as file:
                write_whole(file, lambda stream: stream.write(b"new"))
                mode = stat.S_IMODE(file.stat().st_mode)
                require(mode == 0o666 & ~mask, f"the mode is {oct(mode)} under the umask {oct(mask)}")
        finally:
            os.umask(kept)


def check_no_folder(write_whole: Answer) -> None:
    """Where the folder cannot be made, that too is an InputError with the reason, and without a number of bytes."""
    with folder_with_file() as file:
        try:
            write_whole(file / "below" / "a file", lambda stream: stream.write(b"new"))
        except InputError as error:
            require("irectory" in str(error), f"the error does not give the reason: {error}")
            require(re.search(r"[1-9] bytes", str(error)) is None, f"nothing was written, but: {error}")
        else:
            raise AssertionError("wrote below a file")
        require_untouched(file, "afterwards")
