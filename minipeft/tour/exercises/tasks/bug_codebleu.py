"""A quarter of the score for nothing.

k4black/codebleu#59: where prediction and reference have no data flow in common, CodeBLEU's fourth part counts as 1
instead of 0, so that an empty answer scores 0.25. Many published tables hold this artefact.

Write `probe`, a test without arguments that calls the library: it returns with the library as it is, and an assert
fails with the bug in it. --check runs it both ways.

    codebleu(["x = 1"], ["y = x + 1"]).score       one prediction and its reference; 0 .. 1
"""

from __future__ import annotations

from minipeft.metrics.codebleu import codebleu
from minipeft.tour.exercises.bugs import require_caught
from minipeft.tour.exercises.record import Answer, Bug, Exercise

EXERCISE = Exercise(
    solution="minipeft.tour.exercises.tasks.bug_codebleu.probe",
    hints=(
        "An empty answer deserves 0.",
        "The reference must have data flow, as `y = x + 1` has: without any, that part does not count at all.",
    ),
    bug=Bug(
        "minipeft.metrics.codebleu._score", before='if mode == "compat":', after='if mode in ("compat", "strict"):'
    ),
)


def probe() -> None:
    """An empty answer scores nearly 0."""
    assert codebleu([""], ["x = 1\ny = x + 1"]).score < 0.05


def check_sound(probe: Answer) -> None:
    """Your test passes with the library as it is."""
    probe()


def check_caught(probe: Answer) -> None:
    """Your test fails with the bug."""
    require_caught(probe, "bug_codebleu")
