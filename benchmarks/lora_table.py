"""Write the tables of kernels/README.md from the rows that the LoRA benchmarks measured.

    python benchmarks/lora_table.py                     # print the table of every benchmarks/results/lora-*.json
    python benchmarks/lora_table.py --into kernels/README.md        # write them between its markers

A table stands between `<!-- table NAME -->` and `<!-- end -->`, where NAME.json is a file of benchmarks/results.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from performance_table import RESULTS, fill_markers

Row = dict[str, object]
FLOORS = ("frozen", "base", "plain torch")


def main() -> None:
    """Print the tables, or write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", help="page with the markers")
    arguments = parser.parse_args()
    if arguments.into:
        page = Path(arguments.into)
        page.write_text(fill_markers(page.read_text(), "table", table))
        return
    for path in sorted(RESULTS.glob("lora-*.json")):
        print(f"{path.stem}\n\n{table(json.loads(path.read_text()))}\n")


def table(rows: list[Any]) -> str:
    """Return the Markdown table of a file of rows: a line for each shape and setting, a column for each variant."""
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        variant, graph, _ = row["variant"].partition(", graph")  # a graph's times are a line of their own
        threads = row["surroundings"].get("threads", 1)
        note = row["note"].split("; FAIL")[0].removeprefix("FAIL") + graph
        note = ", ".join(filter(None, [note, f"{threads} threads" * (threads > 1)]))
        groups.setdefault((row["benchmark"], row["shape"], row["dtype"], note), {})[variant] = row
    seen = dict.fromkeys(variant for group in groups.values() for variant in group)
    variants = sorted(seen, key=lambda variant: (variant not in FLOORS, "peft" not in variant))
    head = ["benchmark", "shape", "dtype", "note", *variants]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * 4 + "---:|" * len(variants)]
    for key, group in groups.items():
        lines.append(f"| {' | '.join([*key, *(cell(group.get(variant)) for variant in variants)])} |")
    first = rows[0]
    versions = ", ".join(f"{package} {version}" for package, version in first["versions"].items())
    where = f"{first['device']}; {versions}; commit {first['commit']}; `{first['command']}`"
    around = [row["surroundings"] for row in rows]
    loads, noise = [a["load"] for a in around], max(a["noise"] for a in around)
    best = "{ceiling_tflops:.3g} TFLOP/s in a product, {ceiling_gb_per_s:.3g} GB/s in a copy".format(**around[0])
    said_of = {
        "process_time": "of processor time, on one thread",
        "perf_counter": "by the wall's clock, with several threads",
        "cuda events": "between events",
    }
    clocks = "; ".join(said_of[clock] for clock in dict.fromkeys(a["clock"] for a in around))
    what = f"Median milliseconds (times the floor) {clocks}"
    how = f"load average {min(loads)} to {max(loads)}"
    spread = f"the floor, timed twice, differed by at most {100 * noise:.1f} %; = is no more than in its own run"
    said = f"{what}. {where}; at best {best}; {how}; {spread}."
    return "\n".join([*lines, "", said])


def cell(row: Row | None) -> str:
    """Return a time and its ratio to the baseline, or FAIL for a variant that failed its check."""
    if row is None:
        return ""
    if "FAIL" in str(row["note"]):
        return "FAIL"
    if str(row["variant"]).removesuffix(", graph") in FLOORS:
        return f"{float(row['median']) * 1e3:.3g}"  # type: ignore[arg-type]
    extra: dict[str, float] = row["extra"]  # type: ignore[assignment]
    floor = extra.get("times_frozen", extra.get("times_base", 1.0))
    within = abs(floor - 1) <= row["surroundings"]["noise"]  # type: ignore[index]
    return f"{float(row['median']) * 1e3:.3g} ({'=' if within else f'{floor:.2f}'})"  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
