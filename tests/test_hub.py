"""Models there and back by way of the Hugging Face Hub: its client against a small server on this machine.

The server keeps repositories in memory and answers as the Hub does where a model's files are sent, listed and fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mars import hub
from mars.errors import CheckpointError, ConfigError

CLIENT = """
import json, logging, sys
from pathlib import Path
import torch
import mars
from mars.errors import MarsError

def problem(call):
    try:
        call()
    except MarsError as error:
        return [type(error).__name__, error.code, str(error)]

model = mars.load()
model.card = "# Bells"
found = {"address": model.push_to_hub("ann/bells", private=True, token="hf_secret")}
model.var, model.card, model.notes = None, "", []
found["again"] = model.push_to_hub("ann/bells", token="hf_secret")
there = mars.Model.from_pretrained("ann/bells", token="hf_secret")
found["same"] = torch.equal(there.tokenizer.mask, model.tokenizer.mask) and there.var is None
first = mars.Model.from_pretrained("ann/bells", token="hf_secret", revision=sys.argv[1])
found["card"] = first.card
found["transformer"] = first.var is not None
load = mars.Model.from_pretrained
found["missing"] = problem(lambda: load("ann/nothing", token="hf_secret"))
found["revision"] = problem(lambda: load("ann/bells", token="hf_secret", revision="old"))
found["private"] = problem(lambda: load("ann/secret", token="hf_other"))
found["damaged"] = problem(lambda: load("ann/damaged", token="hf_secret"))
found["refused"] = problem(lambda: model.push_to_hub("ann/full", token="hf_secret"))
found["before"] = sorted(Path("cache").glob("**/notes.txt"))
print(json.dumps(found))
"""


class Hub(ThreadingHTTPServer):
    """Repositories by name: a list of commits, each {path: content}."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.asked: list[str] = []


def sha(number: int) -> str:
    """The name of a commit."""
    return f"{number + 1:040x}"


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def send(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, code: int, document: object, **headers: str) -> None:
        self.send(code, json.dumps(document).encode(), Content_Type="application/json", **headers)

    def do_POST(self) -> None:
        self.server.asked.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            raise AssertionError("a body in chunks")
        if self.headers.get("Authorization") != "Bearer hf_secret":
            return self.json(401, {"error": "who are you?"})
        if self.path == "/api/validate-yaml":
            return self.json(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"ann/{asked['name']}"
            self.server.repositories.setdefault(name, [{}])
            return self.json(200, {"url": f"http://{self.headers['Host']}/{name}", "name": name, "id": name})
        if found := re.fullmatch(r"/api/models/(.+/.+)/preupload/main", self.path):
            files = json.loads(body)["files"]
            told = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in files]
            return self.json(200, {"files": told})
        if found := re.fullmatch(r"/api/models/(.+/.+)/commit/main", self.path):
            if found[1] == "ann/full":
                return self.json(403, {"error": "the account is full"})
            commits = self.server.repositories[found[1]]
            files = dict(commits[-1])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del files[line["value"]["path"]]
            commits.append(files)
            oid = sha(len(commits) - 1)
            return self.json(
                200,
                {
                    "commitUrl": f"http://{self.headers['Host']}/{found[1]}/commit/{oid}",
                    "commitOid": oid,
                    "success": True,
                },
            )
        return self.json(404, {"error": f"no {self.path}"})

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        found = re.fullmatch(
            r"/api/models/([^/]+/[^/]+)(?:/(?:revision|tree)/([^/?]+))?/?|/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path
        )
        name, revision = (found[1] or found[3], found[2] or found[4] or "main") if found else ("", "")
        commits = self.server.repositories.get(name)
        known = self.headers.get("Authorization") == "Bearer hf_secret"
        if commits is None or not known:
            return self.json(404 if known else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        numbers = {sha(i): i for i in range(len(commits))} | {"main": len(commits) - 1}
        if revision not in numbers:
            return self.json(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        number = numbers[revision]
        files = commits[number]
        if found is not None and found[1] and "/tree/" in path:
            tree = [{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}  # noqa: S324
                    for p, c in files.items()]  # fmt: skip
            return self.json(200, tree)
        if found is not None and found[1]:
            siblings = [{"rfilename": p, "size": len(c), "blobId": hashlib.sha1(c).hexdigest()}  # noqa: S324
                        for p, c in files.items()]  # fmt: skip
            return self.json(
                200, {"id": name, "modelId": name, "sha": sha(number), "siblings": siblings, "private": True}
            )
        content = files[found[5]]  # type: ignore[index]
        etag = hashlib.sha256(content).hexdigest()
        return self.send(200, content, ETag=f'"{etag}"', X_Repo_Commit=sha(number))

    do_HEAD = do_GET


@pytest.fixture
def server() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_goes_to_the_hub_and_comes_back(server, tmp_path):
    pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")
    address = f"http://127.0.0.1:{server.server_port}"
    server.repositories["ann/bells"] = [{"notes.txt": b"mine", "labels.json": b"[]", "old.bin": b"0"}]
    server.repositories |= {"ann/full": [{}], "ann/secret": [{}]}
    server.repositories["ann/damaged"] = [
        dict.fromkeys(("config.json", "tokenizer.safetensors", "manifest.json"), b"{}")
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, sha(1)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, "\n".join([done.stderr, *server.asked])
    found = json.loads(done.stdout)
    assert found["address"] == found["again"] == f"{address}/ann/bells"
    assert found["same"] is found["transformer"] is True
    assert found["card"].startswith("# Bells")
    assert found["missing"][:2] == ["CheckpointError", 2]
    assert found["missing"][2].startswith("ann/nothing is not on this machine, and from the Hugging Face Hub")
    for name in ("missing", "revision", "private", "damaged", "refused"):
        assert found[name] is not None, name
        assert found[name][2].count("\n") == 0
        assert found[name][1] == 2
    assert "manifest.json lists no files" in found["damaged"][2]
    assert found["refused"][0] == "ConfigError"
    assert found["before"] == []  # what is no part of a model is not fetched
    first, last = server.repositories["ann/bells"][1:]
    assert set(first) == {"notes.txt", "old.bin", "README.md", "config.json", "manifest.json", "notes.json",
                          "tokenizer.safetensors", "var.safetensors"}  # fmt: skip
    assert set(last) == {"notes.txt", "old.bin", "config.json", "manifest.json", "notes.json", "tokenizer.safetensors"}


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "ann/be lls", "../x", "https://hub/ann/bells"])
def test_what_is_no_name_of_the_hub_asks_nobody(name):
    with pytest.raises(CheckpointError, match="is no folder, and no user/name of the Hugging Face Hub"):
        hub.download(name)


def test_names_to_send_to_are_checked(tmp_path):
    with pytest.raises(ConfigError, match="want user/name"):
        hub.upload(tmp_path, "bells", private=None, token=None, revision=None)


def test_without_its_package_one_line_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"ann/bells is not on this machine; .* needs huggingface_hub; run: pip"):
        hub.download("ann/bells")
