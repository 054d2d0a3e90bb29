"""A conversation streams what `answer` gives, remembers it, and goes through a pipe; an adapter keeps its template."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch

from minipeft import cli
from minipeft.data.chat import load_chat_template
from minipeft.data.tokens import load_tokenizer
from minipeft.errors import InputError
from minipeft.generation import GenerateConfig, answer, stream
from minipeft.models.checkpoint import load_model
from minipeft.runs import estimates
from minipeft.runs import finetune as tuning
from minipeft.runs.answers import AnswersConfig
from minipeft.runs.config import ModelConfig, run_config
from minipeft.runs.conversation import ChatConfig, Conversation, open_conversation
from minipeft.training.processes import check_processes
from tests.small import write_small_model

TEMPLATE = """{% for m in messages %}{{ m.role[0] ~ ':' ~ m.content ~ '<|endoftext|>' }}{% endfor %}
{%- if add_generation_prompt %}a:{% endif %}"""
CHATS = [
    {"messages": [{"role": "user", "content": f"add {n}"}, {"role": "assistant", "content": f"x += {n}"}]}
    for n in range(8)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template, chats, and an adapter that was trained on them."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("chat")
    write_small_model(folder / "model", "llama", layers=1)
    (folder / "model/chat_template.jinja").write_text(TEMPLATE)
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimates, "probe_flops", lambda *_: 1e9)
        given = {"model": folder / "model", "data": folder / "chats.jsonl", "out": folder / "run", "steps": 3}
        words = [
            str(part)
            for name, value in (given | {"held-out": 2, "length": 64}).items()
            for part in (f"--{name}", value)
        ]
        assert cli.main(["train", *words]) == 0
    return folder


def open_it(folder: Path, **more: object) -> Conversation:
    config = AnswersConfig(
        ModelConfig(str(folder / "model")), GenerateConfig(temperature=0.9, seed=3), adapter=folder / "run/adapter"
    )
    return open_conversation(config, ChatConfig(**more), 8, say=lambda _: None)


def test_a_stream_is_the_answer_in_pieces(folder: Path) -> None:
    """With bytes that are half a character, stop texts and ends, whatever is drawn."""
    model, tokenizer = load_model(folder / "model"), load_tokenizer(folder / "model")
    prompt, ended = tokenizer.encode("u:größe"), []
    for seed in range(24):
        config = GenerateConfig(8, temperature=1.5, seed=seed)
        whole = next(iter(answer(model, tokenizer, [prompt], config)))
        assert "".join(stream(model, tokenizer, prompt, config)) == whole.text
        mark = whole.text[2:4]
        cases = [(replace(config, stop=(mark,)), set())] if mark.strip("\0") == mark != "" else []
        cases += [(config, {whole.ids[3]})] if len(whole.ids) > 3 else []
        for cut, ends in cases:
            wanted = next(iter(answer(model, tokenizer, [prompt], cut, ends=ends)))
            assert "".join(stream(model, tokenizer, prompt, cut, ends)) == wanted.text
            ended.append(wanted.ended)
    assert {"stop", "eos"} <= set(ended)
    assert len(ended) > 24


def test_what_was_said_is_remembered(folder: Path) -> None:
    talk = open_it(folder, system="s")
    first = "".join(talk.ask("one"))
    assert talk.messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": first},
    ]
    asked = []
    encode = talk.chat.encode_prompt
    talk.chat.encode_prompt = lambda messages, *rest: asked.append(messages) or encode(messages, *rest)
    next(talk.ask("two"))  # not read to its end
    assert asked[0] == [*talk.messages, {"role": "user", "content": "two"}]
    assert len(talk.messages) == 3
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "s"}]
    with pytest.raises(InputError, match=r"exceed the context, 96.* /reset begins a new conversation"):
        list(talk.ask("x" * 90))


def test_a_conversation_goes_through_a_pipe(folder: Path) -> None:
    words = ["chat", "--model", folder / "model", "--adapter", folder / "run/adapter", "--max-new-tokens", 6]
    command = [sys.executable, "-m", "minipeft", *map(str, words), "--temperature", "1.5", "--seed", "1"]
    said = "add 1\n\nadd 1\n/reset\nadd 1\n" + "x" * 95 + "\n/quit\nnever\n"
    ran = subprocess.run(
        command, input=said, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ran.returncode == 0, ran.stderr
    assert "note: prompt: " in ran.stderr
    assert "/reset begins a new conversation" in ran.stderr
    talk = Conversation(*load(folder), GenerateConfig(6, temperature=1.5, seed=1))
    first, second = "".join(talk.ask("add 1")), "".join(talk.ask("add 1"))
    assert first != second != ""  # the first turn is remembered
    from minipeft.runs.survey import show

    assert ran.stdout == "".join(f"{show(text)}\n" for text in (first, second, first))


def load(folder: Path) -> tuple:
    """What a conversation with the adapter needs."""
    talk = open_it(folder)
    return talk.model, talk.tokenizer, talk.chat


def test_an_adapter_remembers_the_chat_template(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is that of training, also where the model's folder has another one now, and generate uses it."""
    kept = json.loads((folder / "run/adapter/minipeft_data.json").read_text())
    assert kept == {"form": "messages", "template": TEMPLATE}
    given = ["generate", "--model", folder / "model", "--adapter", folder / "run/adapter", "--max-new-tokens", 5]
    words = [str(word) for word in [*given, "--temperature", 1.5, "--seed", 1]]
    capsys.readouterr()
    assert cli.main([*words, "add 1"]) == 0
    templated = capsys.readouterr().out
    assert cli.main([*words, "--raw", "u:add 1<|endoftext|>a:"]) == 0
    raw = capsys.readouterr().out
    model, tokenizer, chat = load(folder)
    prompt = chat.encode_prompt([{"role": "user", "content": "add 1"}], None, tokenizer)
    wanted = next(iter(answer(model, tokenizer, [prompt], GenerateConfig(5, temperature=1.5, seed=1))))
    assert templated == wanted.text + "\n"
    assert raw != templated  # typed, <|endoftext|> is text
    out = folder / "answers.jsonl"
    assert cli.main([*words, "--data", str(folder / "chats.jsonl"), "--limit", "2", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["intent"], row["reference"]) for row in rows] == [("add 0", "x += 0"), ("add 1", "x += 1")]
    assert all(row["prediction"] for row in rows)


def test_what_is_no_conversation(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "minipeft_data.json").write_text(json.dumps({"form": "text", "template": "{text}"}))
    (tmp_path / "adapter_config.json").write_text("{}")
    config = AnswersConfig(ModelConfig(str(folder / "model")), adapter=tmp_path)
    with pytest.raises(InputError, match=r"was trained on text, not on chats. minipeft generate answers single"):
        open_conversation(config, ChatConfig(), None, say=print)
    with pytest.raises(InputError, match="the model has no chat template"):
        open_conversation(AnswersConfig(ModelConfig("demo")), ChatConfig(), None, say=print)


def test_the_loss_is_on_the_assistants_turns_alone(folder: Path) -> None:
    """The log's first step counts the tokens of the assistant and the token that ends its turn, and no other."""
    tokenizer, chat = load_tokenizer(folder / "model"), load_chat_template(folder / "model")
    first = json.loads((folder / "run/log.jsonl").read_text().splitlines()[1])
    examples = [chat.encode(row["messages"], None, tokenizer) for row in CHATS]
    assert {sum(example.trained) for example in examples} == {len("x += 1") + 1}
    assert first["targets"] % 7 == 0
    assert first["tokens"] == first["targets"] // 7 * len(examples[0].ids)


def test_a_run_with_another_template_or_day_is_another_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be resumed: the text that it trains on has changed."""
    model = folder / "dated"
    shutil.copytree(folder / "model", model)
    (model / "chat_template.jinja").write_text("{{ strftime_now('%d') }}" + TEMPLATE)
    monkeypatch.setattr(estimates, "probe_flops", lambda *_: 1e9)
    given = {
        "model": str(model),
        "data": str(folder / "chats.jsonl"),
        "steps": 2,
        "held_out": 2,
        "length": 64,
        "rank": 2,
    }
    config = run_config("lora", **given)
    identity, _ = tuning.identify(config, tuning.prepare(config.model, config.data), check_processes(None))
    assert identity["chat_template_date"] == str(date.today())
    tuning.finetune(config, folder / "dated-run", say=lambda _: None)
    (model / "chat_template.jinja").write_text("{{ strftime_now('%d') }} " + TEMPLATE)
    with pytest.raises(InputError, match=r"this run was started differently \(chat_template_sha256: "):
        tuning.finetune(config, folder / "dated-run", resume=True, say=lambda _: None)
    plain = config.change(model=str(folder / "model"))
    identity, _ = tuning.identify(plain, tuning.prepare(plain.model, plain.data), check_processes(None))
    assert "chat_template_date" not in identity
