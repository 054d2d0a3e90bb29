"""Does a quantized base cost quality? LoRA on a plain, an int8 and an NF4 base: the same recipe and several seeds.

    python benchmarks/quantized_quality.py --out runs/quality                            # the demo, 25 minutes
    python benchmarks/quantized_quality.py --out runs/quality --model FOLDER --data conala --dtype bf16

Each base is a study of its own (`minipeft study --method lora --seeds 3 --quantize FORMAT`), so that a run that was
stopped goes on. Against the plain base: the difference of BLEU, paired by question, with a 95 % interval over questions
and seeds; and that of held-out loss, in nats per token, paired by seed, with Student's interval.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import measure

from minipeft.metrics.bootstrap import bootstrap_bleu
from minipeft.study.rows import Row, as_object
from minipeft.study.statistics import compute_mean_and_sd, compute_t_interval

BASES = ("plain", "int8", "nf4")


def run_study(base: str, options: argparse.Namespace, rest: list[str]) -> tuple[str, dict[int, Row]]:
    """Run or finish the study of one base; returns its command and the row of each seed."""
    given = ["--out", str(options.out / base), "--model", options.model, "--data", options.data]
    given += ["--dtype", options.dtype, "--method", "lora", "--seeds", str(options.seeds), "--threads", "1", *rest]
    given += [] if base == "plain" else ["--quantize", base]
    subprocess.run([sys.executable, "-m", "minipeft", "study", *given], check=True)
    files = (options.out / base / "cells").glob("*--lora--seed*/result.json")
    rows = [Row.from_json(json.loads(file.read_text())) for file in files]
    return "minipeft study " + shlex.join(given), {row.seed: row for row in sorted(rows, key=lambda row: row.seed)}


def compare(rows: dict[int, Row], plain: dict[int, Row]) -> dict[str, Any]:
    """The scores of a base, and its differences to the plain one."""
    losses = [row.training.dev_loss - plain[seed].training.dev_loss for seed, row in rows.items()]  # type: ignore[operator]
    scores, others = [row.scores for row in rows.values()], [row.scores for row in plain.values()]
    runs, base = ([counts for one in some if one is not None for counts in one.runs] for some in (scores, others))
    return {
        "bleu": [one["bleu"] for one in scores if one is not None],
        "exact_match": [one["exact_match"] for one in scores if one is not None],
        "dev_loss": [row.training.dev_loss for row in rows.values()],
        "bleu_difference": as_object(bootstrap_bleu(runs, base, draw_runs=True)),
        "dev_loss_difference": compute_t_interval(losses),
    }


def main() -> None:
    """Run the three studies and write their comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--seeds", type=int, default=3)
    options, rest = parser.parse_known_args()
    ran = {base: run_study(base, options, rest) for base in BASES}
    plain = ran["plain"][1]
    found = {base: compare(rows, plain) | {"command": command} for base, (command, rows) in ran.items()}
    about = {"versions": measure.read_versions(), "commit": measure.read_commit()}
    (options.out / "quality.json").write_text(json.dumps(found | about, indent=1) + "\n")
    for base, row in found.items():
        bleu, loss = (compute_mean_and_sd(row[name])[0] for name in ("bleu", "dev_loss"))
        more = row["bleu_difference"], row["dev_loss_difference"]
        print(f"{base:6} BLEU {100 * bleu:.1f}, held-out loss {loss:.4f}; minus plain: {more[0]}, {more[1]}")


if __name__ == "__main__":
    main()
