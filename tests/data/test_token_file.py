"""A data set that is encoded row by row, and its token file: equal to encoding the rows, whole or not there."""

import hashlib
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from minipeft.data import token_file
from minipeft.data.chat import load_chat_template
from minipeft.data.examples import split_by_question
from minipeft.data.forms import encode_data, load_data, open_data
from minipeft.data.packing import pack
from minipeft.data.streaming import encode_stream
from minipeft.data.token_file import load_encoded
from minipeft.data.tokens import Tokenizer, load_tokenizer
from minipeft.errors import InputError
from minipeft.files import lock_folder
from tests.small import write_tokenizer
from tests.test_docs_data import TEMPLATE

ROWS = {
    "pairs": [{"intent": f"add {n % 5}", "rewritten_intent": None, "snippet": "x" * (n % 3 + 1), "question_id": n // 2}
              for n in range(14)],
    "chats": [{"messages": [{"role": "user", "content": f"add {n}"}, {"role": "assistant", "content": "x" * (n % 4)}]}
              for n in range(1, 10)],
}  # fmt: skip


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


@pytest.fixture(params=ROWS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return put(tmp_path / "rows.jsonl", ROWS[request.param])


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return put(tmp_path / "rows.jsonl", ROWS["pairs"])


def put(file: Path, rows: list[dict[str, object]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def list_tokens(batches):
    return [[t.tolist() for t in (batch.ids, batch.labels, batch.documents)] for batch in batches]


def test_rows_are_those_of_load_data(source: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Streamed and from the file: every example, split, duplicate and packed batch, to the bit."""
    chat = load_chat_template(tmp_path, text=TEMPLATE)
    data = load_data(source)
    streamed = encode_stream(open_data(source), tokenizer, chat)
    written = load_encoded(open_data(source), tokenizer, tmp_path / "cache", chat)
    mapped = load_encoded(open_data(source), tokenizer, tmp_path / "cache", chat)
    wanted = list(encode_data(data, data.format, tokenizer, chat))
    for found in (streamed, written, mapped):
        assert list(found.examples) == wanted
        assert (found.file, found.sha256, found.format, found.notes) == (
            data.file,
            data.sha256,
            data.format,
            data.notes,
        )
        assert found.repeated == len(data) - len({item.content for item in data})
        for count in (0, 2, 4, len(data) - 2):  # the last copies the rows that are kept
            kept, held = split_by_question(data, count)
            ours, ours_held, shared = found.hold_out(count)
            contents = [item.content for item in kept]
            assert shared == sum(item.content in contents for item in held)
            for examples, items in ((ours, kept), (ours_held, held)):
                encoded = encode_data(items, data.format, tokenizer, chat)
                assert list(examples) == list(encoded)
                for isolate, mask in ((True, "response"), (False, "all")) if len(items) else ():
                    packed = [pack(e, tokenizer, length=64, batch=2, isolate=isolate, loss_mask=mask)
                              for e in (examples, encoded)]  # fmt: skip
                    assert packed[0].report == packed[1].report
                    assert list_tokens(packed[0]) == list_tokens(packed[1])
        with pytest.raises(InputError, match=r"held_out: cannot hold out 99 of \d+ (pairs|chats)"):
            found.hold_out(99)
    assert isinstance(mapped.examples.ids.base, np.memmap)
    assert not mapped.examples.ids.flags.writeable


def test_rows_held_out_and_trained_on_are_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Equal in all fields but question_id."""
    rows = [{"intent": "a", "snippet": "x", "question_id": n} for n in range(3)]
    rows += [{"intent": "a", "snippet": "y", "question_id": 4}, {"intent": "b", "snippet": "x", "question_id": 5}]
    data = encode_stream(open_data(put(tmp_path / "rows.jsonl", rows)), tokenizer)
    held = data.hold_out(2)[1]
    twins = sum(example in list(data.examples)[:3] for example in held)
    assert (data.repeated, data.hold_out(2)[2]) == (2, twins)


def test_a_second_run_encodes_nothing(
    pairs: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_encoded(open_data(pairs), tokenizer, tmp_path / "cache")
    monkeypatch.setattr(token_file, "encode_stream", None)
    assert len(load_encoded(open_data(pairs), tokenizer, tmp_path / "cache")) == 14


def test_the_name_is_of_all_that_decides_the_tokens(pairs: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat = load_chat_template(tmp_path, text=TEMPLATE)
    dated = load_chat_template(tmp_path, text=TEMPLATE + "{# strftime_now #}")
    other = load_chat_template(tmp_path, text=TEMPLATE)
    other.names = {"eos_token": "</s>"}
    make = token_file.make_key
    keys = [
        make(open_data(pairs), tokenizer, None),
        make(open_data(pairs, template="{intent}{snippet}"), tokenizer, None),
        make(open_data(put(tmp_path / "b", ROWS["pairs"][1:])), tokenizer, None),
        make(open_data("demo"), tokenizer, None),
        make(open_data("demo", split="test"), tokenizer, None),
        make(open_data(pairs), tokenizer.with_eos("a"), None),
        *(make(open_data(pairs), tokenizer, template) for template in (chat, dated, other)),
    ]
    assert len(set(keys)) == len(keys)
    assert make(open_data(pairs), load_tokenizer(tmp_path), None) == keys[0]


@pytest.mark.parametrize("damage", ["flip", "cut", "rows", "text"])
def test_a_damaged_file_is_written_again(damage: str, pairs: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    wanted = list(load_encoded(open_data(pairs), tokenizer, tmp_path / "cache").examples)
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    whole = file.read_bytes()
    at = whole.index(b"[14]") + 1  # a shape
    file.write_bytes({"flip": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], "cut": whole[:-4], "text": b"tokens",
                      "rows": whole[:at] + b"13" + whole[at + 2:]}[damage])  # fmt: skip
    again = load_encoded(open_data(pairs), tokenizer, tmp_path / "cache")
    assert list(again.examples) == wanted
    assert again.notes[-1].startswith(f"{file}: ")
    assert again.notes[-1].endswith("; encoded again")
    assert file.read_bytes() == whole
    assert len(load_encoded(open_data(pairs), tokenizer, tmp_path / "cache").notes) == 1  # of the null intents


def test_every_byte_is_checked(pairs: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """No file with one changed byte is read, but where the header's free text is changed."""
    load_encoded(open_data(pairs), tokenizer, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    whole, wanted = file.read_bytes(), token_file.read_tokens(file, open_data(pairs))
    draw, read = np.random.default_rng(0), 0
    for at in [*range(0, len(whole), 97), *draw.integers(0, len(whole), 60).tolist()]:
        file.write_bytes(whole[:at] + bytes([whole[at] ^ int(draw.integers(1, 256))]) + whole[at + 1 :])
        try:
            found = token_file.read_tokens(file, open_data(pairs))
        except InputError:
            continue
        read += 1
        assert list(found.examples) == list(wanted.examples), at
        assert at < 8 + int.from_bytes(whole[:8], "little"), at
    assert read <= 3


def encode_and_die(folder: Path, rows: Path) -> None:
    """Encode until the tokens are to be written, write half of them, and wait to be killed."""

    def half(stream):
        stream.write(b"half")
        stream.flush()
        (folder / "dying").touch()
        time.sleep(60)

    token_file.make_tensor_writer = lambda tensors: half
    load_encoded(open_data(rows), load_tokenizer(folder), folder / "cache")


def test_a_killed_encoding_leaves_nothing_that_is_read(pairs: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """And the process that waited for it encodes; its rest is removed."""
    process = multiprocessing.get_context("fork").Process(target=encode_and_die, args=(tmp_path, pairs))
    process.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "dying").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    key = token_file.make_key(open_data(pairs), tokenizer, None)
    with pytest.raises(InputError, match=f"in use by process {process.pid}"):
        lock_folder(tmp_path / "cache", f".tokens-{key}.lock")
    process.kill()
    process.join()
    cache = tmp_path / "cache"
    assert [file.read_bytes() for file in cache.glob(".*.safetensors.*")] == [b"half"]
    assert not list(cache.glob("*.safetensors"))
    assert len(load_encoded(open_data(pairs), tokenizer, cache)) == 14
    assert sorted(os.listdir(cache)) == [f".tokens-{key}.lock", f"tokens-{key}.safetensors"]


def test_who_waited_reads_what_the_other_wrote(
    pairs: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"

    def written_meanwhile(folder: Path, name: str, **how: bool):
        assert how == {"wait": True}
        monkeypatch.undo()
        load_encoded(open_data(pairs), tokenizer, cache)
        monkeypatch.setattr(token_file, "encode_stream", None)
        return lock_folder(folder, name, **how)

    monkeypatch.setattr(token_file, "lock_folder", written_meanwhile)
    assert len(load_encoded(open_data(pairs), tokenizer, cache)) == 14


def test_a_folder_that_cannot_be_written_is_refused(pairs: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: cannot be created: File exists"):
        load_encoded(open_data(pairs), tokenizer, tmp_path / "file")


def test_a_bad_row_leaves_no_file(pairs: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pairs.open("a") as stream:
        stream.write('{"intent": "a"}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:15: is of no known form"):
        load_encoded(open_data(pairs), tokenizer, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*safetensors*"))


def test_questions_are_hashed_as_the_docstring_says(pairs: Path, tokenizer: Tokenizer) -> None:
    data = encode_stream(open_data(pairs), tokenizer)
    wanted = b"".join(hashlib.sha256(f"0/{n // 2}".encode()).digest() for n in range(14))
    assert data.questions.tobytes() == wanted
