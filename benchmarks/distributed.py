"""Tokens per second of a training on 1 and 2 processes, against one process of as many threads.

    python benchmarks/distributed.py --out benchmarks/results/distributed-cpu.json        # 3 minutes on two idle cores

LoRA r16 on all linears of the demo model, rows of 256 tokens, 4 micro-batches a step. Each variant trains STEPS steps
after a first one; the variants alternate, so that a change of the machine's speed affects all of them. Processor
seconds are those of all processes and threads in these steps: on a busy machine they say more than the clock.
"""

import argparse
import json
import operator
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import minipeft
from minipeft.training.launch import join
from minipeft.training.processes import ParallelConfig

STEPS, LENGTH, ACCUMULATE = 5, 256, 4
VARIANTS = {  # processes, threads of each, the sum
    "1 process, 1 thread": (1, 1, "exact"),
    "1 process, 2 threads": (1, 2, "exact"),
    "2 processes, exact": (2, 1, "exact"),
    "2 processes, fast": (2, 1, "fast"),
}


def train(threads: int, reduce: str) -> None:
    """Train in this process, one of those that `start` started; rank 0 prints tokens per second."""
    torch.set_num_threads(threads)
    model, tokenizer = minipeft.load_model("demo", dtype=torch.float32), minipeft.load_tokenizer("demo")
    minipeft.add_adapter(model, minipeft.LoRAConfig(rank=16))
    examples = minipeft.encode_pairs(minipeft.load_pairs("demo"), tokenizer)
    batches = minipeft.pack(examples, tokenizer, length=LENGTH, batch=1)
    settings = minipeft.TrainConfig(steps=STEPS + 1, accumulate=ACCUMULATE)
    with join(ParallelConfig(reduce=reduce)) as processes:
        tokens, begun, used = 0, 0.0, 0.0
        for step in minipeft.train(model, batches, settings, processes=processes):
            if step.number == 1:
                begun, used = time.perf_counter(), time.process_time()
            else:
                tokens += step.tokens
        print(tokens / (time.perf_counter() - begun), (time.process_time() - used) / tokens, step.loss)


def start(processes: int, threads: int, reduce: str) -> tuple[float, float, float]:
    """Start the processes of a variant; returns tokens per second, processor seconds per 1,000 tokens, last loss."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(opened.getsockname()[1])}
    command = [sys.executable, __file__, "--train", str(threads), reduce]
    shared = {"WORLD_SIZE": str(processes), **place}
    ranks = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)} | ({"RANK": str(r), **shared} if processes > 1 else {}),
        )
        for r in range(processes)
    ]
    said = [rank.communicate()[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks)
    speeds, seconds, losses = zip(*(map(float, text.split()) for text in said))
    return min(speeds), 1000 * sum(seconds), losses[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--train", nargs=2, metavar=("THREADS", "SUM"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(int(options.train[0]), options.train[1])
        return
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in VARIANTS}
    for _ in range(options.rounds):
        for name, how in VARIANTS.items():
            found[name].append(start(*how))
    base = [speed for speed, _, _ in found["1 process, 2 threads"]]
    rows = []
    for name, values in found.items():
        speeds, seconds, losses = zip(*values)
        row = {"variant": name, "tokens_per_second": statistics.median(speeds), "lowest": min(speeds)}
        row |= {"highest": max(speeds), "ratio_to_2_threads": statistics.median(map(operator.truediv, speeds, base))}
        row |= {"processor_seconds_per_1000_tokens": statistics.median(seconds), "loss": losses[0]}
        rows.append(row)
        print("  ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    about = {"rounds": options.rounds, "torch": torch.__version__, "cores": os.cpu_count(), "load": os.getloadavg()}
    about |= {"machine": platform.machine(), "command": "python benchmarks/distributed.py", "rows": rows}
    if options.out:
        options.out.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
