"""A hub on this machine: the part of its API that models are read and written by.

A repository is a directory below `root`; each commit is a directory, `main` names the newest. `faults` are
functions of the request that may answer in its place.
"""

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REGULAR_NBYTES = 1 << 16  # what is larger, and every file of weights, is kept as the hub keeps large files


def is_large(path: str, nbytes: int) -> bool:
    return path.endswith((".safetensors", ".bin")) or nbytes > REGULAR_NBYTES


class Repo:
    """Commits by their names, the newest last, and which of them a branch, tag or pull request names."""

    def __init__(self, root: Path) -> None:
        self.root, self.commits, self.refs = root, list[str](), dict[str, str]()
        self.private = self.gated = False
        self.messages: list[str] = []

    def path(self, commit: str) -> Path:
        return self.root / commit

    def commit_of(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)

    def files(self, commit: str) -> list[str]:
        root = self.path(commit)
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())

    def new_commit(self, revision: str) -> Path:
        """A directory with the files that the branch has so far, to be changed."""
        before = self.refs.get(revision) or self.refs.get("main")
        name = hashlib.sha1(f"{self.root}{len(self.commits)}".encode()).hexdigest()
        if before:
            shutil.copytree(self.path(before), self.path(name))
        else:
            self.path(name).mkdir(parents=True)
        self.commits.append(name)
        self.refs[revision] = name
        return self.path(name)


class HubServer:
    """The server and what it was asked for: `log` has (method, path, headers) of each request."""

    def __init__(self, root: Path) -> None:
        self.root, self.repos, self.blobs = root, dict[str, Repo](), root / "blobs"
        self.blobs.mkdir(parents=True)
        self.log: list[tuple[str, str, dict[str, str]]] = []
        self.faults: list[Callable[[Any, str], bool]] = []
        self.token = "hf_right"
        self.needs_login_to_write = True
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo: str, folder: Path | None = None, revision: str = "main") -> Repo:
        """A repository with the files of a folder, or one more commit of it."""
        found = self.repos.setdefault(repo, Repo(self.root / repo))
        if folder is not None:
            commit = found.new_commit(revision)
            shutil.rmtree(commit)
            shutil.copytree(folder, commit)
        return found

    def environ(self, home: Path) -> dict[str, str]:
        """What a process needs to ask this hub."""
        return {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": self.token,
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip

    def requests(self, method: str, part: str = "") -> list[str]:
        return [path for how, path, _ in self.log if how == method and part in path]

    def fetched(self, repo: str = "") -> dict[str, int]:
        """File → how often it was fetched as a whole."""
        found: dict[str, int] = {}
        for how, path, headers in self.log:
            match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
            if match and how == "GET" and "range" not in headers and repo in ("", match[1]):
                found[match[2]] = found.get(match[2], 0) + 1
        return found

    def ranged(self) -> list[tuple[str, str]]:
        """(file, range) of each part that was asked for."""
        return [
            (path.rpartition("/")[2], headers["range"])
            for how, path, headers in self.log
            if how == "GET" and "range" in headers
        ]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that was killed is none."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    hub: HubServer

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _handle(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.query = parse_qs(url.query)
        self.hub.log.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        try:
            if any(fault(self, path) for fault in self.hub.faults):
                return
            self._answer(path)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            pieces = []
            while n := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(n))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def json(self, value: Any, status: int = 200, **headers: str) -> None:
        self.send(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def refuse(self, status: int, code: str, message: str = "") -> None:
        said = {"X_Error_Message": message} if message else {}
        self.body() if self.command in ("POST", "PUT") else None
        self.json({"error": message or code}, status, X_Error_Code=code, **said)

    @property
    def is_logged_in(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {self.hub.token}"

    def _repo(self, name: str) -> Repo | None:
        """The repository, if whoever asks may see it; else the refusal is sent."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.is_logged_in):
            self.refuse(404 if self.is_logged_in else 401, "RepoNotFound", "Repository not found")
            return None
        if repo.gated:
            self.refuse(403, "GatedRepo", f"Access to model {name} is restricted")
            return None
        return repo

    def _answer(self, path: str) -> None:
        routes: list[tuple[str, str, Callable[..., None]]] = [
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/(.+?)", self._tree),
            ("GET", r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", self._info),
            ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+|refs/pr/\d+)/(.+)", self._file),
            ("HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+|refs/pr/\d+)/(.+)", self._file),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/upload/([0-9a-f]{64})", self._upload),
            ("POST", r"/api/validate-yaml", self._validate),
            ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", self._branch),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
        ]
        for method, pattern, answer in routes:
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                answer(*match.groups())
                return
        self.refuse(404, "NotFound")

    def _at(self, name: str, revision: str | None) -> tuple[Repo, str] | None:
        repo = self._repo(name)
        if repo is None:
            return None
        commit = repo.commit_of(revision or "main")
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo, commit

    def _info(self, name: str, revision: str | None) -> None:
        if found := self._at(name, revision):
            repo, commit = found
            files = [{"rfilename": file} for file in repo.files(commit)]
            self.json({"id": name, "sha": commit, "siblings": files, "private": repo.private})

    def _tree(self, name: str, revision: str) -> None:
        if found := self._at(name, revision):
            repo, commit = found
            self.json([_entry(repo.path(commit), file) for file in repo.files(commit)])

    def _file(self, name: str, revision: str, file: str) -> None:
        if not (found := self._at(name, revision)):
            return
        repo, commit = found
        path = repo.path(commit) / file
        if not path.is_file():
            self.json({"error": "no"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        self.send_file(path, {"X_Repo_Commit": commit, "ETag": f'"{_etag(path)}"'})

    def send_file(self, path: Path, headers: dict[str, str]) -> None:
        """In pieces: a file of weights may be large."""
        nbytes = path.stat().st_size
        start, stop, status = 0, nbytes, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, status = int(match[1]), 206
            stop = min(int(match[2] or nbytes - 1) + 1, nbytes)
            headers = {**headers, "Content_Range": f"bytes {start}-{stop - 1}/{nbytes}"}
        self.send_response(status)
        for key, value in {"Content-Length": str(stop - start), "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with open(path, "rb") as f:
            f.seek(start)
            left = stop - start
            while left and (data := f.read(min(left, 1 << 18))):
                self.wfile.write(data)
                left -= len(data)

    def _create(self) -> None:
        wanted = json.loads(self.body())
        name = f"{wanted['organization']}/{wanted['name']}"
        if not self.is_logged_in:
            self.json({"error": "Invalid username or password."}, 401)
        elif name in self.hub.repos:
            said = {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
            self.json(said, 409)
        else:
            repo = self.hub.add(name)
            repo.private = wanted.get("private", False) or wanted.get("visibility") == "private"
            (repo.new_commit("main") / ".gitattributes").write_text("")
            self.json({"url": f"{self.hub.url}/{name}"})

    def _preupload(self, name: str, revision: str) -> None:
        asked = json.loads(self.body())["files"]
        if self._at(name, revision):
            modes = {f["path"]: "lfs" if is_large(f["path"], f["size"]) else "regular" for f in asked}
            self.json(
                {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
            )

    def _batch(self, name: str) -> None:
        objects = json.loads(self.body())["objects"]
        answers = []
        for wanted in objects:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if not (self.hub.blobs / wanted["oid"]).exists():
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/upload/{wanted['oid']}"}}
            answers.append(answer)
        self.json({"transfer": "basic", "objects": answers})

    def _upload(self, oid: str) -> None:
        part, digest = self.hub.blobs / f"{oid}.part", hashlib.sha256()
        left = int(self.headers.get("Content-Length") or -1)
        with open(part, "wb") as f:
            if left < 0:
                data = self.body()
                digest.update(data)
                f.write(data)
            while left > 0:
                data = self.rfile.read(min(left, 1 << 18))
                if not data:
                    return
                digest.update(data)
                f.write(data)
                left -= len(data)
        if digest.hexdigest() != oid:
            self.json({"error": "another hash"}, 400)
            return
        part.rename(self.hub.blobs / oid)
        self.send(b"")

    def _validate(self) -> None:
        self.body()
        self.json({"errors": [], "warnings": []})

    def _branch(self, name: str, branch: str) -> None:
        self.body()
        if repo := self._repo(name):
            if branch in repo.refs:
                self.json({"error": "exists"}, 409)
                return
            repo.refs[branch] = repo.refs["main"]
            self.send(b"")

    def _commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        if not (found := self._at(name, revision)):
            return
        if not self.is_logged_in:
            self.json({"error": "Forbidden"}, 403)
            return
        repo, _ = found
        is_pr = self.query.get("create_pr") == ["1"]
        lacking = [
            line["value"]["path"]
            for line in lines
            if line["key"] == "lfsFile" and not (self.hub.blobs / line["value"]["oid"]).exists()
        ]
        if lacking:
            self.json({"error": f"LFS pointer to a missing file: {lacking[0]}"}, 400)
            return
        commit = repo.new_commit("refs/pr/1" if is_pr else revision)
        for line in lines:
            self._apply(line["key"], line["value"], commit, repo)
        number = {"pullRequestUrl": f"{self.hub.url}/{name}/discussions/1"} if is_pr else {}
        self.json(
            {"commitUrl": f"{self.hub.url}/{name}/commit/{commit.name}", "commitOid": commit.name, **number}
        )

    def _apply(self, key: str, value: dict[str, Any], commit: Path, repo: Repo) -> None:
        if key == "header":
            repo.messages.append(value["summary"])
            return
        path = commit / value["path"]
        if key == "deletedFile":
            path.unlink()
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if key == "file":
            path.write_bytes(base64.b64decode(value["content"]))
        else:
            shutil.copyfile(self.hub.blobs / value["oid"], path)


def _etag(path: Path) -> str:
    status = path.stat()
    return _hash_of(path, status.st_size, status.st_mtime_ns)


@cache
def _hash_of(path: Path, *_: int) -> str:
    data = path.read_bytes()
    if is_large(path.name, len(data)):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(root: Path, file: str) -> dict[str, Any]:
    """A file in a listing."""
    path = root / file
    nbytes = path.stat().st_size
    entry = {"type": "file", "path": file, "size": nbytes, "oid": _git_oid(path, nbytes)}
    if is_large(file, nbytes):
        entry["lfs"] = {"oid": _etag(path), "size": nbytes, "pointerSize": 130}
    return entry


def _git_oid(path: Path, nbytes: int) -> str:
    if is_large(path.name, nbytes):  # of the pointer
        return hashlib.sha1(path.name.encode()).hexdigest()
    return _etag(path)


@contextmanager
def asked_here(hub: HubServer, home: Path, monkeypatch: Any) -> Iterator[None]:
    """The hub's library in this process asks that hub, and waits for nothing between two tries."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    from lorafuse.files import hub_calls

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hub_calls, "WAITS_S", (0, 0))
    close_session()
    yield
    close_session()
