"""Run one Python program in its own Linux namespaces; execution.py starts this file as a script.

    python -I -S sandbox.py FOLDER SECONDS MEMORY PROCESSES FILES TOKEN < program

    user, network    unshared: no uid of the outside, and no network, not even the loopback device
    mounts           all that is mounted is read-only; FOLDER, an empty folder, is a tmpfs of FILES bytes
    processes        a PID namespace: nothing outside can be signalled, and killing its first process kills the rest
    limits           CPU seconds, address space, processes, size of a file, open files; no core dump

The last line of standard output is a JSON object: {"status": "passed" | "failed" | "timeout", "said": TEXT}, or
{"refused": REASON} where this kernel does not give such namespaces; then nothing was run.
"""

import ctypes
import errno
import json
import os
import resource
import signal
import sys
import time

NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
NOSUID, NODEV, REC, PRIVATE = 2, 4, 16384, 1 << 18
MOUNT_SETATTR, RECURSIVE, READ_ONLY, HERE = 442, 0x8000, 1, -100
NO_NEW_PRIVILEGES, DEATH_SIGNAL = 38, 1
INSIDE = 1000  # the uid inside: not 0, so that exec drops every capability
LEAST_PID_MAX = 301  # the least that the kernel takes
FOR_ERRORS = 2**16  # bytes of the folder beyond the size that one file may have, for standard error
SAID = 2000  # characters of the end of standard error

libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """The kernel lacks what isolation needs."""


def call(what: str, result: int) -> None:
    """Check the result of a system call."""
    if result != 0:
        raise Refused(f"{what}: {os.strerror(ctypes.get_errno())}")


def unshare() -> None:
    """Enter the namespaces, as a user that is unknown outside."""
    uid, gid = os.getuid(), os.getgid()
    call("unshare", libc.unshare(NEWUSER | NEWNS | NEWNET | NEWPID | NEWIPC))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{INSIDE} {uid} 1"), ("gid_map", f"{INSIDE} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as stream:
            stream.write(text)


def mount(folder: str, size: int) -> None:
    """Make everything read-only but a tmpfs at `folder`."""
    call("mount /", libc.mount(b"none", b"/", None, REC | PRIVATE, None))
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY, 0, 0, 0)  # set, clear, propagation, userns_fd
    call("mount_setattr", libc.syscall(MOUNT_SETATTR, HERE, b"/", RECURSIVE, attributes, ctypes.sizeof(attributes)))
    options = f"size={size + FOR_ERRORS},mode=700".encode()
    call("mount tmpfs", libc.mount(b"tmpfs", folder.encode(), b"tmpfs", NOSUID | NODEV, options))


def limit_processes(processes: int) -> None:
    """Limit the processes of this PID namespace; root is not bound by RLIMIT_NPROC, but by pid_max of Linux 6.14 on."""
    call("mount proc", libc.mount(b"proc", b"/proc", b"proc", NOSUID | NODEV, None))
    try:
        with open("/proc/sys/kernel/pid_max", "w") as stream:
            stream.write(str(max(LEAST_PID_MAX, processes)))
    except OSError as error:
        if is_root_outside():
            raise Refused(f"pid_max: {error.strerror}; run as an ordinary user") from error


def is_root_outside() -> bool:
    with open("/proc/self/uid_map") as stream:
        return int(stream.read().split()[1]) == 0


def limit(seconds: int, memory: int, processes: int, files: int) -> None:
    """Set the limits of the program and its children."""
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_FSIZE, files),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    call("prctl", libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0))


def start(folder: str, program: bytes, limits: "list[int]", report: int) -> None:
    """Become the program, as the first process of the namespace. Errors before that go to `report`."""
    try:
        os.setsid()  # otherwise kill(0) would reach the waiting process, which is in the same group
        libc.prctl(DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        limit_processes(limits[2])
        os.chdir(folder)
        with open("program.py", "wb") as stream:
            stream.write(program)
        places = ((os.devnull, os.O_RDONLY), ("out", os.O_WRONLY | os.O_CREAT), ("err", os.O_WRONLY | os.O_CREAT))
        for number, (name, how) in enumerate(places):
            os.dup2(os.open(name, how, 0o600), number)
        limit(*limits)
        os.execve(sys.executable, [sys.executable, "-I", "-B", "program.py"], {"HOME": folder, "TMPDIR": folder})
    except (Refused, OSError) as error:
        os.write(report, str(error).encode())
    os._exit(1)


def wait(child: int, seconds: int) -> "int | None":
    """The wait status of a process, which is killed with its namespace after `seconds`: then None."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def run(folder: str, limits: "list[int]", token: str) -> "dict[str, str]":
    """Run the program given on standard input."""
    program = sys.stdin.buffer.read()
    try:
        unshare()
        mount(folder, limits[3])
    except (Refused, OSError) as error:
        return {"refused": str(error)}
    reading, report = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        start(folder, program, limits, report)
    os.close(report)
    status = wait(child, limits[0])
    refused = os.read(reading, SAID) if status is not None else b""
    if refused:
        return {"refused": refused.decode(errors="replace")}
    passed = status == 0 and read_end(folder, "out").rstrip("\n").endswith(token)
    said = f"stopped after {limits[0]} s" if status is None else read_end(folder, "err") or describe(status)
    return {"status": "passed" if passed else "timeout" if status is None else "failed", "said": said}


def describe(status: int) -> str:
    """Describe a wait status; "" if the program ended normally."""
    if os.WIFSIGNALED(status):
        return f"killed by signal {os.WTERMSIG(status)}"
    return f"exit status {os.WEXITSTATUS(status)}" if status else ""


def read_end(folder: str, name: str) -> str:
    """Read the end of a file that the program wrote; "" if it is no longer a plain file."""
    try:
        file = os.open(os.path.join(folder, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.EACCES):
            return ""
        raise
    with os.fdopen(file, "rb") as stream:
        if not stream.seekable():
            return ""
        stream.seek(max(0, os.fstat(file).st_size - SAID))
        return stream.read(SAID).decode("utf-8", "replace")


if __name__ == "__main__":
    where, *numbers, secret = sys.argv[1:]
    print(json.dumps(run(where, [int(number) for number in numbers], secret)))
