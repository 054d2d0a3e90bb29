"""Text <-> ids, with the checkpoint's own tokenizer: tokenizer.json, or GPT-2's vocab.json + merges.txt.

The `tokenizers` library splits and merges; this file chooses the settings of a checkpoint:

    file            tokenizer.json as it is; or byte-level BPE (Radford et al. 2019) from vocab.json, merges.txt and
                    added_tokens.json (all that CodeGPT ships)
    BOS             where the model's own tokenizer puts it: as the post-processor of tokenizer.json says; without such
                    a file as add_bos_token of tokenizer_config.json says (GPT-2: none), as in transformers 5
    EOS, padding    by name in tokenizer_config.json, else special_tokens_map.json; else by id in config.json
    `</s>` in text  is text: the name of a special token, written in a snippet, never becomes that token; in a template,
                    which `encode_pieces` distinguishes from data, it does
    padding, truncation in the files    have no effect
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Sequence
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models

from minipeft.data.tokenizer_files import (
    ADDED,
    FILES,
    GPT2_SPECIAL,
    MERGES,
    SETTINGS,
    VOCAB,
    WHOLE,
    call_library,
    disable_cache,
    find_special_id,
    make_special,
    put_bos,
    read_byte_level,
    read_whole,
)
from minipeft.errors import InputError, check_items, check_kind, format_value
from minipeft.files import check_inside, check_plain, read_object, write_whole
from minipeft.hub import fetch, list_names

LARGEST_TEXT = 2**28  # bytes of a text after the normalizer
PRINTED = {*range(33, 127), *range(161, 173), *range(174, 256)}  # bytes that GPT-2's alphabet writes as themselves

# noncharacters of Unicode, which no text may hold
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # OPEN 3 CLOSE is the special token 3
SAID, UNSAID = "\ufdd2", "\ufdd3"  # around what a chat template says the assistant said
ESCAPE = "\ufdd4"  # inside a special token's name in data, so that it stays text

Piece = tuple[str, bool]  # text, and whether it is of a template: there a special token's name is that token


class Tokenizer:
    """Encode text to ids and decode ids to text. Made by `load_tokenizer`.

    `bos`, `eos` and `pad` are ids or None; `size` is the largest id + 1; `fingerprint` is the sha256 of the files and
    ids that decide what `encode` gives.
    """

    def __init__(self, backend: tokenizers.Tokenizer, file: Path, definition: bytes, special: dict[str, int | None]):
        self.backend = disable_cache(backend)
        self.file = file
        self.definition = definition
        self.chosen_eos: str | None = None  # by with_eos; the files name another, or none
        self.bos, self.eos, self.pad = (special[name] for name in ("bos", "eos", "pad"))
        backend.encode_special_tokens = True  # special tokens written in a text are text
        self.growth = bound_growth(backend.normalizer)
        for name, growth in (("normalizer", self.growth), ("decoder", bound_growth(backend.decoder))):
            if growth > LARGEST_TEXT:
                problem = f"its rules may make a text {growth:.1g} times as long"
                raise InputError(problem, file=file, where=name)
        self.absent = find_absent_bytes(backend)  # bytes that the library would leave out without a word
        probe = call_library(lambda: backend.encode("a"), file, "post_processor")
        leading = probe.special_tokens_mask.index(0) if 0 in probe.special_tokens_mask else len(probe.ids)
        self.before: list[int] = probe.ids[:leading]  # [BOS], or nothing
        self.size: int = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        if self.before and max(self.before) >= self.size:
            problem = f"puts id {max(self.before)} before a text, but the vocabulary ends at {self.size - 1}"
            raise InputError(problem, file=file, where="post_processor")

    def __repr__(self) -> str:
        return f"Tokenizer({self.size:,} ids)"

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore two settings that the library drops in copies and pickles."""
        self.__dict__.update(state)
        disable_cache(self.backend).encode_special_tokens = True

    @property
    def fingerprint(self) -> str:
        ids = json.dumps([self.before, self.bos, self.eos, self.pad])
        return hashlib.sha256(self.definition + ids.encode()).hexdigest()

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """The ids of a text, with BOS before them where the model's own tokenizer puts one and `bos` is true.

        An EOS that some tokenizers put at the end (add_eos_token) is left out: a prompt must go on, and
        `encode_pairs` ends each training text with one itself.

        Raises:
            InputError: the text holds a lone surrogate or a character that the vocabulary has no bytes for, or the
                tokenizer's rules fail on it.
        """
        return self.encode_all([text], bos=bos)[0]

    def encode_all(self, texts: Sequence[str], *, bos: bool = True) -> list[list[int]]:
        """`encode` for each text, in parallel."""
        check_kind(bos, bool, "bos")
        sizes = self.check_texts(texts)
        run = self.backend.encode_batch_fast
        try:
            encodings = call_library(partial(run, list(texts), add_special_tokens=False), self.file)
        except InputError:  # say which text it was
            for number, text in enumerate(texts):
                call_library(partial(run, [text], add_special_tokens=False), self.file, f"text {number + 1}")
            raise
        lists = [encoding.ids for encoding in encodings]
        for number, (ids, size) in enumerate(zip(lists, sizes)):
            if len(ids) > 4 * size + 64:
                raise InputError(
                    f"makes {len(ids):,} tokens of {size:,} bytes: its rules make the text grow",
                    file=self.file,
                    where=f"text {number + 1}",
                )
        return [self.before + ids for ids in lists] if bos else lists

    def check_texts(self, texts: Sequence[str]) -> list[int]:
        """Check that the tokenizer can encode each text; returns their UTF-8 bytes."""
        sizes = [measure_text(text, number) for number, text in enumerate(check_items(texts, object, "texts", "text"))]
        if self.growth > 1 and sizes and (size := max(sizes)) * self.growth > LARGEST_TEXT:
            problem = f"{size:,} bytes may become {size * self.growth:,}: its rules make the text grow"
            raise InputError(problem, file=self.file, where="normalizer")
        if self.absent:
            for number, text in enumerate(texts):
                self.check_bytes(text, f"text {number + 1}")
        return sizes

    def check_bytes(self, text: str, where: str) -> None:
        """Refuse a text with a byte that the vocabulary has no token for."""
        for sign in text:
            if not self.absent.isdisjoint(sign.encode()):
                problem = f"holds {sign!r}, for which the vocabulary has no token: it would be left out"
                raise InputError(problem, file=self.file, where=where)

    def encode_pieces(self, texts: Sequence[Sequence[Piece]], *, bos: bool = True) -> list[list[int]]:
        """`encode` for pieces of template and data: special tokens are recognized in template pieces alone."""
        if not any(self.special.search(text) for pieces in texts for text, of_template in pieces if of_template):
            return self.encode_all(["".join(text for text, _ in pieces) for pieces in texts], bos=bos)
        for number, pieces in enumerate(texts):
            if any(OPEN in text for text, _ in pieces):
                raise InputError(f"holds U+{ord(OPEN):04X}, which is no character", where=f"text {number + 1}")
        marked = ["".join(self.mark(text) if of_template else text for text, of_template in merge(pieces))
                  for pieces in texts]  # fmt: skip
        lists = [ids for ids, _ in self.encode_marked(marked)]
        return [self.before + ids if ids[: len(self.before)] != self.before else ids for ids in lists] if bos else lists

    @cached_property
    def special(self) -> re.Pattern[str]:
        """Matches the name of a special token."""
        names = [token.content for token in self.backend.get_added_tokens_decoder().values() if token.special]
        return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")

    def mark(self, text: str) -> str:
        """Replace each special token in a template's text by OPEN number CLOSE."""
        return self.special.sub(lambda found: f"{OPEN}{self.backend.token_to_id(found[0])}{CLOSE}", text)

    def encode_marked(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Encode texts with marks; returns ids and character offsets, without BOS.

        The library encodes the whole text at once, so that the start of the text and the neighbours of a special token
        are treated as in the model's own tokenizer.

        Raises:
            InputError: as `encode`.
        """
        backend, ids = self.marked
        self.check_texts([re.sub(f"{OPEN}[0-9]+{CLOSE}", "", text) for text in texts])
        found = call_library(partial(backend.encode_batch, list(texts), add_special_tokens=False), self.file)
        return [([ids.get(token, token) for token in encoding.ids], encoding.offsets) for encoding in found]

    @cached_property
    def marked(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """The library's tokenizer with special tokens named by their marks, and the ids of added tokens, which the
        library renumbers."""
        spec = json.loads(self.backend.to_str())
        spec["post_processor"], named = None, {}
        for token in spec["added_tokens"]:
            if token["special"]:
                token["content"] = f"{OPEN}{token['id']}{CLOSE}"
            named[token["content"]] = token["id"]
        backend = disable_cache(call_library(lambda: tokenizers.Tokenizer.from_str(json.dumps(spec)), self.file))
        ids = {int(backend.token_to_id(name) or 0): number for name, number in named.items()}
        if taken := ids.keys() & (set(backend.get_vocab(with_added_tokens=False).values()) - set(ids.values())):
            raise InputError(f"id {min(taken)} would be given twice: the vocabulary has gaps", file=self.file)
        return backend, ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD, unknown ids are left out.

        Raises:
            InputError: an entry is not an integer in [0, 2^32).
        """
        ids = check_items(ids, int, "ids")
        check_kind(skip_special, bool, "skip_special")
        if ids and not (min(ids) >= 0 and max(ids) < 2**32):
            raise InputError(
                f"{format_value(next(i for i in ids if not 0 <= i < 2**32))} must be in [0, 2^32)", where="ids"
            )
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def with_eos(self, token: str) -> Tokenizer:
        """The same tokenizer with another token of its vocabulary as EOS."""
        changed = copy.copy(self)
        for made in ("special", "marked"):  # of the other backend
            changed.__dict__.pop(made, None)
        changed.backend = disable_cache(copy.deepcopy(self.backend))
        changed.backend.encode_special_tokens = True
        changed.eos = make_special(changed.backend, token, self.file, "eos token")
        changed.chosen_eos = token
        return changed

    def save(self, folder: str | Path) -> None:
        """Write its files to `folder` as they were read, for transformers and `load_tokenizer`; with the EOS that
        `with_eos` chose.

        Raises:
            InputError: a file is no longer there, or the folder cannot be written.
        """
        source, folder = self.file.parent, Path(folder)
        check_plain(self.file)
        written = {name: (source / name).read_bytes() for name in FILES if (source / name).is_file()}
        if self.chosen_eos is not None:
            settings = json.loads(written[SETTINGS[0]]) if SETTINGS[0] in written else {}
            text = json.dumps(settings | {"eos_token": self.chosen_eos}, indent=2, ensure_ascii=False)
            written[SETTINGS[0]] = (text + "\n").encode()
        for name, data in written.items():
            write_whole(folder / name, lambda stream, data=data: stream.write(data))  # type: ignore[misc]

    def require_eos(self) -> int:
        """The id of EOS, which training texts end with and generation stops at."""
        if self.eos is None:
            raise InputError(
                "no end-of-sequence token is named in tokenizer_config.json, special_tokens_map.json or config.json",
                file=self.file.parent,
                hint="Name one of the vocabulary's tokens: --eos-token, or tokenizer.with_eos(TOKEN)",
            )
        return self.eos

    def check_fits(self, vocab_size: int, file: str | Path | None = None) -> None:
        """Refuse a tokenizer with ids >= `vocab_size`, for which the model has no embedding; `file` is the model's."""
        if self.size > vocab_size:
            last, model = self.size - 1, "the model" if file is None else f"the model in {file}"
            raise InputError(
                f"token {self.backend.id_to_token(last)!r} has id {last}, but {model} has {vocab_size} tokens",
                file=self.file,
                hint="This tokenizer belongs to another model, or has new tokens: train with --vocabulary N",
            )


def merge(pieces: Sequence[Piece]) -> list[Piece]:
    """Join neighbouring pieces of one kind: a template may spell a special token in two pieces."""
    return [("".join(text for text, _ in group), kind) for kind, group in groupby(pieces, key=lambda piece: piece[1])]


def load_tokenizer(source: str | Path, *, revision: str | None = None) -> Tokenizer:
    """Load the tokenizer of a model folder or hub id.

    Raises:
        InputError: no tokenizer there, or its files are damaged or contradict one another; names file and entry.
    """
    folder = fetch(source, [], revision=revision, optional=[*FILES, "config.json"])
    for name in (*FILES, "config.json"):
        if (folder / name).exists():
            check_inside(folder / name, folder)
    tokenizer_config, special_map, config = (
        read_object(folder / name) if (folder / name).exists() else {} for name in SETTINGS
    )
    named = special_map | {name: value for name, value in tokenizer_config.items() if value is not None}
    if (folder / WHOLE).exists():
        file, backend = folder / WHOLE, read_whole(folder / WHOLE)
    elif (folder / VOCAB).exists() and (folder / MERGES).exists():
        file, backend = folder / VOCAB, read_byte_level(folder, bool(named.get("add_prefix_space")))
        if backend.token_to_id(GPT2_SPECIAL) is not None:
            named = {"bos_token": GPT2_SPECIAL, "eos_token": GPT2_SPECIAL} | named
    else:
        found = f"no {WHOLE}, and no {VOCAB} with {MERGES}, in the folder (found: {list_names(folder)})"
        raise InputError(found, file=folder)
    special = {name: find_special_id(backend, name, folder, named, config) for name in ("bos", "eos", "pad")}
    if file.name == VOCAB and named.get("add_bos_token"):
        if special["bos"] is None:
            raise InputError("is true, but the vocabulary has no BOS token", file=folder, where="add_bos_token")
        put_bos(backend, special["bos"])
    used = [folder / name for name in ([WHOLE] if file.name == WHOLE else [VOCAB, MERGES, ADDED])]
    definition = b"".join(path.name.encode() + b"\0" + path.read_bytes() for path in used if path.exists())
    return Tokenizer(backend, file, definition, special)


def bound_growth(part: Any) -> int:
    """Bound the factor by which a normalizer or decoder may lengthen a text."""

    def longest(rule: Any) -> int:
        if isinstance(rule, list):
            return math.prod(map(longest, rule))
        if not isinstance(rule, dict):
            return 1
        content = rule.get("content") if rule.get("type") == "Replace" else None
        own = len(content) + 1 if isinstance(content, str) and len(content) > 1 else 1  # + 1: it may match nothing
        return own * math.prod(longest(inner) for inner in rule.values())

    return 1 if part is None else longest(json.loads(part.__getstate__()))


def find_absent_bytes(backend: tokenizers.Tokenizer) -> frozenset[int]:
    """Find the bytes that have no token in a byte-level BPE without an unknown token."""
    rules = b"" if backend.pre_tokenizer is None else backend.pre_tokenizer.__getstate__()
    if b'"ByteLevel"' not in rules or not isinstance(backend.model, models.BPE) or backend.model.unk_token is not None:
        return frozenset()
    moved = iter(range(256, 512))  # the others, in order, are written as U+0100, ...
    signs = {byte: chr(byte) if byte in PRINTED else chr(next(moved)) for byte in range(256)}
    possible = {*range(0xC0), *range(0xC2, 0xF5)}
    return frozenset(byte for byte in possible if backend.token_to_id(signs[byte]) is None)


def measure_text(text: Any, number: int) -> int:
    """The UTF-8 bytes of a text."""
    check_kind(text, str, f"text {number + 1}")
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise InputError(
            f"holds a lone surrogate, {text[error.start]!r}, which is no character", where=f"text {number + 1}"
        ) from error
