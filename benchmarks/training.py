"""Training steps and peak memory against Hugging Face transformers + PEFT, on a real checkpoint and CoNaLa, in one run.

    OMP_NUM_THREADS=1 python benchmarks/training.py --model FOLDER --data conala-paired-train.json

Each variant runs in its own process, so that its peak memory can be read; the parent requests steps in interleaved
rounds. A step is one row of 1024 tokens: forward, backward, gradient clipping, AdamW. Both sides pack the same pairs;
ours isolates documents, HF's attends across the row.
"""

import argparse
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import measure
import torch

VARIANTS = (
    "peft lora fp32",
    "minipeft lora fp32",
    "peft lora bf16",
    "minipeft lora bf16",
    "hf full fp32",
    "minipeft full fp32",
)
LENGTH = 1024


def ours(source: str, data: str, method: str, dtype: torch.dtype) -> Iterator[int]:
    """Run a minipeft step for each `next` and yield its number of tokens."""
    import minipeft

    model, tokenizer = minipeft.load_model(source, dtype=dtype), minipeft.load_tokenizer(source)
    minipeft.add_adapter(model, minipeft.LoRAConfig(16, 32) if method == "lora" else minipeft.FullConfig())
    batches = minipeft.pack(
        minipeft.encode_pairs(minipeft.load_pairs(data), tokenizer), tokenizer, length=LENGTH, batch=1
    )
    for step in minipeft.train(model, batches, minipeft.TrainConfig(steps=1000)):
        yield step.tokens


def theirs(source: str, data: str, method: str, dtype: torch.dtype) -> Iterator[int]:
    """Run the same with transformers and PEFT."""
    import peft
    import transformers

    import minipeft

    tokenizer = minipeft.load_tokenizer(source)
    examples = minipeft.encode_pairs(minipeft.load_pairs(data), tokenizer)
    batches = minipeft.pack(examples, tokenizer, length=LENGTH, batch=1, isolate=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    if method == "lora":
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, weight_decay=0.0)
    for number in range(1000):
        batch = batches[number]
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=batch.ids, labels=batch.labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        yield int((batch.documents >= 0).sum())


def serve_steps(variant: str, source: str, data: str) -> None:
    """Run a step for each input line; print its seconds, its tokens and the peak memory so far."""
    side, method, name = variant.split()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    steps = (ours if side == "minipeft" else theirs)(source, data, method, dtype)
    for _ in sys.stdin:
        start = time.perf_counter()
        tokens = next(steps)
        seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(seconds, tokens, peak, flush=True)


def main() -> None:
    """Measure all variants in turn and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "training-cpu.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return serve_steps(options.child, options.model, options.data)
    rows = []
    for group in ("lora", "full"):
        rows += compare([v for v in VARIANTS if group in v], options)
    measure.show_rows(rows)
    for row in rows:
        print(f"{row.variant:22} {row.extra['tokens_per_second']:.0f} tokens/s, peak {row.memory_bytes / 1e9:.2f} GB")
    measure.write_rows(options.out, rows)


def compare(variants: list[str], options: argparse.Namespace) -> list[measure.Row]:
    """Measure variants in interleaved rounds, after one warm-up step each."""
    command = [sys.executable, __file__, "--model", options.model, "--data", options.data, "--child"]
    children = {
        v: subprocess.Popen([*command, v], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for v in variants
    }
    times: dict[str, list[float]] = {v: [] for v in variants}
    rates: dict[str, list[float]] = {v: [] for v in variants}
    memory = dict.fromkeys(variants, 0)
    shuffler = random.Random(0)
    for number in range(options.rounds + 1):
        for v in shuffler.sample(variants, len(variants)):
            process = children[v]
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("step\n")
            process.stdin.flush()
            seconds, tokens, peak = process.stdout.readline().split()
            memory[v] = int(peak)
            if number:
                times[v].append(float(seconds))
                rates[v].append(int(tokens) / float(seconds))
    for process in children.values():
        process.communicate()
    return [
        measure.make_row(
            v,
            t,
            times[variants[0]],
            benchmark="training step",
            shape=f"1x{LENGTH}",
            dtype=v.split()[2],
            memory_bytes=memory[v],
            versions=measure.read_versions(("transformers", "peft")),
            command=f"OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/training.py",
            note="ratio: to the first variant of the group",
            extra={"tokens_per_second": statistics.median(rates[v])},
        )
        for v, t in times.items()
    ]


if __name__ == "__main__":
    main()
