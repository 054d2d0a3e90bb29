"""Tokenization and n-gram counts for BLEU (Papineni et al. 2002) and CodeBLEU's first two parts.

A metric takes `predictions`, a list of texts, and `references`, one text or a list of texts per prediction.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from minipeft.errors import InputError, check_items

ORDERS = (1, 2, 3, 4)

Tokens = list[str]
Counts = tuple[Counter[tuple[str, ...]], ...]  # one counter for each order


def tokenize_conala(text: str) -> Tokens:
    """Tokenize code as the official CoNaLa evaluation does (conala-baseline, eval/conala_eval.py; Ling et al. 2016).

    Each character outside [A-Za-z0-9_] is a token of its own, camelCase is cut in two, and both quotes become `.
    """
    text = re.sub(r"([^A-Za-z0-9_])", r" \1 ", text)
    text = re.sub(r"([a-z])([A-Z])", r"\1 \2", text)
    return text.replace('"', "`").replace("'", "`").split()


def tokenize_13a(text: str) -> Tokens:
    """Tokenize text as NIST's mteval-v13a does, the rules that sacrebleu calls 13a."""
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, sign in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, sign)
    text = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", f" {text} ")  # punctuation, but not . , - '
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)  # . and , stay inside a number only
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


TOKENIZERS: dict[str, Callable[[str], Tokens]] = {"conala": tokenize_conala, "13a": tokenize_13a, "none": str.split}


def count_ngrams(tokens: Tokens) -> Counts:
    """Count the n-grams of each order: `("a", "b")` is the key of the 2-gram "a b"."""
    return tuple(Counter(zip(*(tokens[start:] for start in range(order)))) for order in ORDERS)


def count_matches(counts: Counter[tuple[str, ...]], others: Counter[tuple[str, ...]]) -> int:
    """The clipped matches: sum over n-grams of min(count here, count there)."""
    common = counts.keys() & others.keys()
    return sum(map(min, map(counts.__getitem__, common), map(others.__getitem__, common)))


def choose_length(length: int, reference_lengths: Sequence[int]) -> int:
    """The reference length nearest to `length`, the shorter of two equally near ones."""
    return min(reference_lengths, key=lambda other: (abs(other - length), other))


def check_pairs(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Return the predictions, and for each one the list of its references.

    Raises: InputError if there are no pairs, the lengths differ, or an entry is not text.
    """
    for name, given in (("predictions", predictions), ("references", references)):
        if isinstance(given, str):
            raise InputError(f"one text was given where a list is expected: {given[:40]!r}", where=name)
        check_items(given, object, name, "text")
    if len(predictions) != len(references):
        raise InputError(f"{len(predictions)} predictions but {len(references)} references")
    if not len(predictions):
        raise InputError("no pairs to score: predictions and references are empty")
    lists: list[Any] = [
        [given] if isinstance(given, str) else check_items(given, object, f"references[{place}]", "text")
        for place, given in enumerate(references)
    ]
    for place, (prediction, texts) in enumerate(zip(predictions, lists)):
        if not isinstance(prediction, str):
            raise InputError(f"expected text, got {type(prediction).__name__}", where=f"predictions[{place}]")
        if not texts:
            raise InputError("no reference for this prediction", where=f"references[{place}]")
        for text in texts:
            if not isinstance(text, str):
                raise InputError(f"expected text, got {type(text).__name__}", where=f"references[{place}]")
    return list(predictions), lists
