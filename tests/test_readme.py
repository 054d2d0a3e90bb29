"""The README's example runs on the demo's model and pairs; its commands exist; its links resolve."""

import re
import subprocess
import sys
from pathlib import Path

from tests.small import write_small_model

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL)


def test_the_example_runs(tmp_path):
    """With a small random Qwen 2 and the demo's data in place of the hub's, and 2 steps in place of 600."""
    write_small_model(tmp_path / "qwen", "qwen2", layers=1, max_position_embeddings=512)
    (code,) = blocks("python")
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 15
    for name, put in (('"Qwen/Qwen2.5-Coder-0.5B"', '"qwen"'), ('"conala"', '"demo"'), ("steps=600", "steps=2")):
        assert name in code
        code = code.replace(name, put)
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert ran.stdout.splitlines()[0].split() == ["method", "lora"]


def test_the_commands_are_commands_with_such_flags():
    from minipeft.cli import make_parser

    parser = make_parser()
    for line in re.findall(r"^(?:.*\.venv/bin/)?minipeft (.*)$", "\n".join(blocks("bash")), re.MULTILINE):
        parser.parse_args(line.split())


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / target).exists(), target


def test_the_checks_call_the_test_command():
    """`.ci/run` reads it from here: the line after the mark."""
    after = TEXT.split("<!-- the test command -->")[1]
    (command,) = re.findall(r"\n(python3 -m venv .*)\n", after)
    assert command.endswith("pytest -q -n 2")
    assert "the test command" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
