"""One measurement is one JSON row: how the benchmarks of this folder time variants in turn and write them down.

    rows = measure({"ours": f, "theirs": g}, name="lora_linear", shape="8x1024x768", dtype="float32")
    write_rows("benchmarks/results/lora_linear.json", rows)

The variants are timed in turn, round by round (ours, theirs, ours, theirs, ...), each round in a new order: a machine
that grows slower while it is measured, or a neighbour that wakes up, then hits all of them alike and the ratio stands.
"""

import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "numpy")  # named in every row; a benchmark adds those that its peers need


@dataclass(frozen=True)
class Row:
    """One variant of one benchmark: seconds of a call, and all that is needed to judge or repeat the number."""

    benchmark: str
    variant: str
    median: float  # seconds a call
    p20: float
    p80: float
    rounds: int
    calls: int  # calls a round; the seconds above are already divided by it
    ratio: float  # median of the first variant's time over this one's, round by round: above 1, this one is faster
    shape: str
    dtype: str
    device: str
    memory_bytes: int  # peak: of the variant alone on a GPU, of the whole process so far on a CPU
    versions: dict[str, str]
    commit: str
    command: str
    note: str = ""
    extra: dict[str, object] = field(default_factory=dict)


def measure(
    variants: dict[str, Callable[[], object]],
    *,
    name: str,
    shape: str,
    dtype: str,
    device: str = "cpu",
    rounds: int = 20,
    seconds: float = 0.0,
    warmups: int = 2,
    packages: Sequence[str] = (),
    note: str = "",
) -> list[Row]:
    """Time each variant in `rounds` interleaved rounds; the first variant is the one that the ratios compare with.

    A round makes as many calls of a variant as fill `seconds` (at least one). On a device "cuda..." a round ends with
    a synchronisation, and the memory is the allocator's peak during that variant's rounds.
    """
    for call in variants.values():
        for _ in range(warmups):
            call()
    calls = {label: max(1, int(seconds / max(_round(call, 1, device), 1e-9))) for label, call in variants.items()}
    times: dict[str, list[float]] = {label: [] for label in variants}
    memory = dict.fromkeys(variants, 0)
    order, shuffler = list(variants), random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for label in order:
            _reset_peak(device)
            times[label].append(_round(variants[label], calls[label], device))
            memory[label] = max(memory[label], _peak(device))
    first = times[next(iter(variants))]
    shared = {
        "shape": shape, "dtype": dtype, "device": device_name(device), "versions": versions(packages),
        "commit": commit(), "command": command(), "note": note, "rounds": rounds,
    }  # fmt: skip
    return [
        Row(
            benchmark=name,
            variant=label,
            median=statistics.median(taken),
            p20=quantile(taken, 0.2),
            p80=quantile(taken, 0.8),
            calls=calls[label],
            ratio=statistics.median(a / b for a, b in zip(first, taken)),
            memory_bytes=memory[label],
            **shared,  # type: ignore[arg-type]
        )
        for label, taken in times.items()
    ]


def write_rows(path: str | Path, rows: Sequence[Row]) -> None:
    """Write the rows as a JSON array with one row a line, so that a diff shows which measurement changed."""
    lines = ",\n".join(json.dumps(asdict(row), ensure_ascii=False) for row in rows)
    Path(path).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def show_rows(rows: Sequence[Row]) -> None:
    """Print the rows as a table: milliseconds, and how many times faster than the first variant."""
    for row in rows:
        spread = f"[{row.p20 * 1e3:.3f}, {row.p80 * 1e3:.3f}]"
        label = f"{row.benchmark:28} {row.shape:26} {row.variant:22}"
        print(f"{label} {row.median * 1e3:10.3f} ms {spread:24} {row.ratio:7.2f}x")


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the sorted values lie, interpolated."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def versions(packages: Sequence[str] = ()) -> dict[str, str]:
    """The versions of Python and of each package, "absent" for one that is not installed."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def commit() -> str:
    """The commit that was measured, with "+changes" where tracked files differ from it."""
    here = Path(__file__).resolve().parent
    git = lambda *words: subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False).stdout
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../minipeft", "../kernels", ".")
    return (git("rev-parse", "--short=12", "HEAD").strip() or "unknown") + ("+changes" if changed.strip() else "")


def device_name(device: str) -> str:
    """The device in words: the GPU's name, or the processor's with the number of cores this process may use."""
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


def command() -> str:
    """The command that was given; of a path of this machine only the file's name."""
    words = [Path(sys.executable).name, *sys.argv]
    return " ".join(Path(word).name if Path(word).is_absolute() else word for word in words)


def _round(call: Callable[[], object], calls: int, device: str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / calls


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def _reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: str) -> int:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
