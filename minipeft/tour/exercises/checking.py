"""Run an exercise's checks on the student's file, in a process of its own and within a time limit.

    python -m minipeft.tour.exercises.checking FOLDER NUMBER REPORT

REPORT gets one JSON object a line: the claims of all checks, then each that passed, then what failed, in words. The
first failure ends the process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType

from minipeft.errors import InputError
from minipeft.tour.exercises.definitions import find_definition
from minipeft.tour.exercises.record import Task, find_task, list_checks, load_exercise

SECONDS = 60  # a right answer takes about 3


@dataclass(frozen=True)
class Verdict:
    """What the checks said: the claims that hold, the one that failed and why, and how many were not reached."""

    passed: tuple[str, ...]
    failed: str | None
    reason: str
    left: int

    @property
    def done(self) -> bool:
        return bool(self.passed) and self.failed is None and not self.left


def check_answer(folder: Path, task: Task, seconds: float = SECONDS) -> Verdict:
    """Run the checks of an exercise on the student's file.

    Raises:
        InputError: a file is missing, or a package that the exercise needs.
    """
    exercise = load_exercise(task.name)
    for file in (answer_file(folder, task), test_file(folder, task)):
        if not file.is_file():
            raise InputError("is missing", file=file, hint=f"minipeft exercise {task.number} writes it")
    environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if exercise.needs == "triton" else {})}
    with tempfile.TemporaryDirectory(prefix="minipeft-exercise-") as place:
        report = Path(place, "report")
        report.touch()
        command = [sys.executable, "-m", __name__, str(folder.resolve()), str(task.number), str(report)]
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return read_report(report, status, seconds)


def read_report(report: Path, status: int | None, seconds: float) -> Verdict:
    """Put the lines of a report together. `status`: the process's, None where it was stopped after `seconds`."""
    entries = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    claims: list[str] = next((entry["claims"] for entry in entries if "claims" in entry), [])
    passed = tuple(entry["passed"] for entry in entries if "passed" in entry)
    reason = next((entry["failed"] for entry in entries if "failed" in entry), None)
    if status == 0 and len(passed) == len(claims):
        return Verdict(passed, None, "", 0)
    if reason is None:
        ended = f"the process ended before the check was over (exit status {status})"
        reason = ended if status is not None else f"not done after {seconds:g} seconds: is there an endless loop?"
    failed = claims[len(passed)] if claims else "the file can be run"
    return Verdict(passed, failed, reason, max(0, len(claims) - len(passed) - 1))


def answer_file(folder: Path, task: Task) -> Path:
    """The student's file."""
    return folder / f"exercise_{task.number}.py"


def test_file(folder: Path, task: Task) -> Path:
    """The file of the checks, beside it."""
    return folder / f"test_exercise_{task.number}.py"


def run_checks(folder: Path, task: Task) -> Iterator[dict[str, object]]:
    """Run the checks one by one in this process; yields what the report holds. A failed check raises."""
    name = find_definition(load_exercise(task.name).solution).name
    module = load_file(answer_file(folder, task))
    if not hasattr(module, name):
        raise AssertionError(f"{answer_file(folder, task).name} defines no function {name!r}")
    checks = list_checks(vars(load_file(test_file(folder, task))))
    yield {"claims": [str(check.__doc__).strip().split("\n\n")[0] for check in checks]}
    for check in checks:
        check(getattr(module, name))
        yield {"passed": str(check.__doc__).strip().split("\n\n")[0]}


def load_file(file: Path) -> ModuleType:
    """Run a Python file as a module of its own name."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def explain(error: BaseException, file: Path) -> str:
    """Say what an exception means for the student whose answer is in `file`."""
    while type(error).__name__ == "InterpreterError" and error.__cause__ is not None:  # Triton's wrapper
        error = error.__cause__
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f"{file.name}, line {error.lineno} is not Python: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    mine = next((frame for frame in reversed(frames) if frame.filename == str(file)), None)
    last = frames[-1] if frames else None
    place = "" if mine is None else f"{file.name}, line {mine.lineno}: {mine.line}"
    if mine is not None and isinstance(error, NotImplementedError):
        return f"the hole is still empty. Write its body ({place})"
    if isinstance(error, AssertionError) and (mine is None or mine is not last):
        return str(error) or f"this does not hold: {last.line if last else ''}"
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if mine is not None:
        return f"your code raised {said} ({place})"
    line = "" if last is None else f" ({Path(last.filename).name}, line {last.lineno}: {last.line})"
    return f"the check could not use what your function returned: {said}{line}"


def main(arguments: list[str]) -> None:
    folder, task, report = Path(arguments[0]), find_task(int(arguments[1])), Path(arguments[2])

    def write(entry: dict[str, object]) -> None:
        with report.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        write({"failed": explain(error, answer_file(folder, task))})

    sys.excepthook = tell
    sys.dont_write_bytecode = True
    for entry in run_checks(folder, task):
        write(entry)


if __name__ == "__main__":
    main(sys.argv[1:])
