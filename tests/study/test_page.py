"""report.html: model output is escaped, and the page makes no request."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from minipeft.study.charts import Bar, Curve, draw_bars, draw_losses, escape, smooth, ticks
from minipeft.study.presets import StudyConfig
from minipeft.study.report import write_report
from minipeft.study.results import assemble
from minipeft.study.runner import conduct

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</pre></details>\"' onmouseover=alert(1) x='",
    "\x00\x1b[31m & &lt; \ud800 | a |\n---",
]


class Reader(HTMLParser):
    """All tags with their attributes, and the texts of <pre>."""

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
        if self.open and self.open[-1] == "pre":
            self.answers[-1] += data
        if self.open and self.open[-1] == "script":
            self.script += data


@pytest.fixture
def page(inside, tmp_path, model, pairs) -> str:
    """The page of a study whose tuned model prints hostile text."""
    config = StudyConfig(model=(str(model),), data=str(pairs), method=("prompt",), settings={"steps": 1})
    out = tmp_path / "s"
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
    assert len(folded) == 4
    assert not any("hidden" in attributes for attributes in folded)
    assert next(at for tag, at in reader.tags if tag == "form")["hidden"] is None  # shown by the script alone
    for part in (
        "echo the question",
        "95 % interval",
        "held-out loss",
        "0.25: an empty answer",
        "prefers-color-scheme",
    ):
        assert part in page
    assert page.count('role="img"') == 3  # scores, one loss, CodeBLEU


def test_escape():
    assert escape("<&>\"'") == "&lt;&amp;&gt;&quot;&#x27;"
    assert escape("a\tb\nc\x07") == "a\tb\nc␇"


def test_bars_stand_where_their_numbers_are():
    drawn = draw_bars([Bar("<a>", 0.25, 0.2, 0.5, "25", "tuned")], "t")
    assert "&lt;a&gt;" in drawn
    width, low, high = (float(x) for x in re.findall(r'(?:width|x1|x2)="([\d.]+)%"', drawn)[1:4])  # after the SVG's own
    assert width / high == pytest.approx(0.5, abs=1e-3)
    assert low / high == pytest.approx(0.4, abs=1e-3)


def test_losses():
    assert draw_losses([]) == ""
    points = [(float(step), 1.0) for step in range(1, 601)]
    assert len(smooth(points)) == 60
    assert draw_losses([Curve("run", points, [(600.0, 2.0)])]).count("<circle") == 1
    assert ticks(0.2, 3.4) == [1.0, 2.0, 3.0]
