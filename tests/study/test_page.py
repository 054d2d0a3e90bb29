"""report.html: model output is escaped, and the page makes no request."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from minipeft.metrics.scores import score_texts
from minipeft.study.browser import mark_difference
from minipeft.study.charts import Bar, choose_log_ticks, choose_ticks, draw_bars, draw_intervals, escape, shorten_number
from minipeft.study.curves import Curve, Point, draw_cost, draw_losses, smooth
from minipeft.study.page import draw_costs
from minipeft.study.presets import StudyConfig
from minipeft.study.ranking import MEANING
from minipeft.study.report import MOST_SHOWN, choose_shown, write_report
from minipeft.study.results import assemble
from minipeft.study.rows import Data, Group, Results, Row, Training
from minipeft.study.runner import conduct
from tests.study.inside import patch

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</pre></details>\"' onmouseover=alert(1) x='",
    "\x00\x1b[31m & &lt; \ud800 | a |\n---",
]


class Reader(HTMLParser):
    """All tags with their attributes, and the texts of <pre>, without what is marked as lacking."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.answers: list[str] = []
        self.open: list[str] = []
        self.script = ""

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)
        if tag == "pre":
            self.answers.append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "pre" in self.open and "del" not in self.open:
            self.answers[-1] += data
        if self.open and self.open[-1] == "script":
            self.script += data


def test_of_many_cells_the_page_shows_the_first_seed():
    answered = lambda cell, seed: Row(cell, "m", "lora", seed, scores=score_texts(["x"], ["x"]))
    rows = tuple(answered(f"lora-{seed}", seed) for seed in range(MOST_SHOWN + 1))
    silent = Row("search", "m", "lora", variant="@0.1")
    group = Group("m", "lora", tuple(range(len(rows))), tuple(row.cell for row in rows))
    made = lambda rows: Results("", "rates", Data("", 1, 1, "", ""), {}, (*rows, silent), (group,))
    assert choose_shown(made(rows)) == {"lora-0"}
    assert choose_shown(made(rows[:-1])) == {row.cell for row in rows[:-1]}


@pytest.fixture(scope="module")
def page(tmp_path_factory, model, pairs) -> str:
    """The page of a study whose tuned model prints hostile text."""
    config = StudyConfig(model=(str(model),), data=str(pairs), method=("prompt",), settings={"steps": 1})
    out = tmp_path_factory.mktemp("page") / "s"
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch(monkeypatch.setattr)
        outcomes = conduct(config, out, say=lambda line: None)
    file = out / "cells" / "stories260K--prompt--seed0" / "predictions.jsonl"
    rows = [json.loads(line) | {"prediction": bad} for line, bad in zip(file.read_text().splitlines(), HOSTILE)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(assemble(outcomes, config, out, "minipeft study '</code><b>'"), out)
    return (out / "report.html").read_text()


def test_the_page(page):
    reader = Reader()
    reader.feed(page)
    names = [tag for tag, _ in reader.tags]
    assert names.count("script") == 1
    assert not {"img", "link", "iframe", "object", "base", "b>"} & set(names)
    asking = {"src", "href", "srcset", "action", "data", "poster", "xlink:href"}
    assert not [at for _, attributes in reader.tags for at in attributes if at in asking or at.startswith("on")]
    assert not re.findall(r"@import|url\((?!#)|https?:", page)
    for bad in HOSTILE[:3]:
        assert bad in reader.answers
    assert any("␀␛[31m & &lt; \\ud800" in answer for answer in reader.answers)
    digest = base64.b64encode(hashlib.sha256(reader.script.encode()).digest()).decode()
    policy = next(at["content"] for tag, at in reader.tags if at.get("http-equiv") == "Content-Security-Policy")
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert "fetch(" not in reader.script


def test_it_can_be_read_without_script_and_holds_all_parts(page):
    reader = Reader()
    reader.feed(page)
    folded = [attributes for tag, attributes in reader.tags if tag == "details"]
    assert len([attributes for attributes in folded if "data-marks" in attributes]) == 4
    assert not any("hidden" in attributes for attributes in folded)
    assert next(at for tag, at in reader.tags if tag == "form")["hidden"] is None  # shown by the script alone
    for part in (
        "echo the question",
        "95 % interval",
        "held-out loss",
        "the codebleu package&#x27;s score of an empty answer, 0.25",
        "BLEU of all rows",
        "prefers-color-scheme",
    ):
        assert part in page
    assert page.count('role="img"') == 1  # one loss
    assert page.count('role="list"') == 3  # effects, BLEU, CodeBLEU
    kinds = ["Tuned", "Untrained model", "Baselines without a model"]
    assert re.findall(r'scope="rowgroup"[^>]*>([^<]+)', page)[:3] == kinds


def test_the_page_opens_with_what_won_and_has_the_meaning_of_each_column(page):
    verdict = re.search(r'<p class="verdict">([^<]+)</p>', page)[1]
    assert "prompt" in verdict
    assert "GB" in verdict
    tables, _, ranking = page.partition("<h2>Ranking</h2>")
    assert escape(MEANING) in ranking
    columns = re.findall(r'<th scope="col">([^<]+)</th>', tables)
    meanings = [
        name for part in re.findall(r'<ul class="meanings">(.*?)</ul>', page) for name in re.findall("<b>([^<]+)", part)
    ]
    assert meanings == columns
    assert columns[:2] == ["BLEU", "effect"]
    assert "trained" in columns[2:6]


def test_escape():
    assert escape("<&>\"'") == "&lt;&amp;&gt;&quot;&#x27;"
    assert escape("a\tb\nc\x07") == "a\tb\nc␇"


def test_bars_stand_where_their_numbers_are():
    drawn = draw_bars([Bar("<a>", 0.25, 0.2, 0.5, "25", "tuned")], "t")
    assert "&lt;a&gt;" in drawn
    width, low, high = (float(x) for x in re.findall(r'(?:width|x1|x2)="([\d.]+)%"', drawn[drawn.index("<rect") :])[:3])
    assert width / high == pytest.approx(0.5, abs=1e-3)
    assert low / high == pytest.approx(0.4, abs=1e-3)


def test_intervals_stand_on_both_sides_of_zero():
    rows = [Bar("a", -10.0, -20.0, 0.0, "", "tuned"), Bar("b", 30.0, 20.0, 40.0, "", "tuned")]
    drawn = draw_intervals(rows, "t", "unit")
    zero = float(re.search(r'x1="([\d.]+)%"[^>]*class="zero"', drawn)[1])
    ends = [(float(a), float(b)) for a, b in re.findall(r'x1="([\d.]+)%" x2="([\d.]+)%" y1="13"', drawn)]
    assert ends[0][1] == pytest.approx(zero, abs=0.02)
    assert (ends[1][1] - zero) / (zero - ends[0][0]) == pytest.approx(2.0, abs=0.01)
    assert "+20" in drawn
    assert "unit" in drawn


def test_costs_stand_where_their_numbers_are():
    points = [Point("a", 100.0, 50.0, 40.0, 60.0, 0), Point("b", 10_000.0, 90.0, 80.0, 100.0, 1)]
    drawn = draw_cost(points, "x", "things", 30.0)
    assert "logarithmic" in drawn
    assert "1k" in drawn
    left, right = (float(x) for x in re.findall(r'<svg x="([\d.]+)%"', drawn))
    middle = float(re.search(r'<text x="([\d.]+)%"[^>]*>1k<', drawn)[1])
    assert (left + right) / 2 == pytest.approx(middle, abs=0.02)
    assert "logarithmic" not in draw_cost([points[0]], "x", "things", None)


def test_quality_over_cost_has_a_plot_for_each_cost_and_one_marker_a_method():
    scores = score_texts(["x = f(y)"], ["x = f(y)"])
    cost = Training(trainable=10, train_seconds=3.0, peak_memory_bytes=1e9)
    groups = [Group("m", method, training=cost, scores=scores) for method in ("lora", "full")]
    drawn = draw_costs([*groups, Group("", "empty answer", scores=scores), Group("m", "zero-shot", scores=scores)])
    assert drawn.count('role="img"') == 3
    assert drawn.count('class="m0"') == drawn.count('class="m1"') == 4  # and in the legend
    assert drawn.count('class="mark"') == 3
    assert draw_costs(groups[:1]) == ""


def test_the_difference_to_the_reference_is_marked():
    assert mark_difference("a.b(1)", "a.b(1)") == "a.b(1)"
    assert mark_difference("a.c(1)", "a.b(1)") == "a.<del>b</del><ins>c</ins>(1)"
    assert mark_difference("a.b(<1)", "a.b(1)") == "a.b(<ins>&lt;</ins>1)"
    assert mark_difference("nothing alike", "a.b(1)") == "nothing alike"
    answer, reference = "x = f(y, 2)  # é\nz", "x = g(y)\nz"
    marked = mark_difference(answer, reference)
    assert re.sub(r"<del>.*?</del>|</?ins>", "", marked) == answer
    assert re.sub(r"<ins>.*?</ins>|</?del>", "", marked) == reference


def test_round_numbers_of_an_axis():
    assert choose_ticks(-18.0, 55.0) == [0.0, 20.0, 40.0]
    assert choose_ticks(-45.0, 55.0) == [-40.0, -20.0, 0.0, 20.0, 40.0]
    assert choose_log_ticks(0.02, 4.0, 5) == pytest.approx([0.03, 0.1, 0.3, 1, 3])
    assert choose_log_ticks(5.6, 7.1) == [6.0, 6.5, 7.0]
    assert [shorten_number(number) for number in (5, 5120, 4e6, 7e9)] == ["5", "5.12k", "4M", "7G"]


def test_losses_of_several_runs_differ_by_marker_and_line():
    points = [(float(step), 1.0) for step in range(1, 11)]
    curves = [Curve(name, points, [(10.0, 2.0)]) for name in "ab"]
    drawn = draw_losses(curves)
    assert {"m0", "m1", "curve s0", "curve s1"} <= set(re.findall(r'class="([^"]+)"', drawn))
    assert drawn.count('role="img"') == 1
    assert draw_losses(curves * 4).count('role="img"') == 8  # too many for one plot


def test_losses():
    assert draw_losses([]) == ""
    points = [(float(step), 1.0) for step in range(1, 601)]
    assert len(smooth(points)) == 60
    assert draw_losses([Curve("run", points, [(600.0, 2.0)])]).count("<circle") == 1
    assert choose_ticks(0.2, 3.4) == [1.0, 2.0, 3.0]
