"""The run folder: its files are never links, and have the permissions of the user's umask."""

import os
import stat
from pathlib import Path

import pytest

from minipeft.errors import InputError
from minipeft.files import lock_folder, read_umask, write_json
from minipeft.runs.checkpoints import open_run
from minipeft.runs.folder import LOCK, LOG, RUN, check_folder

IDENTITY = {"arguments": {"seed": 0}}


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """The targets of a hostile run folder's links: a file and a folder of the user's."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home/file").write_text("precious")
    (tmp_path / "home/step-000001").mkdir()
    (tmp_path / "home/step-000001/keep").write_text("precious")
    return tmp_path / "home"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", ["resume", "overwrite"])
@pytest.mark.parametrize(
    "name", [LOCK, LOG, RUN, "log.jsonl.damaged", "result.json", "timing.json", "checkpoints", "adapter", "model"]
)
def test_a_link_in_a_run_folder_is_refused_and_not_followed(
    name: str, how: str, tmp_path: Path, precious: Path
) -> None:
    """A run folder may be somebody else's: resuming it must not write, cut or remove what its links lead to."""
    out, before = tmp_path / "run", contents(precious)
    open_run(out, IDENTITY, resume=False, overwrite=False).close()
    place = out / name
    if place.is_dir():
        place.rmdir()
    else:
        place.unlink(missing_ok=True)
    place.symlink_to(precious / "file" if "." in name else precious)
    with pytest.raises(InputError) as error:
        open_run(out, IDENTITY, resume=how == "resume", overwrite=how == "overwrite")
    assert str(error.value).startswith(f"{place}: is a link")
    assert contents(precious) == before


def test_a_dangling_link_is_refused_too(tmp_path: Path, precious: Path) -> None:
    """Opening it for writing would create the file that it names."""
    out = tmp_path / "run"
    out.mkdir()
    (out / LOCK).symlink_to(precious / "new")
    with pytest.raises(InputError, match="is a link"):
        open_run(out, IDENTITY, resume=True, overwrite=False)
    assert not (precious / "new").exists()


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    """A user's own link to a larger disk."""
    (tmp_path / "large").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "large")
    open_run(tmp_path / "run", IDENTITY, resume=False, overwrite=False).close()
    assert (tmp_path / "large" / RUN).is_file()


def test_a_link_that_comes_between_check_and_use_is_not_followed(
    tmp_path: Path, precious: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race: the check has passed when the link is made."""
    monkeypatch.setattr("minipeft.runs.folder.refuse_links", lambda folder: None)
    for name in (LOCK, LOG):
        out = tmp_path / f"run-{name}"
        open_run(out, IDENTITY, resume=False, overwrite=False).close()
        (out / name).unlink()
        (out / name).symlink_to(precious / "file")
        with pytest.raises(InputError):
            open_run(out, IDENTITY, resume=True, overwrite=False)
        assert (precious / "file").read_text() == "precious"


def test_a_link_at_the_probe_is_not_followed(tmp_path: Path, precious: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / f".probe-{os.getpid()}").symlink_to(precious / "file")
    check_folder(out)
    assert (precious / "file").read_text() == "precious"


def test_a_link_at_a_file_that_is_written_is_replaced(tmp_path: Path, precious: Path) -> None:
    (tmp_path / "result.json").symlink_to(precious / "file")
    write_json(tmp_path / "result.json", {"a": 1})
    assert not (tmp_path / "result.json").is_symlink()
    assert (precious / "file").read_text() == "precious"


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o027])
def test_files_are_as_private_as_the_mask_says(mask: int, tmp_path: Path) -> None:
    old = os.umask(mask)
    try:
        run = open_run(tmp_path / "run", IDENTITY, resume=False, overwrite=False)
        run.log({"step": 1})
        run.close()
    finally:
        os.umask(old)
    for path in (tmp_path / "run").rglob("*"):
        whole = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == whole & ~mask, path


def test_asking_for_the_mask_opens_nothing_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask can be read only by setting it: another thread that makes a file meanwhile must not make it public."""
    plain, seen = os.umask, []
    old = plain(0o027)
    monkeypatch.setattr(os, "umask", lambda mask: seen.append(mask) or plain(mask))
    assert read_umask() == 0o027
    assert plain(old) == 0o027
    assert all(mask & 0o027 == 0o027 for mask in seen), [oct(mask) for mask in seen]


def test_a_lock_is_not_taken_through_a_link(tmp_path: Path, precious: Path) -> None:
    (tmp_path / LOCK).symlink_to(precious / "file")
    with pytest.raises(InputError, match="is a link"):
        lock_folder(tmp_path, LOCK)
    assert (precious / "file").read_text() == "precious"
