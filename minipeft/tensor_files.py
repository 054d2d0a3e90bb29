"""Safetensors files: read and check a header before any data, write tensors one at a time.

A safetensors file is  N (8 bytes, little-endian) | N bytes of JSON, name -> dtype, shape, data_offsets | the data.
Its header is read and checked against the file's size before any tensor is allocated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.files import check_plain, name_type, parse_json, write_whole

LARGEST_HEADER = 100 * 2**20  # bytes; safetensors' own limit
MOST_TENSORS = 100_000  # of one safetensors file
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
         "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip
FLOATS = ("F32", "F16", "BF16")
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
          torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's entry in a safetensors header; `start` and `stop` are byte offsets in the data."""

    file: Path
    name: str  # in the file
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read a safetensors file's header and check it against the file's size; no tensor data is read.

    Raises:
        InputError: not a safetensors file (the error says what it looks like), truncated, overlapping offsets,
            malformed, or more than MOST_TENSORS tensors.
    """
    return parse_header(file)[0]


def parse_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read and check a header; returns its tensors, and the texts that it holds beside them.

    Raises:
        InputError: as `read_header`.
    """
    check_plain(file)
    size = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise InputError(guess_format(start + stream.read(248), size, length), file=file)
        raw = stream.read(length)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"header is not UTF-8 at byte {8 + error.start}: not safetensors", file=file) from error
    check_tensors(text.count('"data_offsets"'), file)  # before any entry is parsed
    header = parse_json(text, file, "header")
    if not isinstance(header, dict):
        raise InputError(f"header must be an object, but is {name_type(header)}", file=file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise InputError("must map text to text", file=file, where="header: __metadata__")
    check_tensors(len(header), file)
    tensors = {name: check_entry(name, entry, file) for name, entry in header.items()}
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            fault = "overlap" if info.start < end else "leave a gap"
            raise InputError(f"offsets {info.start}..{info.stop} {fault}", file=file, where=f"tensor {name!r}")
        end = info.stop
    if end != size - 8 - length:
        fault = "data incomplete" if end > size - 8 - length else "trailing bytes"
        raise InputError(f"{fault}: needs {8 + length + end} bytes, has {size} (download broken?)", file=file)
    return tensors, metadata


def check_tensors(count: int, file: Path) -> None:
    """Refuse a file of more than MOST_TENSORS tensors."""
    if count > MOST_TENSORS:
        raise InputError(f"{count:,} tensors, more than {MOST_TENSORS:,}", file=file, where="header")


def check_entry(name: str, entry: object, file: Path) -> TensorInfo:
    """Check one entry of the header and return it."""
    where = f"tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError("header entry must have dtype, shape and data_offsets", file=file, where=where)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise InputError(f"unknown dtype {dtype!r}", file=file, where=where)
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise InputError(
                f"shape and data_offsets must be lists of integers >= 0, not {numbers!r}", file=file, where=where
            )
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * BYTES[dtype]:
        raise InputError(f"offsets {offsets} do not fit {dtype} of shape {shape}", file=file, where=where)
    return TensorInfo(file, name, dtype, tuple(shape), offsets[0], offsets[1])


def check_header(
    header: Mapping[str, TensorInfo],
    wanted: Mapping[str, tuple[int, ...]],
    file: Path,
    *,
    dtypes: Sequence[str] = FLOATS,
    optional: Collection[str] = (),
    hint: str | None = None,
) -> None:
    """Check tensor names, shapes and dtypes against the expected ones, before any data is read.

    Both mappings use our names; errors quote the file's names. `file` is named when a tensor is missing; tensors in
    `optional` may be absent. `hint` is added to a shape error.

    Raises:
        InputError: a tensor is missing, unexpected, of the wrong shape, or of a dtype not in `dtypes`.
    """
    missing = [name for name in wanted if name not in header and name not in optional]
    if missing:
        raise InputError(f"missing tensors: {', '.join(missing[:5])} ({len(missing)} in all)", file=file)
    unexpected = [info for name, info in header.items() if name not in wanted]
    if unexpected:
        names = ", ".join(info.name for info in unexpected[:5])
        raise InputError(f"unexpected tensors: {names} ({len(unexpected)} in all)", file=unexpected[0].file)
    for name, info in header.items():
        where = f"tensor {info.name!r}"
        if info.shape != tuple(wanted[name]):
            problem = f"shape {list(info.shape)}, want {list(wanted[name])}"
            raise InputError(problem, file=info.file, where=where, hint=hint)
        if info.dtype not in dtypes:
            raise InputError(f"dtype {info.dtype}, want {'/'.join(dtypes)}", file=info.file, where=where)


def guess_format(start: bytes, size: int, length: int) -> str:
    """Say what a file that is not safetensors looks like."""
    text = start.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the weights: run `git lfs pull`"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "looks like an HTML page, not safetensors (download broken?)"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "looks like a pickle (.bin), not safetensors; pickle is not read"
    if size < 8:
        return f"too short to be safetensors: {size} bytes"
    return f"not safetensors, or truncated: its header says {length} bytes, the file has {size}"


def make_tensor_writer(
    tensors: Mapping[str, Tensor | Sequence[Tensor]], metadata: Mapping[str, str] | None = None
) -> Callable[[IO[bytes]], None]:
    """Return a function that writes these tensors to a stream as safetensors, one at a time, without copying all.

    A sequence of tensors of one dtype is written as one flat tensor. `metadata` joins Hugging Face's in the header.
    """
    parts = {name: [t] if isinstance(t, Tensor) else list(t) for name, t in tensors.items()}
    order = sorted(
        parts, key=lambda name: (-parts[name][0].element_size(), name)
    )  # as the safetensors library: by alignment, then by name
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in order:
        count = sum(t.numel() for t in parts[name])
        shape = list(parts[name][0].shape) if isinstance(tensors[name], Tensor) else [count]
        start, end = end, end + count * parts[name][0].element_size()
        header[name] = {"dtype": DTYPES[parts[name][0].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)

    def write(stream: IO[bytes]) -> None:
        stream.write(len(text).to_bytes(8, "little") + text)
        for t in (t for name in order for t in parts[name]):
            stream.write(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    return write


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with Hugging Face's metadata, and `metadata`, atomically."""
    write_whole(file, make_tensor_writer(tensors, metadata))
