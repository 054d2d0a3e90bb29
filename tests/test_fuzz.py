"""Damaged input, 200,000 times: for any bytes a reader returns a value or raises InputError.

Each target starts from its folder of tests/corpus, changes bytes or JSON values at random (a fixed seed: the same each
time), and reads them. Input that once broke a reader belongs in the corpus, so that it is always tried first.
MINIPEFT_FUZZ multiplies the counts.
"""

import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from minipeft.adapters.peft_format import parse_adapter_config as adapter_config
from minipeft.data.examples import Example, load_pairs
from minipeft.data.packing import Batches, pack
from minipeft.data.tokens import load_tokenizer
from minipeft.errors import InputError
from minipeft.files import read_object
from minipeft.models import FAMILIES
from minipeft.models.checkpoint import find_tensors, read_config
from minipeft.runs.answers import read_answers
from minipeft.runs.checkpoints import seal, verify
from minipeft.tensor_files import read_header
from tests.small import write_tokenizer

SCALE = float(os.environ.get("MINIPEFT_FUZZ", "1"))
CORPUS = Path(__file__).parent / "corpus"
COUNTS = {"header": 70_000, "config": 25_000, "adapter_config": 50_000, "index": 20_000, "pairs": 20_000,
          "answers": 10_000, "manifest": 5_000, "tokenizer": 2_000, "packer": 2_000}  # fmt: skip
ODD: list[Any] = [None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, "", "x", "\u0000",
                  "\ud800", "../x", "/x", [], [1], [[]], {}, {"a": 1}, "a" * 300, ["q_proj"], "F32", [0, 8],
                  [2, 2]]  # fmt: skip
BYTES = [b"\0", b"\xff", b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"1e999", b"NaN", b"null", b"\xed\xa0\x80",
         b"\xef\xbb\xbf", b"-", b"9" * 40, b"\n", b"\\ud800", b"true"]  # fmt: skip


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        yield Path(folder)


def spoil(data: bytes, draw: random.Random) -> bytes:
    """Flip, drop, repeat or insert a few bytes."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(data) + 1)
        kind = draw.randrange(6)
        if kind == 0 and data:
            at %= len(data)
            data = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + data[at + draw.randrange(1, 9) :]
        elif kind == 2:
            data = data[:at] + draw.choice(BYTES) + data[at:]
        elif kind == 3:
            data = data[:at]
        elif kind == 4:
            data = data[:at] + data[draw.randrange(len(data) + 1) :]
        else:
            data = data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
    return data


def bend(value: Any, draw: random.Random) -> Any:
    """Change one place of a JSON value: another value, a lost key, a new key."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        kind = draw.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.15:
            return value | {draw.choice([*value, "new", "__class__"]) + draw.choice(["", "_"]): draw.choice(ODD)}
        return value | {key: bend(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], bend(value[at], draw), *value[at + 1 :]]
    if isinstance(value, int) and draw.random() < 0.3:
        return value + draw.choice((-1, 1, 1000))
    return draw.choice(ODD)


def inputs(target: str, draw: random.Random, count: int) -> Iterator[bytes]:
    """The corpus unchanged, then changed."""
    seeds = [file.read_bytes() for file in sorted((CORPUS / target).iterdir())]
    assert seeds
    yield from seeds
    for _ in range(count - len(seeds)):
        data = draw.choice(seeds)
        if draw.random() < 0.5:
            yield spoil(data, draw)
            continue
        start = 8 if target == "header" else 0
        try:
            value = bend(json.loads(data[start : start + int.from_bytes(data[:8], "little")] if start else data), draw)
        except ValueError:  # this seed is no JSON
            yield spoil(data, draw)
            continue
        text = json.dumps(value).encode()
        yield len(text).to_bytes(8, "little") + text + data[-16:] if start else text


def feed(target: str, reader: Callable[[Path], Any], file: Path, least_refused: float) -> None:
    """Let `reader` read each input from `file`; any error but InputError is the test's."""
    count, refused = max(100, round(COUNTS[target] * SCALE)), 0
    for data in inputs(target, random.Random(target), count):
        with open(file, "wb", buffering=0) as stream:
            stream.write(data)
        try:
            reader(file)
        except InputError as error:
            refused += 1
            text = str(error)
            assert "\n" not in text, data
            assert len(text) < 5000, data
        except BaseException as error:
            error.add_note(f"{target}: {data[:2000]!r}")
            raise
    assert refused >= least_refused * count, "the inputs must reach the checks"
    assert refused < count, "and some must pass"


def test_the_header_of_safetensors(place: Path) -> None:
    feed("header", read_header, place / "x.safetensors", 0.5)


def test_config_json(place: Path) -> None:
    feed("config", read_config, place / "config.json", 0.3)


def test_adapter_config_json(place: Path) -> None:
    def read(file: Path) -> None:
        adapter_config(read_object(file))

    feed("adapter_config", read, place / "adapter_config.json", 0.3)


def test_the_index_of_shards(place: Path) -> None:
    folder = place / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name, tensor in (("a.safetensors", "x"), ("b.safetensors", "y")):
        text = json.dumps({tensor: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    feed("index", lambda _: find_tensors(folder, folder, None), folder / "model.safetensors.index.json", 0.3)


def test_pairs(place: Path) -> None:
    feed("pairs", load_pairs, place / "pairs", 0.3)


def test_answers(place: Path) -> None:
    feed("answers", read_answers, place / "answers", 0.3)


def test_the_manifest_of_a_checkpoint(place: Path) -> None:
    """A manifest with any changed byte is refused."""
    folder = place / "step"
    folder.mkdir()
    (folder / "state.safetensors").write_bytes(b"")
    sound = seal(
        {
            "format": 1,
            "step": 3,
            "log": {"bytes": 0, "crc32": 0},
            "files": {"state.safetensors": {"bytes": 0, "crc32": 0}},
        }
    )
    (folder / "manifest.json").write_bytes(sound)
    assert verify(folder)["step"] == 3
    draw = random.Random(0)
    for _ in range(round(COUNTS["manifest"] * SCALE)):
        data = spoil(sound, draw)
        (folder / "manifest.json").write_bytes(data)
        if data != sound:
            with pytest.raises(InputError):
                verify(folder)


def test_tokenizers(place: Path) -> None:
    folder = place / "tokenizer"
    folder.mkdir()
    write_tokenizer(folder)

    def read(_: Path) -> None:
        tokenizer = load_tokenizer(folder)
        tokenizer.decode(tokenizer.encode("def f(x):\n    return x + 1  # é"))

    feed("tokenizer", read, folder / "tokenizer.json", 0.3)


class Eos:
    """The parts of a tokenizer that `pack` uses."""

    eos = pad = 0
    size = 10

    def require_eos(self) -> int:
        return 0


def content(batches: Batches, rows: int) -> tuple[Counter[int], Counter[tuple[int, ...]]]:
    """The tokens of an epoch that are not padding, and its rows."""
    tokens: Counter[int] = Counter()
    held: Counter[tuple[int, ...]] = Counter()
    for batch in batches:
        tokens.update(batch.ids[batch.documents >= 0].tolist())
        held.update(map(tuple, batch.ids.tolist()))
    assert sum(held.values()) == rows
    return tokens, held


def test_the_packer() -> None:
    """No token is lost or added, whatever the documents; a run resumed at any batch sees the same."""
    draw = random.Random(0)
    for _ in range(max(20, round(COUNTS["packer"] * SCALE))):
        lengths = [draw.choice((1, 2, 3, 5, 8, 13, 40)) for _ in range(draw.randint(1, 12))]
        examples = [Example([draw.randint(1, 9) for _ in range(n - 1)] + [0], draw.randint(0, n)) for n in lengths]
        given = {
            "length": draw.randint(2, 24),
            "batch": draw.randint(1, 3),
            "seed": draw.randint(0, 3),
            "virtual_tokens": draw.choice((0, 0, 1)),
            "loss_mask": draw.choice(("all", "response")),
            "isolate": draw.random() < 0.7,
        }
        make: Callable[[], Batches] = partial(pack, examples, Eos(), **given)  # type: ignore[arg-type]
        try:
            batches = make()
        except InputError:
            continue
        report = batches.report
        tokens, rows = content(batches, report.rows)
        assert sum(tokens.values()) == report.tokens_out
        assert report.tokens_in == report.tokens_out + report.tokens_cut + report.tokens_left_out == sum(lengths)
        everything = Counter(token for example in examples for token in example.ids)
        assert not tokens - everything
        if not report.tokens_cut + report.tokens_left_out:
            assert tokens == everything
        again = make()
        assert content(again, report.rows)[1] == rows
        at = draw.randrange(3 * len(batches))
        for name in ("ids", "labels", "documents"):
            assert torch.equal(getattr(again[at], name), getattr(batches[at], name))


def test_there_are_enough() -> None:
    assert sum(COUNTS.values()) >= 200_000
    assert set(FAMILIES) <= {p.name for p in (CORPUS / "config").iterdir()}
    assert {p.name for p in CORPUS.iterdir()} == set(COUNTS) - {"packer", "manifest"}
