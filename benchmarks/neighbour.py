"""Tokens per second of a LoRA run beside a busy process, by how OpenMP's threads wait for one another.

    python benchmarks/neighbour.py        # 3 minutes on two idle cores

torch's threads meet at a barrier after each parallel operator. A thread that waits spins before it sleeps: if another
process needs the core, it spins away the time in which the last thread could have come. LoRA r16 on all linears of the
demo model, two rows of 256 tokens, as many threads as cores; `busy` adds one process that only computes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

STEPS, LENGTH = 12, 256
WAITS = {  # environment of the run
    "default": {},
    "spin 100,000": {"GOMP_SPINCOUNT": "100000"},
    "spin 30,000": {"GOMP_SPINCOUNT": "30000"},
    "spin 10,000": {"GOMP_SPINCOUNT": "10000"},
    "spin 1,000": {"GOMP_SPINCOUNT": "1000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def train() -> None:
    """Train in this process and print tokens per second after the first two steps."""
    import minipeft

    model, tokenizer = minipeft.load_model("demo"), minipeft.load_tokenizer("demo")
    minipeft.add_adapter(model, minipeft.LoRAConfig(rank=16))
    examples = minipeft.encode_pairs(minipeft.load_pairs("demo"), tokenizer)
    batches = minipeft.pack(examples, tokenizer, length=LENGTH, batch=2)
    tokens, begun = 0, 0.0
    for step in minipeft.train(model, batches, minipeft.TrainConfig(steps=STEPS)):
        if step.number == 2:
            begun = time.perf_counter()
        elif step.number > 2:
            tokens += step.tokens
    print(tokens / (time.perf_counter() - begun))


def measure(settings: dict[str, str], busy: bool) -> float:
    """Tokens per second of one run."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        command = [sys.executable, __file__, "--train"]
        done = subprocess.run(command, env=plain | settings, capture_output=True, text=True, check=True)
    finally:
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()
    return float(done.stdout.split()[-1])


def main() -> None:
    """Measure each way to wait, idle and busy, in turn; print medians and shares of the default's idle speed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(WAITS), choices=list(WAITS))
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        return train()
    found: dict[str, dict[bool, list[float]]] = {name: {False: [], True: []} for name in options.only}
    for _ in range(options.rounds):
        for name, speeds in found.items():
            for busy in speeds:
                speeds[busy].append(measure(WAITS[name], busy))
    best = statistics.median(found[options.only[0]][False])
    for name, speeds in found.items():
        idle, busy = (statistics.median(speeds[kind]) for kind in (False, True))
        print(f"{name:14} idle {idle:8,.0f} ({idle / best:.2f})   busy {busy:8,.0f} ({busy / best:.2f})")
    print(json.dumps({"load": os.getloadavg(), "cores": os.cpu_count()}))
    return None


if __name__ == "__main__":
    main()
