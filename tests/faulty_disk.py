"""Fault injection for the disk: it counts the mutating calls under a folder and makes one of them kill, tear or fail.

    with Disk(folder) as disk: ...               counts and records: disk.calls
    with Disk(folder, at=17, how="kill"): ...    the process dies before call 17; "tear": in the middle of it
    with Disk(folder, at=17, how="full"): ...    from call 17 on nothing can be written or made: ENOSPC

`power_cut` makes of a record what may lie on disk if the power goes: a write is on disk when its file was synced, a
name when its folder was; what was not may be there in part. Of one folder's names, or one file's writes, those that
came first are there first; between folders and files there is no order.
"""

import builtins
import errno
import io
import os
import random
import signal
from pathlib import Path
from types import TracebackType
from typing import Any

PATCHED = ("open", "fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "remove", "truncate")
GROWS = {"create", "write", "mkdir", "fsync"}  # a disk that allocates late says at fsync that it is full


class Raw(io.FileIO):
    """A file whose writes are counted."""

    disk: "Disk"
    path: Path

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        offset = self.seek(0, os.SEEK_END) if self.appends else self.tell()

        def tear(_: object = None) -> None:
            super(Raw, self).write(view[: len(view) // 2])

        self.disk.call("write", self.path, (offset, bytes(view)), tear)
        return super().write(view)

    def truncate(self, size: int | None = None) -> int:
        size = self.tell() if size is None else size
        self.disk.call("truncate", self.path, size, lambda: super(Raw, self).truncate(size))
        return super().truncate(size)


class Disk:
    def __init__(self, root: Path, at: int | None = None, how: str = "record"):
        self.root, self.at, self.how = root.resolve(), at, how
        self.calls: list[tuple[str, Path, Any]] = []
        self.plain = {name: getattr(os, name) for name in PATCHED}
        self.plain_open = builtins.open

    def __enter__(self) -> "Disk":
        builtins.open = io.open = self.open  # type: ignore[assignment]
        for name in self.plain:
            setattr(os, name, getattr(self, f"os_{name}"))
        return self

    def __exit__(self, *_: type | BaseException | TracebackType | None) -> None:
        builtins.open = io.open = self.plain_open
        for name, function in self.plain.items():
            setattr(os, name, function)

    def call(self, kind: str, path: Path, detail: Any = None, half: Any = None) -> None:
        """Before a mutating call; `half` does a part of it, or all of an indivisible one."""
        number = len(self.calls)
        self.calls.append((kind, path, detail))
        if self.at is None or number < self.at:
            return
        if self.how in ("kill", "tear"):
            if self.how == "tear" and half is not None:
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "full" and kind in GROWS:
            if kind == "write" and half is not None and number == self.at:
                half()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def inside(self, path: Any, dir_fd: int | None = None) -> Path | None:
        """The path, absolute, if it lies under the folder."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        if dir_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        place = Path(os.path.abspath(path))
        return place if place.is_relative_to(self.root) else None

    def open(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: Any = None,
        errors: Any = None,
        newline: Any = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        path = self.inside(file) if set(mode) & set("wxa+") else None
        if path is None:
            return self.plain_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        if not isinstance(file, int) and not path.exists():
            self.call("create", path, None, lambda: self.plain_open(path, "xb").close())
        raw_mode = mode.replace("b", "").replace("t", "")
        raw = Raw(file, raw_mode, closefd)
        raw.disk, raw.path, raw.appends = self, path, "a" in mode  # type: ignore[attr-defined]
        stream: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return stream if "b" in mode else io.TextIOWrapper(stream, encoding or "utf-8", errors, newline)

    def os_open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        place = self.inside(path, dir_fd) if flags & os.O_CREAT else None
        if place is not None and not place.exists():
            self.call("create", place, None, lambda: self.plain["open"](path, flags, mode, dir_fd=dir_fd))
        return self.plain["open"](path, flags, mode, dir_fd=dir_fd)

    def os_fsync(self, handle: Any) -> None:
        number = handle if isinstance(handle, int) else handle.fileno()
        if (place := self.inside(number)) is not None:
            self.call("fsync", place)
        self.plain["fsync"](number)

    def moved(self, name: str, old: Any, new: Any) -> None:
        if (place := self.inside(old)) is not None:
            self.call("rename", place, self.inside(new), lambda: self.plain[name](old, new))
        self.plain[name](old, new)

    def os_rename(self, old: Any, new: Any, **_: Any) -> None:
        self.moved("rename", old, new)

    def os_replace(self, old: Any, new: Any, **_: Any) -> None:
        self.moved("replace", old, new)

    def os_mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        if (place := self.inside(path, dir_fd)) is not None and not place.exists():
            self.call("mkdir", place, None, lambda: self.plain["mkdir"](path, mode))
        self.plain["mkdir"](path, mode, dir_fd=dir_fd)

    def os_rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        if (place := self.inside(path, dir_fd)) is not None and place.exists():
            self.call("rmdir", place, None, lambda: self.plain["rmdir"](path, dir_fd=dir_fd))
        self.plain["rmdir"](path, dir_fd=dir_fd)

    def os_unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        if (place := self.inside(path, dir_fd)) is not None and place.exists():
            self.call("unlink", place, None, lambda: self.plain["unlink"](path, dir_fd=dir_fd))
        self.plain["unlink"](path, dir_fd=dir_fd)

    os_remove = os_unlink

    def os_truncate(self, path: Any, length: int) -> None:
        if (place := self.inside(path)) is not None:
            self.call("truncate", place, length, lambda: self.plain["truncate"](path, length))
        self.plain["truncate"](path, length)


class File:
    """A file's content on disk, and the operations since: writes (offset, bytes) and truncations (a length)."""

    def __init__(self) -> None:
        self.durable = b""
        self.pending: list[Any] = []

    def content(self, count: int, part: float = 1.0) -> bytes:
        """After the first `count` pending changes, of the last of which (if a write) only a part was done."""
        data = bytearray(self.durable)
        for number, change in enumerate(self.pending[:count], start=1):
            if isinstance(change, int):
                data = data[:change] + bytes(max(0, change - len(data)))
            else:
                offset, new = change
                new = new[: int(len(new) * part)] if number == count else new
                data += bytes(max(0, offset - len(data)))
                data[offset : offset + len(new)] = new
        return bytes(data)


class Folder:
    """The directory entries on disk, and the operations since; `live` are the entries as a process sees them."""

    def __init__(self) -> None:
        self.durable: dict[str, Any] = {}
        self.live: dict[str, Any] = {}
        self.pending: list[tuple[str, str, Any]] = []

    def change(self, kind: str, name: str, detail: Any = None) -> None:
        self.pending.append((kind, name, detail))
        apply(self.live, kind, name, detail)

    def names(self, count: int) -> dict[str, Any]:
        names = dict(self.durable)
        for change in self.pending[:count]:
            apply(names, *change)
        return names


def apply(names: dict[str, Any], kind: str, name: str, detail: Any) -> None:
    if kind == "link":
        names[name] = detail
    elif kind == "unlink":
        names.pop(name, None)
    else:
        names[detail] = names.pop(name)


def power_cut(calls: list[tuple[str, Path, Any]], root: Path, draw: random.Random, syncs: bool = True) -> Folder:
    """The tree after these calls, of which what was not synced is there in part; returned with all of it durable.

    `draw` chooses one of four kinds: nothing unsynced is there, all of it, names but not contents, some of each.
    """
    top = Folder()
    for kind, path, detail in calls:
        replay(top, kind, path, detail, root, syncs)
    kind = draw.choice(["nothing", "all", "names", "some"])
    return settled(top, kind, draw)


def replay(top: Folder, kind: str, path: Path, detail: Any, root: Path, syncs: bool) -> None:
    """Do one recorded call."""
    if path == root:
        if kind == "fsync" and syncs:
            sync(top)
        return
    *above, name = path.relative_to(root).parts
    parent = top
    for part in above:
        parent = parent.live[part]
    if kind in ("create", "mkdir"):
        parent.change("link", name, File() if kind == "create" else Folder())
    elif kind in ("unlink", "rmdir"):
        parent.change("unlink", name)
    elif kind == "rename":
        parent.change("rename", name, detail.name)
    elif kind == "fsync":
        if syncs:
            sync(parent.live[name])
    else:
        parent.live[name].pending.append(detail)


def sync(node: File | Folder) -> None:
    if isinstance(node, File):
        node.durable, node.pending = node.content(len(node.pending)), []
    else:
        node.durable, node.pending = node.names(len(node.pending)), []


def settled(node: Any, kind: str, draw: random.Random) -> Any:
    """The content after the power cut."""
    many = len(node.pending)
    if isinstance(node, File):
        made = File()
        count = {"nothing": 0, "all": many, "names": 0, "some": draw.randint(0, many)}[kind]
        made.durable = node.content(count, draw.random() if kind == "some" else 1.0)
        return made
    folder = Folder()
    count = {"nothing": 0, "all": many, "names": many, "some": draw.randint(0, many)}[kind]
    folder.durable = {name: settled(child, kind, draw) for name, child in node.names(count).items()}
    return folder


def write_tree(folder: Folder, place: Path) -> None:
    """Put the durable tree on a real disk."""
    place.mkdir()
    for name, node in folder.durable.items():
        if isinstance(node, File):
            (place / name).write_bytes(node.durable)
        else:
            write_tree(node, place / name)
