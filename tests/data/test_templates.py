"""The paper's prompt, and templates that are refused."""

import pytest

from minipeft.data.templates import TEMPLATE, format_prompt
from minipeft.errors import InputError


def test_the_prompt_is_the_papers() -> None:
    assert format_prompt("add {x}") == "### Instruction:\nadd {x}\n### Response:\n"
    assert format_prompt("i", TEMPLATE) == format_prompt("i")


def test_a_template_holds_the_intent_once() -> None:
    assert format_prompt("{x} {intent}", "Q: {intent}\nA: ") == "Q: {x} {intent}\nA: "
    for template in ("Q:", "{intent}{intent}"):
        with pytest.raises(InputError, match=r"template: must hold \{intent\} once"):
            format_prompt("i", template)
