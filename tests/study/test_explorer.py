"""The explorer's masks against the rule spelled out in a loop, and its data in the page."""

import html
import itertools
import json
import re

import pytest

from minipeft.documents import PADDING
from minipeft.study.explorer import SWITCHES, PackedRow, compute_masks, count_leaks, draw_explorer

ROW = PackedRow(["a", "b", "c", "d\n", " e", "."], [0, 0, 0, 1, 1, PADDING], 2, 2)
SETTINGS = list(itertools.product(*(settings for _, settings in SWITCHES.values())))


def sees(setting, q, c):
    """Whether token q sees column c, of which the first two are virtual."""
    packing, prefix, window = setting
    if c < 2:
        return prefix == "prefix"
    c -= 2
    if c > q:
        return False
    if PADDING in (ROW.owners[q], ROW.owners[c]):
        return ROW.owners[q] == ROW.owners[c]
    if packing == "rule" and ROW.owners[q] != ROW.owners[c]:
        return False
    return window == "none" or q - c < 2


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_mask_is_the_rule(setting):
    mask = compute_masks(ROW)[setting]
    assert mask.tolist() == [[sees(setting, q, c) for c in range(8)] for q in range(6)]
    leaks = sum(sees(setting, q, c + 2) for q in (3, 4) for c in (0, 1, 2))
    assert count_leaks(ROW, mask) == leaks
    assert (leaks > 0) == (setting[0] == "naive")


def test_the_page_holds_the_masks_as_runs():
    losses = {("rule", "none"): 1.25, ("naive", "none"): 2.5}
    drawn, words = draw_explorer(ROW, losses)
    data = json.loads(html.unescape(re.search(r'data-explorer="([^"]*)"', drawn)[1]))
    assert len(data["runs"]) == len(SETTINGS)
    for setting, mask in compute_masks(ROW).items():
        for line, runs in zip(mask.tolist(), data["runs"]["/".join(setting)], strict=True):
            columns = {c for start, end in zip(runs[::2], runs[1::2], strict=True) for c in range(start, end)}
            assert [c in columns for c in range(8)] == line
    assert "1.2500" in drawn
    assert "2.5000" in words
    assert drawn.count('role="option"') == 6
    assert "d↵" in drawn


@pytest.mark.parametrize(
    ("row", "switches"),
    [
        (PackedRow(["a", "b"], [0, 0]), []),
        (PackedRow(["a", "b"], [0, 1]), ["packing"]),
        (PackedRow(["a", "."], [0, PADDING], 2), ["prefix"]),
        (PackedRow(["a", "b"], [0, 1], 0, 4), ["packing", "window"]),
    ],
)
def test_only_the_switches_that_apply_are_drawn(row, switches):
    drawn, _ = draw_explorer(row, {})
    assert re.findall(r'<input type="radio" name="(\w+)" value="\w+" checked>', drawn) == switches
    assert "nats" not in drawn
    assert len(compute_masks(row)) == 2 ** len(switches)


def test_a_window_that_hides_virtual_tokens_hides_them_here():
    rows = [PackedRow(["a"] * 6, [0] * 6, 2, 3, windowed) for windowed in (False, True)]
    kept, hidden = (compute_masks(row)["rule", "prefix", "window"][5, :2].tolist() for row in rows)
    assert kept == [True, True]
    assert hidden == [False, False]


def test_texts_of_the_data_are_escaped():
    drawn, _ = draw_explorer(PackedRow(["</b><script>alert(1)</script>", '"'], [0, 1]), {})
    assert "<script>" not in drawn
    assert "&lt;script&gt;" in drawn
