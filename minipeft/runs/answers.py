"""Answers to the questions of a data set, in a file: make it, resume it, read it back.

Each line is a JSON object: prediction, reference, question_id, intent, ended (eos, stop, limit). While it is being made
the file is called FILE.part and gets a line per answer; the same command continues where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from minipeft.adapters import merge_adapter
from minipeft.adapters.peft_format import load_adapter
from minipeft.data.examples import load_pairs
from minipeft.data.templates import prompt_text
from minipeft.data.tokens import Tokenizer, load_tokenizer
from minipeft.errors import InputError
from minipeft.files import kind_of, parse_json, read_text, write_whole
from minipeft.generation import GenerateConfig, answer
from minipeft.models import Decoder
from minipeft.models.checkpoint import load_model
from minipeft.runs.config import DTYPES, ModelConfig
from minipeft.runs.process import check_device


def load_tuned(
    config: ModelConfig, adapter: str | Path | None = None, *, merge: bool = False, say: Callable[[str], None] = print
) -> tuple[Decoder, Tokenizer]:
    """The model, with an adapter where one is named, and the tokenizer; `say` gets what the adapter's file notes."""
    check_device(config.device)
    tokenizer = load_tokenizer(config.source, revision=config.revision)
    if config.eos_token is not None:
        tokenizer = tokenizer.with_eos(config.eos_token)
    model = load_model(
        config.source,
        dtype=None if config.dtype is None else DTYPES[config.dtype],
        device=config.device,
        revision=config.revision,
        legacy_bin=config.legacy_bin,
    )
    tokenizer.check_fits(model.config.vocab_size, config.source)
    if adapter is not None:
        for note in load_adapter(model, adapter).notes:
            say(f"note: {note}")
    if merge:
        merge_adapter(model)
    return model, tokenizer


def answer_data(
    model: Decoder,
    tokenizer: Tokenizer,
    generate: GenerateConfig,
    data: str,
    out: Path,
    *,
    split: str = "test",
    limit: int | None = None,
    about: Mapping[str, object] | None = None,
) -> int:
    """Answer the questions of a data set into the file `out`, resumably; returns how many there are.

    `limit`: the first so many only. `about` says what answers them (model, adapter): a resumed file must repeat it.

    Raises:
        InputError: the file exists, or FILE.part was begun with other settings.
    """
    if out.exists():
        raise InputError("exists already", file=out, hint="Name another --out, or remove it")
    pairs = load_pairs(data, split=split)
    items = pairs.items[:limit]
    identity = {"settings": asdict(generate), **(about or {}), "data_sha256": pairs.sha256, "questions": len(items)}
    part = out.with_name(out.name + ".part")
    done = begin(part, json.loads(json.dumps(identity)))
    left = [number for number in range(len(items)) if number not in done]
    prompts = [prompt_text(pair.intent) for pair in items]
    with (
        open(part, "a", encoding="utf-8") as stream,
        tqdm(total=len(items), initial=len(done), unit="answer", disable=None) as bar,
    ):
        for a in answer(model, tokenizer, prompts, generate, only=left):
            pair = items[a.index]
            done[a.index] = {
                "prediction": a.text,
                "reference": pair.snippet,
                "question_id": pair.question_id,
                "intent": pair.intent,
                "ended": a.ended,
            }
            stream.write(json.dumps({"index": a.index, **done[a.index]}) + "\n")
            stream.flush()
            bar.update()
    lines = "".join(json.dumps(done[number]) + "\n" for number in range(len(items)))
    write_whole(out, lambda target: target.write(lines.encode()))
    part.unlink()
    return len(items)


def begin(part: Path, identity: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Begin FILE.part with a line that identifies it, or read its answers; a torn last line is dropped."""
    if not part.exists():
        write_whole(part, lambda stream: stream.write((json.dumps(identity) + "\n").encode()))
        return {}
    text = read_text(part)
    whole = text[: text.rfind("\n") + 1]
    head, *lines = [parse_json(line, part, f"line {n}") for n, line in enumerate(whole.splitlines(), 1)] or [None]
    if head != identity:
        raise InputError("was begun with other settings", file=part, hint="Remove it, or give the same arguments")
    if whole != text:
        write_whole(part, lambda stream: stream.write(whole.encode()))
    return {line.pop("index"): line for line in lines}


class AnswerColumns(NamedTuple):
    """A file of answers by column."""

    predictions: list[str]
    references: list[str | list[str]]
    cut: list[bool] | None  # whether each was cut off at the limit; None where the file does not say
    questions: list[int | str | None]  # question_id; None: a question of its own


def read_answers(file: Path) -> AnswerColumns:
    """Read a file of answers.

    Raises:
        InputError: a line is not an object with a text `prediction` and a text, or list of texts, `reference`.
    """
    rows = list(answers_in(file))
    if not rows:
        raise InputError("holds no answers", file=file)
    known = all("ended" in row for row in rows)
    cut = [row["ended"] == "limit" for row in rows] if known else None
    predictions, references = [row["prediction"] for row in rows], [row["reference"] for row in rows]
    return AnswerColumns(predictions, references, cut, [row.get("question_id") for row in rows])


def answers_in(file: Path) -> Iterator[dict[str, Any]]:
    """The checked lines of a file of answers."""
    for number, line in enumerate(read_text(file).split("\n"), 1):  # JSON may hold what splitlines() splits at
        if not line.strip():
            continue
        row = parse_json(line, file, f"line {number}")
        if not isinstance(row, dict):
            raise InputError(f"must be an object, is {kind_of(row)}", file=file, where=f"line {number}")
        for name in ("prediction", "reference"):
            if name not in row:
                raise InputError(f"field {name!r} is missing", file=file, where=f"line {number}")
            texts = row[name] if name == "reference" and isinstance(row[name], list) else [row[name]]
            if not texts or not all(isinstance(text, str) for text in texts):
                raise InputError(
                    f"field {name!r} must be text, is {kind_of(row[name])}", file=file, where=f"line {number}"
                )
        if not isinstance(row.get("question_id"), int | str | None):
            found = kind_of(row["question_id"])
            raise InputError(
                f"field 'question_id' must be text or an integer, is {found}", file=file, where=f"line {number}"
            )
        yield row
