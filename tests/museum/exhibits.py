"""An exhibit: one public failure, and the outcomes of minipeft and the installed peers in this run.

The docstring of a museum test begins with its threads and the symptom:

    \"\"\"owner/repository#12, owner/other#3: the symptom in a line.\"\"\"

The test itself decides the outcome. Ours is "right" unless `refused` or `not_offered` was entered; a peer's is found in
`theirs`:

    right     what the user asked for              refused    an error names the cause
    warned    wrong, with a warning                wrong      wrong, silently
    fails     an error that does not name the cause
    costs     right, at the cost that the thread tells of
"""

import ast
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import pytest
from safetensors import SafetensorError

import minipeft

CLUSTERS = {
    "no_op": "Adapters that adapt nothing, or a part",
    "loss": "Loss, masks and packing",
    "eos": "Special tokens and generation",
    "training": "Optimizer steps",
    "merge": "Save, load and merge",
    "resume": "Resume and determinism",
    "prefix": "Prefix and prompt",
    "cost": "Memory and speed",
    "scores": "Scores",
    "configs": "Configs that change under a checkpoint",
}
PEERS = ("transformers", "peft", "codebleu")
THREAD = re.compile(r"([\w.-]+/[\w.-]+)#(\d+)")
REFUSALS = (ValueError, TypeError, RuntimeError, IndexError, KeyError, OSError, SafetensorError)  # that peers raise
FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "museum.md"
WRITER = "museum-writer"  # the plugin of write_page.py: while it is there, the page is not compared


@dataclass(frozen=True)
class Label:
    """A museum test's name and docstring, parsed."""

    test: str
    cluster: str
    threads: tuple[str, ...]
    symptom: str


def read_labels() -> list[Label]:
    """The label of each test of the folder, in the order of CLUSTERS and of the files."""
    labels = []
    for cluster in CLUSTERS:
        tree = ast.parse((FOLDER / f"test_{cluster}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                labels.append(label_of(node.name, cluster, ast.get_docstring(node) or ""))
    return labels


def label_of(test: str, cluster: str, docstring: str) -> Label:
    """Split a docstring's first paragraph into threads and symptom."""
    head, separator, symptom = " ".join(docstring.split("\n\n")[0].split()).partition(": ")
    threads = tuple(head.split(", "))
    assert separator, f"{test}: the docstring has no 'thread: symptom'"
    assert all(THREAD.fullmatch(thread) for thread in threads), f"{test}: {head!r} are not threads"
    return Label(test, cluster, threads, symptom)


def peer_versions() -> dict[str, str]:
    """The versions of the peers that the tests run."""
    return {peer: version(peer) for peer in PEERS}


@dataclass
class Peer:
    """A peer's outcome: set `right` to the measurement. `said` holds its warnings."""

    right: bool | None = None
    said: list[str] = field(default_factory=list)


class Listener(logging.Handler):
    """Keeps log records of level WARNING and above."""

    def __init__(self, said: list[str]):
        super().__init__(logging.WARNING)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextmanager
def listening(said: list[str]) -> Iterator[None]:
    """Context manager: keep each warning, raised or logged; transformers' logger does not propagate to the root."""
    listener, library = Listener(said), logging.getLogger("transformers")
    level = library.level
    for logger in (library, logging.getLogger()):
        logger.addHandler(listener)
    library.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        said += [str(entry.message) for entry in caught]
        library.setLevel(level)
        for logger in (library, logging.getLogger()):
            logger.removeHandler(listener)


class Exhibit:
    """Records the outcomes of one test."""

    def __init__(self) -> None:
        self.ours = "right"
        self.peers: dict[str, str] = {}

    @contextmanager
    def refused(self, match: str) -> Iterator[None]:
        """Context manager: minipeft must raise an InputError whose text matches."""
        with pytest.raises(minipeft.InputError, match=match):
            yield
        self.ours = "refused"

    @contextmanager
    def not_offered(self, match: str) -> Iterator[None]:
        """Context manager: minipeft must raise an InputError that says that it has no such feature."""
        with self.refused(match):
            yield
        self.ours = "not offered"

    @contextmanager
    def theirs(
        self,
        name: str,
        *,
        warning: str | None = None,
        refusal: str | None = None,
        failure: str | None = None,
        wrong: str = "wrong",
    ) -> Iterator[Peer]:
        """Context manager: run a peer and set `peer.right`.

        `warning`: a pattern of the warning that a wrong result may come with. `refusal` and `failure`: patterns of the
        errors that name the cause, and of those that do not; any other error fails the test. `wrong`: the outcome where
        `peer.right` is false, "costs" if the result itself is right.
        """
        peer = Peer()
        try:
            with listening(peer.said):
                yield peer
        except REFUSALS as error:
            patterns = {"refused": refusal, "fails": failure}
            found = [kind for kind, pattern in patterns.items() if pattern and re.search(pattern, str(error))]
            if not found:
                raise
            self.peers[name] = found[0]
            return
        assert peer.right is not None, f"{name}: nothing was measured"
        warned = warning is not None and any(re.search(warning, text) for text in peer.said)
        self.peers[name] = "right" if peer.right else "warned" if warned else wrong


def render_row(label: Label, ours: str, peers: dict[str, str]) -> str:
    """An exhibit's line of the page."""
    links = ", ".join(f"[{thread}]({address(thread)})" for thread in label.threads)
    theirs = ", ".join(f"{name}: {mark(outcome)}" for name, outcome in peers.items()) or "not run"
    return f"| {links} | {label.symptom} | {mark(ours)} | {theirs} |"


def address(thread: str) -> str:
    """The URL of a thread; GitHub redirects a pull request's number."""
    repository, number = thread.split("#")
    return f"https://github.com/{repository}/issues/{number}"


def mark(outcome: str) -> str:
    """An outcome, in bold if the user gets a wrong result."""
    return f"**{outcome}**" if outcome in ("wrong", "warned", "costs") else outcome
