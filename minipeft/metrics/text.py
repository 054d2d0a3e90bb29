"""What else can be said of answers: exact, near, valid, empty, repeated, cut off; and `score_texts`, all at once."""

import ast
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from minipeft.errors import InputError
from minipeft.metrics.bleu import Interval, bleu, bootstrap_bleu, count_pairs
from minipeft.metrics.codebleu import CodeBLEU, codebleu
from minipeft.metrics.ngrams import check_pairs, conala_tokens

LONGEST_PYTHON = 200_000  # characters; a longer text is not given to Python's parser
LONGEST_UNIT = 32  # tokens of what is repeated
LEAST_REPEATS = 4


@dataclass(frozen=True)
class TextScores:
    """The scores of a list of answers; all but the counts are 0..1."""

    pairs: int
    bleu: float  # corpus BLEU-4 in CoNaLa's tokens
    bleu_interval: tuple[float, float]  # its 95 % bootstrap interval
    codebleu: float  # strict
    codebleu_compat: float  # what the codebleu package gives
    ngram: float  # the four parts of the strict CodeBLEU
    weighted_ngram: float
    syntax: float
    dataflow: float | None
    exact_match: float  # share with the same CoNaLa tokens as a reference
    chrf: float
    valid_python: float  # share that Python's own parser takes
    empty: int
    repeated: int  # that end in one thing over and over
    hit_limit: int | None  # that were cut off; None where nobody said
    signatures: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """The scores as plain values for JSON."""
        return asdict(self)


def score_texts(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    hit_limit: Sequence[bool] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> TextScores:
    """Score answers in every way that this package knows; `hit_limit` says of each whether generation cut it off.

    Raises: InputError where the pairs cannot be scored.
    """
    predictions, lists = check_pairs(predictions, references)
    if hit_limit is not None and len(hit_limit) != len(predictions):
        raise InputError(f"{len(hit_limit)} flags for {len(predictions)} predictions", where="hit_limit")
    counts = count_pairs(predictions, lists)
    interval: Interval = bootstrap_bleu(counts, resamples=resamples, seed=seed)
    code: CodeBLEU = codebleu(predictions, lists)
    return TextScores(
        pairs=len(predictions),
        bleu=interval.value,
        bleu_interval=(interval.low, interval.high),
        codebleu=code.score,
        codebleu_compat=code.compat,
        ngram=code.ngram,
        weighted_ngram=code.weighted_ngram,
        syntax=code.syntax,
        dataflow=code.dataflow,
        exact_match=_share([is_exact(*pair) for pair in zip(predictions, lists)]),
        chrf=chrf(predictions, lists),
        valid_python=_share([is_valid_python(text) for text in predictions]),
        empty=sum(not text.strip() for text in predictions),
        repeated=sum(is_repeated(text) for text in predictions),
        hit_limit=None if hit_limit is None else sum(map(bool, hit_limit)),
        signatures=(bleu(predictions[:1], lists[:1]).signature, code.signature),
    )


def is_exact(prediction: str, references: Sequence[str]) -> bool:
    """Whether the prediction has the same CoNaLa tokens as one of the references."""
    return any(conala_tokens(prediction) == conala_tokens(text) for text in references)


def chrf(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
    """chrF (Popovic 2015), 0..1: F2 of character n-grams up to 6, by sacrebleu."""
    from sacrebleu.metrics import CHRF

    predictions, lists = check_pairs(predictions, references)
    most = max(map(len, lists))
    streams = [[texts[place] if place < len(texts) else None for texts in lists] for place in range(most)]
    return CHRF().corpus_score(predictions, streams).score / 100  # type: ignore[arg-type]


def is_valid_python(text: str) -> bool:
    """Whether Python's parser takes the text (nothing is run); a text over LONGEST_PYTHON characters counts as no."""
    if len(text) > LONGEST_PYTHON:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of "\d"
        try:
            ast.parse(text.strip())
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


def is_repeated(text: str) -> bool:
    """Whether the text ends in a unit of up to 32 tokens, at least 4 times in a row, that fills half of it or more."""
    tokens = conala_tokens(text)
    for unit in range(1, min(LONGEST_UNIT, len(tokens) // LEAST_REPEATS) + 1):
        run = unit  # tokens at the end that follow themselves at this distance
        while run < len(tokens) and tokens[-run - 1] == tokens[-run - 1 + unit]:
            run += 1
        if run >= LEAST_REPEATS * unit and 2 * run >= len(tokens):
            return True
    return False


def _share(claims: list[bool]) -> float:
    return sum(claims) / len(claims)
