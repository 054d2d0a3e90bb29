"""Training steps and peak memory against Hugging Face transformers + PEFT, in one run.

    OMP_NUM_THREADS=1 python benchmarks/training.py --model FOLDER --data conala-paired-train.json
    OMP_NUM_THREADS=1 python benchmarks/training.py --random gpt2 --rows 2 --length 256

A step is `--rows` rows of `--length` tokens: forward, backward, gradient clipping, AdamW. With --data both sides pack
the same pairs; ours isolates documents, HF's attends across the row. Without it a row is one document of random tokens,
and the first losses must be equal. Each variant runs in its own process, so that its peak memory can be read; the
parent requests steps in interleaved rounds. Times are processor seconds with one thread, else the wall's clock.

"oneDNN" beside a peer: with `torch.backends.mkldnn.matmul.fp32_precision = "bf16"`, the switch that minipeft turns on
within a step (minipeft/models/products.py); "torch's products": minipeft with --no-onednn.
"""

import argparse
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import measure
import torch
from loading import write_random
from steps import CASES

PEER, PEER_SWITCHED, OURS, OURS_PLAIN = "{peer}", "{peer}, oneDNN", "minipeft", "minipeft, torch's products"
GROUPS = {  # what is compared: the first variant is the peer of the others
    "lora fp32": (PEER, PEER_SWITCHED, OURS_PLAIN, OURS),
    "lora bf16": (PEER, OURS),
    "full fp32": (PEER, PEER_SWITCHED, OURS_PLAIN, OURS),
}
PEERS = {"lora": "PEFT", "full": "transformers"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def draw_rows(options: argparse.Namespace, vocabulary: int) -> torch.Tensor:
    """Draw the rows' random tokens, the same on both sides. [rows, length]"""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, vocabulary, (options.rows, options.length), generator=generator)


def ours(options: argparse.Namespace, method: str, dtype: torch.dtype) -> Iterator[tuple[int, float]]:
    """Run a minipeft step for each `next` and yield its number of tokens and its loss."""
    import minipeft

    model = minipeft.load_model(options.model, dtype=dtype)
    minipeft.add_adapter(model, minipeft.LoRAConfig(16, 32) if method == "lora" else minipeft.FullConfig())
    if options.data:
        tokenizer = minipeft.load_tokenizer(options.model)
        examples = minipeft.encode_pairs(minipeft.load_pairs(options.data), tokenizer)
        batches = minipeft.pack(examples, tokenizer, length=options.length, batch=options.rows)
    else:
        ids = draw_rows(options, model.config.vocab_size)
        batches = [minipeft.Batch(ids, ids, torch.zeros_like(ids))] * 1000
    for step in minipeft.train(model, batches, minipeft.TrainConfig(steps=1000)):
        yield step.tokens, step.loss


def theirs(options: argparse.Namespace, method: str, dtype: torch.dtype) -> Iterator[tuple[int, float]]:
    """Run the same with transformers and PEFT."""
    import peft
    import transformers

    import minipeft

    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    rows = []
    if options.data:
        tokenizer = minipeft.load_tokenizer(options.model)
        examples = minipeft.encode_pairs(minipeft.load_pairs(options.data), tokenizer)
        batches = minipeft.pack(examples, tokenizer, length=options.length, batch=options.rows, isolate=False)
        rows = [batches[number] for number in range(200)]
    else:
        ids = draw_rows(options, model.config.vocab_size)
        rows = [minipeft.Batch(ids, ids, torch.zeros_like(ids))]
    if method == "lora":
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, weight_decay=0.0)
    for number in range(1000):
        batch = rows[number % len(rows)]
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=batch.ids, labels=batch.labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        yield int((batch.documents >= 0).sum()), loss.item()


def serve_steps(options: argparse.Namespace) -> None:
    """Run a step for each input line; print its seconds, its tokens, its loss and the peak memory so far."""
    from minipeft.models.products import use_onednn

    group, variant = options.child.split(": ")
    method, name = group.split()
    if variant == PEER_SWITCHED:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
    use_onednn(variant != OURS_PLAIN)
    clock = measure.choose_clock(torch.get_num_threads())
    steps = (ours if variant.startswith(OURS) else theirs)(options, method, DTYPES[name])
    for _ in sys.stdin:
        start = clock()
        tokens, loss = next(steps)
        seconds, peak = clock() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(seconds, tokens, loss, peak, flush=True)


def main() -> None:
    """Measure all groups in turn and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model")
    source.add_argument("--random", choices=CASES, metavar="CASE", help="random float32 weights of a case of steps.py")
    parser.add_argument("--data", help="pairs to pack; default one document of random tokens a row")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", action="store_true", help="measure even on a busy machine; the rows record it")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "training-cpu.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return serve_steps(options)
    if not options.busy:
        measure.wait_for_rest()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if options.random is not None:
            write_random(options.random, None, folder)
            options.model = folder
        for group in options.groups:
            rows += compare(group, options)
    measure.show_rows(rows)
    for row in rows:
        print(f"{row.variant:22} {row.extra['tokens_per_second']:.0f} tokens/s, peak {row.memory_bytes / 1e9:.2f} GB")
    measure.write_rows(options.out, rows)


def compare(group: str, options: argparse.Namespace) -> list[measure.Row]:
    """Measure the variants of a group in interleaved rounds, after one warm-up step each."""
    command = [sys.executable, __file__, "--model", options.model, "--rows", str(options.rows)]
    command += ["--length", str(options.length), *(["--data", options.data] if options.data else [])]
    variants, (method, dtype) = GROUPS[group], group.split()
    children = {
        v: subprocess.Popen(
            [*command, "--child", f"{group}: {v}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for v in variants
    }
    times: dict[str, list[float]] = {v: [] for v in variants}
    rates: dict[str, list[float]] = {v: [] for v in variants}
    losses: dict[str, list[float]] = {v: [] for v in variants}
    memory = dict.fromkeys(variants, 0)
    shuffler = random.Random(0)
    for number in range(options.rounds + 1):
        for v in shuffler.sample(variants, len(variants)):
            process = children[v]
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("step\n")
            process.stdin.flush()
            seconds, tokens, loss, peak = process.stdout.readline().split()
            memory[v] = int(peak)
            losses[v].append(float(loss))
            if number:
                times[v].append(float(seconds))
                rates[v].append(int(tokens) / float(seconds))
    for process in children.values():
        process.communicate()
    first = [losses[v][0] for v in variants]
    held = 1e-5 if dtype == "fp32" else 1e-2
    if not options.data and max(first) - min(first) > held * min(first):
        raise SystemExit(f"{group}: the first losses differ: {dict(zip(variants, first))}")
    source = options.random or Path(options.model).name
    packed = "CoNaLa packed" if options.data else "one document a row"
    return [
        measure.make_row(
            v.format(peer=PEERS[method]),
            t,
            times[variants[0]],
            benchmark=f"{'LoRA r16' if method == 'lora' else 'full'} step, {packed}",
            shape=f"{source}, {options.rows} x {options.length}",
            dtype={"fp32": "float32", "bf16": "bfloat16"}[dtype],
            memory_bytes=memory[v],
            versions=measure.read_versions(("transformers", "peft")),
            command=f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', torch.get_num_threads())} "
            + measure.format_command(),
            note=f"{memory[v] / 1e9:.2f} GB",
            ratios={
                other.format(peer=PEERS[method]): statistics.median(a / b for a, b in zip(times[other], t))
                for other in variants
            },
            extra={"tokens_per_second": statistics.median(rates[v]), "losses": losses[v]},
        )
        for v, t in times.items()
    ]


if __name__ == "__main__":
    main()
