"""Write docs/museum.md from a run of the museum's tests: `.venv/bin/python tests/museum/write_page.py`.

With `--show` the page is printed and not written.
"""

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.museum.exhibits import CLUSTERS, FOLDER, PAGE, WRITER, Label, mark, peer_versions, read_labels, render_row

Outcome = tuple[str, dict[str, str]]  # ours, and that of each peer

HEAD = """# A museum of public failures

Each row is a failure that users of the fine-tuning stack reported in a public thread, most of them silent. A test in
`tests/museum/` reproduces it in a few lines, runs minipeft on it, and runs an installed peer where that can show it on
a CPU. `tests/museum/write_page.py` writes this page from the outcomes of these tests, and each test fails if its row
here says anything else. The peers are those of `constraints.txt`: {versions}.

| outcome | means |
|---|---|
| right | the result is what the user asked for |
| refused | an error names the cause, before anything is changed |
| fails | an error that does not name the cause |
| **warned** | the result is wrong, and a warning was given |
| **wrong** | the result is wrong, silently |
| **costs** | the result is right, but costs the memory or time that the thread reports |
| not offered | minipeft has no such feature; an error says so |
| not run | no installed peer can show it on a CPU |

The peer of a row is not always the software of its thread: vLLM, unsloth, axolotl and others cannot run here, and
transformers or PEFT shows the same failure instead. A peer that is right today often fixed what the thread reported.

{ours}

{counts}
"""


class Collector:
    """Keeps the outcomes of a pytest run."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Outcome] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == "museum" and report.when == "teardown":
                test, ours, peers = value
                self.outcomes[test] = (ours, peers)


def render_head(outcomes: list[Outcome]) -> str:
    """The page's text before the tables."""
    peers = peer_versions()
    counts = []
    for peer in peers:
        found = Counter(theirs[peer] for _, theirs in outcomes if peer in theirs)
        counts.append(f"{peer} in {found.total()} rows: {listed(found)}.")
    versions = ", ".join(f"{name} {version}" for name, version in peers.items())
    ours = Counter(ours for ours, _ in outcomes)
    held = f"minipeft in {ours.total()} rows: {listed(ours)}."
    return HEAD.format(versions=versions, counts="\n\n".join(counts), ours=held)


def listed(found: Counter[str]) -> str:
    """Outcomes with their counts."""
    return ", ".join(f"{count} {outcome}" for outcome, count in found.most_common())


def render_page(labels: list[Label], outcomes: dict[str, Outcome]) -> str:
    """The whole page."""
    parts = [render_head([outcomes[label.test] for label in labels])]
    for cluster, title in CLUSTERS.items():
        parts += [f"## {title}", "", "| thread | symptom | minipeft | peers |", "|---|---|---|---|"]
        parts += [render_row(label, *outcomes[label.test]) for label in labels if label.cluster == cluster]
        parts.append("")
    return "\n".join(parts)


def main() -> int:
    """Run the tests and write the page."""
    collector = Collector()
    arguments = [str(FOLDER), "-q", "-p", "no:randomly", "-n", "0", *(a for a in sys.argv[1:] if a != "--show")]
    code = pytest.main(arguments, plugins=[Named(collector)])
    for test, (ours, peers) in collector.outcomes.items():
        print(f"{mark(ours):<12} {peers} {test}")
    if "--show" in sys.argv:
        return int(code)
    labels = read_labels()
    missing = [label.test for label in labels if label.test not in collector.outcomes]
    if code or missing:
        print(f"not written: {missing}")
        return 1
    PAGE.write_text(render_page(labels, collector.outcomes), encoding="utf-8")
    return 0


class Named:
    """Registers the collector under the name that the tests look for."""

    def __init__(self, collector: Collector):
        self.collector = collector

    def pytest_configure(self, config: pytest.Config) -> None:
        config.pluginmanager.register(self.collector, WRITER)


if __name__ == "__main__":
    raise SystemExit(main())
