"""The table of a study: its columns, the text of each cell, and the names of the groups.

Each row of SCORES (metrics/scores.py) is a column; the columns of training and cost are defined here. A column without
a value for any group is left out, so one table serves every preset.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minipeft.adapters import METHODS
from minipeft.errors import escape
from minipeft.metrics.bootstrap import Interval
from minipeft.metrics.scores import SCORES, Score
from minipeft.runs.planning import format_seconds
from minipeft.study.rows import Group


@dataclass(frozen=True)
class Column:
    """A column: its title, its meaning, and the text of a group's cell ("": no value)."""

    title: str
    meaning: str
    show: Callable[[Group], str]
    rank: int = 0  # on a terminal, the columns of the smallest ranks that fit are shown; 0: never
    table: str = "training"  # on the page: scores, answers, training
    value: Callable[[Group], float | None] = lambda group: None  # sort key on the page; None sorts last


def list_columns() -> list[Column]:
    """List all columns: the scores, with BLEU's interval and difference after it, then training and cost."""
    found = []
    for score in SCORES:
        if score.table:
            found.append(make_score_column(score))
        if score.name == "bleu":
            found += BLEU_COLUMNS
    return sorted(found, key=lambda column: column.table != "scores") + TRAINING_COLUMNS


def choose_main_columns(groups: Sequence[Group]) -> list[Column]:
    """Choose the six main columns: BLEU with its interval, the effect, correct answers, and the cost.

    Where a tuned group gave no answers, the held-out loss replaces the correct answers.
    """
    held = choose_columns(groups)
    silent = any(group.is_tuned and group.scores is None for group in groups)
    right = [column for column in held if column.title in (("held-out loss",) if silent else RIGHT)][:1]
    cost = [column for title in ("trained", "time", "memory") for column in held if column.title == title]
    return [column for column in (*MAIN_COLUMNS, *right, *cost) if any(map(column.show, groups))]


def make_score_column(score: Score) -> Column:
    """Make the column of a score; BLEU is shown with its standard deviation over seeds."""
    better = {True: "; higher is better", False: "; lower is better", None: ""}[score.higher_is_better]
    if score.name == "bleu":
        meaning = f"{score.meaning}{better}; ± standard deviation over seeds"
        return Column(score.label, meaning, show_bleu, score.rank, score.table, lambda group: group.bleu)
    values = lambda group: {} if group.scores is None else group.scores.values
    show = lambda group: score.show(values(group).get(score.name), group.scores and group.scores.pairs)
    value = lambda group: values(group).get(score.name)
    return Column(score.label, score.meaning + better, show, score.rank, score.table, value)


def show_bleu(group: Group) -> str:
    """Format BLEU, times 100, ± its standard deviation over seeds."""
    spread = "" if group.bleu_sd is None else f" ± {100 * group.bleu_sd:.1f}"
    return "" if group.bleu is None else f"{100 * group.bleu:.1f}{spread}"


def show_interval(group: Group) -> str:
    return "" if group.scores is None else "{:.1f} to {:.1f}".format(*(100 * end for end in group.scores.bleu_interval))


def show_bleu_with_interval(group: Group) -> str:
    return f"{show_bleu(group)} [{show_interval(group).replace(' to ', ', ')}]" if show_interval(group) else ""


def show_gain(group: Group) -> str:
    return show_difference(group.difference)


def show_difference(found: Interval | None) -> str:
    """Format a BLEU difference, times 100, with its interval."""
    return "" if found is None else f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def get_value(found: Interval | None) -> float | None:
    """The difference, without its interval."""
    return None if found is None else found.value


def name_reference(groups: Sequence[Group]) -> str:
    """Name the reference of the effects; a general name if models have different ones."""
    found = list(dict.fromkeys(group.reference for group in groups if group.reference))
    return found[0] if len(found) == 1 else "the best baseline or untrained model"


def show_field(name: str, form: str, scale: float = 1.0) -> Callable[[Group], str]:
    """Make a function that formats a field of a group's training; "" for None and 0."""

    def show(group: Group) -> str:
        value = getattr(group.training, name)
        return form.format(value if scale == 1 else scale * value) if value else ""

    return show


def get_field(name: str) -> Callable[[Group], float | None]:
    """Make a function that reads a field of a group's training."""
    return lambda group: getattr(group.training, name)


def show_reported(name: str, form: str) -> Callable[[Group], str]:
    """Make a function that formats a number the paper reports."""
    return lambda group: form.format(group.paper[name]) if group.paper and name in group.paper else ""


def show_held_out_loss(group: Group) -> str:
    """Format the held-out loss ± its standard deviation over seeds."""
    spread = "" if group.dev_loss_sd is None else f" ± {group.dev_loss_sd:.3f}"
    return "" if group.training.dev_loss is None else f"{group.training.dev_loss:.3f}{spread}"


def show_seconds(group: Group) -> str:
    return format_duration(group.training.train_seconds) if group.training.train_seconds else ""


def format_duration(seconds: float) -> str:
    """Format a duration: 57 s, 2 min 23 s, 12 min, 1.5 h."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if 90 <= seconds < 600 else format_seconds(seconds)


def show_init(group: Group) -> str:
    """Format the init of a prefix or prompt."""
    done = group.training
    return f"{done.init}{' + MLP' if done.reparam else ''}" if done.init else ""


BLEU_COLUMNS = [
    Column("95 % interval", "95 % interval of BLEU, bootstrapped over questions", show_interval, 6, "scores",
           lambda group: group.bleu),
    Column("over zero-shot", "BLEU minus the untrained model's on the same questions, with its 95 % interval",
           show_gain, 2, "scores", lambda group: get_value(group.difference)),
    Column("paper's BLEU", "BLEU that the paper reports", show_reported("bleu", "{:.5g}"), 9, "scores",
           lambda group: (group.paper or {}).get("bleu")),
]  # fmt: skip
RIGHT = ("passes", "exact")  # titles of the columns that count correct answers; the first that a study has is shown
MAIN_COLUMNS = [
    Column("BLEU", "corpus BLEU-4 on CoNaLa tokens, 0 to 100, with its 95 % interval over questions",
           show_bleu_with_interval, value=lambda group: group.bleu),
    Column("effect", "BLEU minus that of the best baseline or untrained model, paired by question; 95 % interval",
           lambda group: show_difference(group.effect), value=lambda group: get_value(group.effect)),
]  # fmt: skip
TRAINING_COLUMNS = [
    Column("held-out loss", "nats per supervised token, on pairs held out of training; ± standard deviation over seeds",
           show_held_out_loss, 3, value=get_field("dev_loss")),
    Column("at step 0", "held-out loss before the first step", show_field("dev_loss_start", "{:.3f}"),
           value=get_field("dev_loss_start")),
    Column("init", "how a prefix or prompt is initialized; MLP: reparameterized", show_init),
    Column("learning rate", "peak learning rate", show_field("learning_rate", "{:g}"),
           value=get_field("learning_rate")),
    Column("steps", "optimizer steps", show_field("steps", "{}"), value=get_field("steps")),
    Column("trained", "trainable parameters, in percent of all", show_field("trainable_percent", "{:.3g} %"), 7,
           value=get_field("trainable_percent")),
    Column("stored", "parameters on disk; a reparameterization MLP is folded into the prefix or prompt",
           show_field("stored", "{:,}"), value=get_field("stored")),
    Column("paper's %", "trainable parameters that the paper reports", show_reported("percent", "{:g} %")),
    Column("time", "training time", show_seconds, 8, value=get_field("train_seconds")),
    Column("memory", "peak memory, weights included", show_field("peak_memory_bytes", "{:.2f} GB", 1e-9),
           value=get_field("peak_memory_bytes")),
    Column("paper's GB", "memory that the paper reports; GPT-2's without weights", show_reported("memory", "{:g}")),
]  # fmt: skip


def choose_columns(groups: Sequence[Group], table: str | None = None) -> list[Column]:
    """Choose the columns, of one table or all, that have a value for some group."""
    return [column for column in list_columns() if table in (None, column.table) and any(map(column.show, groups))]


def name_method(method: str) -> str:
    """Name a method in tables by its label; baselines and the untrained model keep their names."""
    return METHODS[method].label if method in METHODS else method


def name_groups(groups: Sequence[Group]) -> list[str]:
    """Name each group: its model if there are several, its method, and settings where a method has several groups."""
    several = len({group.model for group in groups if group.model}) > 1
    plain = [(group.model, group.label or name_method(group.method)) for group in groups]
    found = []
    for group, own in zip(groups, plain):
        parts = [group.model.rsplit("/", 1)[-1]] if several and group.model else []
        parts.append(own[1])
        rate = group.training.learning_rate
        if plain.count(own) > 1 and rate is not None:
            how = f"{show_init(group)} init, " if show_init(group) else ""
            parts.append(f"({how}learning rate {rate:g}, {group.training.steps} steps)")
        found.append(" ".join(parts))
    return found


def group_by_flag(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Map each flag or failure to the names of its groups."""
    found: dict[str, list[str]] = {}
    for name, group in zip(name_groups(groups), groups):
        for text in [f"failed: {group.error}"] if group.error is not None else group.flags:
            found.setdefault(text, []).append(name)
    return found


def join_names(who: Sequence[str]) -> str:
    """Join up to three names; of more, the first and the number of the others."""
    return "; ".join(who) if len(who) <= 3 else f"{who[0]} and {len(who) - 1} more"


def as_text(groups: Sequence[Group], width: int | None = None) -> str:
    """Format the table for a terminal, with as many columns as fit into `width` (default the terminal's)."""
    width = width or measure_terminal()
    kept = [column for column in choose_columns(groups) if column.rank]
    while len(kept) > 1 and len(max(lay_out(groups, kept), key=len)) > width:
        kept.remove(max(kept, key=lambda column: column.rank))
    failed = [
        textwrap.fill(f"{name}  failed: {g.error}", width, subsequent_indent="  ")
        for name, g in zip(name_groups(groups), groups)
        if g.error is not None
    ]
    return "\n".join([*lay_out(groups, kept), *failed])


def measure_terminal() -> int:
    """The terminal's width in characters; 80 without a terminal."""
    return shutil.get_terminal_size((80, 24)).columns


def lay_out(groups: Sequence[Group], kept: Sequence[Column]) -> list[str]:
    """Lay out the table of the groups that did not fail, as lines."""
    rows = [["", *(column.title for column in kept)]]
    named = zip(name_groups(groups), groups)
    rows += [[name, *(column.show(group) for column in kept)] for name, group in named if group.error is None]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(wide) for cell, wide in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]


def as_line(text: str) -> str:
    """Escape an untrusted text for one line of Markdown: no tag, link, image, table cell or line break."""
    marked = escape(text.replace("\n", " ").replace("\\", "\\\\"))
    return marked.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("[", "\\[")


def as_markdown(groups: Sequence[Group], kept: Sequence[Column] | None = None) -> str:
    """Format a Markdown table, by default of all columns; texts of models and errors are escaped."""
    kept = choose_columns(groups) if kept is None else kept
    rows = [["", *(column.title for column in kept)], ["---"] + ["---:"] * len(kept)]
    for name, group in zip(name_groups(groups), groups):
        if group.error is not None:
            rows.append([as_line(name), f"failed: {as_line(group.error)}", *[""] * (len(kept) - 1)])
        else:
            rows.append([as_line(name), *(column.show(group) for column in kept)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
