"""A hub on this machine: the three requests of the hub's client, answered from memory."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants as constants
import pytest

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


@contextmanager
def serve() -> Iterator[int]:
    """Serve FILES; yields the port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.asked = []
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def point_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, port: int) -> None:
    """Point the client at this port and at an empty cache."""
    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", endpoint, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
