"""`minipeft push` and adapters from the hub: both ways, and the errors, on a local hub server."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import minipeft
from minipeft.errors import InputError
from tests.small import write_adapter, write_small_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and an adapter away from its init."""
    folder = tmp_path_factory.mktemp("tuned")
    write_adapter(write_small_model(folder / "model", "llama", layers=1), folder / "adapter")
    (folder / "adapter/README.md").write_text("# A card")
    return folder


class Hub(BaseHTTPRequestHandler):
    """The client's requests to create a repository, commit files and read them back."""

    repositories: dict[str, dict]
    token: str | None = "Bearer secret"

    def reply(self, body: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self.path.split("?")[0].strip("/").split("/")
        if self.headers.get("Authorization") != self.token:
            return self.reply({"error": "unauthorized"}, 401)
        if parts == ["api", "validate-yaml"]:
            return self.reply({"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            given = json.loads(data)
            name = f"{given['organization']}/{given['name']}" if given.get("organization") else given["name"]
            private = given.get("private", given.get("visibility") == "private")
            if name in self.repositories:
                return self.reply({"error": "exists", "url": f"http://{self.headers['Host']}/{name}"}, 409)
            self.repositories[name] = {"private": private, "branches": {"main": {}}}
            return self.reply({"url": f"http://{self.headers['Host']}/{name}", "id": name})
        repository = self.repositories["/".join(parts[2:4])]
        if parts[4] == "branch":
            repository["branches"][parts[5]] = {}
            return self.reply({})
        if parts[4] == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(data)["files"]
            ]
            return self.reply({"files": files})
        for line in map(json.loads, data.decode().splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                repository["branches"][parts[5]][line["value"]["path"]] = content
        url = f"http://{self.headers['Host']}/{'/'.join(parts[2:4])}"
        return self.reply({"commitUrl": f"{url}/commit/{'c' * 40}", "commitOid": "c" * 40})

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        parts = parts[2:] if parts[0] == "api" else parts
        if parts[0] == "whoami-v2":
            return self.reply({"name": "owner"})
        name = "/".join(parts[:2])
        if name not in self.repositories:
            return self.reply({}, 404, {"X-Error-Code": "RepoNotFound"})
        repository, revision = self.repositories[name], parts[3] if len(parts) > 3 else "main"
        commits = {"c" * 40: "main", "d" * 40: "v2"}
        branch = commits.get(revision, revision)
        if branch not in repository["branches"]:
            return self.reply({}, 404, {"X-Error-Code": "RevisionNotFound"})
        commit, files = {b: c for c, b in commits.items()}[branch], repository["branches"][branch]
        if len(parts) < 5:
            siblings = [{"rfilename": file} for file in files]
            return self.reply({"id": name, "sha": commit, "private": repository["private"], "siblings": siblings})
        content = files["/".join(parts[4:])]
        return self.reply(content, 200, {"ETag": f'"{hash(content)}"', "X-Repo-Commit": commit})

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """The client pointed at a hub on this machine, with a token and an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.repositories = {}
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", endpoint, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    yield Hub
    server.shutdown()
    server.server_close()


def test_an_adapter_goes_to_the_hub_and_comes_back(folder: Path, hub: type[Hub], run: Run) -> None:
    (folder / "adapter/notes.pkl").write_bytes(b"x")
    status, out, err = run("push", folder / "adapter", "owner/tuned")
    (folder / "adapter/notes.pkl").unlink()
    assert (status, out) == (0, f"owner/tuned: {'c' * 40}\n")
    assert "note: not pushed: notes.pkl\n" in err
    repository = hub.repositories["owner/tuned"]
    assert repository["private"] is True
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(repository["branches"]["main"]) == names
    assert all(repository["branches"]["main"][n] == (folder / "adapter" / n).read_bytes() for n in names)
    ids, logits = torch.tensor([[5, 6, 7]]), []
    for source in (folder / "adapter", "owner/tuned"):
        model = minipeft.load_model(folder / "model")
        minipeft.load_adapter(model, source)
        logits.append(model(ids))
    assert torch.equal(*logits)


def test_a_branch_is_loaded_by_its_revision(folder: Path, hub: type[Hub], run: Run) -> None:
    assert run("push", folder / "model", "owner/base", "--public", "--revision", "v2")[0] == 0
    repository = hub.repositories["owner/base"]
    assert repository["private"] is False
    assert set(repository["branches"]["v2"]) == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert repository["branches"]["main"] == {}
    again, before = minipeft.load_model("owner/base", revision="v2"), minipeft.load_model(folder / "model")
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), before.parameters()))
    run("push", folder / "adapter", "owner/tuned", "--revision", "v2")
    with pytest.raises(InputError, match=r"owner/tuned: no adapter_config\.json at commit c{12}"):
        minipeft.load_adapter(again, "owner/tuned")
    assert minipeft.load_adapter(again, "owner/tuned", revision="v2").method == "lora"
    answer = ["generate", "--model", folder / "model", "--raw", "add 1", "--temperature", 0, "--max-new-tokens", 4]
    local = run(*answer, "--adapter", folder / "adapter")
    assert run(*answer, "--adapter", "owner/tuned", "--adapter-revision", "v2") == local


def test_a_public_repository_is_not_pushed_to_unasked(folder: Path, hub: type[Hub], run: Run) -> None:
    hub.repositories["owner/open"] = {"private": False, "branches": {"main": {}}}
    status, _, err = run("push", folder / "adapter", "owner/open")
    said = "is a public repository, and private was asked for. --public pushes to it all the same"
    assert (status, err) == (2, f"error: owner/open: {said}\n")
    assert hub.repositories["owner/open"]["branches"] == {"main": {}}
    assert run("push", folder / "adapter", "owner/open", "--public")[0] == 0


@pytest.mark.parametrize(
    ("hub_id", "place", "said"),
    [
        ("name", "adapter", "name: is not a hub id to push to (OWNER/NAME)"),
        ("../x/y", "adapter", "../x/y: is not a hub id to push to (OWNER/NAME)"),
        ("owner/x", ".", "holds neither adapter_config.json nor config.json"),
        ("owner/a--b", "adapter", "owner/a--b: cannot be pushed to ("),
        ("owner/x", "absent", "absent: no such folder"),
    ],
)
def test_what_is_refused_reaches_no_hub(
    folder: Path, hub: type[Hub], run: Run, hub_id: str, place: str, said: str
) -> None:
    status, _, err = run("push", folder / place, hub_id)
    assert status == 2
    assert said in err
    assert hub.repositories == {}


def test_a_link_out_of_the_folder_is_not_followed(folder: Path, tmp_path: Path, hub: type[Hub], run: Run) -> None:
    (tmp_path / "secret").write_text("x")
    write_adapter(folder / "model", tmp_path / "adapter")
    (tmp_path / "adapter/README.md").symlink_to(tmp_path / "secret")
    status, _, err = run("push", tmp_path / "adapter", "owner/x")
    assert status == 2
    assert "README.md: is a link that leaves the model folder" in err
    assert hub.repositories == {}


def test_without_a_token_the_refusal_is_one_line(
    folder: Path, hub: type[Hub], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "wrong")
    status, _, err = run("push", folder / "adapter", "owner/x")
    assert status == 2
    assert err.startswith("error: owner/x: the hub refuses to be written to (HTTP 401). `hf auth login`, or HF_TOKEN")
    assert err.count("\n") == 1


def test_a_hub_that_cannot_be_reached(folder: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as closed:
        port = closed.server_address[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", f"http://127.0.0.1:{port}", raising=False)
    status, _, err = run("push", folder / "adapter", "owner/x")
    assert status == 2
    assert "error: owner/x: cannot be pushed to (" in err
    assert err.count("\n") == 1
