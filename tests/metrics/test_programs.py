"""Answers, right and wrong, in each form of task; every reference of the demo passes its own program."""

import json
from itertools import islice, pairwise

import pytest

from minipeft import InputError
from minipeft.data.examples import load_pairs
from minipeft.metrics.execution import run_program, run_programs
from minipeft.metrics.programs import make_demo_program, make_program, read_tasks

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
}
MBPP = {
    "task_id": 11,
    "text": "double a number",
    "code": "def double(x):\n    return math.floor(2 * x)",
    "test_setup_code": "import math",
    "test_list": ["assert double(2) == 4", "assert double(0) == 0"],
}
ODEX = {
    "task_id": "3844801",
    "prompt": "def f_3844801(myList):\n\treturn ",
    "suffix": "",
    "canonical_solution": "all(x == myList[0] for x in myList)",
    "test_start": "\ndef check(candidate):",
    "test": ["\n    assert candidate([1, 2, 3]) == False\n", "\n    assert candidate([1, 1, 1]) == True\n"],
    "entry_point": "f_3844801",
}


@pytest.fixture(scope="module")
def sandbox():
    """Skip where this kernel gives no user namespaces."""
    try:
        run_program("")
    except InputError as error:
        pytest.skip(str(error))


def test_each_form_passes_its_own_solution_and_no_other(sandbox, tmp_path):
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (HUMANEVAL, MBPP, ODEX)))
    tasks = read_tasks(file)
    assert list(tasks) == ["HumanEval/0", "11", "3844801"]
    right = [HUMANEVAL["canonical_solution"], MBPP["code"], ODEX["canonical_solution"]]
    wrong = ["    return x + 2\n", "def double(x):\n    return 4", "True"]
    found = run_programs([make_program(task, answer) for answers in (right, wrong) for task, answer in
                          zip(tasks.values(), answers)])  # fmt: skip
    assert [outcome.status for outcome in found] == ["passed"] * 3 + ["failed"] * 3


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["[]"], "line 1: must be an object"),
        (['{"task_id": 1}'], "line 1: is not a task. Known forms are ODEX: prompt"),
        (['{"task_id": 1, "test_list": [1]}'], "line 1: is not a task"),
        ([json.dumps(MBPP), json.dumps(MBPP)], "line 2: task_id '11' is given twice"),
        (['{"test_list": []}'], "line 1: task_id '' is missing"),
        ([""], "holds no tasks"),
    ],
)
def test_what_is_no_task(tmp_path, lines, said):
    file = tmp_path / "tasks.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"tasks\.jsonl: ") as error:
        read_tasks(file)
    assert said in str(error.value)


def test_demo_references_pass_and_answers_that_differ_fail(sandbox):
    """One pair of each operation: its reference passes; the references of the others, with its names, do not."""
    kinds: dict[int, str] = {}
    for split in ("test", "hard"):
        for pair in load_pairs("demo", split=split):
            kinds.setdefault((pair.question_id or 0) // 1000, pair.snippet)
    assert len(kinds) == 34
    references = list(kinds.values())
    right = run_programs([make_demo_program(text, f" {text}\n") for text in references])
    assert [(text, outcome.said) for text, outcome in zip(references, right) if outcome.status != "passed"] == []
    shifted = list(islice(pairwise(references), 10))
    wrong = run_programs([make_demo_program(text, other) for text, other in shifted])
    assert {outcome.status for outcome in wrong} == {"failed"}


@pytest.mark.parametrize(
    ("reference", "answer", "status"),
    [
        ("t.where(c='red').size()", "len(t.where(c='red').rows)", "passed"),
        ("t.above('c', 30)", "Table(t.rows)", "failed"),  # only the tables of the reference are known
        ("t.above('c', 30)", "t.above('c', 31)", "failed"),
        ("t.above('c', 30)", "t.below('c', 30)", "failed"),
        ("t.by('c')", "t.by('c', down=True).flip()", "failed"),  # missing values would come first
        ("t.flip().flip()", "t", "passed"),
        ("t.where(c='red')", "t.unless(c='red')", "failed"),
        ("t.head(48)", "t.head(49)", "failed"),
        ("t.every(2)", "t.every(3)", "failed"),
        ("t.total('c')", "sum(t.values('c'))", "passed"),
        ("t.peak('c')", "t.dip('c')", "failed"),
        ("t.fill(c=7)", "t", "failed"),
        ("t.per('c').size()", "t.per('d').size()", "failed"),
        ("t.meet(u, on='c')", "u.meet(t, on='c')", "failed"),
        ("t.save('a.csv')", "t.save('b.csv')", "failed"),
        ("t.save('a.csv')", "t.save('a.csv')", "passed"),
        ("t.save('a.csv')", "None", "failed"),
        ("t.size()", "", "failed"),
        ("t.size()", "exit()", "failed"),
        ("t.size()", "t.size(", "failed"),
    ],
)
def test_two_ways_to_write_the_same(sandbox, reference, answer, status):
    assert run_program(make_demo_program(reference, answer)).status == status
