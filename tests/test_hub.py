"""Local folders and hub ids, against a local hub server, so that no test uses the network."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants as constants
import pytest

from minipeft.data.examples import load_pairs
from minipeft.data.reading import CONALA_COMMIT
from minipeft.errors import InputError
from minipeft.hub import fetch, read_commit

NEW, OLD = "a" * 40, "b" * 40
FILES = {  # repository -> commit -> file -> bytes
    "models/owner/small": {
        NEW: {"config.json": b"new", "sub/part.json": b"part", "model.py": b"never"},
        OLD: {"config.json": b"old", "only_old.json": b"1"},
    }
}
REFUSED = {"models/owner/secret": (401, "GatedRepo"), "models/owner/broken": (500, "")}


class Hub(BaseHTTPRequestHandler):
    """The client's three requests: a repository's files, a file's size, and a file."""

    asked: list[str]

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        type(self).asked.append("/".join(parts))
        api = parts[0] == "api"
        parts = parts[1:] if api else parts if parts[0] == "datasets" else ["models", *parts]
        repository = "/".join(parts[:3])
        if repository in REFUSED:
            return self.answer(REFUSED[repository][0], b"", {"X-Error-Code": REFUSED[repository][1]})
        if repository not in FILES:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        revision = parts[4] if len(parts) > 4 else "main"
        commit = next(iter(FILES[repository])) if revision == "main" else revision
        files = FILES[repository].get(commit)
        if files is None:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if api:
            said = {
                "id": "/".join(parts[1:3]),
                "sha": commit,
                "siblings": [{"rfilename": name} for name in files],
                "private": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
            }
            return self.answer(200, json.dumps(said).encode(), {"Content-Type": "application/json"})
        name = "/".join(parts[5:])
        if name not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        return self.answer(200, files[name], {"ETag": f'"{commit[:6]}{len(name)}"', "X-Repo-Commit": commit})

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """The client pointed at our hub and at an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.asked = []
    point_at(monkeypatch, tmp_path, server.server_address[1])
    yield Hub
    server.shutdown()
    server.server_close()


def point_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, port: int) -> None:
    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", endpoint, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


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
