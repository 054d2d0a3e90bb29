"""Mutation testing: small faults put into the files that matter most, and whether the tests that mirror them notice.

    python benchmarks/mutants.py [--each 10] [--seed 0] [--only models/loss.py] [--out results/mutants]

A mutant is a file with one change of its syntax tree (mutation.py). A sample of each file's mutants is written, one at
a time, into a temporary copy of the package; the tests of TESTS run there, `-x`, each in a process forked off one that
has imported the peers already. A mutant is caught where a test fails or the time is over.

table.json holds every mutant that was tried; the reasons of the survivors stand beside it, in README.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from mutation import list_changes

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    "models/loss.py": ["models/test_loss.py"],
    "models/attention.py": ["models/test_attention.py"],
    "models/layout.py": ["models/test_layout.py", "models/test_attention.py"],
    "documents.py": ["test_documents.py"],
    "data/packing.py": ["data/test_packing.py"],
    "data/rows.py": ["data/test_packing.py"],
    "training/loop.py": ["training/test_loop.py"],
    "training/movement.py": ["training/test_movement.py"],
    "adapters/lora.py": ["adapters/test_lora.py", "adapters/test_surgery.py", "adapters/test_inits.py"],
    "adapters/prefix.py": ["adapters/test_prefix.py", "adapters/test_virtual.py", "adapters/test_reparam.py"],
    "adapters/prompt.py": ["adapters/test_prompt.py", "adapters/test_reparam.py", "adapters/test_virtual.py"],
    "generation.py": ["test_generation.py"],
    "metrics/bleu.py": ["metrics/test_bleu.py"],
}
NEAR = 3  # lines


@dataclass(frozen=True)
class Mutant:
    """One fault: where, what, and the whole file with it."""

    file: str
    line: int
    before: str
    after: str
    source: str


@dataclass
class Found:
    """What came of a mutant."""

    file: str
    line: int
    before: str
    after: str
    caught: bool
    how: str  # the test that failed, or "time"
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=10, help="mutants of a file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=TESTS, default=list(TESTS), metavar="FILE")
    parser.add_argument(
        "--again", type=Path, metavar="TABLE", help="go on from a table.json: its survivors are tried again"
    )
    parser.add_argument("--out", type=Path, help="folder of table.json")
    options = parser.parse_args()
    before = [] if options.again is None else [Found(**row) for row in json.loads(options.again.read_text())["found"]]
    import_peers()
    found = {file: [entry for entry in before if entry.file == file] for file in TESTS}
    with tempfile.TemporaryDirectory(prefix="mutants-") as place:
        copy = copy_project(Path(place))
        for file in options.only:
            mutants = choose(copy, file, options, found[file])
            begun = time.monotonic()
            if mutants and (failed := run_tests(copy, file, 1800.0)) is not None:
                raise SystemExit(f"{file}: its tests fail without a mutant: {failed}")
            limit = 60 + 5 * (time.monotonic() - begun)
            found[file] = [entry for entry in found[file] if entry.caught]
            for mutant in mutants:
                found[file].append(try_mutant(copy, mutant, limit))
                print(json.dumps(asdict(found[file][-1])), flush=True)
            if options.out is not None:
                write_table(options.out, [entry for entries in found.values() for entry in entries])
    entries = [entry for entries in found.values() for entry in entries]
    print(f"{sum(entry.caught for entry in entries)} of {len(entries)} caught")
    return 0


def choose(copy: Path, file: str, options: argparse.Namespace, before: list[Found]) -> list[Mutant]:
    """A sample of a file's mutants; where there was one before, its survivors."""
    mutants = list(mutants_of(copy, file))
    if before:  # the same change within a few lines: the file may have been edited above it
        left = [entry for entry in before if not entry.caught]
        same = lambda m, e: (m.before, m.after) == (e.before, e.after) and abs(m.line - e.line) <= NEAR
        return [mutant for mutant in mutants if any(same(mutant, entry) for entry in left)]
    chosen = random.Random(f"{options.seed} {file}").sample(mutants, min(options.each, len(mutants)))
    return sorted(chosen, key=lambda mutant: mutant.line)


def import_peers() -> None:
    """What every test would import: once, before the forks."""
    sys.dont_write_bytecode = True  # a mutant of the same size in the same second would be taken for the file before it
    for name in ("hypothesis", "peft", "pytest", "sacrebleu", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)


def copy_project(place: Path) -> Path:
    """The package and its tests in a folder of their own; the tree is never written."""
    for name in ("minipeft", "kernels", "tests"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", place)
    os.environ.setdefault("MINIPEFT_ASSETS", str(ROOT.parent / "shared"))
    return place


def write_table(out: Path, found: list[Found]) -> None:
    """Write the table, and how many were caught."""
    out.mkdir(parents=True, exist_ok=True)
    caught = sum(entry.caught for entry in found)
    table = {"command": f"python {' '.join(sys.argv)}", "mutants": len(found), "caught": caught}
    rows = [asdict(entry) for entry in found]
    (out / "table.json").write_text(json.dumps({**table, "found": rows}, indent=1, ensure_ascii=False) + "\n")


def try_mutant(copy: Path, mutant: Mutant, limit: float) -> Found:
    """Run a mutant's tests."""
    place, begun = copy / "minipeft" / mutant.file, time.monotonic()
    kept = place.read_bytes()
    place.write_text(mutant.source, encoding="utf-8")
    how = run_tests(copy, mutant.file, limit)
    place.write_bytes(kept)
    told = (mutant.file, mutant.line, mutant.before, mutant.after, how is not None, how or "")
    return Found(*told, round(time.monotonic() - begun, 1))


def run_tests(copy: Path, file: str, limit: float) -> str | None:
    """The first test of a file's that fails, or "time"; None where all pass."""
    told, child = copy / "told", os.fork()
    if child == 0:
        status = 99
        try:
            os.setsid()  # so that what a test leaves running is ended with it
            os.chdir(copy)
            sys.path.insert(0, str(copy))
            for number, name in ((1, told), (2, os.devnull)):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            import pytest

            tests = [f"tests/{name}" for name in TESTS[file]]
            status = int(pytest.main(["-x", "-q", "-n", "0", "--tb=no", "-p", "no:cacheprovider", *tests]))
            sys.stdout.flush()
        finally:
            os._exit(status)
    end = time.monotonic() + limit
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "time"
        time.sleep(0.05)
    if os.waitstatus_to_exitcode(done[1]) == 0:
        return None
    lines = told.read_text(errors="replace").splitlines()
    return next((line.split()[1] for line in lines if line.startswith(("FAILED ", "ERROR "))), "the process ended")


def mutants_of(copy: Path, file: str) -> Iterator[Mutant]:
    """Every mutant of a file."""
    for change in list_changes((copy / "minipeft" / file).read_text(encoding="utf-8")):
        yield Mutant(file, change.line, change.before, change.after, change.source)


if __name__ == "__main__":
    sys.exit(main())
