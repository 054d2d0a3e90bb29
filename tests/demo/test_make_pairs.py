"""The demo's pairs: the file's content, no overlap of test questions and training, and every answer runs."""

import ast
import json
import random
import re
import subprocess
import sys
from string import Template as Blank

import pytest

from minipeft.demo import demo_pairs_path, make_pairs
from minipeft.demo.house import Table
from minipeft.demo.names import is_kept, split_names

SPLITS = ("train", "test", "hard")
TEMPLATES = make_pairs.read_templates()
GENERAL = make_pairs.read_templates(make_pairs.HERE / "templates.txt")


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
    taught = [t for t in TEMPLATES if t.split == "taught"]
    unseen = [t for t in TEMPLATES if t.split == "unseen"]
    assert len(taught) == 28
    assert len(unseen) == 6
    assert len(of_split(rows, "train")) == len(taught) * make_pairs.TRAIN_PAIRS
    assert len(of_split(rows, "test")) == len(taught) * make_pairs.TEST_PAIRS["taught"]
    assert len(of_split(rows, "hard")) == len(unseen) * make_pairs.TEST_PAIRS["unseen"]


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
    for template in [*TEMPLATES, *GENERAL]:
        for intent in template.intents:
            missing = set(Blank(template.snippet).get_identifiers()) - set(Blank(intent).get_identifiers())
            assert not missing, (template.title, intent)


def drawn(rows, split):
    """All names in backquotes, texts in quotes and numbers: from the words of the file, not from the pools."""
    intents = [row["intent"] for row in of_split(rows, split)]
    names = {n for intent in intents for n in re.findall(r"`([a-z_]\w*)`", intent)}
    texts = {n for intent in intents for n in re.findall(r"'([^']*)'", intent)}
    return names, texts, {n for intent in intents for n in re.findall(r"\b\d+\b", intent)}


def test_the_test_questions_have_names_texts_and_numbers_that_training_has_not(rows):
    for split in ("test", "hard"):
        for train, asked in zip(drawn(rows, "train"), drawn(rows, split)):
            assert len(asked) >= 10
            assert train & asked == set()


def test_no_operation_of_the_unseen_stands_in_training(rows):
    unseen = {t.number for t in TEMPLATES if t.split == "unseen"}
    operations = {split: {row["question_id"] // 1000 for row in of_split(rows, split)} for split in SPLITS}
    assert operations["train"] == operations["test"]
    assert operations["hard"] == unseen
    assert not operations["train"] & unseen
    assert len({row["question_id"] for row in rows}) == len(rows)


def test_what_the_base_has_read_has_nothing_of_the_task():
    """No name, text or number of the test, no word of the house library, no wording of the task."""
    kept = {*split_names(True)[0], *split_names(True)[1]}
    names, texts, numbers = set(), set(), set()
    for intent, snippet in make_pairs.make_general_pairs(3):
        names |= set(re.findall(r"`([a-z_]\w*)`", intent))
        texts |= {node.value for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Constant)}
        numbers |= set(re.findall(r"\b\d\d\b", intent))
        assert "Table" not in snippet
    assert len(names) > 1000
    assert not names & kept
    assert not texts & set(make_pairs.list_choices("text", True))
    assert not numbers & {n for n in make_pairs.list_choices("number", True) if len(n) == 2}
    wordings = {" ".join(Blank(i).safe_substitute({}).split()) for t in TEMPLATES for i in t.intents}
    assert not wordings & {" ".join(i.split()) for t in GENERAL for i in t.intents}


def test_names_fall_in_one_split():
    train, test = split_names(False), split_names(True)
    for mine, other in zip(train, test):
        assert len(mine) > 1000
        assert 100 < len(other) < len(mine) / 4
        assert not set(mine) & set(other)
        assert all(is_kept(name) for name in other)
    assert not set(train[0]) & set(train[1])


def table_for(pair, seed):
    """A table with the columns that a pair names, on which the answer has an effect."""
    slots = dict(pair.slots)
    draw = random.Random(seed)
    column, other = slots.get("c", "c"), slots.get("c2", "c2")
    text = "v" in slots and f"='{slots['v']}'" in pair.snippet
    grouped = ".per(" in pair.snippet or ".meet(" in pair.snippet or ".kinds(" in pair.snippet
    values = [slots.get("v", "x"), "q", "r"] if text else [1, 2, 3] if grouped else list(range(1, 120))
    rows = [{column: draw.choice(values), other: draw.randint(1, 99), "id": n} for n in range(150)]
    if ".fill(" in pair.snippet:
        rows[3][column] = None
    if ".rename(" in pair.snippet:
        rows = [{column: row[column], "id": row["id"]} for row in rows]
    return Table(rows)


def run(pair, snippet, seed=0):
    """Run a snippet on the pair's tables."""
    slots = dict(pair.slots)
    scope = {slots["t"]: table_for(pair, seed)}
    if "t2" in slots:
        scope[slots["t2"]] = table_for(pair, seed + 1)
    return eval(snippet, scope)


def test_every_answer_runs_and_does_something(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = set()
    for pair in make_pairs.make_pairs():
        if (pair.number // 1000, pair.split) in seen:
            continue
        seen.add((pair.number // 1000, pair.split))
        ast.parse(pair.snippet)
        found = run(pair, pair.snippet)
        if ".save(" in pair.snippet:
            assert (tmp_path / re.search(r"'(.*)'", pair.snippet)[1]).exists()
        else:
            assert found is not None
            assert found != table_for(pair, 0), pair.snippet
    assert len(seen) == 28 * 2 + 6
