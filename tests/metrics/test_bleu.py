"""BLEU: equal to sacrebleu and to the official CoNaLa evaluation."""

import json
import math
import random
import re
from collections import Counter

import pytest
from sacrebleu.metrics import BLEU as Sacre

from minipeft import InputError
from minipeft.metrics.bleu import bleu, sentence_bleu
from minipeft.metrics.ngrams import tokenize_13a, tokenize_conala


@pytest.fixture(scope="module")
def pairs(snippets, mutate):
    chance = random.Random(7)
    return [mutate(text, chance) for text in snippets], snippets


SMOOTHINGS = [("none", None), ("exp", None), ("floor", None), ("floor", 0.01), ("add-k", None), ("add-k", 2.0)]


@pytest.mark.parametrize("tokenize", ["13a", "none"])
@pytest.mark.parametrize(("smooth", "value"), SMOOTHINGS)
def test_corpus_and_sentences_score_as_in_sacrebleu(pairs, tokenize, smooth, value):
    predictions, references = pairs
    judge = Sacre(tokenize=tokenize, smooth_method=smooth, smooth_value=value)
    for lists in ([references], [references, references[5:] + references[:5]]):
        given = [list(texts) for texts in zip(*lists)]
        ours = bleu(predictions, given, tokenize=tokenize, smooth=smooth, smooth_value=value)
        theirs = judge.corpus_score(predictions, lists)
        assert ours.score == pytest.approx(theirs.score / 100, abs=1e-9)
        assert ours.brevity_penalty == pytest.approx(theirs.bp)
        assert (ours.length, ours.reference_length) == (theirs.sys_len, theirs.ref_len)
        if smooth != "add-k":
            assert [list(ours.matches), list(ours.totals)] == [theirs.counts, theirs.totals]
    for effective in (True, False):
        judge = Sacre(tokenize=tokenize, smooth_method=smooth, smooth_value=value, effective_order=effective)
        for prediction, reference in zip(predictions[::3], references[::3]):
            ours = sentence_bleu(
                prediction, reference, tokenize=tokenize, smooth=smooth, smooth_value=value, effective_order=effective
            )
            assert ours.score == pytest.approx(judge.sentence_score(prediction, [reference]).score / 100, abs=1e-9)


def test_sacrebleus_defaults_are_ours(pairs):
    predictions, references = pairs
    assert bleu(predictions, references, tokenize="13a").score == pytest.approx(
        Sacre().corpus_score(predictions, [references]).score / 100, abs=1e-9
    )


def test_13a_tokens_are_sacrebleus(pairs):
    judge = Sacre(tokenize="13a")
    texts = [*pairs[0], *pairs[1], "a&quot;b &amp; &lt;skipped&gt; <skipped>", "co-\nop 3-4 1.5, 1,000 .5 5. a.b a,b -"]
    for text in texts:
        assert tokenize_13a(text) == judge._preprocess_segment(text).split()


def official_tokens(code: str) -> list[str]:
    """The rules of the CoNaLa evaluation, one character at a time."""
    spaced = "".join(sign if re.fullmatch("[A-Za-z0-9_]", sign) else f" {sign} " for sign in code)
    split = "".join(
        " " + sign if place and "a" <= spaced[place - 1] <= "z" and "A" <= sign <= "Z" else sign
        for place, sign in enumerate(spaced)
    )
    return [token for token in re.sub(r"\s+", " ", split).translate({34: "`", 39: "`"}).split(" ") if token]


def official_score(predictions: list[str], references: list[str]) -> float:
    """BLEU-4 without smoothing, as in the translation tutorial that the CoNaLa evaluation took it from."""
    matches, possible, length, reference_length = [0] * 4, [0] * 4, 0, 0
    for prediction, reference in zip(predictions, references):
        here, there = official_tokens(prediction), official_tokens(reference)
        length, reference_length = length + len(here), reference_length + len(there)
        for order in range(1, 5):
            grams = [Counter(tuple(t[i : i + order]) for i in range(len(t) - order + 1)) for t in (here, there)]
            matches[order - 1] += (grams[0] & grams[1]).total()
            possible[order - 1] += grams[0].total()
    if not all(matches):
        return 0.0
    mean = math.exp(sum(math.log(m / p) for m, p in zip(matches, possible)) / 4)
    ratio = length / reference_length
    return mean * (1.0 if ratio > 1 else math.exp(1 - 1 / ratio))


def test_the_conala_score_is_the_official_one(pairs, assets):
    lines = (assets / "data/conala/conala-paired-test.json").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    snippets, intents = [row["snippet"] for row in rows], [row["intent"] for row in rows]
    for predictions, references in (pairs, (snippets[1:] + snippets[:1], snippets), (intents, snippets)):
        assert bleu(predictions, references).score == pytest.approx(official_score(predictions, references), abs=1e-12)
    for text in (*pairs[0], *snippets):
        assert tokenize_conala(text) == official_tokens(text)


def test_empty_answers_score_nothing():
    for tokenize in ("conala", "13a", "none"):
        assert bleu(["", " "], ["x = 1", ""], tokenize=tokenize).score == 0
        assert bleu(["", ""], ["", ""], tokenize=tokenize).score == 0
        assert sentence_bleu("", "x", tokenize=tokenize).score == 0


def test_of_several_references_conala_takes_the_shortest():
    assert bleu(["a b"], [["a b c d e", "a"]]).reference_length == 1
    assert bleu(["a b"], [["a b c", "a"]], tokenize="none").reference_length == 1  # as near as 3, and shorter
    assert bleu(["a b"], [["a b c", "a c c c c"]], tokenize="none").reference_length == 3


def test_what_cannot_be_is_named():
    with pytest.raises(InputError, match="no tokenizer is called 'moses'"):
        bleu(["x"], ["x"], tokenize="moses")
    with pytest.raises(InputError, match="no smoothing is called 'nist'"):
        bleu(["x"], ["x"], smooth="nist")
    with pytest.raises(InputError, match="2 predictions but 1 references"):
        bleu(["x", "y"], ["x"])


def test_the_signature_says_what_was_computed():
    assert bleu(["x"], ["x"]).signature == (
        "BLEU-4|scale:0-1|tokenize:conala|smooth:none|effective_order:no|reference_length:shortest|case:kept"
    )
    assert (
        "tokenize:13a|smooth:floor[0.2]"
        in bleu(["x"], ["x"], tokenize="13a", smooth="floor", smooth_value=0.2).signature
    )
