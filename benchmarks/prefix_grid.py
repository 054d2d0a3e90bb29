"""Run the prefix experiment (minipeft/study/prefix_experiment.py) on a checkpoint and CoNaLa, on one thread.

    python benchmarks/prefix_grid.py --model DIR --data DIR --out results/prefix-135m [--part grid|long] [--dtype bf16]

Stopped at any time, it goes on with the first cell that has no file. results.json and report.md are written anew after
each cell.
"""

import argparse
import sys
from pathlib import Path

import torch

from minipeft.data.pairs import load_pairs
from minipeft.data.tokens import load_tokenizer
from minipeft.files import write_json
from minipeft.models.checkpoint import load_model
from minipeft.study import prefix_experiment as experiment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="conala")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=["grid", "long"], default="grid")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the frozen base")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    model, tokenizer = load_model(options.model, dtype=dtype), load_tokenizer(options.model)
    pairs = load_pairs(options.data)
    data = experiment.Data.split(pairs, tokenizer)
    about = {
        "command": f"python benchmarks/prefix_grid.py --model MODEL --data DATA --out OUT --part {options.part} "
        f"--dtype {options.dtype}",
        "model": Path(options.model).name, "data_sha256": pairs.sha256, "train_pairs": len(data.train),
        "dev_pairs": len(data.dev), "base_dtype": options.dtype, "torch": torch.__version__, "threads": 1,
        "base": experiment.base_row(model, data, options.out),
    }  # fmt: skip
    print(f"base {about['base']}", flush=True)
    cells = experiment.grid() if options.part == "grid" else experiment.long_runs()
    for cell, row in zip(cells, experiment.run(model, data, cells, options.out)):
        results = experiment.collect(options.out, about)
        write_json(options.out / "results.json", results)
        (options.out / "report.md").write_text(experiment.as_markdown(results))
        print(
            f"{cell.name:<40} {row['dev_loss_start']:.3f} -> {row['dev_loss']:.3f} {row['train_seconds']} s", flush=True
        )


if __name__ == "__main__":
    sys.exit(main())
