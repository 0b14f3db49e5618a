"""A hub on the loopback interface that speaks as much of both protocols as the clients need, and breaks when told to."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]


class Loopback:
    """``repos[("model", "Org/Name")]`` maps revisions to files; ``corrupt`` and ``cut`` name paths that go wrong once each."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], dict[str, Files]] = {}
        self.corrupt: set[str] = set()  # one byte of these is changed, always
        self.cut: dict[str, int] = {}  # the connection breaks after so many bytes, once
        self.always_cut = False
        self.tokens: set[str] | None = None  # if given, only these may write or ask who they are
        self.readers: set[str] = set()  # of these tokens, those that may not write
        self.private: set[str] = set()
        self.broken_uploads = 0  # so many blobs are answered with an error of the server
        self.messages: list[str] = []  # of commits
        self.requests: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.url = ""

    def add(self, name: str, files: Files, *, revision: str = "main", repo_type: str = "model") -> None:
        self.repos.setdefault((repo_type, name), {})[revision] = files

    def find(self, repo_type: str, name: str) -> tuple[str, dict[str, Files]] | None:
        for (kind, known), revisions in self.repos.items():
            if kind == repo_type and known.lower() == name.lower():
                return known, revisions
        return None

    def downloads(self) -> list[str]:
        return [line for line in self.requests if line.startswith("GET") and ("/resolve/" in line or "FilePath=" in line)]


def commit_of(files: Files) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".parquet"))


@contextmanager
def serve() -> Iterator[Loopback]:
    hub = Loopback()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Loopback
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        self._route()

    def _route(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), {key: values[0] for key, values in parse_qs(url.query).items()}
        self.state.requests.append(f"{self.command} {unquote(self.path)}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, method in _ROUTES:
            if match := re.fullmatch(pattern, path):
                if method in _GUARDED and not self._may(writes=method not in ("whoami", "ms_whoami")):
                    return
                getattr(self, method)(*match.groups(), query=query, body=body)
                return
        self._json(404, {"Code": 404, "Success": False, "Message": f"no such route: {path}"})

    def _may(self, *, writes: bool) -> bool:
        if self.state.tokens is None:
            return True
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.state.tokens:
            self._json(401, {"error": "Invalid credentials", "Code": 10010205002, "Success": False, "Message": "invalid token"})
        elif writes and token in self.state.readers:
            self._json(403, {"error": "You may not write here", "Code": 10010205003, "Success": False, "Message": "no permission"})
        else:
            return True
        return False

    # Hugging Face

    def hf_revision(self, kind: str, name: str, revision: str, *, query: dict[str, str], body: bytes) -> None:
        if (found := self._hf_files(kind, name, revision)) is not None:
            known, files = found
            self._json(200, {"id": known, "sha": commit_of(files), "siblings": [{"rfilename": path} for path in files]})

    def hf_tree(self, kind: str, name: str, revision: str, *, query: dict[str, str], body: bytes) -> None:
        if (found := self._hf_files(kind, name, revision)) is None:
            return
        rows: list[dict[str, Any]] = [{"type": "directory", "path": "folder", "oid": "0" * 40, "size": 0}]
        for path, data in found[1].items():
            row: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
            if is_lfs(path):
                row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            rows.append(row)
        self._json(200, rows)

    def hf_file(self, kind: str | None, name: str, revision: str, path: str, *, query: dict[str, str], body: bytes) -> None:
        if (found := self._hf_files(kind or "models", name, revision)) is None:
            return
        files = found[1]
        if path not in files:
            self._json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        digest = hashlib.sha256(files[path]).hexdigest() if is_lfs(path) else git_oid(files[path])
        self._file(path, files[path], {"X-Repo-Commit": commit_of(files), "ETag": f'"{digest}"'})

    def hf_create(self, *, query: dict[str, str], body: bytes) -> None:
        name = json.loads(body)
        full = f"{name['organization']}/{name['name']}" if name.get("organization") else name["name"]
        if self.state.find("model", full):
            self._json(409, {"error": "You already created this model repo", "url": f"{self.state.url}/{full}"})
            return
        self.state.add(full, {})
        if name.get("private") or name.get("visibility") == "private":
            self.state.private.add(full)
        self._json(200, {"url": f"{self.state.url}/{full}", "name": full, "id": full})

    def hf_validate(self, *, query: dict[str, str], body: bytes) -> None:
        """As the hub checks a model card: its head is a YAML mapping, and a licence is an identifier."""
        import yaml

        asked = json.loads(body)
        head = yaml.safe_load(asked["content"].split("---")[1])
        good = isinstance(head, dict) and re.fullmatch("[a-z0-9.-]+", head.get("license", "other"))
        self._json(200, {"warnings": [], "errors": [] if good else [{"message": "a bad head"}]})

    def hf_preupload(self, name: str, revision: str, *, query: dict[str, str], body: bytes) -> None:
        files = [
            {"path": file["path"], "uploadMode": "lfs" if is_lfs(file["path"]) else "regular", "shouldIgnore": False, "oid": None}
            for file in json.loads(body)["files"]
        ]
        self._json(200, {"files": files})

    def lfs_batch(self, name: str, *, query: dict[str, str], body: bytes) -> None:
        objects = [{"oid": item["oid"], "size": item["size"]} | self._upload_of(item["oid"]) for item in json.loads(body)["objects"]]
        self._json(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def _upload_of(self, oid: str) -> dict[str, Any]:
        """Where to put a blob; nothing for one that is there."""
        return {} if oid in self.state.blobs else {"actions": {"upload": {"href": f"{self.state.url}/blob/{oid}"}}}

    def put_blob(self, oid: str, *, query: dict[str, str], body: bytes) -> None:
        if self.state.broken_uploads:
            self.state.broken_uploads -= 1
            self._json(500, {"error": "out of order"})
            return
        assert hashlib.sha256(body).hexdigest() == oid
        self.state.blobs[oid] = body
        self._json(200, {})

    def auth_check(self, name: str, *, query: dict[str, str], body: bytes) -> None:
        if self.state.find("model", name) is None:
            self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif self._may(writes=True):
            self._json(200, {})

    def hf_commit(self, name: str, revision: str, *, query: dict[str, str], body: bytes) -> None:
        import base64

        files: Files = {}
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "header":
                self.state.messages.append(item["value"]["summary"])
            if item["key"] == "file":
                files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "lfsFile":
                files[item["value"]["path"]] = self.state.blobs[item["value"]["oid"]]
        known, revisions = self.state.find("model", name) or (name, {})
        self.state.add(known, revisions.get(revision, {}) | files, revision=revision)
        oid = commit_of(files)
        url = f"{self.state.url}/{known}/commit/{oid}"
        self._json(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": "", "pullRequestUrl": None})

    def whoami(self, *, query: dict[str, str], body: bytes) -> None:
        self._json(200, {"type": "user", "name": "tester", "orgs": []})

    def _hf_files(self, kind: str, name: str, revision: str) -> tuple[str, Files] | None:
        found = self.state.find(kind.rstrip("s"), name)
        if found is None:
            self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        for known, files in found[1].items():
            if revision in (known, commit_of(files)):
                return found[0], files
        self._json(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        return None

    # ModelScope

    def ms_list(self, kind: str, name: str, *, query: dict[str, str], body: bytes) -> None:
        if (files := self._ms_files(kind, name, query.get("Revision", "master"))) is not None:
            rows = [
                {"Path": path, "Name": path, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}
                for path, data in files.items()
            ]
            self._json(200, {"Code": 200, "Success": True, "Data": {"Files": rows}})

    def ms_file(self, kind: str, name: str, *, query: dict[str, str], body: bytes) -> None:
        files = self._ms_files(kind, name, query.get("Revision", "master"))
        if files is not None:
            path = query["FilePath"]
            self._file(path, files[path], {"ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"'})

    def ms_whoami(self, *, query: dict[str, str], body: bytes) -> None:
        self._json(200, {"success": True, "data": {"username": "tester"}})

    def ms_repo(self, name: str, *, query: dict[str, str], body: bytes) -> None:
        if self.state.find("model", name) is None:
            self._json(404, {"Code": 10010205001, "Success": False, "Message": "record not found"})
        else:
            self._json(200, {"Code": 200, "Success": True, "Data": {"Path": name.split("/")[0], "Name": name.split("/")[1]}})

    def ms_create(self, *, query: dict[str, str], body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['Path']}/{asked['Name']}"
        if self.state.find("model", name):
            self._json(400, {"Code": 10010205004, "Success": False, "Message": "it exists"})
            return
        self.state.add(name, {}, revision="master")
        if asked["Visibility"] == 1:
            self.state.private.add(name)
        self._json(200, {"Code": 200, "Success": True, "Data": {"Path": asked["Path"], "Name": asked["Name"]}})

    def ms_batch(self, name: str, *, query: dict[str, str], body: bytes) -> None:
        asked = json.loads(body)["objects"]
        objects = [{"oid": item["oid"]} | self._upload_of(item["oid"]) for item in asked if item["oid"] not in self.state.blobs]
        self._json(200, {"Code": 200, "Success": True, "Data": {"objects": objects}})

    def ms_commit(self, name: str, revision: str, *, query: dict[str, str], body: bytes) -> None:
        import base64

        asked = json.loads(body)
        self.state.messages.append(asked["commit_message"])
        known, revisions = self.state.find("model", name) or (name, {})
        files = {
            item["path"]: self.state.blobs[item["sha256"]] if item["type"] == "lfs" else base64.b64decode(item["content"])
            for item in asked["actions"]
        }
        self.state.add(known, revisions.get(revision, {}) | files, revision=revision)
        self._json(200, {"Code": 200, "Success": True, "Data": {}})

    def _ms_files(self, kind: str, name: str, revision: str) -> Files | None:
        found = self.state.find(kind.rstrip("s"), name)
        if found is None or revision not in found[1]:
            self._json(404, {"Code": 10010205001, "Success": False, "Message": "record not found"})
            return None
        return found[1][revision]

    # bytes

    def _file(self, path: str, data: bytes, headers: dict[str, str]) -> None:
        if path in self.state.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        begin, end, status = 0, len(data), 200
        if match := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            begin, end, status = int(match[1]), int(match[2]) + 1 if match[2] else len(data), 206
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
            if begin >= len(data):
                self._json(416, {}, {"Content-Range": f"bytes */{len(data)}"})
                return
        self.send_response(status)
        for key, value in {"Accept-Ranges": "bytes", "Content-Length": str(end - begin), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = self.state.cut.get(path) if self.state.always_cut else self.state.cut.pop(path, None)
        self.wfile.write(data[begin:end] if stop is None else data[begin : min(end, begin + stop)])
        if stop is not None:
            self.close_connection = True

    def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


_KIND = "(models|datasets)"
_NAME = "([^/]+/[^/]+)"
_ROUTES = [
    (rf"/api/v1/{_KIND}/{_NAME}/repo/(?:files|tree)", "ms_list"),
    (rf"/api/v1/{_KIND}/{_NAME}/repo", "ms_file"),
    ("/openapi/v1/users/me", "ms_whoami"),
    ("/api/v1/models", "ms_create"),
    (rf"/(?:api|openapi)/v1/models/{_NAME}", "ms_repo"),
    (rf"/api/v1/repos/models/{_NAME}/info/lfs/objects/batch", "ms_batch"),
    (rf"/api/v1/repos/models/{_NAME}/commit/([^/]+)", "ms_commit"),
    ("/api/validate-yaml", "hf_validate"),
    ("/api/repos/create", "hf_create"),
    (rf"/api/models/{_NAME}/auth-check/write", "auth_check"),
    ("/api/whoami-v2", "whoami"),
    (rf"/api/{_KIND}/{_NAME}/revision/([^/]+)", "hf_revision"),
    (rf"/api/{_KIND}/{_NAME}/tree/([^/]+)", "hf_tree"),
    (rf"/api/models/{_NAME}/preupload/([^/]+)", "hf_preupload"),
    (rf"/api/models/{_NAME}/commit/([^/]+)", "hf_commit"),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("/blob/([0-9a-f]+)", "put_blob"),
    (rf"/(?:(datasets)/)?{_NAME}/resolve/([^/]+)/(.+)", "hf_file"),
]
_GUARDED = {"whoami", "ms_whoami", "hf_create", "hf_preupload", "lfs_batch", "hf_commit", "ms_create", "ms_batch", "ms_commit"}
