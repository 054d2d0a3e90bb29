"""The table of a study: its columns, what each shows of a group (results.py), and the groups' names.

A column that has nothing to show of any group is left out; so one table serves every preset.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from minipeft.runs.planning import in_words

Group = dict[str, Any]
NAMES = {"full": "full tuning", "lora": "LoRA", "prefix": "prefix-tuning", "prompt": "prompt-tuning"}
SHORT = {"full": "full", "lora": "LoRA"}  # where the model stands before it


@dataclass(frozen=True)
class Column:
    """A title, what it means, and the text of a group: "" where there is nothing to show."""

    title: str
    meaning: str
    show: Callable[[Group], str]
    brief: bool = True  # whether the terminal shows it
    part: str = "scores"  # of the page: scores, rest


def bleu(group: Group) -> str:
    spread = "" if group.get("bleu_sd") is None else f" ± {100 * group['bleu_sd']:.1f}"
    return "" if group.get("bleu") is None else f"{100 * group['bleu']:.1f}{spread}"


def bounds(group: Group) -> str:
    if group.get("bleu_interval") is None:
        return ""
    return "{:.1f} to {:.1f}".format(*(100 * end for end in group["bleu_interval"]))


def gain(group: Group) -> str:
    found = group.get("difference")
    if found is None:
        return ""
    return f"{100 * found['value']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


def number(name: str, form: str, scale: float = 1.0) -> Callable[[Group], str]:
    """What shows a field of a group in the given form."""
    return lambda group: "" if group.get(name) is None else form.format(scale * group[name])


def share(name: str) -> Callable[[Group], str]:
    """What shows a count of answers as a share of them; nothing where it is 0."""
    return lambda group: f"{100 * group[name] / group['pairs']:.0f} %" if group.get(name) else ""


def held_out(group: Group) -> str:
    spread = "" if group.get("dev_loss_sd") is None else f" ± {group['dev_loss_sd']:.3f}"
    return "" if group.get("dev_loss") is None else f"{group['dev_loss']:.3f}{spread}"


def seconds(group: Group) -> str:
    return in_words(group["train_seconds"]) if group.get("train_seconds") else ""


def trained(group: Group) -> str:
    return f"{group['trainable_percent']:.3g} %" if group.get("trainable") else ""


def printed(name: str, form: str) -> Callable[[Group], str]:
    """What shows a number that the paper prints."""
    return lambda group: form.format(group["paper"][name]) if name in (group.get("paper") or {}) else ""


def started(group: Group) -> str:
    return f"{group['init']}{' + MLP' if group.get('reparam') else ''}" if group.get("init") else ""


COLUMNS = (
    Column("BLEU", "corpus BLEU-4 in CoNaLa's tokens, of 100; ± the standard deviation over seeds", bleu),
    Column("95 % interval", "bootstrap over questions", bounds),
    Column("over zero-shot", "difference to the untrained model on the same questions, with its 95 % interval", gain),
    Column("paper's BLEU", "what the paper prints", printed("bleu", "{:.5g}")),
    Column("CodeBLEU", "strict: a part that is 0 counts as 0", number("codebleu", "{:.3f}")),
    Column("as the package", "as the codebleu package counts: a data-flow match of 0 is 1",
           number("codebleu_compat", "{:.3f}")),
    Column("exact", "answers equal to the reference, token by token", number("exact_match", "{:.1f} %", 100)),
    Column("chrF", "of 100", number("chrf", "{:.1f}", 100)),
    Column("valid", "answers that Python's parser takes", number("valid_python", "{:.0f} %", 100)),
    Column("length", "tokens of the answers for one of the references", number("length_ratio", "{:.2f}"), brief=False,
           part="rest"),
    Column("empty", "empty answers", share("empty"), brief=False, part="rest"),
    Column("repeated", "answers that repeat themselves", share("repeated"), brief=False, part="rest"),
    Column("cut off", "answers that reached the limit of new tokens", share("hit_limit"), brief=False, part="rest"),
    Column("held-out loss", "nats per token that is learned (demo: the answer's), on pairs held out of training; ± the "
           "standard deviation over seeds", held_out, part="rest"),
    Column("at step 0", "the same before the first step", number("dev_loss_start", "{:.3f}"), brief=False, part="rest"),
    Column("start", "what a prefix or prompt starts as", started, brief=False, part="rest"),
    Column("rate", "peak learning rate", number("learning_rate", "{:g}"), brief=False, part="rest"),
    Column("steps", "optimizer steps", lambda group: f"{group['steps']}" if group.get("steps") else "", brief=False,
           part="rest"),
    Column("trained", "share of the parameters", trained, part="rest"),
    Column("stored", "numbers on disk: the network that makes a prefix or prompt is folded into it",
           lambda group: f"{group['stored']:,}" if group.get("stored") else "", brief=False, part="rest"),
    Column("paper's %", "what the paper prints", printed("percent", "{:g} %"), brief=False, part="rest"),
    Column("training", "time of training alone", seconds, part="rest"),
    Column("memory", "peak of the process, weights included", number("peak_memory_bytes", "{:.2f} GB", 1e-9),
           brief=False, part="rest"),
    Column("paper's GB", "what the paper prints; for GPT-2 without the weights", printed("memory", "{:g}"),
           brief=False, part="rest"),
)  # fmt: skip


def shown(groups: Sequence[Group], *, brief: bool = False) -> list[Column]:
    """The columns that have something to show."""
    return [column for column in COLUMNS if (column.brief or not brief) and any(map(column.show, groups))]


def names(groups: Sequence[Group]) -> list[str]:
    """What each group is called: its method, with the model where there are several, and what else tells it apart."""
    several = len({group["model"] for group in groups if group["model"]}) > 1
    plain = [(group["model"], group["method"]) for group in groups]
    found = []
    for group, own in zip(groups, plain):
        method = group["method"]
        parts = [group["model"].rsplit("/", 1)[-1]] if several and group["model"] else []
        parts.append(SHORT.get(method, method) if several else NAMES.get(method, method))
        if plain.count(own) > 1 and group.get("learning_rate") is not None:
            details = (started(group), f"rate {group['learning_rate']:g}", f"{group['steps']} steps")
            parts.append(", ".join(part for part in details if part))
        found.append(" ".join(parts))
    return found


def flagged(groups: Sequence[Group]) -> dict[str, list[str]]:
    """What to know -> the names that it is said of, for each flag and each failure."""
    found: dict[str, list[str]] = {}
    for name, group in zip(names(groups), groups):
        for text in [f"failed: {group['error']}"] if group["error"] is not None else group["flags"]:
            found.setdefault(text, []).append(name)
    return found


def few(who: Sequence[str]) -> str:
    """Some names, the first of them where they are many."""
    return "; ".join(who) if len(who) <= 3 else f"{who[0]} and {len(who) - 1} more"


def as_text(groups: Sequence[Group], *, brief: bool = True) -> str:
    """The table for a terminal."""
    columns = shown(groups, brief=brief)
    rows = [["", *(column.title for column in columns)]]
    for name, group in zip(names(groups), groups):
        failed = group["error"] is not None
        rows.append(
            [name, f"failed: {group['error']}"] if failed else [name, *(column.show(group) for column in columns)]
        )
    whole = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[place]) for row in whole) for place in range(len(rows[0]))]
    widths[0] = max(len(row[0]) for row in rows)
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    )


def as_markdown(groups: Sequence[Group]) -> str:
    """The table in Markdown; whatever a model or an error printed cannot break its cells."""
    columns = shown(groups)
    rows = [["", *(column.title for column in columns)], ["---"] + ["---:"] * len(columns)]
    for name, group in zip(names(groups), groups):
        if group["error"] is not None:
            rows.append([name, f"failed: {group['error']}", *[""] * (len(columns) - 1)])
        else:
            rows.append([name, *(column.show(group) for column in columns)])
    return "\n".join(
        "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in row) + " |" for row in rows
    )
