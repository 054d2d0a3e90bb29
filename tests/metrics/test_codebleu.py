"""CodeBLEU: the package's scores in compat mode, correct ones in strict mode, and termination on every text."""

import json
import math
import os
import random
import subprocess
import sys
import time
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minipeft import InputError
from minipeft.metrics.bleu import bleu
from minipeft.metrics.codebleu import KEYWORDS, _analyse, _count_tokens, _drop_as_package, _drop_truly, codebleu
from minipeft.metrics.grammar import LONGEST

PARTS = {
    "score": "codebleu",
    "ngram": "ngram_match_score",
    "weighted_ngram": "weighted_ngram_match_score",
    "syntax": "syntax_match_score",
    "dataflow": "dataflow_match_score",
}


def assert_equal_to_package(package, predictions, references):
    ours = codebleu(predictions, references, mode="compat")
    theirs = package([[r] if isinstance(r, str) else r for r in references], predictions, "python")
    for name, key in PARTS.items():
        assert getattr(ours, name) == pytest.approx(theirs[key], abs=1e-9), (name, predictions[:1], references[:1])
    assert codebleu(predictions, references).compat == ours.score == ours.compat


@pytest.mark.parametrize("step", [0, 1, 7])
def test_each_pair_of_snippets_scores_as_in_the_package(package, snippets, step):
    for place, reference in enumerate(snippets):  # 334 pairs a step
        assert_equal_to_package(package, [snippets[(place + step) % len(snippets)]], [reference])


def test_mutated_pairs_score_as_in_the_package(package, snippets, mutate):
    chance = random.Random(4)
    for _ in range(600):
        text = chance.choice(snippets)
        assert_equal_to_package(package, [mutate(text, chance)], [mutate(text, chance)])


def test_several_references_score_as_in_the_package(package, snippets):
    chance = random.Random(5)
    for place in range(0, len(snippets), 3):
        assert_equal_to_package(package, [snippets[place]], [chance.choices(snippets, k=3)])


def test_a_corpus_scores_as_in_the_package(package, snippets):
    assert_equal_to_package(package, snippets[1:] + snippets[:1], snippets)


def test_conala_scores_as_in_the_package(package, assets):
    lines = (assets / "data/conala/conala-paired-test.json").read_text().splitlines()
    references = [json.loads(line)["snippet"] for line in lines]
    assert_equal_to_package(package, references[1:] + references[:1], references)
    assert_equal_to_package(package, [""] * len(references), references)


def test_the_mean_aggregate_is_the_mean_of_pairs(snippets):
    predictions, references = snippets[1:60], snippets[:59]
    for mode in ("strict", "compat"):
        mean = codebleu(predictions, references, mode=mode, aggregate="mean")
        alone = [codebleu([p], [r], mode=mode) for p, r in zip(predictions, references)]
        for part in ("score", "compat", "ngram", "weighted_ngram", "syntax", "dataflow"):
            values = [getattr(one, part) for one in alone if getattr(one, part) is not None]
            assert getattr(mean, part) == pytest.approx(sum(values) / len(values), abs=1e-12)


def test_weights_are_those_of_the_parts():
    prediction, reference = ["x = f(a)\ny = x"], ["x = f(b)\nz = x + 1"]
    whole = codebleu(prediction, reference)
    for place, part in enumerate(("ngram", "weighted_ngram", "syntax", "dataflow")):
        weights = [float(other == place) for other in range(4)]
        assert codebleu(prediction, reference, weights=weights).score == pytest.approx(getattr(whole, part))
        assert 0 < getattr(whole, part) < 1


def test_nothing_scores_nothing_in_strict_mode_and_a_quarter_in_compat_mode():
    references = ["x = f(y)", "print(a + b)"]
    for nothing in ("", "  \n", "<|endoftext|>", "!!!!", "# nothing"):
        result = codebleu([nothing] * 2, references)
        assert (result.score, result.compat) == (0.0, 0.25)
        assert codebleu([nothing] * 2, references, mode="compat").score == 0.25


def test_a_corpus_without_data_flow_says_so_and_shares_its_weight_out():
    result = codebleu(["pass"], ["pass"])
    assert result.dataflow is None
    assert result.weights == pytest.approx((1 / 3, 1 / 3, 1 / 3, 0))
    assert result.score == pytest.approx((result.ngram + result.weighted_ngram + result.syntax) / 3)
    compat = codebleu(["pass"], ["pass"], mode="compat")
    assert (compat.dataflow, compat.weights) == (0, (0.25,) * 4)
    assert (
        result.compat == compat.score == pytest.approx(sum([compat.ngram, compat.weighted_ngram, compat.syntax, 1]) / 4)
    )


def test_strict_mode_keeps_a_string_that_begins_a_line():
    # module, statement, call, attribute, string and arguments are the six subtrees of the reference; "y" has none of
    # them, ".join(x)" an ERROR, which is what the package makes of both
    assert codebleu(["' '.join(x)"], ["'-'.join(y)"]).matches["syntax"] == (6,)
    assert codebleu(["' '.join(x)"], ["'-'.join(y)"]).unparsed == 0
    assert codebleu(["' '.join(x)"], ["'-'.join(y)"], mode="compat").unparsed == 1


def test_strict_mode_removes_comments_and_docstrings_only():
    noted = 'def f(x):  # why\n    """Doc."""\n\n    # note\n    return x\n'
    plain = "def f(x):\n    return x"
    result = codebleu([noted], [plain])
    assert (result.syntax, result.dataflow) == (1, 1)
    kept = codebleu(["def f(x):\n    'a'.join(x)"], ["def f(x):\n    x"])
    assert kept.matches["syntax"][0] < codebleu(["def f(x):\n    x"], ["def f(x):\n    x"]).matches["syntax"][0]


def test_strict_mode_reads_tabs_as_python_does():
    tabs, blanks = "if a:\n\tb = a\n\tif c:\n\t\td = b\n\te = d", "if a:\n  b = a\n  if c:\n    d = b\n  e = d"
    assert codebleu([tabs], [blanks]).syntax == 1
    assert codebleu([tabs], [blanks], mode="compat").syntax < 1


def test_counts_and_signature_tell_what_was_done():
    result = codebleu(["x = (", "x = 1"], ["x = 1", "x = 1"])
    assert result.unparsed == 1
    assert result.totals["syntax"] == (2 * 3,)  # module, statement, assignment
    assert result.totals["weighted_ngram"][0] == 2 * 5  # three tokens of weight 1 count at least 5 (a keyword's weight)
    for piece in (
        "mode:strict",
        "corpus",
        "weights:0.25,0.25",
        "tree-sitter:",
        "tree-sitter-python:0.25.0",
        "python:3.",
    ):
        assert piece in result.signature


def test_scores_do_not_depend_on_the_hash_seed(snippets):
    code = (
        "import json, sys; from minipeft.metrics.codebleu import codebleu\n"
        "s = json.load(sys.stdin); print([codebleu([a], [b]) for a, b in zip(s, s[1:])], codebleu(s, s[1:] + s[:1]))"
    )
    texts = [
        *snippets[:150],
        "while a:\n    b, c = c, d\n    e = b + c + d",
        "while x:\n    y, z = z, w\n    v = y + z + w",
    ]
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(texts),
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1


def test_scores_do_not_depend_on_what_was_scored_before(snippets):
    first = [codebleu([a], [b]) for a, b in pairwise(snippets)]
    for remembered in (_analyse, _count_tokens, _drop_as_package, _drop_truly):
        remembered.forget()
    again = [codebleu([a], [b]) for a, b in reversed(list(pairwise(snippets)))]
    assert first == again[::-1]


def nest(kind: str, depth: int) -> str:
    lines = ["  " * level + kind.format(level) for level in range(depth)]
    return "\n".join([*lines, "  " * depth + "y = y + x0"])


HOSTILE = {  # text, seconds of processor time that two scores may take
    "a line of 1 MB": ("x" * 10**6, 1),
    "words of 1 MB": ("the " * 250_000, 4),
    "NUL": ("a\0b = 1", 0.5),
    "lone surrogate": ("x = '\ud800' + \udfff", 0.5),
    "100,000 nested parentheses": ("(" * 100_000 + ")" * 100_000, 4),
    "100,000 open parentheses": ("(" * 100_000, 2),
    "40 nested for": (nest("for x{} in y:", 40), 0.5),
    "40 nested while": (nest("while x{}:", 40), 0.5),
    "300 nested if": (nest("if x{}:", 300), 2),
    "a sum of 4,000 terms": ("+".join(f"a{term}" for term in range(4000)), 1),
    "what tree-sitter repairs for minutes": ("x = ;" * 20_000, 4),
    "escaped quotes": ("'" + "\\'" * 100_000, 4),
    "blanks before a wrong sign": ("x" + " " * 150_000 + "$", 2),
    "each token from each": ("a" + ",a" * 3000 + " = f(" + ",".join("c" * 3000) + ")", 2),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_take_no_time(name):
    text, seconds = HOSTILE[name]
    start = time.process_time()
    same = codebleu([text], [text])
    other = codebleu([text], ["x = 1\ny = x"])
    assert time.process_time() - start < seconds
    assert same.syntax == 1
    assert 0 <= other.score <= 1


def test_what_is_capped_is_counted():
    assert codebleu(["(" * (LONGEST + 1)], ["x = 1"]).capped == 1
    deep = "+".join("a" * 4000)
    assert codebleu([deep, "x"], [deep, "x"]).capped == 2
    assert codebleu(["x"], ["x"]).capped == 0


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        (([], []), {}, "no pairs to score"),
        ((["x"], []), {}, "1 predictions but 0 references"),
        ((["x"], [[]]), {}, r"references\[0\]: no reference"),
        (([None], ["x"]), {}, r"predictions\[0\]: expected text, got NoneType"),
        ((["x"], [["x", 3]]), {}, r"references\[0\]: expected text, got int"),
        (("x", ["x"]), {}, "predictions: one text was given"),
        ((["x"], ["x"]), {"mode": "loose"}, "no mode is called 'loose'"),
        ((["x"], ["x"]), {"aggregate": "max"}, "no aggregate is called 'max'"),
        ((["x"], ["x"]), {"weights": (1, 1, 0, 0)}, "sum to 1"),
        ((["x"], ["x"]), {"weights": (math.nan, 1, 0, 0)}, "sum to 1"),
    ],
)
def test_bad_input_is_named(arguments, options, text):
    with pytest.raises(InputError, match=text):
        codebleu(*arguments, **options)


def identity(text: str, mode: str) -> float:
    """The score of a text against itself, from its tokens alone."""
    words = text.split()
    missing = 0.1 ** ((4 - min(4, len(words))) / 4) if words else 0  # an order that the text is too short for
    weight = sum(5 if word in KEYWORDS else 1 for word in words)
    weighted = missing * (weight / max(5, weight)) ** 0.25 * (math.exp(-1) if len(words) == 1 else 1)
    parts = [missing, weighted, 1]
    return sum(parts) / 3 if mode == "strict without flow" else (sum(parts) + 1) / 4


WORDS = """( ) [ ] { } : = , . ; + - * ** @ ' " ''' \"\"\" \\ # $ ? ! ` é π 名 😀 x y f 1 0x 1.5j if else elif for while
in not is lambda def class return yield async await with try except import from match case print exec None :="""
BLANKS = [" ", "\n", "\n    ", "\n\t", "\t", "\r\n", "\r", "\f", "\v", "\\\n", "\0", "\ud800", "\u2028", "\ufeff"]
PIECES = st.sampled_from([*WORDS.split(), *BLANKS, "f'{", "if x:\n  ", "for i in x:\n  "])
CALLS = {"made": 0}


@settings(max_examples=2000, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(PIECES | st.text(max_size=5), max_size=25).map("".join), st.integers(0, 333))
def check_one_text(snippets, text, place):
    other = snippets[place]
    for mode in ("strict", "compat"):
        itself = codebleu([text], [text], mode=mode)
        name = "strict without flow" if itself.dataflow is None else mode
        assert itself.score == pytest.approx(identity(text.strip(), name), abs=1e-12)
        for prediction, reference in ((text, other), (other, text), (text + other, text), (text, [other, text])):
            result = codebleu([prediction], [reference], mode=mode)
            assert 0 <= result.score <= 1
            assert 0 <= result.compat <= 1
        CALLS["made"] += 5
    assert 0 <= bleu([text], [other]).score <= 1
    CALLS["made"] += 1


def test_twenty_thousand_calls_give_a_number(snippets):
    check_one_text(snippets)
    assert CALLS["made"] >= 20_000
