"""Local folders and hub ids, against a local hub server, so that no test uses the network."""

from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants as constants
import pytest

from minipeft.data.examples import load_pairs
from minipeft.data.reading import CONALA_COMMIT
from minipeft.errors import InputError
from minipeft.hub import fetch, read_commit
from tests.hub import FILES, NEW, OLD, Hub, point_at, serve


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """The client pointed at our hub and at an empty cache."""
    with serve() as port:
        point_at(monkeypatch, tmp_path, port)
        yield Hub


def test_fetches_exact_files_of_one_commit(hub: type[Hub]) -> None:
    folder = fetch("owner/small", ["sub/part.json", "config.json"], optional=["only_old.json"])
    assert read_commit(folder) == NEW
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == {"config.json", "sub/part.json"}
    old = fetch("owner/small", ["config.json"], revision=OLD, optional=["only_old.json"])
    assert (read_commit(old), (old / "config.json").read_bytes()) == (OLD, b"old")
    assert (old / "only_old.json").read_bytes() == b"1"
    assert not any("model.py" in path for path in hub.asked)


def test_what_a_cached_commit_needs_is_not_asked_again(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    first = fetch("owner/small", ["config.json"])
    hub.asked.clear()
    assert fetch("owner/small", ["config.json"], revision=NEW) == first
    assert hub.asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("owner/small", ["config.json"], optional=["absent.json"]) == first
    with pytest.raises(InputError, match=r"^owner/small: HF_HUB_OFFLINE is set, and sub/part.json is not cached"):
        fetch("owner/small", ["config.json", "sub/part.json"])
    assert hub.asked == []


def test_conala_comes_from_its_pinned_commit(hub: type[Hub], assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "conala-paired-train.json"
    held = {CONALA_COMMIT: {f"data/{name}": (assets / "data/conala" / name).read_bytes()}}
    monkeypatch.setitem(FILES, "datasets/neulab/conala", held)
    pairs = load_pairs("conala")
    assert pairs.items == load_pairs(assets / "data/conala" / name).items
    assert read_commit(Path(pairs.file).parents[1]) == CONALA_COMMIT


@pytest.mark.parametrize(
    ("source", "names", "revision", "said"),
    [
        ("owner/none", ["config.json"], None, "owner/none: no local folder and no public model of this name"),
        ("owner/secret", ["config.json"], None, "owner/secret: gated"),
        ("owner/broken", ["config.json"], None, "owner/broken: the hub refuses with HTTP 500"),
        ("owner/small", ["config.json"], "v9", "owner/small: the hub has no revision 'v9'"),
        ("owner/small", ["tokenizer.json"], None, "no tokenizer.json at commit aaaaaaaaaaaa (found: config.json, "),
    ],
)
def test_each_refusal_of_the_hub_is_one_line(
    hub: type[Hub], source: str, names: list[str], revision: str | None, said: str
) -> None:
    with pytest.raises(InputError) as error:
        fetch(source, names, revision=revision)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unreachable_hub_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as closed:
        port = closed.server_address[1]
    point_at(monkeypatch, tmp_path, port)
    with pytest.raises(InputError, match=r"^owner/small: .* the hub cannot be reached .* HF_HUB_OFFLINE=1") as error:
        fetch("owner/small", ["config.json"])
    assert "\n" not in str(error.value)


def test_a_cache_that_cannot_be_written_is_one_line(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"^owner/small: config.json: cannot download .* HF_HOME"):
        fetch("owner/small", ["config.json"])


def test_a_local_folder_is_returned_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert fetch(tmp_path, ["config.json"], optional=["absent"]) == tmp_path
    assert read_commit(tmp_path) is None


@pytest.mark.parametrize(
    ("source", "names", "revision", "said"),
    [
        (".", ["tokenizer.json"], None, "no tokenizer.json in the folder (found: config.json)"),
        (".", ["config.json"], "main", "revision 'main' was given, but this is a local folder"),
        (".", ["../secret"], None, "'../secret' is not a plain file name"),
        (".", ["/etc/passwd"], None, "'/etc/passwd' is not a plain file name"),
        ("config.json", ["config.json"], None, "is a file; the folder that holds it is wanted"),
        ("./absent", ["config.json"], None, "no such folder, and not a hub id"),
        ("a/b/c", ["config.json"], None, "no such folder, and not a hub id"),
        ("a--b", ["config.json"], None, "no such folder, and not a hub id"),
        ("../absent", ["config.json"], None, "no such folder, and not a hub id"),
        ("owner/..", ["config.json"], None, "no such folder, and not a hub id"),
        ("owner/../..", ["config.json"], None, "no such folder, and not a hub id"),
        ("a..b/c", ["config.json"], None, "no such folder, and not a hub id"),
        ("owner/x\0", ["config.json"], None, "holds a NUL character"),
        ("owner/name", ["a/../../x"], None, "'a/../../x' is not a plain file name"),
        ("owner/name", ["config.json"], "../../../../secret", "revision: '../../../../secret' is not a commit, tag or"),
        ("owner/name", ["config.json"], "/etc/passwd", "revision: '/etc/passwd' is not a commit, tag or branch"),
        ("owner/name", ["config.json"], "main\n", "revision: 'main\\n' is not a commit, tag or branch"),
        ("owner/name", ["config.json"], "", "revision: '' is not a commit, tag or branch"),
    ],
)
def test_bad_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, names: list[str], revision: str | None, said: str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        fetch(source, names, revision=revision)
    assert said in str(error.value)
