"""Why an empty answer scores CodeBLEU 0.25: the parts of the score, on the pairs below or on your own file.

    python examples/why_codebleu_says_025.py [conala-paired-test.json]

The file holds one JSON object a line, with "intent" and "snippet", as CoNaLa does.
"""

import json
import sys
from pathlib import Path

from minipeft.metrics.bleu import bleu
from minipeft.metrics.codebleu import codebleu

PAIRS = [
    ("sort the list `words` by length", "words.sort(key=len)"),
    ("read the file `path` into a string `text`", "with open(path) as file:\n    text = file.read()"),
    ("count how often each word of `words` occurs", "counts = Counter(words)\ncounts.most_common()"),
    ("join the names in `names` with a comma", "', '.join(names)"),
    ("get the largest value of dictionary `d`", "best = max(d.values())\nprint(best)"),
    ("sum the squares of `numbers`", "total = sum(n * n for n in numbers)"),
    ("remove all blanks from the string `s`", "s = s.replace(' ', '')"),
    ("swap the variables `a` and `b`", "a, b = b, a"),
    ("print each line of `lines` with its number", "for i, line in enumerate(lines):\n    print(i, line)"),
    ("make a list of the keys of `d` whose value is None", "keys = [k for k, v in d.items() if v is None]"),
    ("stop the program with exit status 1", "sys.exit(1)"),
    ("reverse the list `items` in place", "items.reverse()"),
]

WHAT = """
CodeBLEU is the mean of four parts: n-grams of words, n-grams with keywords weighted more, subtrees of the syntax tree,
and data flow (which value comes from which variable). An answer with nothing in common with its reference has 0 in all.

The codebleu package, which many papers use, computes the last quarter as

    theta * (dataflow_match_score or 1)

This was meant for references without data flow, such as `pass`, which no answer can miss. But in Python `0 or 1` is 1.
So an answer that matches NONE of the data flow gets ALL of that quarter: 0.25 for empty answers, for end-of-text
tokens, for a model that repeats `!!!!`. This value is not a match but the weight theta.
"""

THEN = """
Read the rows from the top: empty answers score above answers that share real variables with their reference, because a
small match is a small value while no match at all counts as 1. minipeft's score is the strict one: no match is 0, and
if no reference has any data flow, that part is None and the other three share its weight. The package's score is shown
beside it as `compat`, for comparison with published tables. If the two differ, trust the strict one.
"""


def answers(intents: list[str], snippets: list[str]) -> dict[str, list[str]]:
    """Systems that answer nothing, noise, or the reference itself."""
    same = lambda text: [text] * len(snippets)
    return {
        "nothing at all": same(""),
        "<|endoftext|>": same("<|endoftext|>"),
        "!!!!!!!!": same("!" * 64),
        "print(x)": same("print(x)"),
        "the question, echoed": intents,
        "the others' references": snippets[1:] + snippets[:1],
        "the reference itself": snippets,
    }


def main() -> None:
    pairs = PAIRS
    if len(sys.argv) > 1:
        rows = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
        pairs = [(row.get("rewritten_intent") or row["intent"], row["snippet"]) for row in rows]
    intents, snippets = [intent for intent, _ in pairs], [snippet for _, snippet in pairs]
    print(WHAT)
    print(f"{len(pairs)} answers             ngram weighted  syntax    flow    compat  strict    BLEU")
    for name, predictions in answers(intents, snippets).items():
        package, ours = codebleu(predictions, snippets, mode="compat"), codebleu(predictions, snippets)
        parts = [package.ngram, package.weighted_ngram, package.syntax, package.dataflow or 0.0]
        scores = [package.score, ours.score, bleu(predictions, snippets).score]
        print(f"{name:22}", *(f"{part:7.3f}" for part in parts), " ", *(f"{score:7.3f}" for score in scores))
    print(THEN)
    print(ours.signature)


if __name__ == "__main__":
    main()
