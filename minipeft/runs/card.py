"""The model card (README.md) of an adapter or merged model: method, base, data, loss, versions and command.

It begins with the YAML that the hub reads (https://huggingface.co/docs/hub/model-cards): base_model, tags, ...
A card depends on the run alone, so a resumed run writes the same bytes. Cards are published, therefore an
absolute path is reduced to its last name.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from minipeft.adapters.method import Recipe
from minipeft.adapters.verdict import MergeReport
from minipeft.errors import escape
from minipeft.files import write_whole
from minipeft.hub import OWNED
from minipeft.runs.config import ModelConfig, RunConfig, collect_settings, find_part, is_required

CARD = "README.md"
Rows = list[tuple[str, str]]


def write_card(folder: Path, text: str) -> None:
    """Write a card to a folder atomically."""
    write_whole(folder / CARD, lambda stream: stream.write(text.encode("utf-8")))


def make_training_card(config: RunConfig, hashes: Mapping[str, str], result: Mapping[str, Any]) -> str:
    """Write the card of a run; `hashes` has model_sha256 and data_sha256, `result` is the content of result.json."""
    method, full = config.method, config.method.trains_base
    held_out = result.get("dev_loss")
    losses = f"{result['loss']:.4f} in training" + (f", {held_out:.4f} held out" if held_out is not None else "")
    size = f"{result['trainable']:,} parameters ({result['trainable_percent']:.4g} %)"
    rows = [
        ("method", method.label),
        (
            "base",
            f"{shorten_path(config.model.source)}{format_revision(config.model)}, sha256 {hashes['model_sha256']}",
        ),
        ("data", f"{shorten_path(config.data.source)}, sha256 {hashes['data_sha256']}"),
        ("trained", f"{size}, {result['steps']} steps"),
        ("loss", f"{losses} (nats per supervised token)"),
        ("versions", format_versions()),
    ]
    name = shorten_path(config.model.source)
    title = f"{name}, tuned in full" if full else f"{method.label} adapter of {name}"
    use = 'minipeft.load_model("FOLDER")' if full else f'minipeft.load_adapter(minipeft.load_model("{name}"), "FOLDER")'
    return render_card(
        config.model, "transformers" if full else "peft", method.name, title, rows, [make_train_command(config)], use
    )


def make_merged_card(model: ModelConfig, adapter: str, report: MergeReport) -> str:
    """The card of a model into which an adapter was merged."""
    rows = [
        ("base", f"{shorten_path(model.source)}{format_revision(model)}"),
        ("adapter", shorten_path(adapter)),
        *((name, text) for name, _, text in (line.partition(" ") for line in str(report).splitlines())),
        ("versions", format_versions()),
    ]
    title = f"{shorten_path(model.source)} with {shorten_path(adapter)} merged"
    return render_card(model, "transformers", "merged", title, rows, [], 'minipeft.load_model("FOLDER")')


def render_card(
    model: ModelConfig, library: str, tag: str, title: str, rows: Rows, commands: list[str], use: str
) -> str:
    """Build the text of a card."""
    head = {"library_name": library, "pipeline_tag": "text-generation", "tags": ["minipeft", tag]}
    if (
        OWNED.fullmatch(model.source) and not Path(model.source).exists()
    ):  # the hub accepts only a base model that it hosts
        head = {"base_model": model.source, **head}
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in head.items()),
        "---",
        "",
        f"# {escape(title)}",
        "",
    ]
    lines += ["| | |", "|---|---|", *(f"| {name} | {escape_cell(text)} |" for name, text in rows), ""]
    for command in commands:
        lines += [f"    {escape(command)}", ""]
    return "\n".join([*lines, "```python", "import minipeft", "", f"model = {escape(use)}", "```", ""])


def escape_cell(text: str) -> str:
    """Escape a text for a cell of a Markdown table."""
    return escape(text.strip()).replace("|", "\\|")


def shorten_path(source: str) -> str:
    """Make a source publishable: an absolute path is reduced to its last name."""
    return Path(source).name if Path(source).is_absolute() else source


def format_revision(model: ModelConfig) -> str:
    """Format the revision, if one was given."""
    return "" if model.revision is None else f" at {model.revision}"


def format_versions() -> str:
    return f"minipeft {version('minipeft')}, torch {torch.__version__}"


def make_train_command(config: RunConfig) -> str:
    """Build the command of this run: every setting that differs from its default or comes from the recipe."""
    words = ["minipeft", "train", "--method", config.method.name]
    for name, setting in collect_settings(config.method.name).items():
        value = getattr(find_part(config, setting), setting.field)
        chosen = setting.section == "train" and setting.field in Recipe.__dataclass_fields__
        if value is None or (value == setting.default and not chosen and not is_required(setting)):
            continue
        words += format_flag(f"--{name}", shorten_path(value) if setting.field == "source" else value)
    return shlex.join([*words, "--out", "OUT"])


def format_flag(flag: str, value: Any) -> list[str]:
    """Format a setting as words of a command line (read back by cli/flags.py)."""
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, Mapping):
        return [word for name, entry in value.items() for word in (flag, f"{name}={entry}")]
    return [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
