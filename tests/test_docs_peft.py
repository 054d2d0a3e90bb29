"""docs/coming-from-peft.md: both sides of every section run, and what has one name on both sides is equal."""

import re
from pathlib import Path

import pytest
import torch

from tests.small import write_small_model

PAGE = Path(__file__).resolve().parents[1] / "docs" / "coming-from-peft.md"
COMPARED = {  # section -> the names that must be equal on both sides
    "Load and adapt": ["trainable", "logits"],
    "Train": ["first_loss"],
    "Save": [],
    "Load the other's adapter": ["logits"],
    "Without the adapter": ["logits"],
    "Merge": ["logits"],
    "A prefix": ["trainable"],
}


def read_sections() -> dict[str, list[str]]:
    parts = re.split(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {title: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for title, text in zip(parts[::2], parts[1::2])}


def test_each_section_has_two_sides():
    assert {title: len(blocks) for title, blocks in read_sections().items()} == dict.fromkeys(COMPARED, 2)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_both_sides_compute_the_same(family, tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    write_small_model(tmp_path / "model", family)
    ids = torch.randint(257, (2, 12), generator=torch.Generator().manual_seed(0))
    sides = [{"folder": str(tmp_path / "model"), "ids": ids} for _ in range(2)]
    if family == "gpt2":  # its own dropout is honoured in training mode, and would differ
        file = tmp_path / "model" / "config.json"
        file.write_text(re.sub(r'("\w+_pdrop": )0\.1', r"\g<1>0.0", file.read_text()))
    for title, blocks in read_sections().items():
        if title == "Load the other's adapter":
            trained = sides[0]["model"].eval()(ids).logits
        for block, names in zip(blocks, sides):
            exec(compile(block, title, "exec"), names)
        if title == "Load the other's adapter":
            assert torch.allclose(sides[1]["other"](ids), trained, atol=1e-4)
        for name in COMPARED[title]:
            theirs, ours = (names[name] for names in sides)
            assert torch.allclose(torch.as_tensor(theirs), torch.as_tensor(ours), atol=1e-4), (title, name)
    assert "lost to rounding" in capsys.readouterr().out
