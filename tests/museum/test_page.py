"""docs/museum.md is what write_page.py makes of its rows: each row is checked by its own test, the rest here."""

import re
from collections import Counter

from tests.museum.exhibits import CLUSTERS, FOLDER, PAGE, read_labels
from tests.museum.write_page import render_page

ROW = re.compile(r"^\| \[.*\| ([\w* ]+) \| ([\w*: ,]+) \|$", re.MULTILINE)


def outcomes_of(ours: str, theirs: str) -> tuple[str, dict[str, str]]:
    """The outcomes that a row shows."""
    plain = lambda text: text.replace("*", "")
    peers = {} if theirs == "not run" else dict(plain(part).split(": ") for part in theirs.split(", "))
    return plain(ours), peers


def test_the_page_is_made_of_its_rows():
    labels, page = read_labels(), PAGE.read_text(encoding="utf-8")
    rows = ROW.findall(page)
    assert len(rows) == len(labels), "run tests/museum/write_page.py"
    outcomes = {label.test: outcomes_of(*row) for label, row in zip(labels, rows)}
    assert render_page(labels, outcomes) == page, "run tests/museum/write_page.py"


def test_every_exhibit_has_its_place():
    files = {path.stem.removeprefix("test_") for path in FOLDER.glob("test_*.py")} - {"page"}
    assert files == set(CLUSTERS)
    labels = read_labels()
    assert len({label.test for label in labels}) == len(labels), "two tests of one name share a row"


def test_minipeft_is_never_wrong():
    """Right, refused by name, or not offered."""
    assert {ours for ours, _ in ROW.findall(PAGE.read_text(encoding="utf-8"))} <= {"right", "refused", "not offered"}


def test_the_readme_counts_them():
    found = Counter(ours for ours, _ in ROW.findall(PAGE.read_text(encoding="utf-8")))
    said = " ".join((FOLDER.parents[1] / "README.md").read_text(encoding="utf-8").split())
    assert f"{found.total()} failures that users of the field reported" in said
    rest = f" and does not offer {found['not offered']}" if found["not offered"] else ""
    counts = f"right in {found['right']} and refuses {found['refused']} by name{rest}"
    assert counts in said


def test_the_museum_is_wide():
    threads = {thread for label in read_labels() for thread in label.threads}
    assert len(read_labels()) >= 45
    assert len({thread.split("#")[0] for thread in threads}) >= 12
