"""Soak: train, kill, resume, generate and score on the demo model for N minutes, and compare every byte.

    python benchmarks/soak.py --minutes 60 --out results/soak

Two processes share one core. One is this: round by round it runs `minipeft train`, `generate` and `score`, and harms
each command at a random time:

    kill      SIGKILL                    memory  RLIMIT_AS at what the process has then, and 0 to 64 MB
    stop      SIGTERM                    file    RLIMIT_FSIZE of 0 to 64 KiB: EFBIG
    disk      the disk is filled (where a small tmpfs can be mounted: unshare -rm)

Then the same command, unharmed, must end with the bytes of a run that nothing happened to. The other process is the
busy neighbour: it trains, generates and scores in one Python process again and again; its bytes must be the same too,
its open files must stay what they are, and its memory must not grow.

log.jsonl gets a line for each command, round and cycle as they end; summary.json says what came of it. The exit status
is 1 where something was wrong: other bytes, a status that the harm does not explain, an error without its line, a hang,
an open file more, memory that grows. (Where memory runs out before minipeft itself is loaded, Python says so; C++ that
may not throw aborts, and C code of Python that loses its MemoryError ends in SystemError.)
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

DISK = 4 * 2**20  # bytes of the small disk; a run takes 0.4 MB
LONGEST = 300.0  # seconds after which a command hangs
PAIRS, QUESTIONS = 120, 6
TRAIN = {"model": "demo", "dtype": "fp32", "rank": 4, "dropout": 0.1, "targets": ("c_attn",), "steps": 16, "batch": 1,
         "length": 128, "held_out": 10, "evaluate_every": 8, "save_every": 2}  # fmt: skip
GENERATE = {"max_new_tokens": 16, "batch": 2}
HARMS = ("kill", "stop", "memory", "file", "disk")
EXPECTED = {"kill": {-signal.SIGKILL}, "stop": {143, -signal.SIGTERM}, "memory": {2}, "file": {2}, "disk": {2},
            "none": {0}}  # fmt: skip
NATIVE = {b"std::bad_alloc": -signal.SIGABRT, b"SystemError: error return without exception set": 1}  # lost in C or C++
TIMED = ("timing.json", ".lock")  # what says how long it took and whose it was
GROWTH = 0.03  # of the neighbour's memory, from the middle third of its cycles to the last: more is a leak
SMALL = 32 * 2**20  # bytes of growth that say nothing in a short soak


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--out", type=Path, required=True, help="folder of log.jsonl and summary.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disk", type=Path, help="a small disk that is there already")
    parser.add_argument("--neighbour", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.neighbour is not None:
        return live_long(options.neighbour, options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        if options.disk is None and can_mount():
            small = Path(place) / "small"
            small.mkdir()
            mount = f'mount -t tmpfs -o size={DISK} tmpfs "$0" && exec "$@"'  # gone with the process's namespace
            again = [sys.executable, *sys.argv, "--disk", str(small)]
            return subprocess.run(["unshare", "-rm", "sh", "-c", mount, str(small), *again]).returncode
        return Soak(options, Path(place)).run()


def can_mount() -> bool:
    """Whether a tmpfs can be mounted for this process alone."""
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", tempfile.gettempdir()]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


class Soak:
    """One soak: its places, its log, and what was wrong so far."""

    def __init__(self, options: argparse.Namespace, place: Path):
        self.options, self.place = options, place
        self.disk: Path = options.disk or place / "disk"
        self.disk.mkdir(exist_ok=True)
        self.harms = HARMS if options.disk else HARMS[:-1]
        self.log = options.out / "log.jsonl"
        self.log.unlink(missing_ok=True)
        self.draw = random.Random(options.seed)
        self.begun = time.monotonic()
        self.seconds: dict[str, float] = {}  # of each command, undisturbed
        self.wrong: list[str] = []
        self.count: Counter[str] = Counter()

    def run(self) -> int:
        write_pairs(self.place / "pairs.jsonl")
        wanted = self.do_round("wanted", ())
        self.note({"wanted": digest_of(wanted), "files": len(wanted)})
        ours = [sys.executable, __file__, "--neighbour", str(self.place), "--out", str(self.options.out)]
        neighbour = subprocess.Popen(ours, stdin=subprocess.PIPE, stderr=(self.options.out / "neighbour").open("w"))
        rounds = 0
        while not rounds or time.monotonic() - self.begun < 60 * self.options.minutes:
            rounds += 1
            found = self.do_round(f"round-{rounds}", self.harms)
            differ = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
            self.note({"round": rounds, "files": len(found), "differ": differ})
            self.wrong += [f"round {rounds}: other bytes in {name}" for name in differ]
            if neighbour.poll() is not None:
                break
        assert neighbour.stdin is not None
        with suppress(BrokenPipeError):
            neighbour.stdin.close()  # it ends its cycle
        status = neighbour.wait(LONGEST)
        said = (self.options.out / "neighbour").read_text()
        (self.options.out / "neighbour").unlink()
        self.wrong += [f"the neighbour ended with {status}: {said[-500:]}"] if status else []
        return self.conclude(rounds, wanted)

    def conclude(self, rounds: int, wanted: dict[str, str]) -> int:
        """Write summary.json; returns the exit status."""
        cycles = [row for row in map(json.loads, self.log.read_text().splitlines()) if "cycle" in row]
        differ = [row["cycle"] for row in cycles if row["digest"] != digest_of(wanted)]
        self.wrong += [f"cycle {number}: other bytes" for number in differ]
        files = sorted({row["open_files"] for row in cycles[1:]})
        self.wrong += [f"open files of the neighbour: {files}"] if len(files) > 1 else []
        memory = [row["resident_bytes"] for row in cycles]
        allocated = [row["allocated_bytes"] or 0 for row in cycles]
        resident, held = compare_thirds(memory), compare_thirds(allocated)
        for kind, (before, after) in (("resident", resident), ("allocated", held)):
            if len(memory) >= 3 and after - before > max(SMALL if len(memory) < 30 else 0, GROWTH * before):
                self.wrong.append(f"{kind} memory of the neighbour grew from {before:,.0f} to {after:,.0f} bytes")
        summary = {
            "minutes": round((time.monotonic() - self.begun) / 60, 2), "seed": self.options.seed, "rounds": rounds,
            "harmed": dict(sorted(self.count.items())), "small_disk": "disk" in self.harms,
            "neighbour": {"cycles": len(cycles), "open_files": files, "resident_bytes_first": memory[:1],
                          "resident_bytes_middle_third": resident[0], "resident_bytes_last_third": resident[1],
                          "allocated_bytes_middle_third": held[0], "allocated_bytes_last_third": held[1]},
            "wrong": self.wrong, "cores": len(os.sched_getaffinity(0)), "machine": platform.machine(),
            "python": platform.python_version(),
        }  # fmt: skip
        (self.options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(json.dumps(summary, indent=2))
        return 1 if self.wrong else 0

    def do_round(self, name: str, harms: tuple[str, ...]) -> dict[str, str]:
        """Train, generate and score in a folder of the small disk; returns the sha256 of each file and the scores."""
        folder = self.disk / name
        pairs = str(self.place / "pairs.jsonl")
        flags = flags_of({**TRAIN, "data": pairs})
        train = ["train", "--method", "lora", *flags, "--out", str(folder / "run"), "--resume", "--json"]
        common = ["--model", "demo", "--dtype", "fp32", "--threads", "1", "--adapter", str(folder / "run/adapter")]
        asked = ["--data", pairs, "--limit", str(QUESTIONS), "--out", str(folder / "answers.jsonl")]
        self.insist([*train, "--threads", "1"], harms, self.draw.randint(1, 3))
        self.insist(["generate", *common, *asked, *flags_of(GENERATE)], harms, self.draw.randint(0, 2))
        said = self.insist(["score", str(folder / "answers.jsonl"), "--json"], harms, self.draw.randint(0, 1))
        found = digests(folder) | {"scores": hashlib.sha256(said).hexdigest()}
        shutil.rmtree(folder)
        return found

    def insist(self, command: list[str], harms: tuple[str, ...], times: int) -> bytes:
        """Run a command, harmed so many times and then left alone; returns its standard output."""
        for _ in range(times if harms else 0):
            answers = Path(command[command.index("--out") + 1]) if command[0] == "generate" else None
            if answers is not None and answers.exists():  # it had ended before it was harmed
                return b""
            self.attempt(command, self.draw.choice(harms))
        if command[0] == "generate" and Path(command[command.index("--out") + 1]).exists():
            return b""
        return self.attempt(command, "none")

    def attempt(self, command: list[str], harm: str) -> bytes:
        """Run a command once; what it did is logged, and wrong where its status is not what the harm explains."""
        kind, delay = command[0], 0.0
        begun = time.monotonic()
        with tempfile.TemporaryFile(dir=self.place) as out, tempfile.TemporaryFile(dir=self.place) as err:
            process = subprocess.Popen([sys.executable, "-m", "minipeft", *command], stdout=out, stderr=err)
            if harm != "none":
                delay = self.draw.uniform(0.2, 1.0) * self.seconds[kind]
                try:
                    process.wait(delay)
                except subprocess.TimeoutExpired:
                    self.do_harm(process.pid, harm)
            try:
                status = process.wait(LONGEST)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
                self.wrong.append(f"{kind} hung after {harm}")
            (self.disk / "ballast").unlink(missing_ok=True)
            said, printed = (stream.seek(0) or stream.read() for stream in (err, out))
        seconds = time.monotonic() - begun
        lines = said.decode(errors="replace").strip().splitlines() or [""]
        last = next(
            (line for line in lines if line.startswith("error: ")), lines[-1]
        )  # Python may add to it as it ends
        last = last.replace(str(self.disk), "DISK").replace(str(self.place), "PLACE")
        last = re.sub(r"/\S*/site-packages", "PACKAGES", last)[-300:]
        if harm == "none":
            self.seconds[kind] = seconds if kind not in self.seconds else (self.seconds[kind] + seconds) / 2
        early = harm == "memory" and status == 1 and b"run_command" not in said  # Python itself was still being loaded
        native = harm == "memory" and any(text in said and status == end for text, end in NATIVE.items())
        explained = status in EXPECTED[harm] | {0} or early or native
        wrong = not explained or (status == 2 and not last.startswith("error: "))
        row = {"command": kind, "harm": harm, "after": round(delay, 2), "status": status, "seconds": round(seconds, 2)}
        row |= {"said": last} if status not in (0, -signal.SIGKILL) else {}
        self.note(row | ({"stderr": "\n".join(lines)[-4000:]} if wrong else {}))
        self.count[f"{kind}, {harm}: {status}"] += 1
        self.wrong += [f"{kind} after {harm} ended with {status}: {last}"] if wrong else []
        return printed

    def do_harm(self, process: int, harm: str) -> None:
        """Do it to a process, if it is still there."""
        with suppress(ProcessLookupError):
            if harm == "kill":
                os.kill(process, signal.SIGKILL)
            elif harm == "stop":
                os.kill(process, signal.SIGTERM)
            elif harm == "file":
                limit(process, resource.RLIMIT_FSIZE, self.draw.choice([0, 512, 4096, 65536]))
            elif harm == "memory":
                pages = int(Path(f"/proc/{process}/statm").read_text().split()[0])
                limit(process, resource.RLIMIT_AS, pages * resource.getpagesize() + self.draw.randrange(64 * 2**20))
            else:
                with open(self.disk / "ballast", "wb", buffering=0) as stream, suppress(OSError):
                    while True:
                        stream.write(bytes(512))

    def note(self, row: dict[str, Any]) -> None:
        note(self.log, {"at": round(time.monotonic() - self.begun, 1), **row})


def compare_thirds(values: list[int]) -> tuple[float, float]:
    """The medians of the middle third of the values and of the last."""
    third = len(values) // 3
    middle, last = (statistics.median(part or [0]) for part in (values[third : 2 * third], values[2 * third :]))
    return middle, last


def limit(process: int, what: int, value: int) -> None:
    """Lower a limit of another process, not for good."""
    resource.prlimit(process, what, (value, resource.prlimit(process, what)[1]))


def note(log: Path, row: dict[str, Any]) -> None:
    """Append a line; two processes may, since a short write of O_APPEND is whole."""
    with open(log, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def flags_of(settings: dict[str, Any]) -> list[str]:
    """The settings as flags."""
    words = {name: ",".join(value) if isinstance(value, tuple) else str(value) for name, value in settings.items()}
    return [word for name, value in words.items() for word in (f"--{name.replace('_', '-')}", value)]


def write_pairs(file: Path) -> None:
    """The first of the demo pairs."""
    from minipeft.demo import demo_pairs_path

    lines = demo_pairs_path().read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:PAIRS]), encoding="utf-8")


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file that does not differ from run to run; of the checkpoints the newest."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in TIMED]
    steps = sorted({path.parent.name for path in files if path.parent.name.startswith("step-")})
    kept = [path for path in files if path.parent.name not in steps[:-1]]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def digest_of(found: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()[:16]


def live_long(place: Path, out: Path) -> int:
    """The neighbour: train, generate and score in this one process until standard input is closed."""
    import select

    import torch
    from tqdm import tqdm

    from minipeft.runs import answers, finetune

    torch.set_num_threads(1)
    for module in (answers, finetune):
        setattr(module, "tqdm", partial(tqdm, disable=True))  # noqa: B010
    begun, cycle = time.monotonic(), 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        cycle += 1
        found = do_cycle(place / "neighbour", place / "pairs.jsonl")
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        row = {"cycle": cycle, "at": round(time.monotonic() - begun, 1), "open_files": len(os.listdir("/proc/self/fd")),
               "resident_bytes": pages * resource.getpagesize(), "allocated_bytes": count_allocated(),
               "digest": digest_of(found)}  # fmt: skip
        note(out / "log.jsonl", row)
    return 0


def count_allocated() -> int | None:
    """The bytes that malloc has handed out and not got back; unlike the resident ones, no matter of the allocator.

    By glibc's mallinfo2 (2.33 on): ten size_t, of which the 5th counts what is mapped alone and the 8th all else.
    """
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return None
    fields = [(f"n{number}", ctypes.c_size_t) for number in range(10)]
    mallinfo2.restype = type("Counts", (ctypes.Structure,), {"_fields_": fields})
    counts = mallinfo2()
    return int(counts.n4 + counts.n7)


def do_cycle(folder: Path, pairs: Path) -> dict[str, str]:
    """What a round does, in this process."""
    from minipeft.generation import GenerateConfig
    from minipeft.metrics.scores import score_texts
    from minipeft.runs.answers import AnswersConfig, answer_data, load_tuned, read_answers
    from minipeft.runs.config import ModelConfig, run_config
    from minipeft.runs.finetune import finetune

    finetune(run_config("lora", data=str(pairs), **TRAIN), folder / "run", say=lambda _: None)
    file = folder / "answers.jsonl"
    config = AnswersConfig(
        ModelConfig("demo", dtype="fp32"), GenerateConfig(**GENERATE), folder / "run/adapter", data=str(pairs),
        limit=QUESTIONS, out=file,
    )  # fmt: skip
    answer_data(*load_tuned(config, say=lambda _: None), config)
    read = read_answers(file)
    scores = score_texts(read.predictions, read.references, questions=read.questions, hit_limit=read.cut)
    printed = json.dumps(scores.as_dict(), indent=2) + "\n"
    found = digests(folder) | {"scores": hashlib.sha256(printed.encode()).hexdigest()}
    shutil.rmtree(folder)
    return found


if __name__ == "__main__":
    sys.exit(main())
