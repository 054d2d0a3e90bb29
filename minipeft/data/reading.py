"""Read the rows of a data source: JSON, JSON lines, gzip or Parquet; a file, a folder of files, or the hub.

    conala, demo               by name: CoNaLa from the hub at one commit, and what comes with the package
    FILE                       a JSON array if it begins with "[", else JSON lines; gzip and Parquet by first bytes
    FOLDER                     all data files in it, by name; of CoNaLa's folder the file of the split
    OWNER/NAME, file, revision a file of a data set on the hub, at a given revision

JSON lines are read one by one, so that the text of a file may exceed memory.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from minipeft.errors import InputError
from minipeft.files import check_plain, parse_json
from minipeft.hub import fetch

CONALA, CONALA_COMMIT = "neulab/conala", "fbc749f1c537e5c3834e93b15784302e331debe2"
LARGEST_FILE = 2**33  # bytes, decompressed
LARGEST_ARRAY = 2**31  # bytes of a JSON array, which is parsed whole
MAGIC = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"PAR1": "parquet", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd",
         b"\xfd7zXZ": "xz"}  # fmt: skip
ENDINGS = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz", ".parquet")

Row = tuple[str, int, Any]  # its place for errors, its number in the file, and what it holds


@dataclass(frozen=True)
class Source:
    """The files of a data set; errors and the log use `name`, `sha256` is that of the files."""

    name: str
    files: tuple[Path, ...]
    sha256: str

    def rows(self, longest_line: int) -> Iterator[Row]:
        """Each row of each file.

        Raises:
            InputError: `FILE:LINE: ...`: a file cannot be read.
        """
        return (row for file in self.files for row in read_file(file, longest_line))


def find_source(
    source: str | Path, split: str = "train", file: str | None = None, revision: str | None = None
) -> Source:
    """Find the files of a source: a known name, a file, a folder, or a hub id with `file` and `revision`.

    Raises:
        InputError: no such file, or a hub id without a revision.
    """
    if file is None and revision is not None:
        raise InputError("has no effect without data_file", where="data_revision")
    if file is not None:
        if revision is None and not Path(source).is_dir():
            hint = "Give the commit, so that the same command reads the same data: --data-revision"
            raise InputError("a data set on the hub needs a revision", file=source, where="data_revision", hint=hint)
        paths = [fetch(source, [file], revision=revision, repo_type="dataset") / file]
    elif str(source) in NAMED:
        paths = [NAMED[str(source)](split)]
    elif (folder := Path(source)).is_dir() and (folder / name_conala_file(split)).exists():
        paths = [folder / name_conala_file(split)]
    elif folder.is_dir():
        paths = sorted(path for path in folder.iterdir() if path.name.endswith(ENDINGS))
        if not paths:
            raise InputError(f"is a directory without data files ({', '.join(ENDINGS)})", file=folder)
    else:
        paths = [folder]
    digests = [hash_source(path) for path in paths]
    if len(paths) == 1:
        return Source(str(paths[0]), tuple(paths), digests[0])
    named = "".join(f"{path.name}\0{digest}\n" for path, digest in zip(paths, digests))
    return Source(str(source), tuple(paths), hashlib.sha256(named.encode()).hexdigest())


def has_splits(source: str | Path) -> bool:
    """Whether a source has training and test rows of its own: a known name, or a folder with CoNaLa's files."""
    return str(source) in NAMED or (Path(source) / name_conala_file("test")).exists()


def name_conala_file(split: str) -> str:
    """The name of CoNaLa's file of a split."""
    if split not in ("train", "test"):
        raise InputError(f"CoNaLa has no split {split!r}, only 'train' and 'test'", where="split")
    return f"conala-paired-{split}.json"


def fetch_conala(split: str) -> Path:
    """Download CoNaLa's file of a split, at the revision of our published results."""
    name = f"data/{name_conala_file(split)}"
    return fetch(CONALA, [name], revision=CONALA_COMMIT, repo_type="dataset") / name


def find_demo_file(split: str) -> Path:
    """The file of the demo pairs; it holds all splits, and each row names its own."""
    if split not in ("train", "test", "hard"):
        raise InputError(f"the demo has no split {split!r}, only 'train', 'test' and 'hard'", where="split")
    return Path(__file__).parents[1] / "demo" / "pairs.jsonl"


# a name in place of a path: split -> file
NAMED: dict[str, Callable[[str], Path]] = {"conala": fetch_conala, "demo": find_demo_file}


def hash_source(path: Path) -> str:
    """The sha256 of a plain file within the size limit that no process is writing."""
    check_plain(path)
    digest, read = hashlib.sha256(), 0
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > LARGEST_FILE:
            raise InputError(f"has {size:,} bytes, more than {LARGEST_FILE:,}", file=path, hint="Split it")
        while block := stream.read(2**20):
            digest.update(block)
            read += len(block)
    if read != size:
        raise InputError(f"changed while it was read ({size:,} bytes, then {read:,})", file=path)
    return digest.hexdigest()


def read_file(path: Path, longest_line: int) -> Iterator[Row]:
    """Each row of a file, whatever its format."""
    with open(path, "rb") as stream:
        start = stream.read(6)
        stream.seek(0)
        kind = next((name for magic, name in MAGIC.items() if start.startswith(magic)), None)
        if kind == "parquet":
            yield from read_parquet(path)
        elif kind == "gzip":
            yield from read_gzip(path, longest_line)
        elif kind is not None:
            raise InputError(f"is a {kind} file", file=path, hint="Decompress or convert it to JSON lines first")
        else:
            yield from read_json(stream, path, longest_line)


def read_gzip(path: Path, longest_line: int) -> Iterator[Row]:
    """Each row of a JSON file in gzip."""
    try:
        with gzip.open(path, "rb") as stream:
            yield from read_json(stream, path, longest_line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"is a gzip file that is damaged ({error})", file=path) from error


def read_json(stream: IO[bytes] | gzip.GzipFile, path: Path, longest_line: int) -> Iterator[Row]:
    """Each row of a JSON array or of JSON lines, with its place for errors and its number."""
    start, offset = b"", 0
    for number, raw in enumerate(stream, start=1):  # by b"\n" alone: U+2028 may stand in a JSON string
        if number == 1 and (raw.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in raw[:4]):
            raise InputError("looks like UTF-16", file=path, hint="Save it as UTF-8")
        line = decode(raw, path, number, offset).removesuffix("\n")
        if not start.strip() and line.lstrip().startswith("["):
            text = line + "\n" + decode(stream.read(LARGEST_ARRAY), path, number + 1, offset + len(raw))
            yield from read_array(text, path, number)
            return
        if len(line) > longest_line:
            raise InputError(f"has {len(line):,} characters, more than {longest_line:,}", file=f"{path}:{number}")
        start, offset = start or raw.strip(), offset + len(raw)
        if offset > LARGEST_FILE:
            raise InputError(f"has more than {LARGEST_FILE:,} bytes", file=path, hint="Split it")
        if line.strip():
            yield f"{path}:{number}", number, parse_json(line, f"{path}:{number}", line=number)


def read_array(text: str, path: Path, first: int) -> Iterator[Row]:
    """Each row of a JSON array, which begins at line `first` of the file."""
    for number, row in enumerate(parse_json(text, path, line=first), start=1):
        yield f"{path}: item {number}", number, row


def decode(raw: bytes, path: Path, line: int, offset: int) -> str:
    """Decode UTF-8 bytes that begin at `line` and byte `offset`; a file may begin with a byte order mark."""
    try:
        return raw.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        place = line + raw.count(b"\n", 0, error.start)
        raise InputError(f"not UTF-8 at byte {offset + error.start}", file=f"{path}:{place}") from error


def read_parquet(path: Path) -> Iterator[Row]:
    """Each row of a Parquet file without its nulls: a column is null where a row lacks the field."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        hint = "pip install minipeft[data], or convert it to JSON lines"
        raise InputError("is a parquet file, which needs pyarrow", file=path, hint=hint) from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", number, drop_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"is a parquet file that cannot be read ({reason})", file=path) from error


def drop_nulls(value: Any) -> Any:
    """Drop the entries of objects that are null."""
    if isinstance(value, dict):
        return {name: drop_nulls(entry) for name, entry in value.items() if entry is not None}
    return [drop_nulls(entry) for entry in value] if isinstance(value, list) else value
