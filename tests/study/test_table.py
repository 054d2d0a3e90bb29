"""The table of a study: columns from the list of scores, names of groups, and a terminal of 80 columns."""

from dataclasses import replace

import numpy as np

from minipeft.metrics import scores
from minipeft.metrics.bootstrap import Interval
from minipeft.metrics.scores import Score, score_texts
from minipeft.study.rows import Group, Training
from minipeft.study.table import (
    as_markdown,
    as_text,
    choose_columns,
    choose_main_columns,
    format_duration,
    list_columns,
    name_groups,
)

REFERENCES = [f"x = sorted(y{n}, key=f)" for n in range(4)]
TRAINED = Training(init="text", learning_rate=1e-3, steps=5, trainable=10, trainable_percent=1.0, dev_loss=2.0)


def group(method: str, model: str = "m", **changes) -> Group:
    found = Group(model, method, training=TRAINED, scores=score_texts(REFERENCES, REFERENCES), bleu_sd=0.01)
    return replace(found, **changes)


def test_the_terminal_shows_the_columns_that_fit():
    gain = Interval(0.2, 0.1, 0.3)
    groups = [group("zero-shot, first line"), group("lora", difference=gain), group("prompt", error="no space | left")]
    narrow, wide = as_text(groups, 80).splitlines(), as_text(groups, 500).splitlines()
    assert max(map(len, narrow)) <= 80
    assert narrow[0].split()[:3] == ["BLEU", "over", "zero-shot"]
    assert len(wide[0]) > len(narrow[0])
    assert narrow[-1].endswith("failed: no space | left")
    assert "no space \\| left" in as_markdown(groups)


def test_a_score_is_a_column(monkeypatch):
    length = Score("mean_length", "characters", "of an answer", lambda a: float(np.mean([*map(len, a.predictions)])))
    monkeypatch.setattr(scores, "SCORES", [*scores.SCORES, length])
    monkeypatch.setattr("minipeft.study.table.SCORES", scores.SCORES)
    assert "characters" in [column.title for column in list_columns()]
    assert "21.000" in as_markdown([group("lora")])
    assert [column.title for column in choose_columns([group("lora")], "scores")][:2] == ["BLEU", "95 % interval"]


def test_names_say_what_groups_differ_by():
    slow, fast = group("prefix"), group("prefix", training=replace(TRAINED, learning_rate=1e-2, reparam=8))
    text = "(text init, learning rate 0.001, 5 steps)", "(text + MLP init, learning rate 0.01, 5 steps)"
    assert [name.split(" ", 1)[1] for name in name_groups([slow, fast])] == list(text)
    assert name_groups([group("lora"), group("lora", "org/n")]) == ["m LoRA", "n LoRA"]
    assert name_groups([group("echo the question", "")]) == ["echo the question"]


def test_the_main_columns():
    gain = Interval(0.2, 0.1, 0.3)
    done = replace(TRAINED, train_seconds=143.0, peak_memory_bytes=5e8)
    groups = [group("lora", effect=gain, training=done), group("echo the question", "")]
    titles = ["BLEU", "effect", "exact", "trained", "time", "memory"]
    assert [column.title for column in choose_main_columns(groups)] == titles
    shown = [column.show(groups[0]) for column in choose_main_columns(groups)]
    assert shown[:3] == ["100.0 ± 1.0 [100.0, 100.0]", "+20.0 [+10.0, +30.0]", "100.0 %"]
    assert shown[3:] == ["1 %", "2 min 23 s", "0.50 GB"]
    assert [column.value(groups[0]) for column in choose_main_columns(groups)] == [1.0, 0.2, 1.0, 1.0, 143.0, 5e8]
    silent = [*groups, group("prefix", scores=None)]
    assert [column.title for column in choose_main_columns(silent)][2] == "held-out loss"
    assert [format_duration(n) for n in (57, 89.4, 91.2, 599, 720)] == [
        "57 s",
        "89 s",
        "1 min 31 s",
        "9 min 59 s",
        "12 min",
    ]
