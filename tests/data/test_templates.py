"""The paper's prompt, and templates that are refused."""

import pytest

from minipeft.data.templates import TEMPLATE, prompt_text
from minipeft.errors import InputError


def test_the_prompt_is_the_papers() -> None:
    assert prompt_text("add {x}") == "### Instruction:\nadd {x}\n### Response:\n"
    assert prompt_text("i", TEMPLATE) == prompt_text("i")


def test_a_template_holds_the_intent_once() -> None:
    assert prompt_text("{x} {intent}", "Q: {intent}\nA: ") == "Q: {x} {intent}\nA: "
    for template in ("Q:", "{intent}{intent}"):
        with pytest.raises(InputError, match=r"template: must hold \{intent\} once"):
            prompt_text("i", template)
