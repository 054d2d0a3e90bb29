"""Mutation testing of the exercises: small faults put into each solution, and whether the exercise's checks notice.

    python benchmarks/exercise_mutants.py [--each 40] [--seed 0] [--only lora_forward] [--out results/exercises]

For each exercise the hole must fail, the library's own function pass, and its mutants (mutation.py) fail, and so must
wrong answers that once passed (FAULTS). Each is checked in a process forked off one that has imported torch and Triton,
in a folder of its own. A line of JSON each; table.json holds them all, and the reasons of the survivors stand beside
it, in README.md. The exercises of "Break it" have no mutants: their checks run the student's test with and without a
bug.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from mutation import list_changes

from minipeft.tour.exercises import checking, folder, record
from minipeft.tour.exercises.definitions import find_definition

SECONDS = 30  # of one answer
FAULTS: dict[str, tuple[tuple[str, str], ...]] = {  # wrong answers that passed once: what becomes what in the solution
    "lora_init": (("size, generator=generator)", "size)"),),
    "text_to_length": (
        ('if ids and ids[0] == getattr(tokenizer, "bos", None)', 'if ids and getattr(tokenizer, "bos", None)'),
    ),
    "accumulation": (
        ("with DRAWING, fast_products(), torch", "with torch"),
        ("        loss.backward()", "    loss.backward()"),
    ),
    "atomic_write": ((", dir=file.parent)", ")"),),
    "repetition": (("if length >= LEAST", "length -= length % unit\n        if length >= LEAST"),),
    "kernel_add": (("tl.load(x + at, mask=inside)", "tl.load(x + at)"),),
    "kernel_shrink": (
        ("(r < R)[:, None] & (k < K)[None, :]", "(k < K)[None, :]"),
        (
            "range(part * BLOCK_K, K, SPLIT * BLOCK_K)",
            "range(part * tl.cdiv(K, SPLIT * BLOCK_K) * BLOCK_K, "
            "tl.minimum(K, (part + 1) * tl.cdiv(K, SPLIT * BLOCK_K) * BLOCK_K), BLOCK_K)",
        ),
    ),
    "kernel_lora": (("tl.load(bias + columns, mask=columns < N, other=0.0)", "tl.load(bias + columns)"),),
}
LONGEST = 120  # characters of a reason in the table


@dataclass
class Found:
    """What the checks said of one answer."""

    exercise: str
    kind: str  # solution, hole, fault or mutant
    line: int
    before: str
    after: str
    passed: bool
    said: str  # why it failed
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=40, help="mutants of an exercise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=record.NAMES, default=list(record.NAMES), metavar="NAME")
    parser.add_argument("--out", type=Path, help="folder of table.json")
    options = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import torch
    import torch._dynamo  # which torch.utils.checkpoint imports
    import triton  # noqa: F401

    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    found = []
    for name in options.only:
        for entry in try_exercise(name, options.each, options.seed):
            found.append(entry)
            print(json.dumps(asdict(entry), ensure_ascii=False), flush=True)
    mutants = [entry for entry in found if entry.kind == "mutant"]
    caught = sum(not entry.passed for entry in mutants)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        table = {"command": f"python {' '.join(sys.argv)}", "mutants": len(mutants), "caught": caught}
        rows = [asdict(entry) for entry in found]
        text = json.dumps({**table, "found": rows}, indent=1, ensure_ascii=False)
        (options.out / "table.json").write_text(text + "\n", encoding="utf-8")
    print(f"{caught} of {len(mutants)} mutants caught", file=sys.stderr)
    return 0


def try_exercise(name: str, each: int, seed: int) -> Iterator[Found]:
    """Check the solution of an exercise, its hole, and a sample of its mutants."""
    task = record.find_task(record.NAMES.index(name) + 1)
    exercise = record.load_exercise(name)
    text = find_definition(exercise.solution).text
    yield try_answer(task, "solution", folder.make_answer(task, text))
    yield try_answer(task, "hole", folder.make_answer(task))
    for before, after in FAULTS.get(name, ()):
        assert text.count(before) == 1, f"{text.count(before)} places of {name} hold {before!r}"
        yield try_answer(task, "fault", folder.make_answer(task, text.replace(before, after)), 0, before, after)
    if exercise.bug is not None:
        return
    changes = list(list_changes(text))
    for change in random.Random(f"{seed} {name}").sample(changes, min(each, len(changes))):
        source = folder.make_answer(task, change.source + "\n")
        yield try_answer(task, "mutant", source, change.line, change.before, change.after)


def try_answer(task: record.Task, kind: str, source: str, line: int = 0, before: str = "", after: str = "") -> Found:
    """Run an exercise's checks on an answer, in a forked process."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="exercise-") as place:
        checking.answer_file(Path(place), task).write_text(source, encoding="utf-8")
        checking.test_file(Path(place), task).write_text(folder.make_test(task), encoding="utf-8")
        said = run_here(Path(place), task) if kind == "hole" else run_forked(Path(place), task)
    reason = (said or "").partition("\n")[0][:LONGEST]
    return Found(task.name, kind, line, before, after, said is None, reason, round(time.monotonic() - begun, 2))


def run_here(place: Path, task: record.Task) -> str | None:
    """What is wrong with a hole, which is reached at once: no process is needed."""
    from triton.runtime.errors import InterpreterError

    try:
        for _ in checking.run_checks(place, task):
            pass
    except (NotImplementedError, InterpreterError) as error:
        return checking.explain(error, checking.answer_file(place, task))
    return None


def run_forked(place: Path, task: record.Task) -> str | None:
    """What is wrong with the answer in a folder; None where all checks pass."""
    told, child = place / "said", os.fork()
    if child == 0:
        status = 99
        try:
            os.setsid()
            for number in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            for _ in checking.run_checks(place, task):
                pass
            status = 0
        finally:
            error = sys.exc_info()[1]
            if error is not None:
                told.write_text(checking.explain(error, checking.answer_file(place, task)), encoding="utf-8")
            os._exit(status)
    end = time.monotonic() + SECONDS
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"not done after {SECONDS} seconds"
        time.sleep(0.01)
    if os.waitstatus_to_exitcode(done[1]) == 0:
        return None
    return told.read_text(encoding="utf-8") if told.exists() else f"ended with the status {done[1]}"


if __name__ == "__main__":
    sys.exit(main())
