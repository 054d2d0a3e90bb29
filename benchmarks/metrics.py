"""CodeBLEU of ours against the codebleu package 0.7.0, in one run on one core; writes results/metrics-cpu.json.

    python benchmarks/metrics.py [--conala conala-paired-test.json]

Our caches are cleared before each call, except in the variant "warm"; the package has no caches.
"""

import argparse
import ast
import inspect
import json
import logging
import random
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import codebleu as package
from measure import Row, measure, show_rows, write_rows

from minipeft.metrics import codebleu as ours
from minipeft.metrics.bleu import count_pairs
from minipeft.metrics.bootstrap import bootstrap_bleu

PACKAGES = ("codebleu", "sacrebleu", "tree-sitter", "tree-sitter-python")
CACHES = (ours._count_tokens, ours._analyse, ours._drop_truly, ours._drop_as_package)


def clear_caches() -> None:
    """Clear the caches of analysed texts."""
    for cache in CACHES:
        cache.forget()


def sample_functions(lines: range, number: int) -> list[str]:
    """Sample functions of Python's standard library whose length is in `lines`."""
    found = []
    for path in sorted(Path(inspect.getfile(ast)).parent.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 in lines:
                found.append(
                    textwrap.dedent("    " * (node.col_offset // 4) + (ast.get_source_segment(source, node) or ""))
                )
    return random.Random(0).sample(found, number)


def rename(code: str, seed: int) -> str:
    """Return the code with one of its names changed, as a stand-in for a model's answer."""
    names = sorted(set(re.findall(r"\b[a-z_]{3,}\b", code)))
    return re.sub(rf"\b{random.Random(seed).choice(names)}\b", "renamed", code)


def compare(name: str, shape: str, predictions: list[str], references: list[str], rounds: int, note: str) -> list[Row]:
    """Time the package, ours in both modes with cold caches, and ours with warm caches."""

    def cold(mode: str) -> Callable[[], object]:
        def call() -> object:
            clear_caches()
            return ours.codebleu(predictions, references, mode=mode)

        return call

    variants = {
        "codebleu 0.7.0": lambda: package.calc_codebleu(references, predictions, "python"),
        "strict (and compat)": cold("strict"),
        "compat": cold("compat"),
        "strict, warm": lambda: ours.codebleu(predictions, references),
    }
    return measure(
        variants, name=name, shape=shape, dtype="text", rounds=rounds, warmups=1, packages=PACKAGES, note=note
    )


def nest(depth: int) -> str:
    """Return nested loops that all change one variable."""
    lines = ["  " * level + f"for x{level} in y{level}:" for level in range(depth)]
    return "\n".join([*lines, "  " * depth + "z = x0 + z"])


def compare_nested_loops(rounds: int) -> list[Row]:
    """Time a text with 5, 10, 20 and 40 nested loops; the package, whose time doubles with each, up to 10."""
    rows = []
    for depth in (5, 10, 20, 40):
        text = nest(depth)

        def cold(text: str = text) -> object:
            clear_caches()
            return ours.codebleu([text], [text])

        variants: dict[str, Callable[[], object]] = {"strict (and compat)": cold}
        if depth <= 10:
            variants = {"codebleu 0.7.0": lambda text=text: package.calc_codebleu([text], [text], "python")} | variants
        rows += measure(
            variants,
            name="nested loops",
            shape=f"{depth} deep",
            dtype="text",
            rounds=rounds,
            warmups=1,
            packages=PACKAGES,
            note="one text against itself",
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conala", type=Path, help="conala-paired-test.json, for the 500 references")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "metrics-cpu.json")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    rows: list[Row] = []
    if arguments.conala:
        references = [json.loads(line)["snippet"] for line in arguments.conala.read_text(encoding="utf-8").splitlines()]
        rotated = references[1:] + references[:1]
        rows += compare("CoNaLa", "500 pairs", rotated, references, arguments.rounds, "references rotated by one")
        counts = count_pairs(rotated, references)
        rows += measure(
            {"bootstrap": lambda: bootstrap_bleu([counts], resamples=1000)},
            name="BLEU interval",
            shape="500 x 1000 resamples",
            dtype="int64",
            rounds=arguments.rounds,
            packages=PACKAGES,
        )
    long = sample_functions(range(45, 56), 20)
    repeated = [code for code in long for _ in range(5)]
    changed = [rename(code, seed) for seed, code in enumerate(repeated)]
    note = "20 functions of the standard library, each against 5 answers in which one name is changed"
    rows += compare("50-line functions", "100 pairs, 20 references", changed, repeated, arguments.rounds, note)
    rows += compare_nested_loops(arguments.rounds)
    write_rows(arguments.out, rows)
    show_rows(rows)


if __name__ == "__main__":
    main()
