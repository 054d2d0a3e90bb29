"""A LoRA step, a decoded token and memory on a 4-bit and an 8-bit base beside float32 and bfloat16, in one run.

    OMP_NUM_THREADS=1 python benchmarks/quantized.py --model FOLDER --data conala-paired-train.json

Each variant lives in a process of its own, so that its memory is its own; the parent asks them in turn, round by round.
`memory_bytes` is what the linears of the blocks hold. The loss is that of the untuned model on one packed row, in
nats per supervised token.

    --variants fp32 "nf4 fp32"   these alone: a processor that emulates bfloat16 takes minutes for a step in it
    --errors FILE                instead: the error of each format by layer, |W - Q(W)| / |W|, as JSON and as a picture
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import measure
import torch

VARIANTS = {  # what the base is held in, and the dtype that its values are computed in
    "bf16": ("bf16", None),
    "fp32": ("fp32", None),
    "nf4": ("bf16", "nf4"),
    "int8": ("bf16", "int8"),
    "nf4 fp32": ("fp32", "nf4"),
    "int8 fp32": ("fp32", "int8"),
}
LENGTH, DECODED = 1024, 16  # tokens of a step's row; tokens decoded at batch 1
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def child(variant: str, source: str, data: str) -> None:
    """Load, report memory and loss, then make a step or decode for each line read."""
    import minipeft
    from minipeft.models.loss import count_targets
    from minipeft.models.quantized import QuantizedWeight, find_quantizable

    dtype, quantize = VARIANTS[variant]
    model = minipeft.load_model(source, dtype=DTYPES[dtype], quantize=quantize)
    weights = [layer.weight for layer in find_quantizable(model).values()]
    held = sum(w.nbytes_held() if isinstance(w, QuantizedWeight) else w.nbytes for w in weights)
    tokenizer = minipeft.load_tokenizer(source)
    examples = minipeft.encode_pairs(minipeft.load_pairs(data), tokenizer)
    batches = minipeft.pack(examples, tokenizer, length=LENGTH, batch=1)
    with torch.no_grad():
        batch = batches[0]
        loss = model.loss(batch.ids, batch.labels, batch.documents).item() / count_targets(batch.labels)
    print(json.dumps({"held": held, "weights": sum(w.numel() for w in weights), "loss": loss}), flush=True)
    minipeft.add_adapter(model, minipeft.LoRAConfig(16, 32))
    steps = minipeft.train(model, batches, minipeft.TrainConfig(steps=1000))
    cache, ids = model.new_cache(1, 32 + 20 * DECODED), batches[0].ids[:1, :32]
    with torch.no_grad():
        model(ids, cache=cache)

    @torch.no_grad()
    def decode() -> None:
        for column in range(DECODED):
            model(ids[:, column : column + 1], cache=cache)

    jobs: dict[str, Callable[[], object]] = {"step": lambda: next(steps), "decode": decode}
    for line in sys.stdin:
        start = time.process_time()
        jobs[line.strip()]()
        print(time.process_time() - start, flush=True)


def compare(options: argparse.Namespace) -> list[measure.Row]:
    """Rows of all variants, measured side by side; the first call of each is not counted."""
    command = [sys.executable, __file__, "--model", options.model, "--data", options.data, "--child"]
    children = {
        v: subprocess.Popen([*command, v], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for v in options.variants
    }
    about = {v: json.loads(answer(process)) for v, process in children.items()}
    times: dict[tuple[str, str], list[float]] = {(job, v): [] for job in ("step", "decode") for v in options.variants}
    shuffler = random.Random(0)
    for number in range(options.rounds + 1):
        for job, v in shuffler.sample(list(times), len(times)):
            children[v].stdin.write(job + "\n")  # type: ignore[union-attr]
            children[v].stdin.flush()  # type: ignore[union-attr]
            seconds = float(answer(children[v]))
            if number:
                times[job, v].append(seconds)
    for process in children.values():
        process.communicate()
    first = options.variants[0]
    return [
        measure.make_row(
            v,
            t,
            times[job, first],
            benchmark="LoRA step" if job == "step" else f"{DECODED} tokens decoded at batch 1",
            shape=f"1x{LENGTH}" if job == "step" else "1x1",
            dtype=VARIANTS[v][0],
            memory_bytes=about[v]["held"],
            command=f"OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/quantized.py",
            note=f"ratio: {first}'s time over this one's, processor seconds; memory_bytes: of the blocks' linears",
            extra={"bits a weight": 8 * about[v]["held"] / about[v]["weights"], "untuned loss": about[v]["loss"]},
        )
        for (job, v), t in times.items()
    ]


def answer(process: "subprocess.Popen[str]") -> str:
    """The next line that a child prints."""
    assert process.stdout is not None
    return process.stdout.readline()


def errors_by_layer(source: str, file: Path) -> None:
    """Write |W - Q(W)| / |W| of each linear and format, and draw the mean of each block."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    import minipeft
    from minipeft.models.quantize import FORMATS
    from minipeft.models.quantized import find_quantizable, quantize_weight

    model = minipeft.load_model(source)
    found: dict[str, dict[str, float]] = {format: {} for format in FORMATS}
    for path, layer in find_quantizable(model).items():
        weight = layer.weight.detach().float()
        for format in FORMATS:
            missed = quantize_weight(weight, format).dequantize() - weight
            found[format][path] = (missed.norm() / weight.norm()).item()
    file.write_text(json.dumps(found, indent=1) + "\n")
    kinds = sorted({path.split(".")[-1] for path in found["nf4"]})
    figure, axes = pyplot.subplots(figsize=(8, 4))
    for kind, mark in zip(kinds, "osv^D*P"):
        for format, style in zip(FORMATS, ("-", ":")):
            values = [error for path, error in found[format].items() if path.endswith(kind)]
            axes.plot(values, style, marker=mark, markersize=4, label=f"{kind}, {format}")
    axes.set(xlabel="block", ylabel="|W - Q(W)| / |W|", yscale="log", title="Error of quantization by layer")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(file.with_suffix(".svg"), bbox_inches="tight")


def main() -> None:
    """Measure all variants in turn and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS], help="ratios are to the first")
    parser.add_argument("--errors", type=Path, metavar="FILE")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "quantized-cpu.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.errors:
        return errors_by_layer(options.model, options.errors)
    if options.child:
        return child(options.child, options.model, options.data)
    rows = compare(options)
    measure.show_rows(rows)
    for row in rows:
        bits, loss = row.extra["bits a weight"], row.extra["untuned loss"]
        print(f"{row.benchmark:32} {row.variant:10} {bits:.2f} bits a weight, untuned loss {loss:.3f}")
    measure.write_rows(options.out, rows)


if __name__ == "__main__":
    main()
