"""Build the program that checks an answer, for tasks of HumanEval, MBPP, ODEX and the demo.

program = before + answer + after            it ends without an error if and only if the answer passes its tests

form        before            after                                    source
HumanEval   prompt            test, check(entry_point)                 Chen et al. 2021
MBPP        test_setup_code   test_list                                Austin et al. 2021
ODEX        prompt            suffix, test_start, test, check(...)     Wang et al. 2022
demo        the house library answer and reference give the same on tables filled from the reference
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipeft.errors import InputError, format_value
from minipeft.files import name_type, parse_json, read_text

HOUSE = Path(__file__).parents[1] / "demo" / "house.py"
DEMO = "demo"  # in place of a file of tasks
CHECK_DEMO = '''
import ast
ROWS = 202  # each number from 0 to 100 stands in a column once at least


def read_names(reference):
    """The tables of an expression, and its columns with the text that each is compared with, None for numbers."""
    tree = ast.parse(reference.strip(), mode="eval")
    tables = sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)})
    columns = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for given in node.args:
                if isinstance(given, ast.Constant) and isinstance(given.value, str):
                    columns.setdefault(given.value, None)
            for given in node.keywords:
                value = getattr(given.value, "value", None)
                if given.arg == "on":
                    columns.setdefault(value, None)
                elif given.arg != "down":
                    columns[given.arg] = value if isinstance(value, str) else columns.get(given.arg)
    return tables, columns


def fill_table(place, columns):
    """A table of ROWS rows: of each column texts or numbers in an order of its own, some of them missing."""
    rows = []
    for row in range(ROWS):
        values = {"row": 1000 * place + row}
        for number, (name, text) in enumerate(columns.items(), 1):
            draw = (row * (3 + 4 * number + place) + 13 * number) % 101
            missing = row % 13 == (7 + number) % 13
            values[name] = (text, "other", "third")[draw % 3] if text is not None else None if missing else draw
        rows.append(values)
    return Table(rows)


def show(value):
    """A value by what it holds."""
    if isinstance(value, Table):
        return ["table", value.rows]
    if isinstance(value, Groups):
        return ["groups", [[kind, table.rows] for kind, table in value.tables.items()]]
    if isinstance(value, float):
        return round(value, 9)
    return repr(sorted(value.items(), key=repr)) if isinstance(value, dict) else value


def find_outcome(expression):
    """The value of an expression on fresh tables, and the files that it wrote."""
    tables, columns = read_names(REFERENCE)
    before = {file.name for file in Path().iterdir()}
    value = eval(expression.strip(), {name: fill_table(place, columns) for place, name in enumerate(tables)})
    files = {file.name: file.read_text() for file in Path().iterdir() if file.name not in before}
    for name in files:
        Path(name).unlink()
    return show(value), files


assert find_outcome(ANSWER) == find_outcome(REFERENCE)
'''


@dataclass(frozen=True)
class Task:
    """The code before and after an answer in the program that checks it."""

    before: str
    after: str


@dataclass(frozen=True)
class Form:
    """A form of tasks: its name, the kinds of its fields, and the task of a row."""

    name: str
    fields: Mapping[str, type]
    make: Callable[[Mapping[str, Any]], Task]


def make_humaneval(row: Mapping[str, Any]) -> Task:
    return Task(row["prompt"], f"\n\n{row['test']}\n\ncheck({row['entry_point']})\n")


def make_mbpp(row: Mapping[str, Any]) -> Task:
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    return Task(f"{setup}\n", "\n\n" + "\n".join(row["test_list"]) + "\n")


def make_odex(row: Mapping[str, Any]) -> Task:
    tests = row["test_start"] + "".join(row["test"])
    return Task(row["prompt"], f"{row['suffix']}\n{tests}\n\ncheck({row['entry_point']})\n")


FORMS = (
    Form("ODEX", {"prompt": str, "suffix": str, "test_start": str, "test": list, "entry_point": str}, make_odex),
    Form("HumanEval", {"prompt": str, "test": str, "entry_point": str}, make_humaneval),
    Form("MBPP", {"test_list": list}, make_mbpp),
)


def read_tasks(file: Path) -> dict[str, Task]:
    """The tasks of a file of JSON lines by task_id, as text.

    Raises:
        InputError: a line is not a task of one of FORMS, or a task_id stands twice.
    """
    found: dict[str, Task] = {}
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        where, row = f"line {number}", parse_json(line, file, f"line {number}")
        if not isinstance(row, dict):
            raise InputError(f"must be an object, is {name_type(row)}", file=file, where=where)
        name = str(row.get("task_id", ""))
        if not name or name in found:
            raise InputError(
                f"task_id {format_value(name)} is {'given twice' if name else 'missing'}", file=file, where=where
            )
        found[name] = find_form(row, file, where).make(row)
    if not found:
        raise InputError("holds no tasks", file=file)
    return found


def find_form(row: Mapping[str, Any], file: Path, where: str) -> Form:
    """Find the form of which a row has all fields."""
    for form in FORMS:
        if all(has_kind(row.get(name), kind) for name, kind in form.fields.items()):
            return form
    known = "; ".join(f"{form.name}: {', '.join(form.fields)}" for form in FORMS)
    raise InputError("is not a task", file=file, where=where, hint=f"Known forms are {known}")


def has_kind(value: object, kind: type) -> bool:
    """Whether a value is a text, or a list of texts."""
    return isinstance(value, kind) and (kind is str or all(isinstance(text, str) for text in value))  # type: ignore


def make_program(task: Task, answer: str) -> str:
    return f"{task.before}{answer}{task.after}"


def make_demo_task(reference: str) -> Task:
    """The task of a demo pair: the answer's value equals the reference's, on tables with the reference's columns."""
    return Task(f"{read_text(HOUSE)}\nREFERENCE = {reference!r}\nANSWER = ", CHECK_DEMO)


def make_demo_program(reference: str, answer: str) -> str:
    """The program that checks an answer to a demo pair."""
    return make_program(make_demo_task(reference), repr(answer))


def build_programs(answers: Sequence[Mapping[str, Any]], source: str) -> list[str]:
    """The program of each answer; `source` is a file of tasks, or DEMO.

    An answer's task is the one with its task_id, or else its question_id.

    Raises:
        InputError: the file cannot be read, or an answer has no task in it.
    """
    if source == DEMO:
        texts = [row["reference"] if isinstance(row["reference"], str) else row["reference"][0] for row in answers]
        return [make_demo_program(text, row["prediction"]) for text, row in zip(texts, answers)]
    tasks, found = read_tasks(Path(source)), []
    for number, row in enumerate(answers, 1):
        name = str(row.get("task_id", row.get("question_id")))
        if name not in tasks:
            problem = f"answer {number} has task_id or question_id {format_value(name)}, for which there is no task"
            raise InputError(problem, file=source)
        found.append(make_program(tasks[name], row["prediction"]))
    return found
