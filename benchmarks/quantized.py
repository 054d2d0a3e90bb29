"""A LoRA step, a decoded token and memory on a 4-bit and an 8-bit base beside float32 and bfloat16, in one run.

    OMP_NUM_THREADS=1 python benchmarks/quantized.py --model FOLDER --data conala-paired-train.json

Each variant lives in a process of its own, so that its memory is its own; the parent asks them in turn, round by round.
`memory_bytes` is what the linears of the blocks hold. The loss is that of the untuned model on one packed row, in
nats per supervised token. Decoding is measured with packed copies of the weights, as `generate` makes them by default,
and without (--no-pack).

    --variants fp32 "nf4 in fp32"   these alone: a processor that emulates bfloat16 takes minutes for a step in it
    --memory --random llama-1b      instead: what loading a model of this shape adds to the process, and its peak
    --errors FILE                   instead: the error of each format by layer, |W - Q(W)| / |W|, and a picture of it
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import measure
import torch
from loading import write_random
from steps import CASES

VARIANTS = {  # what the base is held in, and the dtype that its values are computed in
    "bf16": ("bf16", None),
    "fp32": ("fp32", None),
    "int8 in bf16": ("bf16", "int8"),
    "nf4 in bf16": ("bf16", "nf4"),
    "int8 in fp32": ("fp32", "int8"),
    "nf4 in fp32": ("fp32", "nf4"),
}
LENGTH, DECODED = 1024, 16  # tokens of a step's row; tokens decoded at batch 1
STEP, PACKED, UNPACKED = "LoRA step", f"{DECODED} tokens decoded", f"{DECODED} tokens decoded, --no-pack"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def read_status(name: str) -> int:
    """A figure of this process from /proc, in bytes."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


def child(variant: str, source: str, data: str | None) -> None:
    """Load, report memory and loss, then make a step or decode for each line read."""
    import minipeft
    from minipeft.models.loss import count_targets
    from minipeft.models.packed import PackedModel
    from minipeft.models.quantized import QuantizedWeight, find_quantizable

    dtype, quantize = VARIANTS[variant]
    before = read_status("VmRSS")
    model = minipeft.load_model(source, dtype=DTYPES[dtype], quantize=quantize)
    added = {"added": read_status("VmRSS") - before, "peak": read_status("VmHWM") - before}
    weights = [layer.weight for layer in find_quantizable(model).values()]
    held = sum(w.nbytes_held() if isinstance(w, QuantizedWeight) else w.nbytes for w in weights)
    about = {"held": held, "weights": sum(w.numel() for w in weights), **added}
    if data is None:
        return print(json.dumps(about))
    tokenizer = minipeft.load_tokenizer(source)
    examples = minipeft.encode_pairs(minipeft.load_pairs(data), tokenizer)
    batches = minipeft.pack(examples, tokenizer, length=LENGTH, batch=1)
    with torch.no_grad():
        batch = batches[0]
        loss = model.loss(batch.ids, batch.labels, batch.documents).item() / count_targets(batch.labels)
    print(json.dumps(about | {"loss": loss}), flush=True)
    minipeft.add_adapter(model, minipeft.LoRAConfig(16, 32))
    steps = minipeft.train(model, batches, minipeft.TrainConfig(steps=1000))
    cache, ids = model.new_cache(1, 32 + 20 * DECODED), batches[0].ids[:1, :32]
    with torch.no_grad():
        model(ids, cache=cache)

    @torch.no_grad()
    def decode(packed: PackedModel) -> None:
        with packed.used():
            for column in range(DECODED):
                model(ids[:, column : column + 1], cache=cache)

    copies, none = PackedModel(model), PackedModel(model, empty=True)
    jobs: dict[str, Callable[[], object]] = {
        STEP: lambda: next(steps),
        PACKED: lambda: decode(copies),
        UNPACKED: lambda: decode(none),
    }
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
    jobs = (STEP, PACKED, UNPACKED)
    times: dict[tuple[str, str], list[float]] = {(job, v): [] for job in jobs for v in options.variants}
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
            benchmark=job,
            shape=f"1x{LENGTH}" if job == STEP else "1x1",
            dtype="by variant",
            memory_bytes=about[v]["held"],
            command=f"OMP_NUM_THREADS={torch.get_num_threads()} {measure.format_command()}",
            note=f"{8 * about[v]['held'] / about[v]['weights']:.2f} bits a weight, untuned loss {about[v]['loss']:.3f}",
            extra={"bits a weight": 8 * about[v]["held"] / about[v]["weights"], "untuned loss": about[v]["loss"]},
        )
        for (job, v), t in times.items()
    ]


def compare_memory(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What loading adds to a process of each variant, and the peak meanwhile; bytes."""
    command = [sys.executable, __file__, "--model", options.model, "--child"]
    found = {
        v: json.loads(subprocess.run([*command, v], stdout=subprocess.PIPE, text=True, check=True).stdout)
        for v in options.variants
    }
    first = found[options.variants[0]]
    for v, about in found.items():
        about["bits a weight"] = 8 * about["held"] / about["weights"]
        print(
            f"{v:10} {about['bits a weight']:.2f} bits a weight: linears {about['held'] / 1e6:,.0f} MB "
            f"({about['held'] / first['held']:.3f} of {options.variants[0]}), process +{about['added'] / 1e6:,.0f} MB, "
            f"peak +{about['peak'] / 1e6:,.0f} MB"
        )
    return found


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
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model")
    source.add_argument("--random", choices=CASES, metavar="CASE", help="random bfloat16 weights of a case of steps.py")
    parser.add_argument("--tokenizer", help="folder of the tokenizer for --random")
    parser.add_argument("--memory", action="store_true", help="measure memory alone")
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
    with tempfile.TemporaryDirectory() as folder:
        if options.random is not None:
            write_random(options.random, options.tokenizer, folder)
            options.model = folder
        if options.memory:
            about = {"model": options.random or options.model, "versions": measure.read_versions()}
            about |= {"device": measure.describe_device("cpu"), "commit": measure.read_commit()}
            found = about | {"command": measure.format_command(), "variants": compare_memory(options)}
            Path(options.out).write_text(json.dumps(found, indent=1) + "\n")
            return
        rows = compare(options)
    measure.show_rows(rows)
    for row in rows:
        bits, loss = row.extra["bits a weight"], row.extra["untuned loss"]
        print(f"{row.benchmark:32} {row.variant:10} {bits:.2f} bits a weight, untuned loss {loss:.3f}")
    measure.write_rows(options.out, rows)


if __name__ == "__main__":
    main()
