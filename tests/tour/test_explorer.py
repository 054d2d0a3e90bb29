"""The explorer's masks against the rule spelled out in a loop, and its data in the page."""

import base64
import html
import itertools
import json
import re

import numpy as np
import pytest

from minipeft.documents import PADDING
from minipeft.tour.explorer import SWITCHES, Row, compute_masks, count_leaks, draw_explorer

ROW = Row(["a", "b", "c", "d\n", " e", "."], [0, 0, 0, 1, 1, PADDING], 2, 2)
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


def test_the_page_holds_the_masks_as_bits():
    losses = {("rule", "none"): 1.25, ("naive", "none"): 2.5}
    drawn = draw_explorer(ROW, losses)
    data = json.loads(html.unescape(re.search(r'data-explorer="([^"]*)"', drawn.html)[1]))
    for setting, mask in compute_masks(ROW).items():
        bits = np.unpackbits(np.frombuffer(base64.b64decode(data["masks"]["/".join(setting)]), np.uint8))
        assert bits[: mask.numel()].reshape(mask.shape).astype(bool).tolist() == mask.tolist()
    assert "1.2500" in drawn.html
    assert "2.5000" in drawn.words
    assert drawn.html.count('role="option"') == 6
    assert "d↵" in drawn.html
