"""What `minipeft generate` and `minipeft score` do: answer prompts or a data set, and read the answers back.

A file of answers has one JSON object a line: prediction, reference, question_id, intent, ended (eos, stop, limit).
While it is being made it is called FILE.part, a line as each answer comes; the same command goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minipeft.adapters import merge_adapter
from minipeft.adapters.peft_format import load_adapter
from minipeft.data.examples import load_pairs, prompt_text
from minipeft.data.tokens import Tokenizer, load_tokenizer
from minipeft.errors import InputError
from minipeft.files import kind_of, parse_json, read_text, write_whole
from minipeft.generation import GenerateConfig, answer, generate
from minipeft.metrics.text import TextScores
from minipeft.models import Decoder
from minipeft.models.checkpoint import load_model
from minipeft.runs.config import DTYPES
from minipeft.runs.process import check_device


def load_tuned(options: Namespace) -> tuple[Decoder, Tokenizer]:
    """The model, with its adapter if one is named, and the tokenizer."""
    check_device(options.device)
    if options.dtype not in (None, *DTYPES):
        raise InputError(f"{options.dtype!r} is not known ({', '.join(DTYPES)})", where="dtype")
    tokenizer = load_tokenizer(options.model, revision=options.revision)
    model = load_model(
        options.model,
        dtype=DTYPES.get(options.dtype),
        device=options.device,
        revision=options.revision,
        legacy_bin=options.legacy_bin,
    )
    tokenizer.check_fits(model.config.vocab_size, options.model)
    if options.adapter is not None:
        load_adapter(model, options.adapter)
    if options.merge:
        merge_adapter(model)
    return model, tokenizer


def answer_prompts(model: Decoder, tokenizer: Tokenizer, config: GenerateConfig, options: Namespace) -> list[str]:
    """The answers to the prompts of the command line."""
    texts = options.prompts if options.raw else [prompt_text(prompt) for prompt in options.prompts]
    return generate(model, tokenizer, texts, config)


def answer_data(model: Decoder, tokenizer: Tokenizer, config: GenerateConfig, options: Namespace) -> None:
    """Answer each question of a data set into a file, resumably.

    Raises:
        InputError: the file exists; or FILE.part was begun with other settings.
    """
    out: Path = options.out
    if out.exists():
        raise InputError("exists already", file=out, hint="Name another --out, or remove it")
    pairs = load_pairs(options.data, split=options.split)
    items = pairs.items[: options.limit]
    begun = {
        "settings": asdict(config),
        "model": options.model,
        "adapter": str(options.adapter),
        "merge": options.merge,
        "data_sha256": pairs.sha256,
        "questions": len(items),
    }
    part = out.with_name(out.name + ".part")
    done = begin(part, json.loads(json.dumps(begun)))
    left = [number for number in range(len(items)) if number not in done]
    prompts = [prompt_text(items[number].intent) for number in range(len(items))]
    with (
        open(part, "a", encoding="utf-8") as stream,
        tqdm(total=len(items), initial=len(done), unit="answer", disable=None) as bar,
    ):
        for a in answer(model, tokenizer, prompts, config, only=left):
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
    print(f"{out}: {len(items)} answers", file=sys.stderr)


def begin(part: Path, begun: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Start FILE.part with a line that says what it is for, or read what it holds; a last line cut short is dropped."""
    if not part.exists():
        write_whole(part, lambda stream: stream.write((json.dumps(begun) + "\n").encode()))
        return {}
    text = read_text(part)
    whole = text[: text.rfind("\n") + 1]
    head, *lines = [parse_json(line, part, f"line {n}") for n, line in enumerate(whole.splitlines(), 1)] or [None]
    if head != begun:
        raise InputError("was begun with other settings", file=part, hint="Remove it, or give the same arguments")
    if whole != text:
        write_whole(part, lambda stream: stream.write(whole.encode()))
    return {line.pop("index"): line for line in lines}


def read_answers(file: Path) -> tuple[list[str], list[str | list[str]], list[bool] | None]:
    """Predictions, references, and whether each answer was cut off (None where the file does not say).

    Raises:
        InputError: a line is not an object with a text `prediction` and a text, or list of texts, `reference`.
    """
    rows = list(answers_in(file))
    if not rows:
        raise InputError("holds no answers", file=file)
    known = all("ended" in row for row in rows)
    cut = [row["ended"] == "limit" for row in rows] if known else None
    return [row["prediction"] for row in rows], [row["reference"] for row in rows], cut


def answers_in(file: Path) -> Iterator[dict[str, Any]]:
    """The checked lines of a file of answers."""
    for number, line in enumerate(read_text(file).splitlines(), 1):
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
        yield row


def scores_in_words(scores: TextScores) -> str:
    """The scores as a table, with a warning where CodeBLEU's two totals part."""
    low, high = scores.bleu_interval
    flow = "none in the references" if scores.dataflow is None else f"{scores.dataflow:.4f}"
    parts = f"n-gram {scores.ngram:.4f}, weighted {scores.weighted_ngram:.4f}, syntax {scores.syntax:.4f}"
    cut = "" if scores.hit_limit is None else f", {scores.hit_limit} cut off"
    lines = [
        f"pairs          {scores.pairs}",
        f"BLEU           {100 * scores.bleu:.1f} [{100 * low:.1f}, {100 * high:.1f}] of 100 (95 % bootstrap)",
        f"CodeBLEU       {scores.codebleu:.4f} strict ({parts}, data flow {flow})",
        f"               {scores.codebleu_compat:.4f} as the codebleu package counts",
        f"exact match    {scores.exact_match * scores.pairs:.0f} of {scores.pairs}",
        f"chrF           {100 * scores.chrf:.1f}",
        f"valid Python   {scores.valid_python * scores.pairs:.0f} of {scores.pairs}",
        f"degenerate     {scores.empty} empty, {scores.repeated} repeat themselves{cut}",
        *scores.signatures,
    ]
    if abs(scores.codebleu_compat - scores.codebleu) > 0.005:
        lines.append(
            "warning: the two CodeBLEU totals part: the package counts a data-flow match of 0 as 1, so that empty "
            "answers score 0.25"
        )
    return "\n".join(lines)
