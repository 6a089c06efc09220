"""``align push`` against a server on this machine that speaks as much of the hub's protocol as an upload needs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from alignment import cli

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the hub's client calls httpx so
TOKEN = "hf_secretOfTheTests0123456789"
FILES = {
    "README.md": b"---\ntags: [alignment]\n---\n# A model\n",
    "lineage.json": b"{}",
    "model.safetensors": bytes(range(256)) * 40,
}


class Hub(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.storage_is_full = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self._note()
        name = re.match(r"/api/models/([\w.-]+/[\w.-]+)", self.path)
        if name is None or name[1] not in self.server.repositories:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        repository = self.server.repositories[name[1]]
        names = [".gitattributes", *repository["files"]]
        if "/tree/" in self.path:
            self._answer(200, [{"type": "file", "path": file, "size": 1, "oid": "0" * 40} for file in names])
            return
        siblings = [{"rfilename": file} for file in names]
        self._answer(200, {"id": name[1], "private": repository["private"], "siblings": siblings, "tags": []})

    def do_POST(self) -> None:
        self._note()
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": f"Invalid token {self.headers.get('Authorization')}"})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.repositories[name] = {"private": asked["visibility"] == "private", "files": {}}
            self._answer(200, {"url": f"{self.server.url}/{name}"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in files}
            file_modes = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            self._answer(200, {"files": file_modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            links = [
                {**each, "actions": {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}} for each in objects
            ]
            self._answer(200, {"transfer": "basic", "objects": links}, {"Content-Type": "application/vnd.git-lfs+json"})
        elif "/commit/" in self.path:
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            self._commit(name, [json.loads(line) for line in body.splitlines() if line])
            self._answer(
                200, {"commitUrl": f"{self.server.url}/{name}/commit/abc", "commitOid": "abc", "success": True}
            )
        else:
            self._answer(200, {})

    def do_PUT(self) -> None:
        self._note()
        content = self._body()
        if self.server.storage_is_full:
            self._answer(403, {"error": "no storage left"})
            return
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.large[oid] = content
        self._answer(200, {})

    def log_message(self, *_: Any) -> None:
        """Prints nothing."""

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.repositories[name]["files"]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            if line["key"] == "deletedFile":
                del files[value["path"]]

    def _note(self) -> None:
        self.server.requests.append(f"{self.command} {self.path.partition('?')[0]}")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, code: int, content: Any, headers: dict[str, str] | None = None) -> None:
        text = json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def push(
    hub: Hub, exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """``align push`` to my/model; checks the exit code and that no token is printed."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(exported.parent / "none"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def call(*words: str, code: int = 0, token: str = TOKEN, endpoint: str = hub.url) -> str:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setenv("HF_TOKEN", token)
        assert cli.main(["push", str(exported), "--to", "my/model", *words]) == code
        printed = "".join(capsys.readouterr())
        assert not token or token not in printed
        return printed

    return call


def test_all_files_arrive_in_a_private_repository_in_one_commit(hub: Hub, push: Callable[..., str]) -> None:
    printed = push()
    assert hub.repositories == {"my/model": {"private": True, "files": FILES}}
    assert f"pushed: {hub.url}/my/model/commit/abc" in printed
    assert sum("/commit/" in request for request in hub.requests) == 1


def test_a_repository_with_files_is_replaced_only_on_request(hub: Hub, push: Callable[..., str]) -> None:
    older = {"old.bin": b"old", "README.md": b"old"}
    hub.repositories["my/model"] = {"private": True, "files": dict(older)}
    assert "my/model has 2 files" in push(code=2)
    assert hub.repositories["my/model"]["files"] == older
    push("--replace")
    assert hub.repositories["my/model"]["files"] == FILES


def test_it_is_public_only_on_request(hub: Hub, push: Callable[..., str]) -> None:
    hub.repositories["my/model"] = {"private": False, "files": {}}
    assert "my/model is public" in push(code=2)
    push("--public")
    hub.repositories.clear()
    push("--public")
    assert hub.repositories["my/model"] == {"private": False, "files": FILES}
    hub.repositories["my/model"]["private"] = True
    assert "my/model is private" in push("--public", "--replace", code=2)


def test_what_cannot_be_pushed_is_refused(hub: Hub, push: Callable[..., str], exported: Path) -> None:
    assert "no token for the hub" in push(code=2, token="")
    assert hub.requests == []
    assert "the hub refused: " in push(code=11, token="hf_wrongwrong")
    assert hub.repositories == {}
    assert "the hub cannot be reached" in push(code=11, endpoint="http://127.0.0.1:9")
    hub.storage_is_full = True
    printed = push(code=11)  # the client has an error of its own form for weights that the hub does not take
    assert [word for word in ("the upload failed: ", "model.safetensors", "403") if word not in printed] == []
    assert not hub.repositories["my/model"]["files"]
    assert "OWNER/NAME" in push("--to", "model", code=2)
    (exported / "lineage.json").unlink()
    assert "lineage.json is missing" in push(code=2)
