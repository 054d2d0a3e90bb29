"""The learning rate of a step.

The steps are counted from 0; `config.steps` = n of them are taken. Over the first w = round(warmup n) steps, at least
one, the rate rises in equal parts: step 0 gets peak / w, step w - 1 the peak. From step w on it decays by the share of
the steps after the warm-up that is still left,

    left = (n - step) / (n - w)              1 at step w, 1 / (n - w) at the last step: never 0

    constant   peak
    linear     peak * left
    cosine     peak * (1 - cos(pi * left)) / 2

`config.learning_rate` is the peak, `config.warmup` a share in [0, 1), `config.decay` one of the three names. A function
of the step alone needs no state: whoever resumes at step 700 has the rate of step 700. Source: Loshchilov and Hutter
2017 (cosine).
"""

from __future__ import annotations

import math
import random

from minipeft.tour.exercises.judging import require, require_close
from minipeft.tour.exercises.record import Answer, Exercise
from minipeft.training.loop import TrainConfig

EXERCISE = Exercise(
    solution="minipeft.training.loop.learning_rate_at",
    hints=(
        "w = max(1, round(config.warmup * config.steps)); within it the factor is (step + 1) / w.",
        "With one step, n - w is 0: no step comes after the warm-up, but mind that you do not divide by it.",
        "(1 - cos(pi left)) / 2 is 1 at left = 1 and near 0 at the end.",
    ),
)


def check_warmup(learning_rate_at: Answer) -> None:
    """A tenth of 40 steps: peak times 1/4, 2/4, 3/4, 1; and the peak again at step 4."""
    config = TrainConfig(steps=40, learning_rate=0.8, warmup=0.1)
    for step, rate in enumerate((0.2, 0.4, 0.6, 0.8, 0.8)):
        require_close(learning_rate_at(step, config), rate, f"the rate of step {step}", 1e-12)


def check_decays(learning_rate_at: Answer) -> None:
    """Halfway through the decay and at the last step, for each decay."""
    for decay, middle, last in (
        ("constant", 1.0, 1.0),
        ("linear", 0.5, 0.1),
        ("cosine", 0.5, (1 - math.cos(math.pi / 10)) / 2),
    ):
        config = TrainConfig(steps=12, learning_rate=2.0, warmup=0.17, decay=decay)
        require_close(learning_rate_at(1, config), 2.0, f"the {decay} rate of step 1, the end of the warm-up", 1e-12)
        require_close(learning_rate_at(7, config), 2 * middle, f"the {decay} rate of step 7", 1e-12)
        require_close(learning_rate_at(11, config), 2 * last, f"the {decay} rate of step 11, the last", 1e-12)


def check_without_warmup(learning_rate_at: Answer) -> None:
    """warmup=0 still has one step of warm-up, at the peak; a run of one step has no division by 0."""
    config = TrainConfig(steps=5, learning_rate=1.0, warmup=0.0)
    for step, rate in enumerate((1.0, 1.0, 0.75, 0.5, 0.25)):
        require_close(learning_rate_at(step, config), rate, f"the rate of step {step} of 5", 1e-12)
    for decay in ("constant", "linear", "cosine"):
        rate = learning_rate_at(0, TrainConfig(steps=1, learning_rate=1.0, decay=decay))
        require_close(rate, 1.0, f"the {decay} rate of the only step", 1e-12)


def check_all_steps(learning_rate_at: Answer) -> None:
    """60 random settings, every step, against the text's formula; the rate is above 0 at every step."""

    draw = random.Random(0)
    for _ in range(60):
        n, warmup = draw.randint(1, 30), draw.choice((0.0, 0.06, 0.3, 0.97))
        decay = draw.choice(("constant", "linear", "cosine"))
        config = TrainConfig(steps=n, learning_rate=3e-4, warmup=warmup, decay=decay)
        w = max(1, round(warmup * n))
        for step in range(n):
            left = 1.0 if step < w else (n - step) / (n - w)
            part = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[decay]
            expected = 3e-4 * ((step + 1) / w if step < w else part)
            rate = learning_rate_at(step, config)
            require_close(rate, expected, f"the rate of step {step} of {n}, warmup {warmup}, {decay}", 1e-9)
            require(rate > 0, f"the rate of step {step} of {n} is {rate}")
