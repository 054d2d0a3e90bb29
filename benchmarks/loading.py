"""From the start of a process to a loaded model and a first token, beside transformers, in processes of their own.

    OMP_NUM_THREADS=1 python benchmarks/loading.py --model FOLDER --out benchmarks/results/loading-cpu.json
    OMP_NUM_THREADS=1 python benchmarks/loading.py --random qwen3-0.6b --tokenizer FOLDER

Processor seconds of: importing the library (torch included), loading the model, loading the tokenizer and generating
one token; and how much memory the load added, as a multiple of the weights' file.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import measure
import torch
from steps import CASES, decoder, draw_weights

import minipeft

OURS = """
import minipeft, tokenizers
mark("import")
model = minipeft.load_model(source)
mark("load")
tokenizer = minipeft.load_tokenizer(source)
minipeft.generate(model, tokenizer, ["def add(a, b):"], minipeft.GenerateConfig(max_new_tokens=1, temperature=0))
mark("first token")
"""
THEIRS = """
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
mark("import")
model = AutoModelForCausalLM.from_pretrained(source)
mark("load")
tokenizer = AutoTokenizer.from_pretrained(source)
model.generate(**tokenizer("def add(a, b):", return_tensors="pt"), max_new_tokens=1, do_sample=False)
mark("first token")
"""
FRAME = """
import json, sys, time
def read_memory():
    status = open("/proc/self/status").read()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024
source, marks, memory = sys.argv[1], {}, {}
def mark(name):
    marks[name], memory[name] = time.process_time(), read_memory()
%s
print(json.dumps([marks, memory]))
"""
VARIANTS = {"transformers": THEIRS, "minipeft": OURS}
PHASES = ("import", "load", "first token")


def main() -> None:
    """Measure a model, given or random."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser, rounds=5)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model")
    source.add_argument("--random", choices=CASES, metavar="CASE", help="random bfloat16 weights of a case of steps.py")
    parser.add_argument("--tokenizer", help="folder of the tokenizer for --random")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.random is not None:
            write_random(options.random, options.tokenizer, folder)
            options.model = folder
        compare(options)


def write_random(case: str, tokenizer: str | None, folder: str) -> None:
    """Write a model folder of random weights: bfloat16 with a tokenizer, else float32."""
    model = decoder(CASES[case], draw_weights(CASES[case], torch.bfloat16 if tokenizer else torch.float32, "cpu"))
    minipeft.save_model(model, folder, None if tokenizer is None else minipeft.load_tokenizer(tokenizer))


def compare(options: argparse.Namespace) -> None:
    """Start processes of both sides in turn and write the rows."""
    if not options.busy:
        measure.wait_for_rest()
    size = sum(file.stat().st_size for file in Path(options.model).glob("*.safetensors"))
    seconds: dict[tuple[str, str], list[float]] = {(phase, v): [] for phase in PHASES for v in VARIANTS}
    growth: dict[str, list[float]] = {v: [] for v in VARIANTS}
    shuffler = random.Random(0)
    for number in range(options.rounds + 1):
        for v in shuffler.sample(list(VARIANTS), len(VARIANTS)):
            command = [sys.executable, "-c", FRAME % VARIANTS[v], options.model]
            marks, memory = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            if number:  # the first fills the disk's cache
                for phase in PHASES:  # "first token" counts from the start of the process, the others their own time
                    seconds[phase, v].append(marks[phase] - (marks["import"] if phase == "load" else 0.0))
                growth[v].append((memory["load"] - memory["import"]) / size)
    rows = [
        measure.make_row(
            v,
            t,
            seconds[phase, "transformers"],
            benchmark=phase,
            shape=f"{size / 1e6:,.0f} MB" if options.random is None else f"{options.random}, {size / 1e6:,.0f} MB",
            dtype="stored",
            memory_bytes=round(statistics.median(growth[v]) * size),
            versions=measure.read_versions(("transformers",)),
            note="processor seconds, but for load from the start of the process; memory_bytes: what load adds",
            extra={"memory over file": statistics.median(growth[v])},
        )
        for (phase, v), t in seconds.items()
    ]
    measure.show_rows(rows)
    for v in VARIANTS:
        print(f"{v:14} load adds {statistics.median(growth[v]):.2f} times the file's size to memory")
    if options.out:
        measure.write_rows(options.out, rows)


if __name__ == "__main__":
    main()
