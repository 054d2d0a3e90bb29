"""The prompt template of Männistö, Attieh and Tiedemann (2025).

    ### Instruction:
    {intent}
    ### Response:
    {snippet}EOS

Up to and with the newline after `### Response:` it is the prompt; what follows is the response.
"""

from __future__ import annotations

from minipeft.errors import InputError

TEMPLATE = "### Instruction:\n{intent}\n### Response:\n"


def prompt_text(intent: str, template: str = TEMPLATE) -> str:
    """The prompt that asks for a snippet: the start of a training text, and all that generation is given.

    Raises:
        InputError: the template does not hold {intent} exactly once.
    """
    if template.count("{intent}") != 1:
        raise InputError(f"must hold {{intent}} once, is {template!r}", where="template")
    return template.replace("{intent}", intent)
