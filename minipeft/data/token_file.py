"""The tokens of a data set on disk, in a file that is named by a hash of all that decides them; training maps it.

FOLDER/tokens-KEY.safetensors    ids, starts, prompts, trained: encoded.py; questions, contents: streaming.py
                                 notes: as JSON; digest: sha256 of all others
FOLDER/.tokens-KEY.lock          locked by the process that encodes; the others wait and read its file

The file gets its name when it is complete, and is checked whole before it is used. A damaged one is written again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from minipeft.data.chat import ChatTemplate
from minipeft.data.encoded import Array, Encoded
from minipeft.data.forms import DataStream
from minipeft.data.streaming import EncodedData, encode_stream
from minipeft.data.tokens import Tokenizer
from minipeft.errors import InputError
from minipeft.files import lock_folder, make_folder, parse_json, write_whole
from minipeft.tensor_files import TensorInfo, check_header, make_tensor_writer, read_header

VERSION = 1  # of the file's layout
DTYPES = {"ids": "I32", "starts": "I64", "prompts": "I32", "trained": "BOOL", "questions": "U8", "contents": "I64",
          "notes": "U8", "digest": "U8"}  # fmt: skip
NUMPY = {"I32": np.int32, "I64": np.int64, "BOOL": np.bool_, "U8": np.uint8}
BLOCK = 2**20  # bytes that are hashed at a time


def load_encoded(
    stream: DataStream, tokenizer: Tokenizer, folder: Path, chat: ChatTemplate | None = None
) -> EncodedData:
    """Read a data set's tokens from `folder`; where they are not there, or damaged, encode the rows and write them.

    Raises:
        InputError: a row cannot be read or encoded; the folder cannot be written.
    """
    key = make_key(stream, tokenizer, chat)
    file = folder / f"tokens-{key}.safetensors"
    if isinstance(found := try_reading(file, stream), EncodedData):
        return found
    try:
        make_folder(folder)
    except OSError as error:
        raise InputError(f"cannot be created: {error.strerror}", file=folder) from error
    with closing(lock_folder(folder, f".tokens-{key}.lock", wait=True)):
        if isinstance(found := try_reading(file, stream), EncodedData):  # written by the process before
            return found
        for part in folder.glob(f".{file.name}.????????"):  # of a process that was killed
            part.unlink()
        write_tokens(file, encode_stream(stream, tokenizer, chat))
        written = read_tokens(file, stream)
        return replace(written, notes=(*written.notes, f"{found}; encoded again")) if found else written


def make_key(stream: DataStream, tokenizer: Tokenizer, chat: ChatTemplate | None) -> str:
    """sha256 of all that decides the tokens of a data set: its bytes, form and template; the tokenizer; the chat
    template, its special tokens and, if it writes one, the date; the versions of the code."""
    parts = {
        "version": (VERSION, version("minipeft"), version("tokenizers")),
        "data": (stream.sha256, stream.part),
        "form": (stream.format.form, stream.format.template),
        "tokenizer": tokenizer.fingerprint,
        "chat": None if chat is None else (chat.text, sorted(chat.names.items())),
        "date": str(date.today()) if chat is not None and chat.writes_date else None,
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def write_tokens(file: Path, data: EncodedData) -> None:
    """Write a token file atomically.

    Raises:
        InputError: the write fails.
    """
    examples = data.examples.compact()
    arrays: dict[str, Array] = {
        "ids": examples.ids,
        "starts": examples.starts,
        "prompts": examples.prompts,
        "questions": data.questions,
        "contents": data.contents,
        "notes": np.frombuffer(bytearray(json.dumps(data.notes).encode()), np.uint8),
    }
    if examples.trained is not None:
        arrays["trained"] = examples.trained
    digest = hash_tensors(
        {name: (array.shape, [array.reshape(-1).view(np.uint8).data]) for name, array in arrays.items()}
    )
    arrays["digest"] = np.frombuffer(bytearray(digest), np.uint8)
    write_whole(file, make_tensor_writer({name: torch.from_numpy(array) for name, array in arrays.items()}))


def try_reading(file: Path, stream: DataStream) -> EncodedData | str:
    """Read a token file; the problem with it, or "" where there is none."""
    if not file.exists():
        return ""
    try:
        return read_tokens(file, stream)
    except InputError as error:
        return str(error)


def read_tokens(file: Path, stream: DataStream) -> EncodedData:
    """Map a token file of the data set into memory.

    Raises:
        InputError: it is truncated or damaged.
    """
    header = read_header(file)
    shapes = {name: info.shape for name, info in header.items()}
    (rows,), (tokens,), (said,) = (shapes.get(name, (0,))[:1] or (0,) for name in ("prompts", "ids", "notes"))
    wanted = {"ids": (tokens,), "starts": (rows + 1,), "prompts": (rows,), "trained": (tokens,),
              "questions": (rows, 32), "contents": (rows,), "notes": (said,), "digest": (32,)}  # fmt: skip
    check_header(header, wanted, file, dtypes=tuple(NUMPY), optional=("trained",))
    begin = file.stat().st_size - max(info.stop for info in header.values())  # of the data
    arrays = {name: map_tensor(info, begin) for name, info in header.items()}
    hashed = {name: (info.shape, read_blocks(info, begin)) for name, info in header.items() if name != "digest"}
    dtypes = {name: info.dtype for name, info in header.items()}
    if hash_tensors(hashed) != arrays["digest"].tobytes() or not dtypes.items() <= DTYPES.items():
        raise InputError("is damaged: its digest is not that of its data", file=file)
    notes = parse_json(arrays["notes"].tobytes().decode(), file, "notes")
    examples = Encoded(arrays["ids"], arrays["starts"], arrays["prompts"], arrays.get("trained"))
    return EncodedData(
        examples, arrays["questions"], arrays["contents"], stream.file, stream.sha256, stream.format, tuple(notes)
    )


def hash_tensors(tensors: Mapping[str, tuple[tuple[int, ...], Iterable[bytes | memoryview]]]) -> bytes:
    """sha256 of names, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        shape, blocks = tensors[name]
        digest.update(f"{name}{list(shape)}".encode())
        for block in blocks:
            digest.update(block)
    return digest.digest()


def read_blocks(info: TensorInfo, begin: int) -> Iterable[bytes]:
    """The bytes of a tensor, BLOCK at a time: a mapped page that is read would count as this process's memory."""
    with open(info.file, "rb") as stream:
        stream.seek(begin + info.start)
        for left in range(info.stop - info.start, 0, -BLOCK):
            yield stream.read(min(BLOCK, left))


def map_tensor(info: TensorInfo, begin: int) -> Array:
    """A tensor of the file as an array, mapped read-only."""
    dtype = NUMPY[info.dtype]
    if info.start == info.stop:  # which cannot be mapped
        return np.zeros(info.shape, dtype)
    return np.asarray(np.memmap(info.file, dtype, "r", begin + info.start, info.shape))
