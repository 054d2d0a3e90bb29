"""The list of all scores with name, function and format, and `score_texts`, which computes them.

    SCORES        one row per score: table, page, report, results.json and `minipeft score` read it
    score_texts   answers -> Scores: the value of each row, and BLEU's bootstrap interval by question

To add a score, write its function and append a row.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from minipeft.errors import InputError, check_items, check_value, format_value
from minipeft.metrics.bleu import LENGTH, REFERENCE_LENGTH, bleu, count_pairs, score_counts
from minipeft.metrics.bootstrap import bootstrap_bleu, sum_by_question
from minipeft.metrics.codebleu import CodeBLEU, codebleu
from minipeft.metrics.execution import count_trials, pass_at_k
from minipeft.metrics.ngrams import check_pairs
from minipeft.metrics.text import bleu_13a, chrf, find_language, is_exact, is_repeated, is_valid_python

LANGUAGES = ("python", "text")
TEXT_ONLY = "text: most references are not Python, so there is no CodeBLEU and no validity"
ARTEFACT = 0.005  # difference of the two CodeBLEU totals above which it is flagged
TEMPLATE_PARTS = ("### Instruction", "### Response")  # parts of the template: an answer with one began a new task


@dataclass(frozen=True)
class Answers:
    """The answers to score; values that several scores share are computed once, on first use."""

    predictions: Sequence[str]
    references: Sequence[Sequence[str]]  # of each prediction
    hit_limit: Sequence[bool] | None = None  # whether generation cut the answer off; None: unknown
    passed: Sequence[bool] | None = None  # whether it passed its tests; None: not run
    questions: Sequence[Hashable] = ()  # of each prediction

    @cached_property
    def counts(self) -> np.ndarray:
        """BLEU counts of each pair. [N, 10]"""
        return count_pairs(self.predictions, self.references)

    @cached_property
    def bleu(self) -> float:
        return float(score_counts(self.counts.sum(axis=0, keepdims=True))[0][0])

    @property
    def length_ratio(self) -> float | None:
        """Tokens of all predictions over tokens of all references; None if the references are empty."""
        sums = self.counts.sum(axis=0)  # [10]
        return float(sums[LENGTH] / sums[REFERENCE_LENGTH]) if sums[REFERENCE_LENGTH] else None

    @cached_property
    def code(self) -> CodeBLEU:
        return codebleu(self.predictions, self.references)

    def passing(self, k: int) -> float | None:
        """pass@k; None where the answers were not run, or are fewer than k to some question."""
        return None if self.passed is None else pass_at_k(count_trials(self.passed, self.questions), k)

    def count(self, claim: Callable[[str], bool]) -> int:
        """The number of answers for which `claim` is true."""
        return sum(map(claim, self.predictions))

    def share(self, claim: Callable[[str], bool]) -> float:
        return self.count(claim) / len(self.predictions)


@dataclass(frozen=True)
class Score:
    """One score. Shown values are `scale` times the value; a value of None is not shown."""

    name: str  # in results.json and `score --json`
    label: str  # in tables
    meaning: str
    compute: Callable[[Answers], float | None]
    format: str = "{:.3f}"  # in tables
    scale: float = 1.0
    counts: bool = False  # the value counts answers; tables show its share of them, and leave 0 empty
    higher_is_better: bool | None = None  # None: neither is
    table: str = "scores"  # the page's table that shows it: scores, answers; "": none
    rank: int = 0  # in the terminal's table, which shows the smallest ranks that fit; 0: never
    heading: str = ""  # its line in `minipeft score`; "": a separate line under its label
    text: str = ""  # there; may name value, count, pairs, low and high ("": `format`)
    absent: str = ""  # there, where the value is None
    language: str = ""  # of the references that it means something for: python, text; "": any
    each: Callable[[Answers], Sequence[float] | None] | None = None  # of each answer; the value is their mean

    def compute_for(self, answers: "Answers", language: str) -> float | None:
        """The value; None where the references are in another language than the score is for."""
        return self.compute(answers) if self.language in ("", language) else None

    def show(self, value: float | None, pairs: int | None = None) -> str:
        """The value as a table shows it."""
        if value is None or (self.counts and not value):
            return ""
        return self.format.format(self.scale * value / (pairs or 1) if self.counts else self.scale * value)


SCORES: list[Score] = [
    Score("bleu", "BLEU", "corpus BLEU-4 on CoNaLa tokens, 0 to 100", lambda a: a.bleu, "{:.1f}", 100,
          higher_is_better=True, rank=1, text="{value:.1f} [{low:.1f}, {high:.1f}] of 100 (95 % bootstrap)"),
    Score("codebleu", "CodeBLEU", "strict: a part without a match counts 0", lambda a: a.code.score,
          higher_is_better=True, rank=4, heading="CodeBLEU", text="{value:.4f} strict", language="python"),
    Score("codebleu_compat", "as the package", "CodeBLEU as the codebleu package computes it: a data-flow match of 0 "
          "counts as 1", lambda a: a.code.compat, heading="CodeBLEU",
          text="{value:.4f} as the codebleu package counts", language="python"),
    Score("ngram", "n-gram", "CodeBLEU's n-gram match", lambda a: a.code.ngram, higher_is_better=True, table="",
          heading="  its parts", text="n-gram {value:.4f}", language="python"),
    Score("weighted_ngram", "weighted n-gram", "CodeBLEU's n-gram match with keywords weighted 5",
          lambda a: a.code.weighted_ngram, higher_is_better=True, table="", heading="  its parts",
          text="weighted {value:.4f}", language="python"),
    Score("syntax", "syntax", "CodeBLEU's syntax-tree match", lambda a: a.code.syntax, higher_is_better=True, table="",
          heading="  its parts", text="syntax {value:.4f}", language="python"),
    Score("dataflow", "data flow", "CodeBLEU's data-flow match; none where no reference has data flow",
          lambda a: a.code.dataflow, higher_is_better=True, table="", heading="  its parts",
          text="data flow {value:.4f}",
          absent="data flow none in the references", language="python"),
    Score("pass_at_1", "passes", "pass@1: answers that pass their tests when they are run", lambda a: a.passing(1),
          "{:.1f} %", 100, higher_is_better=True, rank=3, heading="execution", text="pass@1 {value:.1f} %",
          each=lambda a: a.passed),
    Score("pass_at_10", "pass@10", "unbiased chance that one of 10 answers passes", lambda a: a.passing(10), "{:.1f} %",
          100, higher_is_better=True, heading="execution", text="pass@10 {value:.1f} %"),
    Score("pass_at_100", "pass@100", "unbiased chance that one of 100 answers passes", lambda a: a.passing(100),
          "{:.1f} %", 100, higher_is_better=True, heading="execution", text="pass@100 {value:.1f} %"),
    Score("exact_match", "exact", "exact match: the CoNaLa tokens equal a reference's",
          lambda a: sum(map(is_exact, a.predictions, a.references)) / len(a.predictions), "{:.1f} %", 100,
          higher_is_better=True, rank=5, heading="exact match", text="{count:.0f} of {pairs}",
          each=lambda a: list(map(is_exact, a.predictions, a.references))),
    Score("bleu_13a", "BLEU 13a", "corpus BLEU-4 of text that is not Python, 0 to 100, with sacrebleu's defaults",
          lambda a: bleu_13a(a.predictions, a.references), "{:.1f}", 100, higher_is_better=True, rank=4,
          heading="BLEU 13a", text="{value:.1f} of 100 (sacrebleu)", language="text"),
    Score("chrf", "chrF", "character n-gram F-score, 0 to 100", lambda a: chrf(a.predictions, a.references), "{:.1f}",
          100, higher_is_better=True, rank=10),
    Score("valid_python", "valid", "answers that Python's parser accepts", lambda a: a.share(is_valid_python),
          "{:.0f} %", 100, higher_is_better=True, rank=11, heading="valid Python", text="{count:.0f} of {pairs}",
          language="python", each=lambda a: list(map(is_valid_python, a.predictions))),
    Score("length_ratio", "length", "tokens of all answers over tokens of all references",
          lambda a: a.length_ratio, "{:.2f}",
          table="answers", heading="length", text="{value:.2f} times the references' tokens"),
    Score("empty", "empty", "empty answers", lambda a: a.count(lambda text: not text.strip()), "{:.0f} %", 100,
          counts=True, higher_is_better=False, table="answers", heading="degenerate", text="{value:.0f} empty"),
    Score("repeated", "repeated", "answers that repeat themselves", lambda a: a.count(is_repeated), "{:.0f} %", 100,
          counts=True, higher_is_better=False, table="answers", heading="degenerate",
          text="{value:.0f} repeat themselves"),
    Score("hit_limit", "cut off", "answers cut off at the token limit",
          lambda a: None if a.hit_limit is None else sum(map(bool, a.hit_limit)), "{:.0f} %", 100, counts=True,
          higher_is_better=False, table="answers", heading="degenerate", text="{value:.0f} cut off"),
    Score("leaked", "template", "answers that contain the prompt template",
          lambda a: a.count(lambda text: any(part in text for part in TEMPLATE_PARTS)), "{:.0f} %", 100, counts=True,
          higher_is_better=False, table="answers", heading="degenerate", text="{value:.0f} with the template"),
    Score("distinct", "distinct", "different answers", lambda a: len(set(a.predictions)), "{:.0f} %", 100, counts=True,
          table="", heading="distinct", text="{value:.0f} of {pairs}"),
]  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """The scores of one run's answers, or the mean over runs: a value for each row of SCORES, in 0..1 except counts."""

    pairs: int
    values: Mapping[str, float | None]
    bleu_interval: tuple[float, float]  # 95 %, by question
    signatures: tuple[str, ...]
    runs: tuple[np.ndarray, ...] = field(
        compare=False, repr=False
    )  # of each run BLEU counts by question, int64 [Q, 10]
    language: str = "python"  # of the references: python, or text, which has no CodeBLEU and no validity

    def __getitem__(self, name: str) -> float | None:
        return self.values[name]

    @property
    def questions(self) -> int:
        return len(self.runs[0])

    @staticmethod
    def mean(several: Sequence["Scores"]) -> "Scores":
        """Average the scores of several runs on the same questions, with one interval for the mean BLEU."""
        if len(several) == 1:
            return several[0]
        values = {}
        for name in several[0].values:
            known = [value for scores in several if (value := scores[name]) is not None]
            values[name] = float(np.mean(known)) if known else None
        runs = tuple(run for scores in several for run in scores.runs)
        interval = bootstrap_bleu(runs)
        return replace(several[0], values=values, bleu_interval=(interval.low, interval.high), runs=runs)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Scores":
        """Read the scores from the entries of `as_dict` and "bleu_counts", which holds `runs`.

        Raises: InputError if an entry is missing or not a number.
        """
        added = ("bleu_13a", "pass_at_1", "pass_at_10", "pass_at_100")  # rows written before 0.1 lack them
        names = [score.name for score in SCORES]
        for name in ("pairs", "bleu_interval", "signatures", "bleu_counts", *names):
            if name not in data and name not in added:
                raise InputError(f"field {name!r} is missing")
        values = {name: data.get(name) for name in names}
        for name, value in values.items():
            check_value(value, float | None, {}, name)
        language = data.get("language", "python")  # earlier rows had no other
        check_value(language, str, {"choices": LANGUAGES}, "language")
        kinds = {"pairs": int, "bleu_interval": tuple[float, ...], "signatures": tuple[str, ...]}
        given: dict[str, Any] = {
            name: tuple(data[name]) if isinstance(data[name], list) else data[name] for name in kinds
        }
        for name, kind in kinds.items():
            check_value(given[name], kind, {}, name)
        ends = given["bleu_interval"]
        if len(ends) != 2:
            raise InputError(f"{ends} must be two numbers", where="bleu_interval")
        try:
            runs = tuple(np.array(run, dtype=np.int64).reshape(-1, 10) for run in data["bleu_counts"])
        except (ValueError, TypeError) as error:
            raise InputError("must hold runs of 10 counts a question", where="bleu_counts") from error
        return Scores(given["pairs"], values, ends, given["signatures"], runs, language)

    def as_dict(self) -> dict[str, object]:
        """The scores as plain values for JSON."""
        return {
            "pairs": self.pairs,
            "questions": self.questions,
            **self.values,
            "bleu_interval": list(self.bleu_interval),
            "signatures": list(self.signatures),
            "language": self.language,
        }


def score_texts(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    questions: Sequence[Hashable] | None = None,
    hit_limit: Sequence[bool] | None = None,
    language: str = "auto",
    passed: Sequence[bool] | None = None,
) -> Scores:
    """Compute every score of SCORES.

    `questions`: each pair's question_id, by which the bootstrap draws (None: every pair is a question of its own).
    `hit_limit`: whether generation cut the answer off. `language`: of the references, python or text; auto finds it.
    `passed`: whether each answer passed its tests (execution.py); None: they were not run.
    Raises: InputError where the pairs cannot be scored.
    """
    predictions, lists = check_pairs(predictions, references)
    for name, given in (("questions", questions), ("hit_limit", hit_limit)):
        if given is not None:
            check_items(given, object, name, "value")
    if hit_limit is not None and len(hit_limit) != len(predictions):
        raise InputError(f"{len(hit_limit)} flags for {len(predictions)} predictions", where="hit_limit")
    keys = [None] * len(predictions) if questions is None else list(questions)
    if len(keys) != len(predictions):
        raise InputError(f"{len(keys)} for {len(predictions)} predictions", where="questions")
    for key in keys:
        if not isinstance(key, str | int | float | None):
            raise InputError(f"{format_value(key)} must be text or a number", where="questions")
    answers = Answers(predictions, lists, hit_limit, passed, keys)
    check_value(language, str, {"choices": ("auto", *LANGUAGES)}, "language")
    language = find_language(lists) if language == "auto" else language
    values = {score.name: score.compute_for(answers, language) for score in SCORES}
    counts = sum_by_question(answers.counts, keys)
    interval = bootstrap_bleu([counts])
    code = (answers.code.signature,) if language == "python" else ()
    signatures = (bleu(predictions[:1], lists[:1]).signature, *code)
    return Scores(len(predictions), values, (interval.low, interval.high), signatures, (counts,), language)


def add_passes(scores: Scores, passed: Sequence[bool], questions: Sequence[Hashable]) -> Scores:
    """The scores with pass@k of the same answers, which were run after they were scored."""
    trials = count_trials(passed, questions)
    return replace(scores, values={**scores.values, **{f"pass_at_{k}": pass_at_k(trials, k) for k in (1, 10, 100)}})


def as_text(scores: Scores) -> str:
    """Format the scores as lines for a terminal, with a warning if CodeBLEU's two totals differ."""
    lines = {"pairs": [f"{scores.pairs}"]}
    if scores.questions < scores.pairs:
        lines["questions"] = [f"{scores.questions}"]
    if scores.language == "text":
        lines["references"] = [TEXT_ONLY]
    low, high = (100 * end for end in scores.bleu_interval)
    for score in SCORES:
        value, line = scores.values.get(score.name), lines.setdefault(score.heading or score.label, [])
        if value is None:
            line += [score.absent] if score.absent and score.language in ("", scores.language) else []
            continue
        said = score.text or score.format.replace("{:", "{value:")
        filled = said.format(
            value=value * (1 if score.counts else score.scale),
            count=value * scores.pairs,
            pairs=scores.pairs,
            low=low,
            high=high,
        )
        line.append(filled)
    table = [f"{heading:<14} {', '.join(parts)}" for heading, parts in lines.items() if parts]
    return "\n".join([*table, *scores.signatures, *list_warnings(scores.values)])


def list_warnings(values: Mapping[str, float | None]) -> list[str]:
    """Warn if CodeBLEU's two totals differ."""
    gap = (values.get("codebleu_compat") or 0) - (values.get("codebleu") or 0)
    if abs(gap) <= ARTEFACT:
        return []
    return [
        "warning: the two CodeBLEU totals differ: the package counts a data-flow match of 0 as 1, so that empty "
        "answers score 0.25"
    ]
