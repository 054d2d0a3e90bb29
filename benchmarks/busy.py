"""A LoRA run of the demo beside a busy process: how many threads, and how they wait for each other.

    python benchmarks/busy.py --out benchmarks/results/busy-cpu.json     # 4 minutes; the machine must be idle else

Each variant is a process of `minipeft train` of its own, alone and then beside one process that computes without end;
tokens a second are its own figure. OpenMP's threads spin while they wait for each other, which is fast where each has a
core, and slow where one of them has none.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import measure

CORES = os.cpu_count() or 1
VARIANTS = {  # threads, environment
    f"{CORES} threads": (CORES, {}),
    f"{CORES} threads, passive waiting": (CORES, {"OMP_WAIT_POLICY": "PASSIVE"}),
    "1 thread": (1, {}),
}
TRAIN = ("train", "--model", "demo", "--data", "demo", "--method", "lora", "--length", "256", "--dtype", "fp32")


def train(threads: int, environment: dict[str, str], steps: int) -> tuple[float, bool]:
    """Tokens a second of a run, and whether it said that one thread is faster."""
    with tempfile.TemporaryDirectory() as folder:
        out = ("--out", folder, "--steps", str(steps), "--threads", str(threads))
        command = [sys.executable, "-m", "minipeft", *TRAIN, *out]
        done = subprocess.run(command, env=os.environ | environment, check=True, capture_output=True, text=True)
        result = json.loads((Path(folder) / "timing.json").read_text())
    return result["tokens_per_second"], "--threads 1 is faster" in done.stdout + done.stderr


def main() -> None:
    """Measure each variant alone and beside a busy process, in turn, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    found: dict[str, dict[str, list[float]]] = {name: {"alone": [], "beside": []} for name in VARIANTS}
    noted = {name: 0 for name in VARIANTS}
    for _ in range(options.rounds):
        for condition in ("alone", "beside"):
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if condition == "beside" else None
            for name, (threads, environment) in VARIANTS.items():
                speed, said = train(threads, environment, options.steps)
                found[name][condition].append(speed)
                noted[name] += said and condition == "beside"
            if busy is not None:
                busy.kill()
    medians = {name: {c: statistics.median(speeds) for c, speeds in both.items()} for name, both in found.items()}
    idle = max(both["alone"] for both in medians.values())
    for name, both in medians.items():
        shown = ", ".join(
            f"{condition} {speed:,.0f} tokens/s ({speed / idle:.2f})" for condition, speed in both.items()
        )
        print(f"{name:30} {shown}; said so {noted[name]} of {options.rounds}")
    about = {
        "command": measure.format_command(), "load before": load, "device": measure.describe_device("cpu"),
        "versions": measure.read_versions(), "commit": measure.read_commit(), "steps": options.steps,
    }  # fmt: skip
    options.out.write_text(json.dumps({"tokens_per_second": found, "noted": noted, **about}, indent=1) + "\n")


if __name__ == "__main__":
    main()
