"""Read a tokenizer's files into the `tokenizers` library: tokenizer.json, or GPT-2's vocab.json + merges.txt.

Ids must be unique and in range, and the library's ids must be those of the files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from minipeft.errors import InputError, check_text, has_type
from minipeft.files import name_type, read_object, read_text

WHOLE = "tokenizer.json"
VOCAB, MERGES, ADDED = "vocab.json", "merges.txt", "added_tokens.json"
SETTINGS = ["tokenizer_config.json", "special_tokens_map.json", "config.json"]
# the files that belong to a tokenizer and not to a model
FILES = [WHOLE, VOCAB, MERGES, ADDED, *SETTINGS[:2], "chat_template.jinja"]
GPT2_SPECIAL = "<|endoftext|>"  # GPT-2's own BOS and EOS, where no file names others

T = TypeVar("T")


def read_whole(file: Path) -> tokenizers.Tokenizer:
    """Read tokenizer.json, without its padding and truncation, and check its ids."""
    spec = read_object(file)
    model, added = spec.get("model"), spec.get("added_tokens") or []
    if not isinstance(model, dict) or not model.get("vocab"):
        raise InputError("vocabulary is empty" if isinstance(model, dict) else "is missing", file=file, where="model")
    ids = read_vocab(model["vocab"], file)
    check_unique(ids, file)
    if model.get("dropout"):
        problem = f"{model['dropout']!r}: merges would be left out at random, and two runs would see other ids"
        raise InputError(problem, file=file, where="model.dropout", hint="Set it to null")
    spec["padding"] = spec["truncation"] = None
    backend = call_library(lambda: tokenizers.Tokenizer.from_str(json.dumps(spec)), file)
    for token in added:  # the library numbers added tokens itself, whatever the file says
        number, name = token["id"], token["content"]
        if backend.token_to_id(name) != number:
            owner = next((other for other, taken in ids.items() if taken == number), None)
            place = f"which is that of {owner!r}" if owner else f"but its place is {backend.token_to_id(name)}"
            raise InputError(f"token {name!r} has id {number}, {place}", file=file, where="added_tokens")
    return backend


def read_vocab(vocab: Any, file: Path) -> dict[str, int]:
    """A vocabulary as token -> id: written as an object (BPE, WordLevel) or as a list of [token, score] (Unigram)."""
    if isinstance(vocab, list) and all(isinstance(entry, list) and entry for entry in vocab):
        return {str(entry[0]): number for number, entry in enumerate(vocab)}
    if not isinstance(vocab, dict):
        raise InputError(f"must be an object of token: id, is {name_type(vocab)}", file=file, where="vocab")
    for token, number in vocab.items():
        if not is_id(number):
            raise InputError(f"token {token!r} has id {number!r}, not a number from 0", file=file, where="vocab")
    return vocab


def is_id(value: Any) -> TypeGuard[int]:
    """Whether a JSON value can be a token id."""
    return has_type(value, int) and 0 <= value < 2**32


def check_unique(ids: dict[str, int], file: Path) -> None:
    """Refuse two tokens with one id."""
    owners: dict[int, str] = {}
    for token, number in ids.items():
        if owners.setdefault(number, token) is not token:
            raise InputError(f"ids not unique: {owners[number]!r} and {token!r} both have {number}", file=file)


def read_byte_level(folder: Path, prefix_space: bool) -> tokenizers.Tokenizer:
    """GPT-2's byte-level BPE from vocab.json and merges.txt, with added_tokens.json where there is one."""
    vocab = read_vocab(read_object(folder / VOCAB), folder / VOCAB)
    if not vocab:
        raise InputError("vocabulary is empty", file=folder / VOCAB)
    check_unique(vocab, folder / VOCAB)
    merges = read_merges(folder / MERGES, vocab)
    model = call_library(lambda: models.BPE(vocab, merges, fuse_unk=False), folder / VOCAB)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    added = read_vocab(read_object(folder / ADDED), folder / ADDED) if (folder / ADDED).exists() else {}
    for token, number in sorted(added.items(), key=lambda entry: entry[1]):
        backend.add_tokens([tokenizers.AddedToken(token, normalized=True)])
        if backend.token_to_id(token) != number:
            raise InputError(
                f"token {token!r} has id {number}, but {VOCAB} leaves it {backend.token_to_id(token)}",
                file=folder / ADDED,
            )
    return backend


def read_merges(file: Path, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs of merges.txt, in order; line 1 says `#version`, each other line holds two tokens of the vocabulary."""
    text = read_text(file).replace("\r\n", "\n")
    if "\r" in text:  # the whole file would be its first line, a comment
        place = text.count("\n", 0, text.index("\r")) + 1
        raise InputError(f"line {place} ends in CR alone", file=file, hint="Save it with LF at the line ends")
    lines = text.split("\n")
    if not lines[0].startswith("#version"):
        raise InputError(
            f"line 1 is {lines[0][:40]!r}, not '#version: ...' (some readers would drop a first merge)",
            file=file,
            hint="Put the line `#version: 0.2` before it",
        )
    merges = []
    for number, line in enumerate(lines[1:], start=2):
        parts = line.split(" ")
        if not line:
            continue
        if len(parts) != 2:
            raise InputError(f"line {number}: {line[:40]!r} is not two tokens", file=file)
        unknown = [token for token in (*parts, "".join(parts)) if token not in vocab]
        if unknown:
            raise InputError(f"line {number}: {unknown[0]!r} is not in {VOCAB}", file=file)
        merges.append((parts[0], parts[1]))
    return merges


def find_special_id(
    backend: tokenizers.Tokenizer, name: str, folder: Path, named: dict[str, Any], config: dict[str, Any]
) -> int | None:
    """Find the id of the BOS, EOS or padding token: by name in `named`, else by number in `config`, else None.

    A BOS or padding token outside the vocabulary is None too, since neither is needed; such an EOS is an error, because
    a new id would have no embedding.
    """
    token = named.get(f"{name}_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None:
        if not isinstance(token, str):
            raise InputError(f"must be text, is {name_type(token)}", file=folder, where=f"{name}_token")
        if name != "eos" and backend.token_to_id(token) is None:
            return None
        return make_special(backend, token, folder, f"{name}_token")
    number = config.get(f"{name}_token_id")
    number = number[0] if isinstance(number, list) and number else number  # Llama 3 lists several: EOS comes first
    if not is_id(number):
        return None
    token = backend.id_to_token(number)
    return None if token is None else make_special(backend, token, folder, f"{name}_token_id")


def make_special(backend: tokenizers.Tokenizer, token: str, file: Path, where: str) -> int:
    """Make a token of the vocabulary special (skipped when decoding); returns its id."""
    check_text(token, None, where)
    number = backend.token_to_id(token)
    if number is None:
        raise InputError(f"{token!r} is not in the vocabulary", file=file, where=where)
    backend.add_special_tokens([token])
    assert backend.token_to_id(token) == number
    return number


def put_bos(backend: tokenizers.Tokenizer, bos: int) -> None:
    """Make the tokenizer put this BOS id before each text; its name may contain a colon or a space."""
    backend.post_processor = processors.TemplateProcessing(single="BOS:0 $A:0", special_tokens=[("BOS", bos)])


def disable_cache(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Disable the library's cache of words and return the tokenizer.

    The cache is kept by thread and outlives the tokenizer: 0.3 MB for 600 short texts, for each tokenizer loaded
    (tokenizers 0.23.3). Encoding 4.4 MB of Python takes the same time without it.
    """
    resize = getattr(backend.model, "_resize_cache", None)  # of BPE and Unigram; named like this since 0.21
    if resize is not None:
        resize(0)
    return backend


def call_library(action: Callable[[], T], file: Path, where: str | None = None) -> T:
    """Call the Rust library; its errors and panics become an InputError.

    It raises plain `Exception` for an error, and PanicException, a BaseException that cannot be imported, for a panic.
    """
    try:
        return action()
    except BaseException as failure:
        if type(failure) is not Exception and type(failure).__name__ != "PanicException":
            raise
        reason = " ".join(str(failure).split())[:200]
        raise InputError(f"the tokenizer fails: {reason}", file=file, where=where) from failure
