"""Properties of an answer: exact match, chrF, BLEU of other text than code, valid Python, repetition."""

import ast
import keyword
import re
import warnings
from collections.abc import Sequence

from minipeft.errors import check_items, check_kind
from minipeft.metrics.ngrams import check_pairs, tokenize_conala

LONGEST_PYTHON = 200_000  # characters; a longer text is not parsed
LONGEST_UNIT = 32  # tokens of the repeated unit
LEAST_REPEATS = 4
LEAST_PYTHON = 0.5  # share of the references: 100 % of CoNaLa's, 25 % of 20 common shell commands


def is_exact(prediction: str, references: Sequence[str]) -> bool:
    """Whether the prediction has the same CoNaLa tokens as one of the references."""
    check_kind(prediction, str, "prediction")
    return any(
        tokenize_conala(prediction) == tokenize_conala(text) for text in check_items(references, str, "references")
    )


def chrf(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
    """chrF (Popovic 2015), 0..1: F2 of character n-grams up to 6, by sacrebleu."""
    from sacrebleu.metrics import CHRF

    predictions, lists = check_pairs(predictions, references)
    most = max(map(len, lists))
    streams = [[texts[place] if place < len(texts) else None for texts in lists] for place in range(most)]
    return CHRF().corpus_score(predictions, streams).score / 100  # type: ignore[arg-type]


def bleu_13a(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
    """Corpus BLEU-4 of text that is not code, 0..1: sacrebleu's default, 13a tokens and exponential smoothing."""
    from sacrebleu.metrics import BLEU

    predictions, lists = check_pairs(predictions, references)
    most = max(map(len, lists))
    streams = [[texts[place] if place < len(texts) else None for texts in lists] for place in range(most)]
    return BLEU().corpus_score(predictions, streams).score / 100  # type: ignore[arg-type]


def find_language(references: Sequence[Sequence[str]]) -> str:
    """ "python" where at least LEAST_PYTHON of the references that are not empty are Python, else "text".

    A single name or number is Python to the parser and a word to anyone else: it does not count as either.
    """
    texts = [texts[0].strip() for texts in references]
    counted = [text for text in texts if text and (keyword.iskeyword(text) or not re.fullmatch(r"[\w.+-]+", text))]
    known = sum(map(is_valid_python, counted))
    return "python" if counted and known >= LEAST_PYTHON * len(counted) else "text"


def is_valid_python(text: str) -> bool:
    """Whether Python's parser accepts the text, which is not run; more than LONGEST_PYTHON characters are invalid."""
    check_kind(text, str, "text")
    if len(text) > LONGEST_PYTHON:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the parser warns of "\d"
        try:
            ast.parse(text.strip())
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


def is_repeated(text: str) -> bool:
    """Whether the text ends in a unit of up to 32 tokens repeated at least 4 times and filling half of it or more."""
    check_kind(text, str, "text")
    tokens = tokenize_conala(text)
    for unit in range(1, min(LONGEST_UNIT, len(tokens) // LEAST_REPEATS) + 1):
        length = unit  # tokens at the end that repeat at this distance
        while length < len(tokens) and tokens[-length - 1] == tokens[-length - 1 + unit]:
            length += 1
        if length >= LEAST_REPEATS * unit and 2 * length >= len(tokens):
            return True
    return False
