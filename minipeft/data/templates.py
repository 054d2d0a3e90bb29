"""The prompt template of Männistö, Attieh and Tiedemann (2025).

    ### Instruction:
    {intent}
    ### Response:
    {snippet}EOS

Up to and with the newline after `### Response:` it is the prompt; what follows is the response.
"""

from __future__ import annotations

from minipeft.errors import InputError, check_value, shown

TEMPLATE = "### Instruction:\n{intent}\n### Response:\n"


def prompt_text(intent: str, template: str = TEMPLATE) -> str:
    """The prompt that asks for a snippet: the start of a training text, and all that generation is given.

    Raises:
        InputError: the intent is empty or blank; the template does not hold {intent} exactly once.
    """
    for name, text in (("intent", intent), ("template", template)):
        check_value(text, str, {}, name)
    if not intent.strip():
        raise InputError("is blank" if intent else "is empty", where="intent")
    if template.count("{intent}") != 1:
        raise InputError(f"must hold {{intent}} once, is {shown(template)}", where="template")
    return template.replace("{intent}", intent)
