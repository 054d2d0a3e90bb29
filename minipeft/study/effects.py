"""The effect of each method as a paired difference of BLEU, and the verdict on a study as text.

    reference   the baseline or the untrained model, whichever has the higher BLEU
    effect      BLEU(group) - BLEU(reference)
    behind      BLEU(group) - BLEU(best tuned group)

Both differences are paired by question: each bootstrap resample draws the same questions for both systems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from minipeft.metrics.bootstrap import Interval, bootstrap_bleu
from minipeft.study.rows import Group
from minipeft.study.table import format_duration, name_groups

Named = tuple[str, Group]


def add_effects(groups: Sequence[Group]) -> tuple[Group, ...]:
    """Add to each group its differences to the reference and to the best tuned group."""
    best = find_best(groups)
    return tuple(add_effect(group, find_reference(groups, group.model), best) for group in groups)


def find_best(groups: Sequence[Group]) -> Group | None:
    """Find the tuned group with the highest BLEU."""
    tuned = [group for group in groups if group.scores is not None and group.is_tuned]
    return max(tuned, key=lambda group: group.bleu or 0.0, default=None)


def find_reference(groups: Sequence[Group], model: str) -> Group | None:
    """Find the reference: the baseline or untrained model with the highest BLEU."""
    known = [g for g in groups if g.scores is not None and not g.is_tuned and g.model in ("", model)]
    return max(known, key=lambda group: group.bleu or 0.0, default=None)


def add_effect(group: Group, reference: Group | None, best: Group | None) -> Group:
    """Add its differences to a group; a baseline has none."""
    if not group.model or reference is None or reference.method == group.method:
        return group
    behind = None if best is None or group is best or not group.is_tuned else subtract(group, best)
    return replace(group, reference=reference.method, effect=subtract(group, reference), behind=behind)


def subtract(one: Group, other: Group) -> Interval | None:
    """Compute the paired difference of two groups' BLEU; None where one gave no answers."""
    if one.scores is None or other.scores is None:
        return None
    return bootstrap_bleu(one.scores.runs, other.scores.runs)


def decide(groups: Sequence[Group]) -> list[str]:
    """Write the verdict in sentences: the winner and its cost, a cheaper tie, methods without gain, intervals."""
    named = list(zip(name_groups(groups), groups))
    best = next(((n, g) for n, g in named if g.is_tuned and g.effect is not None and g.behind is None), None)
    if best is None:
        return []
    tuned = [(name, group) for name, group in named if group.is_tuned and group.effect is not None]
    text = [describe_best(*best)]
    level = [(name, group) for name, group in tuned if group.behind is not None and group.behind.high >= 0]
    others = [(name, group) for name, group in tuned if group.behind is not None]
    if level:
        text.append(describe_level(min(level, key=lambda row: row[1].training.trainable or 0), best))
    elif others:
        name, second = max(others, key=lambda row: row[1].bleu or 0.0)
        text.append(f"Second is {name}, {format_difference(second.behind)} BLEU behind.")
    lost = [(name, group.reference) for name, group in tuned if group.effect is not None and group.effect.low <= 0]
    if lost and len(tuned) > 1:
        references = " or ".join(dict.fromkeys(repr(reference) for _, reference in lost))
        text.append(f"Not better than {references}: {', '.join(name for name, _ in lost)}.")
    return [*text, state_intervals(best[1])]


def describe_best(name: str, best: Group) -> str:
    """Describe the best group, its effect and its cost."""
    assert best.scores is not None
    assert best.effect is not None
    low, high = (100 * end for end in best.scores.bleu_interval)
    score = f"BLEU {100 * (best.bleu or 0.0):.1f} [{low:.1f}, {high:.1f}]"
    cost = f", for {describe_cost(best)}" if describe_cost(best) else ""
    if best.effect.low <= 0:
        return (
            f"No method is better than {best.reference!r}; the best is {name}, {score}, {describe_effect(best)}{cost}."
        )
    return f"Best: {name}, {score}, {describe_effect(best)}{cost}."


def describe_effect(group: Group) -> str:
    """Describe the effect: "2.1 [0.3, 4.0] above 'zero-shot'"."""
    assert group.effect is not None
    where = "above" if group.effect.value >= 0 else "below"
    return f"{format_difference(group.effect)} {where} {group.reference!r}"


def describe_level(level: Named, best: Named) -> str:
    """Describe the cheapest group whose BLEU is not significantly below the best."""
    name, group = level
    sizes = [one.training.trainable or 1 for one in (group, best[1])]
    behind = group.behind
    assert behind is not None
    told = f"{100 * behind.value:+.1f} [{100 * behind.low:+.1f}, {100 * behind.high:+.1f}]"
    text = f"{name[0].upper()}{name[1:]} is not distinguishable from it ({told})"
    if sizes[0] >= sizes[1]:
        return f"{text}."
    text += f" and trains {100 * sizes[0] / sizes[1]:.2g} % of its parameters"
    times = [one.training.train_seconds for one in (group, best[1])]
    return f"{text} in {times[0] / times[1]:.2f} times its time." if times[0] and times[1] else f"{text}."


def describe_cost(group: Group) -> str:
    """Describe the cost: trained parameters, time and memory, where known."""
    done = group.training
    parts = [f"{done.trainable:,} trained parameters"] if done.trainable else []
    parts += [format_duration(done.train_seconds)] if done.train_seconds else []
    parts += [f"{done.peak_memory_bytes / 1e9:.2f} GB"] if done.peak_memory_bytes else []
    return ", ".join(parts)


def format_difference(found: Interval | None) -> str:
    """Format the absolute value of a difference, times 100, with its interval."""
    assert found is not None
    low, high = sorted((100 * abs(found.low), 100 * abs(found.high)))
    if found.low <= 0 <= found.high:  # the interval includes 0
        return f"{100 * abs(found.value):.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return f"{100 * abs(found.value):.1f} [{low:.1f}, {high:.1f}]"


def state_intervals(best: Group) -> str:
    """State what the intervals cover."""
    seeds, what = len(best.seeds), "In brackets: 95 % intervals over the questions"
    if seeds == 1:
        return f"{what}; one seed, so the spread over seeds is unknown."
    return f"{what}, for the mean of {seeds} seeds."
