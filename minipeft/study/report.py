"""A study on disk and on the terminal: results.json, report.md, report.html, and the summary that is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minipeft.files import parse_json, read_text, write_json, write_whole
from minipeft.runs.answers import answers_in
from minipeft.study.cells import ANSWERS
from minipeft.study.charts import Curve
from minipeft.study.page import Answered, page
from minipeft.study.prefix_experiment import MEANING, Grid, conclusion, several_seeds, tables
from minipeft.study.table import Group, as_markdown, as_text, few, flagged, names, shown

NOTES = (
    "Intervals are percentile bootstraps over questions: pairs of one question are drawn together. A difference whose "
    "interval excludes 0 holds for questions like these; with one seed nothing is said of other seeds.",
    "An answer ends at the end-of-text token or at the limit of new tokens. \"zero-shot, first line\" is the untrained "
    "model's answer up to its first newline: what it is worth if it need not know where to end.",
    "CodeBLEU is strict: a part without a match counts 0. The codebleu package counts a data-flow match of 0 as 1, "
    "which gives 0.25 to an empty answer; its total is shown beside the strict one.",
)  # fmt: skip


def write_report(results: dict[str, Any], out: Path) -> None:
    """Write results.json, report.md and report.html into the study's folder."""
    write_json(out / "results.json", results)
    text = markdown(results)
    write_whole(out / "report.md", lambda stream: stream.write(text.encode("utf-8", "backslashreplace")))
    web = page(results, summary(results), NOTES, curves(results, out), answers(results, out))
    write_whole(out / "report.html", lambda stream: stream.write(web.encode("utf-8", "backslashreplace")))


def summary(results: dict[str, Any]) -> list[str]:
    """What came out, in a few sentences."""
    groups: list[Group] = results["groups"]
    called = dict(zip(map(id, groups), names(groups)))
    done = [group for group in groups if group["error"] is None]
    tuned = [group for group in done if group["difference"] is not None and group.get("trainable")]
    data = results["data"]
    said = [f"{data['pairs']} pairs of {data['questions']} questions ({data['source']}) were answered."]
    clear = [group for group in tuned if group["difference"]["low"] > 0]
    if clear:
        best = max(clear, key=lambda group: group["bleu"])
        low, high = (100 * best["difference"][end] for end in ("low", "high"))
        said.append(
            f"Best is {called[id(best)]}: BLEU {100 * best['bleu']:.1f}, which is "
            f"{100 * best['difference']['value']:+.1f} over the untrained model "
            f"(95 % interval {low:+.1f} to {high:+.1f})."
        )
    unsure = [called[id(group)] for group in tuned if group["difference"]["low"] <= 0]
    if unsure:
        said.append(f"Not clearly better than the untrained model: {', '.join(unsure)}.")
    said += conclusion(results)
    quiet = [group for group in done if group.get("bleu") is None]
    if quiet:
        least = min(quiet, key=lambda group: group["dev_loss"])
        said.append(
            f"Of {len(quiet)} that were not asked, {called[id(least)]} has the least held-out loss, "
            f"{least['dev_loss']:.3f}."
        )
    trivial = max((group for group in done if not group["model"]), key=lambda group: group["bleu"])
    said.append(f"Without any model, {called[id(trivial)]!r} scores {100 * trivial['bleu']:.1f}.")
    failed = [called[id(group)] for group in groups if group["error"] is not None]
    if failed:
        said.append(f"Failed: {', '.join(failed)}.")
    return said


def terminal(results: dict[str, Any], out: Path) -> str:
    """What the command prints at its end."""
    groups = results["groups"]
    flags = [
        f"! {few(who)}: {text}" for text, who in flagged(groups).items() if not text.startswith("CodeBLEU artefact")
    ]
    parts = [as_text(groups), " ".join(summary(results)), "\n".join(flags), f"{out / 'report.html'}"]
    return "\n\n".join(part for part in parts if part)


def markdown(results: dict[str, Any]) -> str:
    """report.md"""
    groups = results["groups"]
    flags = "\n".join(f"- {few(who)}: {text}" for text, who in flagged(groups).items()) or "- none"
    meanings = "\n".join(f"- {column.title}: {column.meaning}" for column in shown(groups))
    where = ", ".join(f"{name} {value}" for name, value in results["environment"].items() if value is not None)
    grids = "".join(
        f"## Prefixes after {grid.steps} steps\n\n{MEANING}\n\n{grid_text(grid)}\n\n" for grid in tables(groups)
    )
    grids += "".join(
        f"## Held-out loss after {steps} steps\n\n" + "\n".join(f"- {name}: {said}" for name, said, _ in rows) + "\n\n"
        for steps, rows in several_seeds(results).items()
    )
    return (
        f"# Study: {results['preset']}\n\n    {results['command']}\n\n{' '.join(summary(results))}\n\n"
        f"{as_markdown(groups)}\n\n{grids}## To know before using a number\n\n{flags}\n\n## What the columns are\n\n"
        f"{meanings}\n\n" + "\n\n".join(NOTES) + f"\n\nMade with {where}.\n"
    )


def grid_text(grid: Grid) -> str:
    """A grid in Markdown."""
    head, *rows = grid.texts()
    lines = [head, ["---", *["---:"] * len(grid.rates)], *rows]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return text + "\n\nTo compare with: " + ", ".join(name for name, _ in grid.others) + "."


def curves(results: dict[str, Any], out: Path) -> list[Curve]:
    """The losses of each trained cell, from its log; of those that answered, where any did."""
    found, asked = [], any(row.get("bleu") is not None and row.get("steps") for row in results["cells"])
    called = {cell: name for name, group in zip(names(results["groups"]), results["groups"]) for cell in group["cells"]}
    for row in results["cells"]:
        file = out / "cells" / row["cell"] / "run" / "log.jsonl"
        if row["error"] is not None or not file.exists() or (asked and row.get("bleu") is None):
            continue
        entries = [parse_json(line, file) for line in read_text(file).splitlines()]
        seeds = f" seed {row['seed']}" if row["seed"] else ""
        pick = lambda name, entries=entries: [(e["step"], e[name]) for e in entries if e.get(name) is not None]
        found.append(Curve(called[row["cell"]] + seeds, pick("loss"), pick("dev_loss")))
    return found


def answers(results: dict[str, Any], out: Path) -> list[Answered]:
    """For each cell that answered: its name, and its answers in the questions' order."""
    called = {cell: name for name, group in zip(names(results["groups"]), results["groups"]) for cell in group["cells"]}
    found = []
    for row in results["cells"]:
        if row["error"] is None and row.get("bleu") is not None:
            seeds = f" seed {row['seed']}" if row["seed"] else ""
            found.append(Answered(called[row["cell"]] + seeds, list(answers_in(out / "cells" / row["cell"] / ANSWERS))))
    return found
