"""A model hub in a thread: repositories in memory, as much of its HTTP as the real client asks for."""

import base64
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import constants, hf_api
from transformers.utils import hub as transformers_hub

TOKEN = "hf_of_a_test"


@dataclass
class Repository:
    """A repository: the files of its newest commit, and what the hub knows besides."""

    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = True
    downloads: int = 0
    commits: int = 0

    @property
    def sha(self) -> str:
        parts = [f"{name} {hashlib.sha256(data).hexdigest()}" for name, data in sorted(self.files.items())]
        return hashlib.sha1("\n".join(parts).encode()).hexdigest()

    @property
    def card(self) -> dict[str, Any]:
        head, *rest = self.files.get("README.md", b"").decode().split("\n---\n", 1)
        return yaml.safe_load(head) if rest else {}


class Hub:
    """The hub's repositories by name, the bytes that were put for them, and all requests: method and path."""

    def __init__(self) -> None:
        self.apart = (".safetensors",)  # endings of files that are kept apart from the commits
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.url = ""

    def add(self, name: str, folder: Path, downloads: int = 0) -> Repository:
        """Put a folder there as somebody's repository."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repositories[name] = Repository(files, private=False, downloads=downloads)
        return self.repositories[name]

    def downloaded(self) -> list[str]:
        """The files whose contents were asked for."""
        return sorted(
            {
                path.split("/resolve/")[1].split("/", 1)[1]
                for method, path in self.asked
                if method == "GET" and "/resolve/" in path
            }
        )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def _send(self, status: int, body: object = None, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self) -> None:
        body = self._body()
        place = urllib.parse.urlsplit(self.path)
        path, query = urllib.parse.unquote(place.path), urllib.parse.parse_qs(place.query)
        self.hub.asked.append((self.command, path))
        if self.command == "PUT":
            self.hub.blobs[path.rpartition("/")[2]] = body
            return self._send(200, {})
        if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/models":
            return self._send(200, self._listing(query))
        if path.endswith("/info/lfs/objects/batch"):
            return self._send(200, self._batch(json.loads(body)))
        if path.startswith("/api/models/"):
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            repository = self.hub.repositories.get(f"{owner}/{name}")
            if repository is None:
                return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return self._of_repository(f"{owner}/{name}", repository, rest, body)
        name, resolved, place = path.lstrip("/").partition("/resolve/")
        revision, _, file = place.partition("/")
        return self._file(name, revision, file) if resolved else self._send(404, {})

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
        url = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repositories:
            return self._send(409, {"error": "You already created this model repo", **url})
        self.hub.repositories[name] = Repository(
            {".gitattributes": b"*.safetensors filter=lfs\n"}, private=asked.get("visibility") == "private"
        )
        return self._send(200, url)

    def _listing(self, query: dict[str, list[str]]) -> list[dict[str, Any]]:
        wanted, words = query.get("filter", []), query.get("search", [""])[0]
        found = []
        for name, repository in self.hub.repositories.items():
            bases = repository.card.get("base_model", [])
            tags = [f"base_model:adapter:{base}" for base in ([bases] if isinstance(bases, str) else bases)]
            if set(wanted) <= set(tags) and words in name:
                found.append(self._info(name, repository) | {"tags": tags})
        found.sort(key=lambda one: -one["downloads"])
        return found[: int(query.get("limit", ["100"])[0])]

    def _info(self, name: str, repository: Repository) -> dict[str, Any]:
        siblings = [{"rfilename": file} for file in repository.files]
        facts = {"id": name, "sha": repository.sha, "private": repository.private, "downloads": repository.downloads}
        return {**facts, "siblings": siblings, "cardData": repository.card, "tags": [], "gated": False, "likes": 0}

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        upload = lambda oid: {"upload": {"href": f"{self.hub.url}/blobs/{oid}", "header": {}}}  # noqa: E731
        objects = [{"oid": o["oid"], "size": o["size"], "actions": upload(o["oid"])} for o in asked["objects"]]
        return {"transfer": "basic", "objects": objects}

    def _entry(self, path: str, data: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry = {"type": "file", "path": path, "size": len(data), "oid": blob}
        if path.endswith(self.hub.apart):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def _of_repository(self, name: str, repository: Repository, rest: list[str], body: bytes) -> None:
        match rest:
            case [] | ["revision", *_]:
                return self._send(200, self._info(name, repository))
            case ["tree", *_]:
                return self._send(200, [self._entry(path, data) for path, data in repository.files.items()])
            case ["paths-info", *_]:
                asked = urllib.parse.parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
                files = {path: repository.files[path] for path in asked if path in repository.files}
                return self._send(200, [self._entry(path, data) for path, data in files.items()])
            case ["preupload", *_]:
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(self.hub.apart) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
                return self._send(200, {"files": modes})
            case ["commit", *_]:
                self._commit(repository, [json.loads(line) for line in body.splitlines() if line])
                url = f"{self.hub.url}/{name}/commit/{repository.sha}"
                return self._send(200, {"success": True, "commitOid": repository.sha, "commitUrl": url})
        return self._send(404, {"error": "unknown"})

    def _commit(self, repository: Repository, lines: list[dict[str, Any]]) -> None:
        repository.commits += 1
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    repository.files[value["path"]] = self.hub.blobs[value["oid"]]
                case "deletedFile":
                    del repository.files[value["path"]]

    def _file(self, name: str, revision: str, path: str) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None or revision not in ("main", repository.sha):
            return self._send(404, {}, {"X-Error-Code": "RepoNotFound" if repository is None else "RevisionNotFound"})
        if path not in repository.files:
            return self._send(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.sha})
        data, entry = repository.files[path], self._entry(path, repository.files[path])
        headers = {"X-Repo-Commit": repository.sha, "ETag": f'"{entry.get("lfs", entry)["oid"]}"'}
        span = self.headers.get("Range")
        if span is None:
            return self._send(200, data, headers)
        first, _, last = span.removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last or len(data) - 1) + 1]
        return self._send(
            206, part, headers | {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"}
        )


@contextmanager
def serving_hub(cache: Path, patch: Any) -> Iterator[Hub]:
    """Run a hub to which huggingface_hub's own client speaks, with a cache of its own and a token that may write."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(hf_api.api, "endpoint", hub.url)
    patch.setattr(transformers_hub, "_hf_api", None)  # which would go on asking the hub of the first test
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose store speaks a protocol of its own
    patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    patch.setenv("HF_TOKEN", TOKEN)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
