"""The exercises: each solution passes its checks, each hole fails in words, seeded mutants are caught; and the command.

MINIPEFT_EXERCISE_MUTANTS=40 tries that many mutants of each solution (results/exercises); one is tried without it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minipeft import cli
from minipeft.errors import InputError
from minipeft.tour.exercises import bugs, checking, folder, judging, kernel_memory, record
from minipeft.tour.exercises.definitions import cut_body, find_definition

ROOT = Path(__file__).resolve().parents[2]
MUTANTS = int(os.environ.get("MINIPEFT_EXERCISE_MUTANTS", "1"))
LORA = record.NAMES.index("merge_lora") + 1


@pytest.fixture(scope="module")
def found() -> list[dict]:
    """What the checks said of each solution, each hole and some mutants: one process for all imports torch once."""
    pytest.importorskip("triton")
    command = [sys.executable, str(ROOT / "benchmarks/exercise_mutants.py"), "--each", str(MUTANTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600 + 3600 * (MUTANTS > 1), check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_each_solution_passes_its_checks(found):
    solutions = {entry["exercise"]: entry for entry in found if entry["kind"] == "solution"}
    assert set(solutions) == set(record.NAMES)
    assert not [entry for entry in solutions.values() if not entry["passed"]]
    assert max(entry["seconds"] for entry in solutions.values()) < 30  # aim: 2; beside other tests it may take longer


def test_each_hole_fails_and_says_so(found):
    holes = {entry["exercise"]: entry for entry in found if entry["kind"] == "hole"}
    assert set(holes) == set(record.NAMES)
    for number, name in enumerate(record.NAMES, 1):
        assert not holes[name]["passed"]
        assert holes[name]["said"].startswith("the hole is still empty. Write its body")
        assert f"exercise_{number}.py, line " in holes[name]["said"]


def test_mutants_are_caught(found):
    """The sample is seeded, and the command of results/exercises/README.md tries 40 of each solution."""
    mutants = [entry for entry in found if entry["kind"] == "mutant"]
    assert len({entry["exercise"] for entry in mutants}) == sum(not name.startswith("bug_") for name in record.NAMES)
    missed = [f"{entry['exercise']}: {entry['before']} -> {entry['after']}" for entry in mutants if entry["passed"]]
    assert len(missed) <= 0.05 * len(mutants), missed


def test_wrong_answers_that_once_passed_are_refused(found):
    faults = [entry for entry in found if entry["kind"] == "fault"]
    assert len(faults) >= 10
    assert not [f"{entry['exercise']}: {entry['before']} -> {entry['after']}" for entry in faults if entry["passed"]]


@pytest.mark.parametrize("name", [name for name in record.NAMES if name.startswith("bug_")])
def test_the_bug_fails_an_assertion_of_the_solution(name):
    """The patch applies, the library is whole again afterwards, and the failure is the test's own."""
    module = __import__(f"{record.TASKS}.{name}", fromlist=["probe"])
    module.probe()
    bug = record.load_exercise(name).bug
    with bugs.planted(bug), pytest.raises(AssertionError):
        module.probe()
    module.probe()


def test_a_probe_that_notices_nothing_fails():
    with pytest.raises(AssertionError, match="your test also passes with the bug"):
        bugs.require_caught(lambda: None, "bug_eos")


def test_a_patch_that_no_longer_fits_is_refused():
    with (
        pytest.raises(InputError, match="0 places hold 'nothing of it', not one"),
        bugs.planted(record.Bug("minipeft.documents.visible", "nothing of it", "")),
    ):
        pass


def test_every_exercise_has_a_text_hints_and_checks():
    for number, name in enumerate(record.NAMES, 1):
        task = record.find_task(number)
        assert task.name == name
        assert len(task.body) > 200, name
        assert len(record.load_exercise(name).hints) >= 2, name
        test = folder.make_test(task)
        compile(test, name, "exec")
        assert test.count("\ndef check_") >= 2, name
        assert "EXERCISE" not in test, name
        assert "def probe" not in test, name
    assert {file.stem for file in (ROOT / "minipeft/tour/exercises/tasks").glob("[a-z]*.py")} == set(record.NAMES)


def test_the_pages_count_the_exercises():
    bugs_planted = sum(name.startswith("bug_") for name in record.NAMES)
    assert f"{len(record.NAMES)} exercises" in (ROOT / "README.md").read_text(encoding="utf-8")
    page = (ROOT / "docs/exercises.md").read_text(encoding="utf-8")
    assert bugs_planted == 9
    assert "nine public bugs" in page
    assert all(f"| {chapter} |" in page for chapter in record.CHAPTERS)


def test_the_hole_is_the_library_function_without_its_body():
    text = find_definition("minipeft.documents.visible").text
    hole = cut_body(text)
    assert text.startswith(hole.removesuffix("    raise NotImplementedError\n"))
    source = folder.make_answer(record.find_task(record.NAMES.index("visibility") + 1))
    assert "import torch\n" in source
    assert "from minipeft.documents import VIRTUAL\n" in source
    assert "@torch.no_grad()\ndef " in cut_body(find_definition("minipeft.adapters.dora.compute_row_norms").text)


def test_a_name_that_is_nowhere_is_refused():
    with pytest.raises(InputError, match=r"minipeft\.documents defines no 'nothing'"):
        find_definition("minipeft.documents.nothing")
    with pytest.raises(InputError, match=r"'VIRTUAL' of minipeft\.documents is no function"):
        find_definition("minipeft.documents.VIRTUAL")


def test_a_title_that_asks_ends_with_its_question_mark():
    head = folder.make_answer(record.find_task(record.NAMES.index("repetition") + 1)).partition("\n")[0]
    assert head.endswith(": Has the answer got stuck?")


def test_the_addresses_of_a_kernel_are_those_of_its_tensors():
    """A view has its own entries only: neither the columns beside it nor what lies beyond its end."""
    whole = torch.zeros(4, 6, dtype=torch.bfloat16)
    view = whole[1:3, 2:4]
    addresses = kernel_memory.list_addresses({"view": view})
    assert addresses.tolist() == [whole.data_ptr() + 2 * at for at in (8, 9, 14, 15)]
    pointers = SimpleNamespace(data=addresses + np.uint64(2))
    assert not kernel_memory.covers(addresses, pointers, SimpleNamespace(data=np.ones(4)))
    assert kernel_memory.covers(addresses, pointers, SimpleNamespace(data=np.array([1, 0, 1, 0])))


def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Run `minipeft exercise` in a folder: the status and what it said."""
    status = cli.main(["exercise", *map(str, words), "--out", str(tmp_path)])
    said = capsys.readouterr()
    return status, said.out + said.err


def fill(tmp_path: Path, body: str) -> None:
    """Write an answer into the hole of merge_lora."""
    file = tmp_path / f"exercise_{LORA}.py"
    file.write_text(file.read_text().replace("raise NotImplementedError", body))


def test_an_exercise_from_the_first_hint_to_done(tmp_path, capsys, monkeypatch):
    status, said = run(tmp_path, capsys, LORA)
    assert status == 0
    assert "W' = W + s B A" in said
    assert f"minipeft exercise {LORA} --check" in said
    assert f"{LORA:>2}  Merge LoRA into the weight  [begun]" in run(tmp_path, capsys)[1]

    hints = [run(tmp_path, capsys, LORA, "--hint")[1] for _ in range(4)]
    assert [hint.split(":")[0] for hint in hints] == ["hint 1 of 3", "hint 2 of 3", "hint 3 of 3", "hint 3 of 3"]
    assert "def merged(self)" in run(tmp_path, capsys, LORA, "--solution")[1]

    fill(tmp_path, "return 1 / 0")
    monkeypatch.chdir(tmp_path)
    status, said = run(Path(), capsys, LORA, "--check")
    assert status == 1
    assert "WRONG A plain linear with W' and b' computes what the layer computes.\n" in said
    assert f"your code raised ZeroDivisionError: division by zero (exercise_{LORA}.py, line " in said
    assert "3 more checks were not run" in said

    run(tmp_path, capsys, LORA, "--overwrite")
    fill(tmp_path, "W, b, A, B, s = self.part()\n    return W.float() + s * (B @ A), None if b is None else b.float()")
    status, said = run(tmp_path, capsys, LORA, "--check")
    assert status == 0
    assert said.count("  ok  ") == 4
    assert f"exercise {LORA} is done" in said
    assert f"1 of {len(record.NAMES)} done" in run(tmp_path, capsys)[1]
    rows = json.loads(run(tmp_path, capsys, "--json")[1])
    assert [row["number"] for row in rows if row["state"]] == [LORA]
    assert rows[LORA - 1] == {
        "number": LORA,
        "chapter": "Merging",
        "title": "Merge LoRA into the weight",
        "state": "done",
    }

    file = tmp_path / f"exercise_{LORA}.py"
    file.write_text(file.read_text() + "\n")
    assert "[changed since it was done]" in run(tmp_path, capsys)[1]


def test_an_answer_is_not_overwritten(tmp_path, capsys):
    run(tmp_path, capsys, LORA)
    fill(tmp_path, "return 1")
    status, said = run(tmp_path, capsys, LORA)
    assert status == 2
    assert f"exercise_{LORA}.py: is there already. minipeft exercise {LORA} --check runs its checks" in said
    assert "return 1" in (tmp_path / f"exercise_{LORA}.py").read_text()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((99,), "exercise 99: there are "),
        (("--check",), "exercise: needs the number of an exercise"),
        ((LORA, "--check"), f"exercise_{LORA}.py: is missing. minipeft exercise {LORA} writes it"),
    ],
    ids=["number", "no-number", "no-file"],
)
def test_what_cannot_be_done_is_refused(tmp_path, capsys, words, text):
    status, said = run(tmp_path, capsys, *words)
    assert status == 2
    assert text in said


def test_without_triton_the_kernel_chapter_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(record.importlib.util, "find_spec", lambda name: None)
    status, said = run(tmp_path, capsys, record.NAMES.index("kernel_add") + 1)
    assert status == 2
    assert "exercise kernel_add: needs triton, which is not installed. pip install minipeft[kernels]" in said
    assert not list(tmp_path.iterdir())


def test_damaged_notes_are_refused(tmp_path, capsys):
    (tmp_path / "exercises.json").write_text('{"done": 3}')
    status, said = run(tmp_path, capsys)
    assert status == 2
    assert "exercises.json: done: must be an object" in said


@pytest.mark.parametrize(
    ("mine", "expected", "text"),
    [
        (None, 1.0, "y: None; does your function return it?"),
        ("a", 1.0, "y: 'a' (str); it should be 1.0 (float)"),
        (torch.zeros(2), torch.zeros(3), "y: the shape is [2]; it should be [3]"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64), "y: torch.float32; it should be torch.int64"),
        (torch.tensor([[1.0, 2.5]]), torch.tensor([[1.0, 2.0]]), "y: wrong at [0, 1]: yours 2.5, expected 2 (allowed"),
        (torch.tensor([float("nan")]), torch.tensor([1.0]), "y: wrong at [0]: yours nan, expected 1"),
        (torch.tensor([float("inf")]), torch.tensor([1.0]), "y: wrong at [0]: yours inf, expected 1"),
        (1.02, 1.0, "y: wrong: yours 1.02, expected 1 (allowed difference 0.01)"),
    ],
    ids=["none", "text", "shape", "dtype", "place", "nan", "inf", "number"],
)
def test_differences_are_told_in_words(mine, expected, text):
    with pytest.raises(AssertionError) as caught:
        judging.require_close(mine, expected, "y", 0.01)
    assert str(caught.value).startswith(text)


def test_what_agrees_is_accepted():
    judging.require_close(torch.tensor([1.0, 2.0]), torch.tensor([1.01, 2.0]), "y", 0.01)
    judging.require_close(torch.tensor([float("nan")]), torch.tensor([float("nan")]), "y", 0)
    judging.require_close(torch.zeros(0, 3), torch.zeros(0, 3), "y", 0)
    judging.require_equal([1, (2,)], [1, (2,)], "y")
    with pytest.raises(AssertionError, match=r"y: yours \[1\], expected \[2\]"):
        judging.require_equal([1], [2], "y")


def explain(tmp_path: Path, body: str) -> str:
    """What is told of an answer to merge_lora, in this process."""
    task = record.find_task(LORA)
    folder.write_exercise(tmp_path, task, overwrite=True)
    fill(tmp_path, body)
    file = checking.answer_file(tmp_path, task)
    with pytest.raises(BaseException) as caught:  # noqa: PT011  a student's code may raise anything
        list(checking.run_checks(tmp_path, task))
    return checking.explain(caught.value, file)


def test_failures_are_told_in_words(tmp_path):
    """An exception of the answer, a result that is missing, one of another shape, and a file that is no Python."""
    assert explain(tmp_path, "return 1 / 0").startswith(
        "your code raised ZeroDivisionError: division by zero (exercise_"
    )
    assert "None" in explain(tmp_path, "return None")
    plain = explain(tmp_path, "return self.weight, self.bias")
    assert plain.startswith("the output of the merged linear: wrong at [")
    assert "the bias is None exactly where the layer has none" in explain(tmp_path, "return self.weight, None")
    assert "is not Python" in explain(tmp_path, "return (")
    transposed = explain(tmp_path, "return self.part()[0].t(), self.bias")
    assert transposed.startswith("the check could not use what your function returned: RuntimeError")


def test_an_endless_loop_is_stopped(tmp_path):
    """The process is ended with all that it started; a second is less than it takes to import torch."""
    task = record.find_task(LORA)
    folder.write_exercise(tmp_path, task, overwrite=True)
    fill(tmp_path, "while True:\n        pass")
    verdict = checking.check_answer(tmp_path, task, seconds=1)
    assert verdict.reason == "not done after 1 seconds: is there an endless loop?"
    assert not verdict.done


def test_what_a_check_found_as_json(tmp_path, capsys, monkeypatch):
    verdict = checking.Verdict(("one",), "two", "it is wrong", 1)
    monkeypatch.setattr(checking, "check_answer", lambda *_: verdict)
    run(tmp_path, capsys, LORA)
    status, said = run(tmp_path, capsys, LORA, "--check", "--json")
    assert status == 1
    assert json.loads(said) == {
        "number": LORA,
        "done": False,
        "passed": ["one"],
        "failed": "two",
        "reason": "it is wrong",
        "left": 1,
    }


def test_a_report_without_an_end_is_no_success(tmp_path):
    """A process that ended early, for one by sys.exit(0) in the answer, and a check that was not reached."""
    report = tmp_path / "report"
    report.write_text('{"claims": ["one", "two", "three"]}\n{"passed": "one"}\n')
    for status in (0, 3):
        verdict = checking.read_report(report, status, 60)
        assert (verdict.passed, verdict.failed, verdict.left) == (("one",), "two", 1)
        assert verdict.reason == f"the process ended before the check was over (exit status {status})"
        assert not verdict.done
