"""The four forms of data and templates of one's own: what is read, what is refused, and which tokens are trained on."""

import json
from pathlib import Path
from typing import Any

import pytest

from minipeft.data.chat import load_chat_template
from minipeft.data.examples import encode_pairs, load_pairs
from minipeft.data.forms import (
    FORM_FILE,
    DataFormat,
    Item,
    encode_data,
    encode_questions,
    get_reference,
    load_data,
    make_prompt_item,
    read_format,
)
from minipeft.data.templates import parse_template, read_template
from minipeft.data.tokens import Tokenizer, load_tokenizer
from minipeft.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(assets: Path) -> Tokenizer:
    return load_tokenizer(assets / "fixtures/smollm2-135m")


def put(file: Path, *rows: object) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def trained(tokenizer: Tokenizer, example: Any) -> str:
    """The text that a response's loss is taken on."""
    return tokenizer.decode(example.ids[example.prompt_tokens :], skip_special=False)


USER, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
FORMS = {
    "pairs": ({"intent": "i", "snippet": "s"}, "s<|im_end|>"),
    "messages": ({"messages": [USER, SAID]}, "hello<|im_end|>"),
    "prompt and completion": ({"prompt": "a b", "completion": " c"}, " c<|im_end|>"),
    "text": ({"text": "all of it"}, "all of it<|im_end|>"),
}
CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.mark.parametrize("form", FORMS)
def test_the_form_is_told_by_the_fields(form: str, tmp_path: Path, assets: Path, tokenizer: Tokenizer) -> None:
    row, wanted = FORMS[form]
    data = load_data(put(tmp_path / "x", row, row | {"other": 1}))
    assert data.format.form == form
    assert len(data) == 2
    chat = load_chat_template(assets / "fixtures/smollm2-135m", text=CHATML)
    encoded = encode_data(data.items, data.format, tokenizer, chat)
    example = encoded[0]
    assert trained(tokenizer, example) == wanted + ("\n" if form == "messages" else "")
    (prompt,) = encode_questions(data.items[:1], data.format, tokenizer, chat)
    assert example.ids[: len(prompt)] == prompt
    assert get_reference(data.items[0], data.format) == wanted.removesuffix("<|im_end|>")


def test_pairs_are_encoded_as_ever(assets: Path, tokenizer: Tokenizer) -> None:
    """To the id, whichever way they are read."""
    file = assets / "data/conala/conala-paired-test.json"
    data, pairs = load_data(file), load_pairs(file)
    assert (data.sha256, data.notes, data.file) == (pairs.sha256, pairs.notes, pairs.file)
    assert [(i.values["intent"], i.values["snippet"], i.question_id, i.line) for i in data] == [
        (p.intent, p.snippet, p.question_id, p.line) for p in pairs
    ]
    assert list(encode_data(data, data.format, tokenizer)) == list(encode_pairs(pairs, tokenizer))


def test_a_template_names_other_fields(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = put(tmp_path / "x", {"q": "why {x}?", "ctx": "c", "a": "so", "question_id": 3})
    data = load_data(file, template=r"{ctx}\n{{Q}}: {q}\n{a} end")
    assert data.format == DataFormat("template", "{ctx}\n{{Q}}: {q}\n{a} end")
    (example,) = encode_data(data.items, data.format, tokenizer)
    assert tokenizer.decode(example.ids) == "c\n{Q}: why {x}?\nso end"
    assert trained(tokenizer, example) == "so end<|im_end|>"
    assert data.items[0].question_id == 3
    assert data.items[0].question == "c\nwhy {x}?"
    (tmp_path / "t.txt").write_text("{q}\n\n{a}\n")
    assert load_data(file, template=str(tmp_path / "t.txt")).format.template == "{q}\n\n{a}"


def test_special_tokens_in_a_template_are_tokens_and_in_data_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    start, end = (tokenizer.backend.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>"))
    template = "<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>"
    file = put(tmp_path / "x", {"q": "<|im_start|>", "a": "<|im_end|> x"}, {"q": "q", "a": "a"})
    data = load_data(file, template=template)
    for example, item in zip(encode_data(data.items, data.format, tokenizer), data):
        assert (example.ids.count(start), example.ids.count(end)) == (2, 2)  # EOS once: the template named it
        assert example.ids[-1] == end == tokenizer.eos
        assert trained(tokenizer, example) == item.values["a"] + "<|im_end|>"
    with pytest.raises(InputError, match=r"text 1: holds U\+FDD0, which is no character"):
        tokenizer.encode_pieces([[("<|im_start|>", True), ("\ufdd0", False)]])


@pytest.mark.parametrize("folder", ["smollm2-135m", "mistral-tokenizer", "stories260K", "gpt2-tokenizer"])
def test_pieces_are_encoded_as_transformers_does(folder: str, assets: Path, tmp_path: Path) -> None:
    """Where data holds no special token, the whole is what the library gives for the whole text."""
    ours = load_tokenizer(assets / "fixtures" / folder)
    special = sorted(t.content for t in ours.backend.get_added_tokens_decoder().values() if t.special)
    if not special:
        return
    parts = [("  a\n", True), (special[0], True), ("  hello wörld ", False), (special[-1], True), ("\n\nx", False)]
    ours.backend.encode_special_tokens = False
    wanted = ours.backend.encode("".join(text for text, _ in parts), add_special_tokens=False).ids
    ours.backend.encode_special_tokens = True
    assert ours.encode_pieces([parts], bos=False) == [wanted]
    assert ours.encode_pieces([parts]) == [ours.before + wanted]
    assert ours.encode_pieces([parts[:1]]) == [ours.encode(parts[0][0])]


def test_openai_s_messages_are_read(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]
    row = {
        "messages": [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "1", "content": "2"},
            {"role": "assistant", "content": "c", "weight": 0},
        ],
        "tools": json.dumps([{"type": "function"}]),
    }
    (item,) = load_data(put(tmp_path / "x", row)).items
    assert [message["content"] for message in item.messages] == ["ab", "", "2", "c"]
    assert item.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert item.tools == [{"type": "function"}]
    assert item.question == "2"


def message(**changed: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a"} | changed]}


CASES: dict[str, tuple[list[object], str]] = {
    "no form": ([{"a": 1}], "FILE:1: is of no known form (the row has: a). A row holds messages, intent and snippet,"),
    "no object": ([1], "FILE:1: must be an object, is a number"),
    "nothing": ([], "FILE: holds no examples"),
    "mixed": ([{"text": "a"}, {"messages": [USER]}], "FILE:2: holds messages, but FILE:1 holds text. One form in a"),
    "no completion's prompt": ([{"completion": "a"}], "FILE:1: field 'prompt': is missing (the row has: comp"),
    "blank text": ([{"text": " "}], "FILE:1: field 'text': is blank"),
    "messages are text": ([{"messages": "hi"}], "FILE:1: field 'messages': must be a list, is text"),
    "no messages": ([{"messages": []}], "FILE:1: field 'messages': is empty"),
    "a message is text": ([{"messages": ["hi"]}], "FILE:1: message 1: must be an object, is text"),
    "role": ([message(role="human")], "FILE:1: message 1: role 'human' is not known (system, user, assistant, tool)"),
    "no content": ([{"messages": [{"role": "user"}]}], "FILE:1: message 1: has no content"),
    "content is a number": ([message(content=1)], "FILE:1: message 1: content must be text, is a number"),
    "an image": ([message(content=[{"type": "image_url"}])], "FILE:1: message 1: holds a part of type 'image_url'; on"),
    "weight": ([message(weight=0.5)], "FILE:1: message 1: weight 0.5 must be 0 or 1"),
    "calls": ([message(tool_calls="x")], "FILE:1: message 1: tool_calls must be a list of objects"),
    "arguments": ([message(tool_calls=[{"function": {"arguments": "{"}}])], "FILE:1: message 1: arguments: not val"),
    "tools": ([message() | {"tools": {}}], "FILE:1: field 'tools': must be a list of objects"),
    "NUL": ([message(content="a\0")], "FILE:1: message 1: holds a NUL character at 1"),
    "surrogate": ([message(content="\ud800")], "FILE:1: message 1: holds a lone surrogate"),
    "question": ([{"text": "a", "question_id": "7"}], "FILE:1: field 'question_id': must be an integer, is text"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_read_is_one_line(case: str, tmp_path: Path) -> None:
    rows, said = CASES[case]
    file = put(tmp_path / "x.jsonl", *rows)
    with pytest.raises(InputError) as error:
        load_data(file)
    assert str(error.value).startswith(said.replace("FILE", str(file)))


def test_a_field_of_the_template_must_be_there(tmp_path: Path) -> None:
    file = put(tmp_path / "x", {"q": "a", "intent": "i", "snippet": "s"})
    with pytest.raises(InputError, match=r"field 'a': is missing \(the row has: q, intent, .* The template needs q, a"):
        load_data(file, template="{q}{a}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "template: {} is no plain field name"),
        ("{a!r}", "template: {a} is no plain field name"),
        ("{a:>9}", "template: {a} is no plain field name"),
        ("{a.b}", "template: {a.b} is no plain field name"),
        ("{a", "template: expected '}' before end of string in '{a'. Write {{ and }} for braces"),
        ("{{a}}", "template: holds no field, is '{{a}}'"),
    ],
)
def test_a_template_that_is_none(text: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        parse_template(text)
    assert str(error.value).startswith(said)


def test_a_template_s_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_template(str(tmp_path / "none"))


def test_the_format_is_kept_in_a_folder(tmp_path: Path) -> None:
    assert read_format(tmp_path) is None
    for kept in (DataFormat("messages", CHATML), DataFormat("template", "{q}\n{a}")):
        kept.write(tmp_path)
        assert read_format(tmp_path) == kept
    for given, said in (
        ({"form": "text"}, "must hold form and template, two texts"),
        ({"form": 1, "template": "{a}"}, "must hold form and template, two texts"),
        ({"form": "template", "template": "a"}, "template: holds no field, is 'a'"),
    ):
        (tmp_path / FORM_FILE).write_text(json.dumps(given))
        with pytest.raises(InputError) as error:
            read_format(tmp_path)
        assert str(error.value).startswith(f"{tmp_path / FORM_FILE}: {said}")


def test_a_typed_prompt_fills_the_one_field_of_a_prompt() -> None:
    assert make_prompt_item("p", DataFormat("template", "{q}\n{a}")).values == {"q": "p"}
    assert make_prompt_item("p", DataFormat("messages", CHATML)) == Item(messages=({"role": "user", "content": "p"},))
    with pytest.raises(InputError, match="prompts: the adapter's template asks for q, ctx, not one PROMPT"):
        make_prompt_item("p", DataFormat("template", "{q}{ctx}{a}"))
