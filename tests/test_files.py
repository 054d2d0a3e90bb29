"""Strict reading and atomic writing: against Python's json, and failing disks."""

import json
import os
import re
import resource
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipeft import files
from minipeft.errors import InputError
from minipeft.files import lock_folder, parse_json, read_object, read_text, write_json, write_whole

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def refused(function, *arguments) -> str:
    """The text of the InputError that a call must give."""
    with pytest.raises(InputError) as error:
        function(*arguments)
    return str(error.value)


class TestText:
    def test_utf_8_with_and_without_a_mark(self, tmp_path):
        for data in ("größe\n".encode(), b"\xef\xbb\xbf" + "größe\n".encode()):
            (tmp_path / "f").write_bytes(data)
            assert read_text(tmp_path / "f") == "größe\n"

    def test_line_ends_are_kept(self, tmp_path):
        (tmp_path / "f").write_bytes(b"a\r\nb\rc\n")
        assert read_text(tmp_path / "f") == "a\r\nb\rc\n"

    def test_what_is_none(self, tmp_path, monkeypatch):
        (tmp_path / "latin").write_bytes("größe".encode("latin-1"))
        (tmp_path / "long").write_bytes(b" " * 101)
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        monkeypatch.setattr(files, "LARGEST_JSON", 100)
        assert refused(read_text, tmp_path / "latin") == f"{tmp_path}/latin: not UTF-8 at byte 2"
        assert refused(read_text, tmp_path / "long") == f"{tmp_path}/long: has 101 bytes, more than 100"
        assert refused(read_text, tmp_path / "pipe") == f"{tmp_path}/pipe: is not a plain file"
        assert refused(read_text, tmp_path) == f"{tmp_path}: is a directory, not a file"
        assert refused(read_text, tmp_path / "no").startswith(f"{tmp_path}/no: no such file (its folder holds: latin, ")
        assert refused(read_text, tmp_path / "a" / "b") == f"{tmp_path}/a/b: no such file (its folder does not exist)"
        assert "no such file" in refused(read_text, tmp_path / "loop")
        assert refused(read_text, Path("/dev/null")) == "/dev/null: is not a plain file"


class TestJSON:
    @given(VALUES)
    @settings(max_examples=100, deadline=None)
    def test_what_json_writes_is_read(self, value):
        assert parse_json(json.dumps(value), "F") == value

    @given(st.text(alphabet='{}[]":,0123456789eE.+-truefalsn NIy\\u', max_size=30))
    @settings(max_examples=800, deadline=None)
    def test_any_text_is_a_value_or_an_input_error(self, text):
        try:
            value = parse_json(text, "F")
        except InputError:
            return
        assert value == json.loads(text)

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("", "F: not valid JSON: line 1 column 1: Expecting value"),
            ('{"a": 1,\n "b"}', "F: not valid JSON: line 2 column 5: Expecting ':' delimiter"),
            ('{"a": 1} {}', "F: not valid JSON: line 1 column 10: Extra data"),
            ('{"a": {"b": 1, "b": 2}}', "F: key 'b' given twice"),
            ('{"a": NaN}', "F: NaN is not JSON (key 'a')"),
            ('{"a": [1, [2, -Infinity]]}', "F: Infinity, or a number beyond 1.8e308, is not JSON (key 'a')"),
            ('{"a": 1e999}', "F: Infinity, or a number beyond 1.8e308, is not JSON (key 'a')"),
            ("[[NaN]]", "F: NaN is not JSON"),
            ("NaN", "F: NaN is not JSON"),
            ("[" * 100_000, "F: JSON nested too deep"),
            ("[" * 100_000 + "]" * 100_000, "F: JSON nested too deep"),
            ("9" * 5000, "F: not usable JSON: Exceeds the limit (4300 digits)"),
        ],
    )
    def test_what_is_none(self, text, says):
        assert refused(parse_json, text, "F").startswith(says)

    def test_the_place_of_a_text_within_a_file(self):
        assert refused(parse_json, "{", "F", "header").startswith("F: header: not valid JSON: line 1 column 2")
        assert refused(parse_json, "\n{", "F", None, 41).startswith("F: not valid JSON: line 42 column 2")

    @pytest.mark.parametrize(
        ("text", "kind"),
        [
            ("[]", "a list"),
            ('"a"', "text"),
            ("3", "a number"),
            ("3.5", "a number"),
            ("true", "a boolean"),
            ("null", "null"),
        ],
    )
    def test_an_object_is_wanted(self, text, kind, tmp_path):
        (tmp_path / "f").write_text(text)
        assert refused(read_object, tmp_path / "f") == f"{tmp_path}/f: must hold a JSON object, but holds {kind}"


class TestWriteWhole:
    def test_the_old_file_stays_until_the_new_one_is_whole(self, tmp_path):
        (tmp_path / "f").write_text("old")

        def fill(stream):
            stream.write(b"half")
            stream.flush()
            assert (tmp_path / "f").read_text() == "old"
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_whole(tmp_path / "f", fill)
        assert (tmp_path / "f").read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["f"], "nothing half-written is left"

    def test_who_has_the_old_file_open_keeps_it(self, tmp_path):
        (tmp_path / "f").write_text("old")
        with open(tmp_path / "f") as reader:
            write_whole(tmp_path / "f", lambda stream: stream.write(b"new"))
            assert reader.read() == "old"
        assert (tmp_path / "f").read_text() == "new"

    def test_it_is_on_disk_before_it_is_in_place(self, tmp_path, monkeypatch):
        order = []
        for name in ("fsync", "replace"):
            plain = getattr(os, name)
            monkeypatch.setattr(os, name, lambda *a, n=name, f=plain: (order.append(n), f(*a))[1])
        write_whole(tmp_path / "f", lambda stream: stream.write(b"new"))
        assert order[:2] == ["fsync", "replace"]

    def test_folders_are_made_and_the_mode_is_the_users(self, tmp_path):
        old = os.umask(0o027)
        try:
            write_whole(tmp_path / "a" / "b" / "f", lambda stream: stream.write(b"x"))
        finally:
            assert os.umask(old) == 0o027, "the mask is left as it was"
        assert stat.S_IMODE((tmp_path / "a" / "b" / "f").stat().st_mode) == 0o640

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_a_full_disk(self, call, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        (tmp_path / "f").write_text("old")
        monkeypatch.setattr(os, call, full)
        said = refused(write_json, tmp_path / "f", {"a": 1})
        assert said == f"{tmp_path}/f: cannot write: No space left on device (for 13 bytes)"
        assert (tmp_path / "f").read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["f"]

    def test_a_folder_that_cannot_be(self, tmp_path):
        (tmp_path / "f").write_text("")
        assert refused(write_json, tmp_path / "f" / "g", {}).startswith(f"{tmp_path}/f/g: cannot write: ")

    def test_json(self, tmp_path):
        value = {"b": [1, 2.5, None], "a": {"größe": True}}
        write_json(tmp_path / "f", value)
        text = (tmp_path / "f").read_text(encoding="utf-8")
        assert read_object(tmp_path / "f") == value
        assert list(read_object(tmp_path / "f")) == ["b", "a"]
        assert text.endswith("}\n")
        assert "größe" in text
        with pytest.raises(ValueError, match="JSON compliant"):
            write_json(tmp_path / "g", {"a": float("nan")})
        assert not (tmp_path / "g").exists()


def test_a_folder_is_locked_by_one_process(tmp_path: Path) -> None:
    """Against another process, whose lock goes when it ends; and unlocked by closing."""
    code = "import sys; from pathlib import Path; from minipeft.files import lock_folder\n"
    code += "lock = lock_folder(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(InputError) as error:
            lock_folder(tmp_path)
        holder = f"process {other.pid} on {socket.gethostname()}"
        assert str(error.value) == f"{tmp_path}: in use by {holder}. One process at a time"
        other.kill()
    lock = lock_folder(tmp_path)
    with pytest.raises(InputError, match=f"in use by process {os.getpid()}"):
        lock_folder(tmp_path)
    lock.close()
    lock_folder(tmp_path, "other.lock").close()
    lock_folder(tmp_path).close()
    with pytest.raises(InputError, match=r"no/\.lock: cannot write: No such file"):
        lock_folder(tmp_path / "no")


MANY: dict[str, tuple[Callable[[], str], str]] = {
    "lists": (lambda: "[" + ",".join(["[]"] * 30_000_000) + "]", "holds 30,000,001 lists and objects, more than"),
    "numbers": (lambda: "[" + ",".join(["0"] * 6_000_000) + "]", "holds 6,000,000 values, more than 5,000,000"),
    "objects": (lambda: "{" + ",".join(['"a":{}'] * 1_500_000) + "}", "holds 1,500,001 lists and objects, more than"),
    "cut in a text": (
        lambda: "[" + ",".join(["{}"] * 1_500_000) + ',"' + '\\"' * 1_500_000,
        "holds 1,500,001 lists and objects",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MANY)
def test_json_of_too_many_values_is_refused_before_it_is_parsed(case: str) -> None:
    """90 MB of empty lists took 56 s and 2.5 GB."""
    make, said = MANY[case]
    text = make()
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=re.escape(f"x.json: {said}")):
        parse_json(text, "x.json")
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


def test_what_stands_in_texts_is_not_counted() -> None:
    text = json.dumps(['[{,\\"' * 1_500_000, "x"])
    assert parse_json(text, "x.json") == json.loads(text)
