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
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from minipeft.errors import InputError, check_items, check_kind, format_value, has_type
from minipeft.files import check_inside, check_plain, name_type, read_object, read_text, write_whole
from minipeft.hub import fetch, list_names

WHOLE = "tokenizer.json"
VOCAB, MERGES, ADDED = "vocab.json", "merges.txt", "added_tokens.json"
SETTINGS = ["tokenizer_config.json", "special_tokens_map.json", "config.json"]
FILES = [
    WHOLE,
    VOCAB,
    MERGES,
    ADDED,
    *SETTINGS[:2],
    "chat_template.jinja",
]  # that belong to a tokenizer and not a model
GPT2_SPECIAL = "<|endoftext|>"  # GPT-2's own BOS and EOS, where no file names others
LARGEST_TEXT = 2**28  # bytes of a text after the normalizer
PRINTED = {*range(33, 127), *range(161, 173), *range(174, 256)}  # bytes that GPT-2's alphabet writes as themselves

# noncharacters of Unicode, which no text may hold
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # OPEN 3 CLOSE is the special token 3
SAID, UNSAID = "\ufdd2", "\ufdd3"  # around what a chat template says the assistant said
ESCAPE = "\ufdd4"  # inside a special token's name in data, so that it stays text

Piece = tuple[str, bool]  # text, and whether it is of a template: there a special token's name is that token

T = TypeVar("T")


class Tokenizer:
    """Encode text to ids and decode ids to text. Made by `load_tokenizer`.

    `bos`, `eos` and `pad` are ids or None; `size` is the largest id + 1; `fingerprint` is the sha256 of the files and
    ids that decide what `encode` gives.
    """

    def __init__(self, backend: tokenizers.Tokenizer, file: Path, definition: bytes, special: dict[str, int | None]):
        self.backend = backend
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a setting that the library drops in copies and pickles."""
        self.__dict__.update(state)
        self.backend.encode_special_tokens = True

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
        backend = call_library(lambda: tokenizers.Tokenizer.from_str(json.dumps(spec)), self.file)
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
        changed.backend = copy.deepcopy(self.backend)
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
                hint="This tokenizer belongs to another model",
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
    check_kind(token, str, where)
    number = backend.token_to_id(token)
    if number is None:
        raise InputError(f"{token!r} is not in the vocabulary", file=file, where=where)
    backend.add_special_tokens([token])
    assert backend.token_to_id(token) == number
    return number


def put_bos(backend: tokenizers.Tokenizer, bos: int) -> None:
    """Make the tokenizer put this BOS id before each text; its name may contain a colon or a space."""
    backend.post_processor = processors.TemplateProcessing(single="BOS:0 $A:0", special_tokens=[("BOS", bos)])


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
