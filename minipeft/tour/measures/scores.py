"""The numbers of the stops on scores: BLEU by hand, and CodeBLEU's quarter for nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping

from minipeft.metrics.bleu import bleu
from minipeft.metrics.codebleu import codebleu
from minipeft.metrics.ngrams import tokenize_conala
from minipeft.tour.bench import Bench
from minipeft.tour.values import Output, Table, Value, claim


def measure_bleu(bench: Bench) -> Mapping[str, Value]:
    """BLEU of one answer, by hand and by the library."""
    reference = "words.sort(key=len, reverse=True)"
    prediction = "words.sort(key=len)"
    tokens, wanted = tokenize_conala(prediction), tokenize_conala(reference)
    rows, logs = [], []
    for order in (1, 2, 3, 4):
        mine = [tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1)]
        theirs = [tuple(wanted[i : i + order]) for i in range(len(wanted) - order + 1)]
        matches = sum(min(mine.count(gram), theirs.count(gram)) for gram in set(mine))
        rows.append((f"{order}-grams", matches, len(mine), matches / len(mine)))
        logs.append(math.log(matches / len(mine)))
    brevity = min(1.0, math.exp(1 - len(wanted) / len(tokens)))
    score = brevity * math.exp(sum(logs) / 4)
    found = bleu([prediction], [reference])
    claim(abs(found.score - score) < 1e-12, "the score by hand is the library's")
    claim(found.brevity_penalty < min(found.precisions), "brevity costs more than any precision")
    claim(abs(score - 0.5) < 0.05, "the score is close to a half")
    missed = max(total - match for _, match, total, _ in rows)
    return {
        "prediction": prediction,
        "reference": reference,
        "tokens": Output(f"{' '.join(tokens)}\n{' '.join(wanted)}"),
        "table": Table(("order", "matches", "in the answer", "precision"), rows),
        "length": len(tokens),
        "wanted": len(wanted),
        "brevity": brevity,
        "mean": math.exp(sum(logs) / 4),
        "missed": missed,
        "score": score,
        "signature": Output(found.signature),
    }


def measure_codebleu(bench: Bench) -> Mapping[str, Value]:
    """CodeBLEU of useless and useful answers, strict and as the package computes it."""
    references = ["total = sum(n * n for n in numbers)", "best = max(d.values())\nprint(best)", "a, b = b, a"]
    answers = {
        "nothing": [""] * 3,
        "`!!!!`": ["!!!!"] * 3,
        "print(x)": ["print(x)"] * 3,
        "another's reference": references[1:] + references[:1],
        "the reference": references,
    }
    rows, found = [], {}
    for name, predictions in answers.items():
        found[name] = score = codebleu(predictions, references)
        compat = codebleu(predictions, references, mode="compat")
        rows.append((name.strip("`"), compat.ngram, compat.weighted_ngram, compat.syntax, compat.dataflow or 0.0,
                     score.compat, score.score))  # fmt: skip
    nothing = found["nothing"]
    claim(nothing.score == 0 and nothing.compat == 0.25, "an empty answer scores a quarter in the package and 0 here")
    claim(
        found["another's reference"].compat < nothing.compat, "an answer with a shared variable scores less than none"
    )
    return {
        "quarter": nothing.compat,
        "strict": f"{nothing.score:g}",
        "table": Table(("answer", "n-grams", "weighted", "syntax", "data flow", "package", "strict"), rows),
    }
