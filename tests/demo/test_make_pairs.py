"""The demo's pairs: what the file holds, that nothing of the test split is in training, that every snippet runs."""

import ast
import builtins
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from string import Template as Blank

import pytest

from minipeft.demo import demo_pairs_path, make_pairs

TEMPLATES = make_pairs.read_templates()


@pytest.fixture(scope="module")
def rows():
    return [json.loads(line) for line in demo_pairs_path().read_text(encoding="utf-8").splitlines()]


def of_split(rows, split):
    return [row for row in rows if row["split"] == split]


def test_the_generator_writes_the_committed_bytes(tmp_path):
    out = tmp_path / "pairs.jsonl"
    subprocess.run([sys.executable, "-m", "minipeft.demo.make_pairs", "--out", out], check=True, timeout=120)
    assert out.read_bytes() == demo_pairs_path().read_bytes()


def test_there_are_as_many_as_promised(rows):
    train, test = of_split(rows, "train"), of_split(rows, "test")
    assert len(train) + len(test) == len(rows)
    assert 1600 <= len(train) <= 2400
    assert 200 <= len(test) <= 300
    assert len({row["question_id"] for row in rows}) == len(TEMPLATES) >= 150


def test_fields_are_conalas_and_no_pair_stands_twice(rows):
    for row in rows:
        assert list(row) == ["intent", "rewritten_intent", "snippet", "question_id", "split"]
        assert row["intent"].strip() == row["intent"] != ""
        assert "$" not in row["intent"] + row["snippet"]
    assert len({(row["intent"], row["snippet"]) for row in rows}) == len(rows)


def test_an_intent_says_all_that_its_snippet_needs(rows):
    """The same question never has two answers, and every drawn name or literal of the answer is in the question."""
    answers = {row["intent"]: row["snippet"] for row in rows}
    assert all(answers[row["intent"]] == row["snippet"] for row in rows)
    for template in TEMPLATES:
        for intent in template.intents:
            missing = set(Blank(template.snippet).get_identifiers()) - set(Blank(intent).get_identifiers())
            assert not missing, (template.title, intent)


def test_no_question_and_no_intent_is_in_both_splits(rows):
    for field in ("question_id", "intent", "snippet"):
        assert not {r[field] for r in of_split(rows, "train")} & {r[field] for r in of_split(rows, "test")}


def skeleton(template):
    """A template's code with every name that is no builtin, module or method renamed in order of appearance."""
    blank = Blank(template.snippet)
    tree, names = ast.parse(blank.substitute({slot: f"slot_{slot}" for slot in blank.get_identifiers()})), {}
    for node in ast.walk(tree):
        for field in ("id", "arg"):
            name = getattr(node, field, None)
            if isinstance(name, str) and not hasattr(builtins, name) and name not in sys.stdlib_module_names:
                setattr(node, field, names.setdefault(name, f"name{len(names)}"))
    return ast.unparse(tree)


def test_the_test_split_has_code_that_training_has_not():
    train = {skeleton(t): t.title for t in TEMPLATES if t.split == "train"}
    assert [(t.title, train[skeleton(t)]) for t in TEMPLATES if t.split == "test" and skeleton(t) in train] == []


def test_skeletons_see_through_names():
    one, other = (make_pairs.Template(1, "train", "", [], s) for s in ("[x for x in $ints]", "[w for w in $words]"))
    assert skeleton(one) == skeleton(other)


def test_the_test_split_has_names_that_training_has_not(rows):
    """By the words of the file, not by the generator's pools: all names between backquotes, all literals in quotes."""

    def names(split):
        intents = [row["intent"] for row in of_split(rows, split)]
        return {n for intent in intents for n in re.findall(r"`([a-z_]\w*)`", intent)}

    def literals(split):
        return {word for row in of_split(rows, split) for word in re.findall(r"'([^']*)'", row["intent"])}

    assert len(names("test")) > 30
    assert names("train") & names("test") == set()
    assert literals("train") & literals("test") == set()


def test_every_snippet_parses_and_most_are_one_line(rows):
    for row in rows:
        ast.parse(row["snippet"])
    assert sum("\n" not in row["snippet"] for row in rows) > 0.8 * len(rows)
    assert max(row["snippet"].count("\n") for row in rows) <= 4


RUNNER = Path(__file__).with_name("run_snippets.py")


def test_every_snippet_runs():
    ended = subprocess.run([sys.executable, RUNNER], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_snippet_that_fails_is_named():
    spec = importlib.util.spec_from_file_location("run_snippets", RUNNER)
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    pair = make_pairs.Pair("divide", "1 / 0", 1, "train", "1 / 0", None)
    assert list(runner.run([pair])) == [(pair, "ZeroDivisionError")]
