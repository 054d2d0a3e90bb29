"""Read the messages of a chat, in Hugging Face's form or OpenAI's, check them and convert them to one form.

{"role": "user", "content": "..."}                              content may be a list of {"type": "text", "text": "..."}
{"role": "assistant", "tool_calls": [...], "weight": 0}         weight 0: no loss on this turn
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minipeft.data.examples import check_text
from minipeft.errors import InputError
from minipeft.files import name_type, parse_json

ROLES = ("system", "user", "assistant", "tool")


def read_messages(given: Any, place: str, longest: int) -> Iterator[dict[str, Any]]:
    """Read and check the messages of a chat, in Hugging Face's form or OpenAI's."""
    if not isinstance(given, list) or not given:
        problem = "is empty" if given == [] else f"must be a list, is {name_type(given)}"
        raise InputError(problem, file=place, where="field 'messages'")
    for number, message in enumerate(given, start=1):
        where = f"message {number}"
        if not isinstance(message, dict):
            raise InputError(f"must be an object, is {name_type(message)}", file=place, where=where)
        role = message.get("role")
        if role not in ROLES:
            raise InputError(f"role {role!r} is not known ({', '.join(ROLES)})", file=place, where=where)
        yield read_message(message, place, where, longest)


def read_message(message: dict[str, Any], place: str, where: str, longest: int) -> dict[str, Any]:
    """Read a message: its content as one text, the arguments of its calls as objects."""
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise InputError(f"holds a part of type {kind!r}; only text is read", file=place, where=where)
        content = "".join(part["text"] for part in content)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        problem = "has no content" if "content" not in message else f"content must be text, is {name_type(content)}"
        raise InputError(problem, file=place, where=where)
    check_text(content, place, where, longest)
    read = {**message, "content": content}
    if message.get("weight", 1) not in (0, 1):
        raise InputError(f"weight {message['weight']!r} must be 0 or 1", file=place, where=where)
    if calls is not None:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise InputError("tool_calls must be a list of objects", file=place, where=where)
        read["tool_calls"] = [read_call(call, place, where) for call in calls]
    return read


def read_call(call: dict[str, Any], place: str, where: str) -> dict[str, Any]:
    """Read a tool call; OpenAI writes its arguments as JSON text, chat templates need the object."""
    function = call.get("function")
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        arguments = parse_json(function["arguments"], place, f"{where}: arguments")
        return {**call, "function": {**function, "arguments": arguments}}
    return call


def read_tools(given: Any, place: str) -> list[dict[str, Any]] | None:
    """Read the JSON schemas of the tools that a chat may call; Parquet files hold them as JSON text."""
    tools = parse_json(given, place, "field 'tools'") if isinstance(given, str) else given
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InputError("must be a list of objects", file=place, where="field 'tools'")
    return tools or None
