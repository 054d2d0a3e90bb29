"""CodeBLEU (Ren et al. 2020, arXiv:2009.10297) for Python: as the `codebleu` package 0.7.0 computes it, and corrected.

    CodeBLEU = w1 ngram + w2 weighted_ngram + w3 syntax + w4 dataflow,    w = 1/4 each

    ngram           BLEU-4 of whitespace tokens, denominators of at least 1, 0.1 matches for an order without a match
    weighted_ngram  the same as *recall*, a keyword's unigram weighted five times another's
    syntax          the share of the reference's subtrees that occur in the prediction (syntax.py)
    dataflow        the share of the reference's data-flow items that the prediction has (dataflow.py)

The package adds `w4 * (dataflow or 1)`: a corpus that shares no data flow with its references, such as one of empty
answers, gets the full weight w4 and scores 0.25. It also drops every string that begins a line (comments.py).
`mode="compat"` reproduces both, for comparison with published numbers; `mode="strict"`, the default, does neither.
Both modes fix two bugs: the sources of an item keep the order of their first occurrence (the package's order depends on
PYTHONHASHSEED), and tokens are cut at byte offsets (the package's are wrong after a non-ASCII character).
"""

import keyword
import math
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

from minipeft.errors import InputError, check_items, check_value, format_value
from minipeft.metrics.comments import drop_as_package, drop_truly
from minipeft.metrics.dataflow import count_flows
from minipeft.metrics.grammar import list_grammar_versions, parse
from minipeft.metrics.ngrams import ORDERS, Counts, check_pairs, choose_length, count_matches, count_ngrams
from minipeft.metrics.syntax import count_subtrees, match_subtrees, shorten

KEYWORDS = frozenset({*keyword.kwlist, "match", "case", "type"})  # the 35 of Python since 3.7 and three soft ones
PARTS = ("ngram", "weighted_ngram", "syntax", "dataflow")
MODES = ("strict", "compat")
AGGREGATES = ("corpus", "mean")
LONGEST_SHORT = 5_000  # characters

# The counts of a pair are one row; the corpus is scored from the sum of the rows.
LENGTH, REFERENCE_LENGTH, PAIRS = 0, 1, 2
MATCHES = {"ngram": slice(3, 7), "weighted_ngram": slice(7, 11), "syntax": slice(19, 20), "dataflow": slice(20, 21)}
TOTALS = {"ngram": slice(11, 15), "weighted_ngram": slice(15, 19), "syntax": slice(21, 22), "dataflow": slice(22, 23)}

Row = list[int]
Result = TypeVar("Result")


@dataclass(frozen=True)
class CodeBLEU:
    """A CodeBLEU score, 0..1, and its parts, in the chosen mode."""

    score: float
    compat: float  # the codebleu package's total
    ngram: float
    weighted_ngram: float
    syntax: float
    dataflow: float | None  # strict: None where no reference has data flow; the other parts then share its weight
    weights: tuple[float, ...]  # as used
    matches: dict[str, tuple[int, ...]]  # of each part, summed over the corpus; the unigrams of weighted_ngram count
    totals: dict[str, tuple[int, ...]]  #   5 for a keyword, else 1
    unparsed: int  # predictions in which tree-sitter finds an error
    capped: int  # texts too deep or too large for a full analysis
    signature: str


def codebleu(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    mode: str = "strict",
    weights: Sequence[float] = (0.25, 0.25, 0.25, 0.25),
    aggregate: str = "corpus",
) -> CodeBLEU:
    """Score a corpus: from counts summed over its pairs, or as the mean of its pairs' scores (`aggregate="mean"`).

    `weights`: of ngram, weighted_ngram, syntax and dataflow. With several references ngram uses the best match, the
    other three parts sum over the references.
    Raises: InputError for an unknown mode or aggregate, weights that do not sum to 1, pairs that cannot be scored.
    """
    if mode not in MODES:
        raise InputError(f"no mode is called {format_value(mode)}; there are {list(MODES)}", where="mode")
    if aggregate not in AGGREGATES:
        raise InputError(
            f"no aggregate is called {format_value(aggregate)}; there are {list(AGGREGATES)}", where="aggregate"
        )
    weights = _check_weights(weights)
    pairs = list(zip(*check_pairs(predictions, references)))
    words = [_count_words(prediction, texts) for prediction, texts in pairs]
    seen = {name: [_count_trees(*pair, name) for pair in pairs] for name in dict.fromkeys((mode, "compat"))}
    totals, parts = {}, {}
    for name, trees in seen.items():
        rows = [common + tree.row for common, tree in zip(words, trees)]
        groups = rows if aggregate == "mean" else [_sum(rows)]
        totals[name], parts[name] = _score(groups, name, weights)
    sums = _sum([common + tree.row for common, tree in zip(words, seen[mode])])
    return CodeBLEU(
        score=totals[mode],
        compat=totals["compat"],
        ngram=parts[mode]["ngram"] or 0.0,
        weighted_ngram=parts[mode]["weighted_ngram"] or 0.0,
        syntax=parts[mode]["syntax"] or 0.0,
        dataflow=parts[mode]["dataflow"],
        weights=_share(weights, parts[mode]["dataflow"]),
        matches={part: tuple(sums[MATCHES[part]]) for part in PARTS},
        totals={part: tuple(sums[TOTALS[part]]) for part in PARTS},
        unparsed=sum(tree.unparsed for tree in seen[mode]),
        capped=sum(tree.capped for tree in seen[mode]),
        signature=f"CodeBLEU|mode:{mode}|aggregate:{aggregate}|weights:{','.join(f'{weight:g}' for weight in weights)}"
        f"|pairs:{len(pairs)}|tokenize:whitespace|smooth:floor[0.1]|keywords:{len(KEYWORDS)}|{list_grammar_versions()}"
        f"|python:{'.'.join(platform.python_version_tuple()[:2])}",
    )


def _check_weights(weights: Sequence[float]) -> tuple[float, ...]:
    entries: list[object] = check_items(weights, object, "weights", "number")
    for weight in entries:
        if not isinstance(weight, float) or not math.isnan(weight):  # NaN is refused below
            check_value(weight, float, {}, "weights")
    if len(weights) != 4 or not all(weight >= 0 for weight in weights) or not math.isclose(sum(weights), 1):
        raise InputError(
            f"expected four numbers, none below 0, that sum to 1, got {format_value(weights)}", where="weights"
        )
    return tuple(weights)


def _share(weights: tuple[float, ...], dataflow: float | None) -> tuple[float, ...]:
    """The weights; if no reference has data flow, its weight is distributed over the other parts in proportion."""
    rest = sum(weights[:3])
    if dataflow is not None or not rest:
        return weights
    return (*(weight / rest for weight in weights[:3]), 0.0)


def _score(groups: list[Row], mode: str, weights: tuple[float, ...]) -> tuple[float, dict[str, float | None]]:
    """The total and the parts of each group of summed counts, averaged over groups."""
    scores: list[float] = []
    parts: dict[str, list[float]] = {part: [] for part in PARTS}
    for sums in groups:
        values = _score_parts(sums, mode)
        used = _share(weights, values["dataflow"])
        terms = {part: value or 0.0 for part, value in values.items()}
        if mode == "compat":
            terms["dataflow"] = terms["dataflow"] or 1.0  # the package's line: 0.25 for an empty answer
        scores.append(math.fsum(weight * terms[part] for weight, part in zip(used, PARTS)))
        for part, value in values.items():
            if value is not None:
                parts[part].append(value)
    means = {part: math.fsum(values) / len(values) if values else None for part, values in parts.items()}
    return math.fsum(scores) / len(scores), means


def _score_parts(sums: Row, mode: str) -> dict[str, float | None]:
    """The four parts of summed counts."""
    (found,), (subtrees,) = sums[MATCHES["syntax"]], sums[TOTALS["syntax"]]
    (matched,), (flows,) = sums[MATCHES["dataflow"]], sums[TOTALS["dataflow"]]
    nothing = None if mode == "strict" else 0.0
    return {
        "ngram": _ngram_score(sums, "ngram", sums[REFERENCE_LENGTH]),
        # The package takes len() of the pair (tokens, weights) instead of the tokens': 2, whatever the reference.
        "weighted_ngram": _ngram_score(sums, "weighted_ngram", 2 * sums[PAIRS]),
        "syntax": found / subtrees,
        "dataflow": matched / flows if flows else nothing,
    }


def _ngram_score(sums: Row, part: str, reference_length: int) -> float:
    """Brevity penalty times the geometric mean of matches / totals, with 0.1 matches where there are none."""
    matches, totals, length = sums[MATCHES[part]], sums[TOTALS[part]], sums[LENGTH]
    if not matches[0]:
        return 0.0
    brevity = 1.0 if length > reference_length else math.exp(1 - reference_length / length)
    return brevity * math.exp(math.fsum(math.log((found or 0.1) / total) for found, total in zip(matches, totals)) / 4)


def _sum(rows: list[Row]) -> Row:
    return [sum(column) for column in zip(*rows)]


def _count_words(prediction: str, references: list[str]) -> Row:
    """A pair's n-gram counts: lengths, matches and totals of both n-gram parts."""
    here, there = _count_tokens(prediction), [_count_tokens(text) for text in references]
    best = list(there[0].ngrams)
    for other in there[1:]:
        best = [most | more for most, more in zip(best, other.ngrams)]
    matches = [count_matches(counts, allowed) for counts, allowed in zip(here.ngrams, best)]
    totals = [max(1, here.length - order + 1) for order in ORDERS]
    # Recall: with several references the matches and the totals of all of them are summed.
    found = matches[1:]
    if len(there) > 1:
        found = [sum(count_matches(other.ngrams[place], here.ngrams[place]) for other in there) for place in (1, 2, 3)]
    words = here.ngrams[0]
    weighted = sum(
        min(other.ngrams[0][word], words[word]) * _weight(word)
        for other in there
        for word in other.ngrams[0].keys() & words.keys()
    )
    wanted = [sum(max(1, other.length - order + 1) for other in there) for order in ORDERS[1:]]
    # In fifths: the package's weights are 1 and 0.2, and its denominator is at least 1.
    weights = sum(max(5, other.weight) for other in there)
    closest = choose_length(here.length, [other.length for other in there])
    return [here.length, closest, 1, *matches, weighted, *found, *totals, weights, *wanted]


def _weight(word: tuple[str, ...]) -> int:
    return 5 if word[0] in KEYWORDS else 1


@dataclass(frozen=True, slots=True)
class Trees:
    """A pair's tree counts: subtrees and flows matched, subtrees and flows of the references."""

    row: Row
    unparsed: bool
    capped: int


def _count_trees(prediction: str, references: list[str], mode: str) -> Trees:
    row, here, capped = [0, 0, 0, 0], None, 0
    for text in references:
        if mode == "strict":
            here, there = _analyse(_drop_truly(prediction.strip())), _analyse(_drop_truly(text.strip()))
        else:  # the package strips the prediction once more for each reference
            prediction = _drop_as_package(prediction.strip() if here is None else prediction)
            here, there = _analyse(prediction), _analyse(_drop_as_package(text.strip()))
        row[0] += match_subtrees(there.subtrees, here.subtrees)
        row[1] += sum(min(there.flows[item], here.flows[item]) for item in there.flows.keys() & here.flows.keys())
        row[2] += there.subtrees.total()
        row[3] += there.flows.total()
        capped += there.capped
    assert here is not None
    return Trees(row, here.broken, capped + here.capped)


class Cached(Generic[Result]):
    """A cached function of a text: the cache keeps many short texts and the last few long ones."""

    def __init__(self, function: Callable[[str], Result]):
        self._short, self._long = lru_cache(maxsize=4096)(function), lru_cache(maxsize=8)(function)

    def __call__(self, text: str) -> Result:
        return self._short(text) if len(text) <= LONGEST_SHORT else self._long(text)

    def forget(self) -> None:
        """Empty the cache."""
        self._short.cache_clear()
        self._long.cache_clear()


@dataclass(frozen=True, slots=True)
class Words:
    """The n-grams of a text's whitespace tokens."""

    length: int
    ngrams: Counts
    weight: int  # of all tokens: 5 for a keyword, else 1


@Cached
def _count_tokens(text: str) -> Words:
    tokens = text.split()
    ngrams = count_ngrams(tokens)
    return Words(len(tokens), ngrams, sum(count * _weight(word) for word, count in ngrams[0].items()))


@dataclass(frozen=True, slots=True)
class Analysis:
    """The subtrees and data-flow items of a text without comments."""

    subtrees: Counter[str]
    flows: Counter[str]
    broken: bool
    capped: bool


_drop_as_package = Cached(drop_as_package)


@Cached
def _analyse(code: str) -> Analysis:
    tree = parse(code)
    if tree is None:  # one subtree that only the same text has
        return Analysis(Counter([shorten(code)]), Counter(), True, True)
    flows, capped = count_flows(tree)
    return Analysis(count_subtrees(tree), flows, tree.broken, capped or (tree.broken and tree.expression is None))


_drop_truly = Cached(drop_truly)
