"""Files of every format give the same rows; what is damaged, or not pinned, is one line."""

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from minipeft.data import reading
from minipeft.data.reading import find_source, read_file
from minipeft.errors import InputError

ROWS = [{"text": "größe = 1\u2028x", "n": 1, "m": [{"role": "user"}]}, {"text": "b", "n": 2, "m": [{"role": "x"}]}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def rows_of(file: Path) -> list[dict]:
    return [row for _, _, row in find_source(file).rows(10**6)]


def write_formats(folder: Path) -> list[Path]:
    """The rows as lines, as an array, both in gzip, and as Parquet."""
    import pyarrow
    import pyarrow.parquet

    array = json.dumps(ROWS, indent=1).encode()
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / "b.json").write_bytes(b"\n" + array)
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(LINES))
    (folder / "d.json.gz").write_bytes(gzip.compress(array))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "e.parquet")
    return sorted(folder.iterdir())


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    files = write_formats(tmp_path)
    assert len(files) == 5
    for file in files:
        assert rows_of(file) == ROWS, file.name
        assert find_source(file).sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert rows_of(tmp_path) == ROWS * 5  # a folder: all files, by name
    before = find_source(tmp_path).sha256
    (tmp_path / "notes.txt").write_text("not data")
    assert find_source(tmp_path).sha256 == before
    (tmp_path / "a.jsonl").rename(tmp_path / "z.jsonl")
    assert find_source(tmp_path).sha256 != before  # another order of rows


def test_a_row_says_where_it_stands(tmp_path: Path) -> None:
    a, b, c, d, e = write_formats(tmp_path)
    places = [[place for place, _, _ in read_file(file, 10**6)] for file in (a, b, c, d, e)]
    assert places[0] == [f"{a}:1", f"{a}:2"]
    assert places[1] == [f"{b}: item 1", f"{b}: item 2"]
    assert places[2] == [f"{c}:1", f"{c}:2"]
    assert places[4] == [f"{e}: row 1", f"{e}: row 2"]


def test_what_is_null_in_parquet_is_absent(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"a": "x", "m": [{"role": "user", "calls": None}]}, {"a": None, "m": [{"role": "b", "calls": "c"}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert rows_of(tmp_path / "x.parquet") == [{"a": "x", "m": [{"role": "user"}]}, {"m": rows[1]["m"]}]


DAMAGED = {
    "gzip cut": (gzip.compress(LINES)[:-9], "FILE: is a gzip file that is damaged (Compressed file ended"),
    "gzip changed": (gzip.compress(LINES)[:-8] + b"\0" * 8, "FILE: is a gzip file that is damaged (CRC check failed"),
    "not UTF-8 in gzip": (gzip.compress(LINES + b'{"a": "\xe9"}'), "FILE:3: not UTF-8 at byte "),
    "parquet cut": (b"PAR1\x15\x04", "FILE: is a parquet file that cannot be read ("),
    "zstd": (b"\x28\xb5\x2f\xfd\0\0", "FILE: is a zstd file. Decompress"),
    "lines after an array": (b"\n[1]\n2", "FILE: not valid JSON: line 3 column 1"),
    "a long line": (LINES + b'{"a": "' + b"x" * 10**6 + b'"}\n', "FILE:3: has 1,000,009 characters, more than"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_damaged_is_one_line(tmp_path: Path, case: str) -> None:
    raw, said = DAMAGED[case]
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(InputError) as error:
        rows_of(tmp_path / "x")
    assert str(error.value).startswith(said.replace("FILE", str(tmp_path / "x")))
    assert "\n" not in str(error.value)


def test_parquet_without_pyarrow_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"is a parquet file, which needs pyarrow\. pip install minipeft\[data\]"):
        rows_of(tmp_path / "x")


def test_a_gzip_that_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LARGEST_FILE", 2**16)
    (tmp_path / "x").write_bytes(gzip.compress(b'{"a": 1}\n' * 10_000))
    with pytest.raises(InputError, match="has more than 65,536 bytes"):
        rows_of(tmp_path / "x")


def test_a_data_set_on_the_hub_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.jsonl").write_bytes(LINES)
    asked = []

    def fetch(source: object, names: list[str], **how: object) -> Path:
        asked.append((source, names, how))
        return tmp_path

    monkeypatch.setattr(reading, "fetch", fetch)
    found = find_source("owner/name", file="data/x.jsonl", revision="a" * 40)
    assert [row for _, _, row in found.rows(10**6)] == ROWS
    assert asked == [("owner/name", ["data/x.jsonl"], {"revision": "a" * 40, "repo_type": "dataset"})]
    with pytest.raises(InputError, match=r"data_revision: a data set on the hub needs a revision\. Give the commit"):
        find_source("owner/name", file="data/x.jsonl")
    with pytest.raises(InputError, match="data_revision: has no effect without data_file"):
        find_source("owner/name", revision="a" * 40)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is a directory without data files"):
        find_source(tmp_path / "empty")
