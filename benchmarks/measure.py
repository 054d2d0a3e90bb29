"""Time variants in interleaved rounds and write each measurement as one JSON row.

    rows = measure({"ours": f, "theirs": g}, name="lora_linear", shape="8x1024x768", dtype="float32")
    write_rows("benchmarks/results/lora_linear.json", rows)

Each round times every variant, in a new random order, so that a change of the machine's speed affects all variants and
the ratios hold. The first variant is timed twice a round; the difference of the two is the noise of the run, and a
smaller difference between variants is reported as none. On a GPU, CUDA events are the clock. Each row records the peak
rates of the machine (a large product, a large copy) measured in the same process, and a GPU's clocks and driver.
"""

import argparse
import contextlib
import ctypes
import functools
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "numpy")  # their versions are in every row; a benchmark adds its peers'
AGAIN = "the first variant again"
FLOATS = (
    "float32",
    "bfloat16",
    "float16",
    "float64",
)  # dtypes whose peak rate is measured; float32 stands for any other
BUSY = 0.5  # load average above the number of cores from which the machine counts as busy
PATIENCE, WAIT = 300.0, 15.0  # seconds to wait for a busy machine to become idle, and between two checks


@dataclass(frozen=True)
class Row:
    """One variant of one benchmark: seconds a call, and what is needed to judge and repeat the measurement."""

    benchmark: str
    variant: str
    median: float  # seconds a call
    p20: float
    p80: float
    rounds: int
    calls: int  # calls a round; the seconds above are already divided by it
    ratio: float  # median over rounds of the first variant's time over this one's; above 1 this one is faster
    shape: str
    dtype: str
    device: str
    memory_bytes: int  # peak of a call, less what was allocated before it
    versions: dict[str, str]
    commit: str
    command: str
    note: str = ""
    best: float | None = None  # of all rounds
    ratios: dict[str, float] = field(default_factory=dict)  # as `ratio`, of each variant's time over this one's
    extra: dict[str, object] = field(default_factory=dict)
    surroundings: dict[str, object] = field(default_factory=dict)  # clock, load, noise, peak rates; a GPU's clocks


def add_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add the options of all benchmarks: device, rounds, threads and output file."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=rounds, help="(default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1], help="number of torch threads; several are measured in turn"
    )
    parser.add_argument("--busy", action="store_true", help="measure even on a busy machine; the rows record it")
    parser.add_argument("--out", help="JSON file for the rows")


def measure(
    variants: dict[str, Callable[[], object]],
    *,
    name: str,
    shape: str,
    dtype: str,
    device: str = "cpu",
    rounds: int = 20,
    seconds: float = 0.0,
    calls: int | None = None,
    warmups: int | None = None,
    packages: Sequence[str] = (),
    note: str = "",
    threads: int = 1,
    busy: bool = False,
) -> list[Row]:
    """Time each variant in `rounds` interleaved rounds; ratios are relative to the first variant.

    A round makes `calls` calls of a variant, or as many as fill `seconds` (at least one), after 2 calls to warm up, 25
    on a GPU. CUDA devices are timed by events; a CPU by processor time with one thread, which excludes other processes,
    and by wall-clock time with several.

    Raises: SystemExit if the machine is still busy after five minutes, unless `busy`.
    """
    if not busy and not device.startswith("cuda"):
        wait_for_rest()
    clock = choose_clock(threads)
    around = describe_conditions(device, dtype, threads)
    warmups = (25 if device.startswith("cuda") else 2) if warmups is None else warmups
    first = next(iter(variants))
    variants = {**variants, AGAIN: variants[first]}
    for call in variants.values():
        for _ in range(warmups):
            call()
    counts = {label: calls or _calls(call, seconds, device, clock) for label, call in variants.items()}
    times: dict[str, list[float]] = {label: [] for label in variants}
    order, shuffler = list(variants), random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for label in order:
            times[label].append(_round(variants[label], counts[label], device, clock))
    memory = {
        label: measure_peak_bytes(call, device) for label, call in variants.items()
    }  # measured separately: it disturbs the time
    again, base = times.pop(AGAIN), times[first]
    twice = [a / b for a, b in zip(base, again)]
    noise = max(
        abs(statistics.median(twice) - 1), (interpolate_quantile(twice, 0.8) - interpolate_quantile(twice, 0.2)) / 2
    )
    shared: dict[str, Any] = {
        "shape": shape,
        "dtype": dtype,
        "device": describe_device(device),
        "versions": read_versions(packages),
        "commit": read_commit(),
        "command": format_command(),
        "note": note,
        "surroundings": {"clock": _clock_name(device, clock), **around, "noise": round(noise, 4)},
    }
    return [
        make_row(
            label,
            taken,
            base,
            benchmark=name,
            best=min(taken),
            ratios={other: statistics.median(a / b for a, b in zip(times[other], taken)) for other in times},
            calls=counts[label],
            memory_bytes=memory[label],
            **shared,
        )
        for label, taken in times.items()
    ]


def make_row(variant: str, taken: Sequence[float], first: Sequence[float], **about: Any) -> Row:
    """Return the row of a variant from its seconds in each round and those of the first variant; `about`: other fields,
    of which the versions, the place and the load have defaults."""
    shared = {
        "rounds": len(taken),
        "calls": 1,
        "device": describe_device("cpu"),
        "versions": read_versions(),
        "commit": read_commit(),
        "command": format_command(),
        "surroundings": {"load": round(os.getloadavg()[0], 1), "busy": measure_overload() > 0},
    }
    return Row(
        variant=variant,
        median=statistics.median(taken),
        p20=interpolate_quantile(taken, 0.2),
        p80=interpolate_quantile(taken, 0.8),
        ratio=statistics.median(a / b for a, b in zip(first, taken)),
        **{**shared, **about},
    )


def write_rows(path: str | Path, rows: Sequence[Row]) -> None:
    """Write the rows as a JSON array with one row a line, so that a diff shows which measurements changed."""
    lines = ",\n".join(json.dumps(asdict(row), ensure_ascii=False) for row in rows)
    Path(path).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def compare_speed(row: Row, other: str) -> float | str:
    """Return how many times faster a row is than another variant, or "no difference" within the noise of the run."""
    times = row.ratios[other]
    return times if abs(times - 1) > float(str(row.surroundings["noise"])) else "no difference"


def show_rows(rows: Sequence[Row]) -> None:
    """Print the rows as a table: milliseconds, and the speed relative to the first variant."""
    for row in rows:
        spread = f"[{row.p20 * 1e3:.3f}, {row.p80 * 1e3:.3f}]"
        label = f"{row.benchmark:28} {row.shape:26} {row.variant:22}"
        busy = "  (busy machine)" if row.surroundings.get("busy") else ""
        within = abs(row.ratio - 1) <= float(str(row.surroundings.get("noise", 0.0)))
        said = "FAIL" if "FAIL" in row.note else "no difference" if within else f"{row.ratio:.2f}x"
        print(f"{label} {row.median * 1e3:10.3f} ms {spread:24} {said:>13}{busy}")


def interpolate_quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the sorted values lie, interpolated."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def read_versions(packages: Sequence[str] = ()) -> dict[str, str]:
    """Return the versions of Python and of each package, "absent" for one that is not installed."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


@functools.cache
def read_commit() -> str:
    """Return the measured commit, with "+changes" if tracked files differ from it."""
    here = Path(__file__).resolve().parent
    git = lambda *words: subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False).stdout
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../minipeft", "../kernels", ".", ":!results")
    return (git("rev-parse", "--short=12", "HEAD").strip() or "unknown") + ("+changes" if changed.strip() else "")


def describe_device(device: str) -> str:
    """Return the name of the GPU, or of the processor with the number of cores available to this process."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"


def measure_overload() -> float:
    """Return the 1-minute load average above the limit of a busy machine; <= 0 is idle enough."""
    return os.getloadavg()[0] - (os.cpu_count() or 1) - BUSY


def wait_for_rest() -> None:
    """Wait until the machine is idle enough.

    Raises: SystemExit if it is not within PATIENCE seconds.
    """
    waited = 0.0
    while (over := measure_overload()) > 0:
        if waited >= PATIENCE:
            raise SystemExit(
                f"not measured: the load average is {over:.1f} above {(os.cpu_count() or 1) + BUSY} and a busy "
                "machine's times say little; end what else runs, or give --busy"
            )
        print(f"# waits for other work to end: the load average is {over:.1f} too high", flush=True)
        time.sleep(WAIT)
        waited += WAIT


def describe_conditions(device: str, dtype: str, threads: int) -> dict[str, object]:
    """Return the conditions of a measurement: load, peak rates of the machine, a GPU's driver and clocks."""
    found: dict[str, object] = {
        "threads": threads,
        "load": round(os.getloadavg()[0], 1),
        "busy": measure_overload() > 0,
        **measure_peak_rates(device, dtype if dtype in FLOATS else FLOATS[0], threads),
    }
    if device.startswith("cuda"):
        asked = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"
        query = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader,nounits"]
        said = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().splitlines()
        found |= dict(zip(asked.split(","), said[0].split(", "))) if said else {}
    return found


@functools.cache
def measure_peak_rates(device: str, dtype: str, threads: int) -> dict[str, float]:
    """Measure the peak rates of the device: TFLOP/s of a product (8192^3; 1024^3 on a CPU), GB/s of a copy."""
    import torch

    gpu = device.startswith("cuda")
    width, size = (8192, 1 << 32) if gpu else (1024, 1 << 28)
    a, b = (torch.randn(width, width, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    source = torch.ones(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    best = {}
    for name, call, work in (
        ("ceiling_tflops", lambda: a @ b, 2e-12 * width**3),
        ("ceiling_gb_per_s", lambda: target.copy_(source), 2e-9 * size),  # read and written
    ):
        call()
        seconds: list[float] = []
        while len(seconds) < 10 and sum(seconds) < 2:
            seconds.append(_round(call, 1, device, choose_clock(threads)))
        best[name] = float(f"{work / min(seconds):.3g}")
    return best


def choose_clock(threads: int) -> Callable[[], float]:
    """Return the clock: processor time for one thread; wall-clock time for several, whose processor times add up."""
    return time.process_time if threads == 1 else time.perf_counter


def count_input_sets(size: int, device: str) -> int:
    """Return how many inputs of `size` bytes to cycle through, so that the next input is not in a GPU's L2 cache.

    Four times the size of that cache, within 4 to 32 inputs; 1 on a CPU.
    """
    if not device.startswith("cuda"):
        return 1
    import torch

    return max(4, min(32, 1 + 4 * torch.cuda.get_device_properties(device).L2_cache_size // size))


def record_graph(call: Callable[[], object], sets: int) -> Callable[[], object]:
    """Capture `sets` CUDA graphs of a call and return their replay in turn: kernel time without Python overhead.

    The graphs share memory, so the outputs of a replay are not usable.

    Raises: RuntimeError if the call synchronizes with the GPU during capture.
    """
    import torch

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graphs: list[torch.cuda.CUDAGraph] = []
    for _ in range(sets):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
            call()
        graphs.append(graph)
    turn = itertools.cycle(graphs)
    return lambda: next(turn).replay()


def format_command() -> str:
    """Return the command line, absolute paths reduced to file names."""
    words = [Path(sys.executable).name, *sys.argv]
    return " ".join(Path(word).name if Path(word).is_absolute() else word for word in words)


def _calls(call: Callable[[], object], seconds: float, device: str, clock: Callable[[], float]) -> int:
    """Return how many calls fill this many seconds, at least one."""
    return max(1, int(seconds / max(_round(call, 1, device, clock), 1e-9))) if seconds else 1


def _round(call: Callable[[], object], calls: int, device: str, clock: Callable[[], float]) -> float:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1e3 / calls
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) / calls


def _clock_name(device: str, clock: Callable[[], float]) -> str:
    return "cuda events" if device.startswith("cuda") else clock.__name__


def measure_peak_bytes(call: Callable[[], object], device: str) -> int:
    """Return the peak memory of a call above the level before it: the allocator's on a GPU, resident pages on Linux.

    Elsewhere 0: getrusage gives the peak of the whole process, which includes other variants.
    """
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not sys.platform.startswith("linux"):
        return 0
    with contextlib.suppress(
        OSError, AttributeError
    ):  # without malloc_trim libc keeps freed pages and the peak is underestimated
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM (man proc_pid_clear_refs)
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    """Return a field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
