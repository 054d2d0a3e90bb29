"""The README's figures are those of committed results, its links resolve, and `.ci/run` calls its test command."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/commands.md").read_text(encoding="utf-8"), re.DOTALL)


def read(file: str) -> Any:
    return json.loads((ROOT / file).read_text(encoding="utf-8"))


def test_the_commands_are_commands_with_such_flags():
    """Those of the README and of docs/commands.md, which names every command."""
    from minipeft.cli import make_parser

    parser, named = make_parser(), set()
    text = "\n".join([*re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL), *COMMANDS])
    for line in re.findall(r"^(?:.*\.venv/bin/)?minipeft (.*)$", text, re.MULTILINE):
        parser.parse_args(line.split())
        named.add(line.split()[0])
    (commands,) = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    assert named == set(commands)


def test_it_is_one_screen():
    """One picture, one table, and lines for a screen."""
    assert len(TEXT.splitlines()) <= 45
    assert TEXT.count("![") == 1
    assert len(re.findall(r"^\|---", TEXT, re.MULTILINE)) == 1


def test_the_figures_are_those_of_committed_results():
    rows = [row for row in read("benchmarks/results/training-cpu.json") if row["benchmark"].startswith("LoRA")]
    theirs, switched, _, ours = (row for row in rows if row["dtype"] == "float32")
    assert (theirs["variant"], switched["variant"], ours["variant"]) == ("PEFT", "PEFT, oneDNN", "minipeft")
    assert f"{ours['ratio']:.2f} times as fast" in TEXT
    assert f"({switched['median'] / ours['median']:.2f} if" in TEXT
    assert f"{ours['memory_bytes'] / 1e9:.1f} GB instead of {theirs['memory_bytes'] / 1e9:.1f} GB" in TEXT

    groups = [group for group in read("results/prefix-135m/results.json")["groups"] if group["bleu"] is not None]
    losses = {(group["method"], group["init"], group["learning_rate"]): group["dev_loss"] for group in groups}
    text, noise = losses["prefix", "text", 0.03], losses["prefix", "peft", 0.0002]
    assert f"held-out loss of {text:.2f} nats with our init and {noise:.2f} with PEFT's" in TEXT
    assert f"LoRA {losses['lora', None, 0.001]:.2f}" in TEXT


def test_the_checks_call_the_test_command():
    """`.ci/run` reads it from here: the line after the mark."""
    after = TEXT.split("<!-- the test command -->")[1]
    (command,) = re.findall(r"\n(python3 -m venv .*)\n", after)
    assert command.endswith("pytest -q -n 2")
    assert "the test command" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
