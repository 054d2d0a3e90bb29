"""Generate answers with a base or tuned model: to prompts, or to a data set's questions in a resumable file.

Each line of the file is a JSON object: prediction, reference, question_id, intent, ended (eos, stop, limit). Until all
questions are answered the file is FILE.part, to which a line is appended per answer; the same command resumes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from minipeft.adapters import merge_adapter
from minipeft.adapters.peft_format import find_adapter, load_adapter
from minipeft.data.chat import ChatTemplate, load_chat_template
from minipeft.data.forms import (
    CHAT,
    FORM_FILE,
    FORMS,
    PAIRS,
    Data,
    DataFormat,
    Item,
    encode_questions,
    get_reference,
    load_data,
    make_prompt_item,
    read_format,
)
from minipeft.data.templates import read_template
from minipeft.data.tokens import Tokenizer
from minipeft.errors import InputError, check_fields, check_path, option
from minipeft.files import name_type, parse_json, read_text, write_whole
from minipeft.generation import Answer, GenerateConfig, answer, generate
from minipeft.hub import fetch
from minipeft.models import Decoder
from minipeft.models.checkpoint import check_device
from minipeft.runs.config import ModelConfig
from minipeft.runs.folder import check_alike
from minipeft.runs.preparation import load_given, load_tokens
from minipeft.training.processes import Processes, check_processes


@dataclass(frozen=True)
class AnswersConfig:
    """Settings of `minipeft generate`: the model and its adapter, the data set, and the file of answers."""

    model: ModelConfig
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    adapter: Path | None = option(None, "folder or hub id of an adapter, ours or PEFT's")
    adapter_revision: str | None = option(None, "commit, tag or branch of the adapter on the hub")
    merge: bool = option(False, "merge the adapter into the weights first")
    raw: bool = option(False, "continue PROMPT unchanged, without the training template")
    template: str | None = option(None, "format string, or a file of one; default the adapter's own, else the paper's")
    data: str | None = option(None, "answer the questions of this data set instead of PROMPT")
    split: str = option("test", "split of the data set, where it has several")
    limit: int | None = option(None, "answer the first N questions only", least=1)
    out: Path | None = option(None, "JSON lines with prediction and reference; resumable")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.data is not None and self.out is None:
            raise InputError("must be given with data: the answers are written there", where="out")
        if self.data is not None and self.raw:
            raise InputError("has no effect with data: questions take the training template", where="raw")
        if self.raw and self.template is not None:
            raise InputError("has no effect with raw", where="template")
        for name, plain in (("split", "test"), ("limit", None), ("out", None)):
            if self.data is None and getattr(self, name) != plain:
                raise InputError("has no effect without data", where=name)


@dataclass(frozen=True)
class Asking:
    """How a question becomes prompt ids: the form of the data, the template, and the chat template."""

    format: DataFormat
    chat: ChatTemplate | None

    def encode(self, items: Sequence[Item], tokenizer: Tokenizer) -> list[list[int]]:
        """Encode the prompt of each row."""
        return encode_questions(items, self.format, tokenizer, self.chat)


def choose_format(config: AnswersConfig) -> DataFormat | None:
    """Choose form and template of the prompts: the caller's, else those of the training; None without either.

    Raises:
        InputError: the folder's record is invalid.
    """
    if config.template is not None:
        return DataFormat("template", read_template(config.template).text)
    return find_format(config)


def make_asking(config: AnswersConfig, form: DataFormat) -> Asking:
    """Load the chat template where the prompts are chats.

    Raises:
        InputError: the model has none.
    """
    return Asking(form, load_chat(config.model, form.template) if form.form == CHAT else None)


def find_format(config: AnswersConfig) -> DataFormat | None:
    """Find form and template of the training of the adapter or the model; None if neither folder records them."""
    if config.adapter is None:
        given = config.model
        return read_format(fetch(given.source, ["config.json"], revision=given.revision, optional=[FORM_FILE]))
    return read_format(find_adapter(config.adapter, config.adapter_revision, also=[FORM_FILE]))


def load_chat(model: ModelConfig, text: str | None = None) -> ChatTemplate:
    """Load the chat template of a model; `text` is the one that an adapter was trained with."""
    return load_chat_template(model.source, revision=model.revision, text=text)


def load_tuned(config: AnswersConfig, say: Callable[[str], None] = print) -> tuple[Decoder, Tokenizer]:
    """Load the model, its adapter if given, and the tokenizer; `say` gets the notes on the adapter's files."""
    given = config.model
    check_device(given.device)
    tokenizer = load_tokens(given)
    model = load_given(given)
    if config.adapter is not None:
        report = load_adapter(
            model, config.adapter, revision=config.adapter_revision, legacy_bin=config.model.legacy_bin
        )
        for note in report.notes:
            say(f"note: {note}")
    tokenizer.check_fits(model.config.vocab_size, given.source)  # after the adapter, which may have resized it
    if config.merge:
        merge_adapter(model)
    return model, tokenizer


def answer_prompts(model: Decoder, tokenizer: Tokenizer, config: AnswersConfig, prompts: Sequence[str]) -> list[str]:
    """Answer each prompt; unless `raw` is set, it is inserted into the training template."""
    if config.raw:
        return generate(model, tokenizer, prompts, config.generate)
    asking = make_asking(config, choose_format(config) or PAIRS)
    rows = asking.encode([make_prompt_item(prompt, asking.format) for prompt in prompts], tokenizer)
    ends = asking.chat.find_end(tokenizer) if asking.chat else set()
    found = answer(model, tokenizer, rows, config.generate, ends=ends)
    return [a.text for a in sorted(found, key=lambda a: a.index)]


def answer_data(model: Decoder, tokenizer: Tokenizer, config: AnswersConfig, processes: Processes | None = None) -> int:
    """Answer the questions of `config.data` into the file `config.out`, resumably; returns how many there are.

    `processes` (training/processes.py) share the batches, which are those of one process; rank 0 writes the file.

    Raises:
        InputError: the file exists, FILE.part was started with other settings, or the data is of another form than the
            adapter was trained on.
    """
    assert config.data is not None
    processes = check_processes(processes)
    out = check_path(config.out, "out")
    data = load_questions(config.data, config.split, choose_format(config))
    asking = make_asking(config, data.format)
    items = data.items[: config.limit]
    about = {"model": config.model.source, "adapter": str(config.adapter), "merge": config.merge}
    if config.adapter_revision is not None:
        about["adapter_revision"] = config.adapter_revision
    identity = {"settings": asdict(config.generate), **about, "data_sha256": data.sha256, "questions": len(items)}
    if asking.format != PAIRS:
        identity |= {"form": asking.format.form, "template": asking.format.template}
    check_alike(identity, processes)
    part = out.with_name(out.name + ".part")
    done: dict[int, dict[str, Any]] = {}

    def find_left() -> list[int]:
        if out.exists():
            raise InputError("exists already", file=out, hint="Name another --out, or remove it")
        done.update(begin(part, json.loads(json.dumps(identity))))
        return [number for number in range(len(items)) if number not in done]

    left = processes.lead(find_left)
    prompts = asking.encode(items, tokenizer)
    ends = asking.chat.find_end(tokenizer) if asking.chat else set()
    batches = share_batches(left, prompts, config.generate.batch, processes)
    answers = answer(model, tokenizer, prompts, config.generate, only=list(chain.from_iterable(batches)), ends=ends)
    rounds = (asdict(a) for a in answers)
    with open_part(part, processes) as stream, show_answers(len(items), len(items) - len(left), processes) as bar:

        def write(found: list[dict[str, Any]]) -> None:
            for a in map(lambda fields: Answer(**fields), found):
                done[a.index] = make_answer_line(items[a.index], a, asking.format)
                add_line(stream, part, {"index": a.index, **done[a.index]})
                bar.update()

        each = config.generate.batch if processes.size > 1 else 1  # answers that a process gives in a round
        for _ in range(-(-len(left) // (each * processes.size))):
            found = processes.exchange(list(islice(rounds, each)))
            processes.lead(lambda found=found: write(list(chain.from_iterable(found))))  # type: ignore[misc]

    def finish() -> None:
        lines = "".join(json.dumps(done[number]) + "\n" for number in range(len(items)))
        write_whole(out, lambda target: target.write(lines.encode()))
        part.unlink()

    processes.lead(finish)
    return len(items)


def share_batches(
    left: Sequence[int], prompts: Sequence[list[int]], batch: int, processes: Processes
) -> list[list[int]]:
    """The batches of this process: each W-th of those that one process would make, by prompt length.

    All but the last of one process are full, so that `answer` makes the same batches of the prompts of one rank.
    """
    order = sorted(left, key=lambda number: len(prompts[number]))
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    return batches[processes.rank :: processes.size]


def open_part(part: Path, processes: Processes) -> IO[str]:
    """Open FILE.part to append to it; rank 0 alone writes."""
    return open(part if processes.rank == 0 else os.devnull, "a", encoding="utf-8")


def show_answers(total: int, initial: int, processes: Processes) -> tqdm[Any]:
    """The progress bar of the answers, on rank 0 alone and in a terminal alone."""
    return tqdm(total=total, initial=initial, unit="answer", disable=None if processes.rank == 0 else True)


def load_questions(source: str, split: str, form: DataFormat | None) -> Data:
    """Load the rows to answer, which must have the form of the training data; None: any form.

    Raises:
        InputError: they are of another form.
    """
    if form is None:
        return load_data(source, split=split)
    known = form.form in {found.form for found in FORMS.values()} and (form.form == CHAT or form in FORMS.values())
    data = load_data(source, split=split, template=None if known else form.template)
    if known and data.format.form != form.form:
        problem = f"holds {data.format.form}, but the adapter was trained on {form.form}"
        raise InputError(problem, file=data.file, hint="Give data of that form, or --template")
    return replace(data, format=form)


def make_answer_line(item: Item, answer: Answer, form: DataFormat) -> dict[str, Any]:
    """Build a line of the file."""
    row = {"prediction": answer.text, "reference": get_reference(item, form), "question_id": item.question_id}
    return {**row, "intent": item.question, "ended": answer.ended}


def add_line(stream: IO[str], part: Path, entry: Mapping[str, Any]) -> None:
    """Write one answer to FILE.part.

    Raises:
        InputError: the write fails; resuming drops the partial line.
    """
    try:
        stream.write(json.dumps(entry) + "\n")
        stream.flush()
    except OSError as error:
        with suppress(OSError):  # the unwritten bytes are still in the buffer
            stream.close()
        hint = "The answers so far are kept: solve this, then give the same command again"
        raise InputError(f"cannot write: {error.strerror}", file=part, hint=hint) from error


def begin(part: Path, identity: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Start FILE.part with a line that identifies it, or read its answers; a partial last line is dropped."""
    if not part.exists():
        write_whole(part, lambda stream: stream.write((json.dumps(identity) + "\n").encode()))
        return {}
    text = read_text(part)
    whole = text[: text.rfind("\n") + 1]
    head, *lines = [parse_json(line, part, f"line {n}") for n, line in enumerate(whole.splitlines(), 1)] or [None]
    if head != identity:
        raise InputError("was started with other settings", file=part, hint="Remove it, or give the same arguments")
    if whole != text:
        write_whole(part, lambda stream: stream.write(whole.encode()))
    return {line.pop("index"): line for line in lines}


class AnswerColumns(NamedTuple):
    """The columns of a file of answers."""

    predictions: list[str]
    references: list[str | list[str]]
    cut: list[bool] | None  # whether each was cut off at the token limit; None: not recorded
    questions: list[int | str | None]  # question_id, or HumanEval's task_id; None: a question of its own


def read_answers(file: Path) -> AnswerColumns:
    """Read a file of answers.

    Raises:
        InputError: a line is not an object with a text `prediction` and a text, or list of texts, `reference`.
    """
    file = check_path(file, "file")
    rows = list(read_answer_lines(file))
    if not rows:
        raise InputError("holds no answers", file=file)
    known = all("ended" in row for row in rows)
    cut = [row["ended"] == "limit" for row in rows] if known else None
    predictions, references = [row["prediction"] for row in rows], [row["reference"] for row in rows]
    questions = [row.get("question_id", row.get("task_id")) for row in rows]
    return AnswerColumns(predictions, references, cut, questions)


def read_answer_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Read and check the lines of a file of answers."""
    for number, line in enumerate(
        read_text(file).split("\n"), 1
    ):  # JSON strings may hold characters at which splitlines() splits
        if not line.strip():
            continue
        row = parse_json(line, file, f"line {number}")
        if not isinstance(row, dict):
            raise InputError(f"must be an object, is {name_type(row)}", file=file, where=f"line {number}")
        for name in ("prediction", "reference"):
            if name not in row:
                raise InputError(f"field {name!r} is missing", file=file, where=f"line {number}")
            texts = row[name] if name == "reference" and isinstance(row[name], list) else [row[name]]
            if not texts or not all(isinstance(text, str) for text in texts):
                raise InputError(
                    f"field {name!r} must be text, is {name_type(row[name])}", file=file, where=f"line {number}"
                )
        if not isinstance(row.get("question_id"), int | str | None):
            found = name_type(row["question_id"])
            raise InputError(
                f"field 'question_id' must be text or an integer, is {found}", file=file, where=f"line {number}"
            )
        yield row
