"""Chats against transformers: the same ids and the same mask, for ten ways of writing them; and what is refused."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from minipeft.data.chat import ChatTemplate, load_chat_template
from minipeft.data.tokens import Tokenizer, load_tokenizer
from minipeft.errors import InputError

REFUSED = "F:1: chat template: the chat template refuses these messages "
HERE = Path(__file__).parent


def load_templates() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chat_templates", HERE / "chat_templates.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


texts = load_templates()

CHAT = [
    {"role": "system", "content": "Answer in\n\ncode."},
    {"role": "user", "content": "Sort xs — größte zuerst 🙂"},
    {"role": "assistant", "content": "xs.sort(reverse=True)"},
    {"role": "user", "content": " and now? "},
    {"role": "assistant", "content": "  [x for x in xs]\n\n"},
]
TOOLS = [{"type": "function", "function": {"name": "now", "description": "time & <date>", "parameters": {}}}]
CALLS = [
    {"role": "user", "content": "what time is it?"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "now", "arguments": {"zone": "ü"}}}]},
    {"role": "tool", "content": "noon"},
    {"role": "tool", "content": "or one"},
    {"role": "assistant", "content": "Noon."},
]


@pytest.fixture(scope="module", params=["smollm2-135m", "mistral-tokenizer"])
def folder(request: pytest.FixtureRequest, assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer, and one that puts a space before a text, with every special token of the templates."""
    folder = tmp_path_factory.mktemp(request.param)
    backend = tokenizers.Tokenizer.from_file(str(assets / "fixtures" / request.param / "tokenizer.json"))
    backend.add_special_tokens([*texts.SPECIAL[:-1], tokenizers.AddedToken("<|end|>", rstrip=True), "<s>", "</s>"])
    backend.add_tokens(texts.PLAIN)
    backend.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> object:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def chat_of(name: str) -> list[dict]:
    return CHAT[1:] if name in texts.NO_SYSTEM else CHAT


def template(folder: Path, text: str) -> ChatTemplate:
    return load_chat_template(folder, text=text)


def apply(theirs: object, text: str, messages: list[dict], **more: object) -> tuple[list[int], list[bool]]:
    """What transformers makes of a chat: ids, and the mask of the assistant's tokens."""
    made = theirs.apply_chat_template(
        messages, chat_template=text, return_dict=True, return_assistant_tokens_mask=True, **more
    )
    return made["input_ids"], [bool(token) for token in made["assistant_masks"]]


@pytest.mark.parametrize("marked", [True, False], ids=["generation", "prefixes"])
@pytest.mark.parametrize("name", texts.TEMPLATES)
def test_ids_and_mask_are_those_of_transformers(name: str, marked: bool, folder, ours, theirs) -> None:
    """Where the template does not mark the turns, the mask is that of the template that does."""
    if name == "qwen3" and not marked:
        return  # refused: the next test
    text = texts.TEMPLATES[name]
    wanted, mask = apply(theirs, text, chat_of(name))
    example = template(folder, text if marked else texts.without_marks(text)).encode(chat_of(name), None, ours)
    assert example.ids == wanted
    assert example.trained == mask
    assert 0 < sum(mask) < len(mask)
    assert example.prompt_tokens == mask.index(True)


@pytest.mark.parametrize("name", texts.TEMPLATES)
def test_a_prompt_is_that_of_transformers(name: str, folder, ours, theirs) -> None:
    text, asked = texts.TEMPLATES[name], chat_of(name)[:-1]
    wanted = theirs.apply_chat_template(asked, chat_template=text, add_generation_prompt=True)["input_ids"]
    assert template(folder, text).encode_prompt(asked, None, ours) == wanted


@pytest.mark.parametrize("marked", [True, False])
def test_tools_are_written_as_in_transformers(marked: bool, folder, ours, theirs) -> None:
    text = texts.TEMPLATES["qwen2.5"]
    wanted, mask = apply(theirs, text, CALLS, tools=TOOLS)
    example = template(folder, text if marked else texts.without_marks(text)).encode(CALLS, TOOLS, ours)
    assert (example.ids, example.trained) == (wanted, mask)


def test_a_template_that_rewrites_earlier_turns_is_refused(folder, ours) -> None:
    """Qwen3 without marks: the thoughts of the first answer are gone once it is followed by another question."""
    thinking = template(folder, texts.without_marks(texts.TEMPLATES["qwen3"]))
    with pytest.raises(InputError) as error:
        thinking.encode(CHAT, None, ours, "F:3")
    assert str(error.value).startswith(
        "F:3: messages: the chat template writes what comes before turn 3 otherwise once it"
    )
    assert "{% generation %}" in str(error.value)
    one = thinking.encode(CHAT[:3], None, ours)
    assert "<think>" in ours.decode([token for token, kept in zip(one.ids, one.trained) if kept])


@settings(deadline=None, derandomize=True, max_examples=40)
@given(parts=st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>system", "</s>", " ", "\n", "a", "é", "<think>"]),
                      min_size=1, max_size=6))  # fmt: skip
def test_special_tokens_in_data_are_text(parts: list[str], folder, ours) -> None:
    """However data spells them: as many special tokens as in the same chat without them, and the text comes back."""
    said = "".join(parts)
    plain = template(folder, texts.CHATML)
    special = {ours.backend.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>", "</s>")}
    count = lambda chat: sum(token in special for token in plain.encode(chat, None, ours).ids)
    chat = [{"role": "user", "content": said}, {"role": "assistant", "content": f"{said}x"}]
    assert count(chat) == count([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]) == 4
    example = plain.encode(chat, None, ours)
    answered = [token for token, kept in zip(example.ids, example.trained) if kept]
    assert answered[-1] == ours.backend.token_to_id("<|im_end|>")
    if (
        "Ġ" in ours.backend.get_vocab()
    ):  # a token may hold the line end before the turn and its first sign, as in theirs
        assert ours.decode(answered[:-1], skip_special=False).lstrip() == f"{said}x".lstrip()


def test_a_template_may_spell_a_special_token_in_parts(folder, ours) -> None:
    """Phi-3 makes <|user|> of a role; and the same text in a content stays text."""
    user = ours.backend.token_to_id("<|user|>")
    chat = [{"role": "user", "content": "<|user|>"}, {"role": "assistant", "content": "b"}]
    assert template(folder, texts.PHI3).encode(chat, None, ours).ids.count(user) == 1


def test_a_weight_of_zero_is_not_trained_on(folder, ours, theirs) -> None:
    for text in (texts.CHATML, texts.without_marks(texts.CHATML)):
        chat = [*CHAT[:2], CHAT[2] | {"weight": 0}, *CHAT[3:]]
        example, whole = (template(folder, text).encode(c, None, ours) for c in (chat, CHAT))
        assert example.ids == whole.ids
        assert sum(example.trained) < sum(whole.trained)
        assert not any(example.trained[: len(example.trained) // 2])


def test_the_token_that_ends_a_turn_is_found(folder, ours) -> None:
    for name, end in (("chatml", "<|im_end|>"), ("gemma", "<end_of_turn>"), ("zephyr", "</s>"), ("phi3", "<|end|>")):
        for text in (texts.TEMPLATES[name], texts.without_marks(texts.TEMPLATES[name])):
            assert template(folder, text).find_end(ours) == {ours.backend.token_to_id(end)}


@pytest.mark.parametrize(
    ("text", "messages", "said"),
    [
        (texts.CHATML, CHAT[:2], "F:1: messages: the assistant says nothing that could be trained on"),
        ("{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}", CHAT[1:3],
         "F:1: messages: everything is said by the assistant, nothing is asked"),
        (texts.MISTRAL, CHAT, REFUSED + "(Roles must alternate: user"),
        (texts.GEMMA, CHAT, REFUSED + "(System role not supported)"),
        ("{{ messages[0].content + 1 }}", CHAT, REFUSED + "(can only"),
        ("{{ ''.__class__.__mro__ }}", CHAT, REFUSED + "(access to attr"),
        ("{% set ns = namespace(_a=1) %}", CHAT, REFUSED + "(a namespace"),
        ("{{ range(10**9) | list }}", CHAT, REFUSED + "(Range too big"),
        (texts.CHATML, [{"role": "user", "content": "\ufdd0"}, CHAT[2]], "F:1: messages: holds U+FDD0, which is no"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on(text: str, messages: list[dict], said: str, folder, ours) -> None:
    with pytest.raises(InputError) as error:
        template(folder, text).encode(messages, None, ours, "F:1")
    assert str(error.value).startswith(said)


def test_where_a_template_stands(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the model has no chat template \(chat_template.jinja, or chat_template in"):
        load_chat_template(folder)
    with pytest.raises(InputError, match="chat template: line 2: no valid Jinja: "):
        load_chat_template(folder, text="a\n{% if %}")
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}"}))
    assert load_chat_template(tmp_path).render([]) == "<s>"
    both = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    config.write_text(json.dumps({"chat_template": both}))
    assert load_chat_template(tmp_path).render([]) == "plain"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_chat_template(tmp_path).render([]) == "file"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.jinja").symlink_to(HERE / "chat_templates.py")
    with pytest.raises(InputError, match="is a link that leaves the model folder"):
        load_chat_template(tmp_path)
    config.write_text(json.dumps({"chat_template": 7}))
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="chat_template: must be text, is a number"):
        load_chat_template(tmp_path)
