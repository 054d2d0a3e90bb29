"""Write the tables of docs/performance.md from the committed rows: each variant beside the peer of its own run.

    python benchmarks/performance_table.py --into docs/performance.md

A table stands between `<!-- rows NAME -->`, or `<!-- columns NAME -->`, and `<!-- end -->`, where NAME.json is a file
of benchmarks/results. Each variant has a line of its own, or a column.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

OTHER_WORK = ("packing",)  # variants that do something else than the first one: their ratio says nothing
RESULTS = Path(__file__).resolve().parent / "results"


def fill_markers(page: str, word: str, make: Callable[[Any], str]) -> str:
    """Return the page with what `make` makes of benchmarks/results/NAME.json between each `<!-- word NAME -->` and
    `<!-- end -->`."""

    def fill(found: re.Match[str]) -> str:
        path = RESULTS / f"{found[2]}.json"
        absent = f"No rows yet: benchmarks/results/{path.name} is not there."
        return f"{found[1]}{make(json.loads(path.read_text())) if path.exists() else absent}\n{found[3]}"

    return re.sub(rf"(<!-- {word} (\S+) -->\n).*?(<!-- end -->)", fill, page, flags=re.DOTALL)


def make_table(rows: Any) -> str:
    """Return the Markdown table of a file: seconds or the rows of benchmarks/breakdown.py."""
    return make_breakdown(rows) if isinstance(rows, dict) else make_rows(rows)


def make_rows(rows: list[dict[str, Any]]) -> str:
    """A line a row: what, shape, dtype, variant, time, how many times as fast as the group's first variant, and the
    note where it differs from that one's."""
    lines = ["| | shape | dtype | variant | time | times as fast | |", "|---|---|---|---|---:|---:|---|"]
    before: tuple[str, str, str] | None = None
    said = ""
    for row in rows:
        group = (row["benchmark"], row["shape"], row["dtype"])
        begins, before = group != before or row["ratio"] == 1.0, group  # the first variant of a measurement has 1
        what = group if begins else ("", "", "")
        note = row["note"] if begins or row["note"] != said else ""
        said = row["note"] if begins else said
        ratio = "" if begins or row["variant"] in OTHER_WORK else f"{row['ratio']:.2f}"
        lines.append(f"| {' | '.join([*what, row['variant'], format_time(row['median']), ratio, note])} |")
    return "\n".join([*lines, "", describe(rows[0], rows[0].get("surroundings", {}), rows[0]["rounds"])])


def make_columns(rows: list[dict[str, Any]]) -> str:
    """A line a measurement: what, shape, and each variant's time with its note."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        note = f" ({row['note']})" if row["note"] else ""
        groups.setdefault((row["benchmark"], row["shape"]), {})[row["variant"]] = format_time(row["median"]) + note
    lines = [f"| | shape | {' | '.join(variants)} |", "|---|---|" + "---:|" * len(variants)]
    lines += [f"| {' | '.join([*group, *(cells.get(v, '') for v in variants)])} |" for group, cells in groups.items()]
    return "\n".join([*lines, "", describe(rows[0], rows[0].get("surroundings", {}), rows[0]["rounds"])])


def fill(page: str) -> str:
    """The page with its tables."""
    return fill_markers(fill_markers(page, "rows", make_table), "columns", make_columns)


def make_breakdown(found: dict[str, Any]) -> str:
    """Seconds of a step by kind of operator, a column a side."""
    sides = found["seconds"]
    lines = [f"| seconds of a step | {' | '.join(sides)} |", "|---|" + "---:|" * len(sides)]
    for kind in next(iter(sides.values())):
        lines.append(f"| {kind} | {' | '.join(f'{side[kind]:.2f}' for side in sides.values())} |")
    lines.append(f"| **all** | {' | '.join(f'**{sum(side.values()):.2f}**' for side in sides.values())} |")
    lines.append(f"| limit: its products at the best rate | {found['limit']:.2f} |" + " |" * (len(sides) - 1))
    return "\n".join([*lines, "", describe(found, {}, None)])


def describe(row: dict[str, Any], around: dict[str, Any], rounds: int | None) -> str:
    """Where and how the rows were measured."""
    versions = ", ".join(f"{package} {version}" for package, version in row["versions"].items())
    how = "" if rounds is None else f"; medians of {rounds} rounds"
    load = f"; load average {around['load']}" if "load" in around else ""
    return f"{row['device']}{how}{load}; {versions}; commit {row['commit']}; `{row['command']}`."


def format_time(seconds: float) -> str:
    """Three digits, in ms below a second."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def main() -> None:
    """Write the tables into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, required=True, help="page with the markers")
    page = parser.parse_args().into
    page.write_text(fill(page.read_text()))


if __name__ == "__main__":
    main()
