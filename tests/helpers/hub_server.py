"""Stands in for the Hub on loopback, for the real client: repositories, branches, commits with LFS, trees, files.

It has everything in memory, knows one user by one token, and cuts connections when told to. Xet is the client's to
leave out (HF_HUB_DISABLE_XET=1); then it uploads by LFS, as it does where the package hf_xet is not installed.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

USER, TOKEN = "tester", "hf_TestsOnlyNoSecret"


@dataclass
class Repo:
    """Holds a repository's branches as commits, newest last, and the files of each commit."""

    private: bool = False
    branches: dict[str, list[str]] = field(default_factory=lambda: {"main": []})
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)  # paths that came by LFS

    def __post_init__(self) -> None:
        self.commit("main", {".gitattributes": b""}, set(), "initial commit")

    def commit(self, branch: str, added: dict[str, bytes], deleted: set[str], message: str) -> str:
        before = self.files(branch)
        sha = hashlib.sha1(f"{branch}{len(self.trees)}{message}".encode()).hexdigest()
        self.trees[sha] = {path: data for path, data in {**before, **added}.items() if path not in deleted}
        self.branches[branch].append(sha)
        self.messages[sha] = message
        return sha

    def sha(self, revision: str) -> str | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return revision if revision in self.trees else None

    def files(self, revision: str) -> dict[str, bytes]:
        return self.trees[self.branches[revision][-1]] if self.branches.get(revision) else {}


class Hub(ThreadingHTTPServer):
    """Serves repositories from memory; `cut` names a part of an address at which it drops connections."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.cards: list[str] = []
        self.cut: str | None = None
        self.requests: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints nothing where a client goes away."""


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """Runs a Hub while the block runs."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def entries(files: dict[str, bytes]) -> list[dict[str, Any]]:
    """Lists files as a tree does."""
    return [
        {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for path, data in files.items()
    ]


NAME = r"(?P<repo>(?:datasets/)?[\w.-]+/[\w.-]+)"
API = rf"/api/(?:models/|(?=datasets/)){NAME}"
ROUTES = {
    ("GET", r"/api/whoami-v2"): "whoami",
    ("POST", r"/api/repos/create"): "create",
    ("POST", r"/api/validate-yaml"): "validate",
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)"): "preupload",
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch"): "batch",
    ("PUT", r"/lfs/(?P<oid>\w+)"): "put",
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)"): "commit",
    ("POST", rf"{API}/branch/(?P<branch>[^/]+)"): "branch",
    ("GET", rf"{API}/refs"): "refs",
    ("POST", rf"{API}/paths-info/(?P<revision>[^/]+)"): "paths",
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(/(?P<under>.+))?"): "tree",
    ("GET", rf"{API}(/revision/(?P<revision>[^/]+))?"): "info",
    ("HEAD", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"): "resolve",
    ("GET", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"): "resolve",
}


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.cut and self.server.cut in path:
            self.close_connection = True
            self.connection.close()
            return
        for (method, pattern), name in ROUTES.items():
            if method == self.command and (match := re.fullmatch(pattern, path)):
                values = {key: value for key, value in match.groupdict().items() if value is not None}
                getattr(self, name)(**values)
                return
        self.reply(404, {"error": f"no such address: {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = answer  # noqa: N815

    def log_message(self, *args: Any) -> None:
        """Logs nothing."""

    def reply(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def found(self, repo: str) -> Repo | None:
        """Returns a repository that this client may see, or else gives the Hub's own answer."""
        repository = self.server.repos.get(repo)
        if repository is None or (repository.private and not self.known()):
            self.reply(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return repository

    def writable(self, repo: str) -> Repo | None:
        if not self.known() or repo.split("/")[0] != USER:
            self.reply(403 if self.known() else 401, {"error": "You don't have the rights"})
            return None
        return self.found(repo)

    def whoami(self) -> None:
        self.reply(
            *((200, {"name": USER, "type": "user", "orgs": []}) if self.known() else (401, {"error": "Invalid"}))
        )

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if not self.known() or not name.startswith(f"{USER}/"):
            self.reply(403 if self.known() else 401, {"error": "You don't have the rights"})
            return
        exists = name in self.server.repos
        if not exists:
            self.server.repos[name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self.reply(409 if exists else 200, {"url": f"{self.server.endpoint}/{name}", "name": name})

    def validate(self) -> None:
        self.server.cards.append(json.loads(self.body)["content"])
        self.reply(200, {"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        if repository := self.writable(repo):
            large = (".safetensors", ".png", ".bin", ".pt")
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(large) else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(self.body)["files"]
            ]
            repository.lfs |= {mode["path"] for mode in modes if mode["uploadMode"] == "lfs"}
            self.reply(200, {"files": modes})

    def batch(self, repo: str) -> None:
        if self.writable(repo):
            objects = []
            for each in json.loads(self.body)["objects"]:
                href = f"{self.server.endpoint}/lfs/{each['oid']}"
                known = each["oid"] in self.server.objects
                objects.append({**each, **({} if known else {"actions": {"upload": {"href": href}}})})
            self.reply(200, {"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.objects[oid] = self.body
        self.reply(200, b"")

    def commit(self, repo: str, revision: str) -> None:
        if repository := self.writable(repo):
            lines = [json.loads(line) for line in self.body.splitlines() if line]
            added, deleted, message = {}, set(), ""
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    message = value["summary"]
                elif line["key"] == "file":
                    added[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    added[value["path"]] = self.server.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    deleted.add(value["path"])
            if revision not in repository.branches:
                self.reply(404, {"error": "no such branch"}, {"X-Error-Code": "RevisionNotFound"})
                return
            sha = repository.commit(revision, added, deleted, message)
            self.reply(
                200, {"commitUrl": f"{self.server.endpoint}/{repo}/commit/{sha}", "commitOid": sha, "success": True}
            )

    def branch(self, repo: str, branch: str) -> None:
        if repository := self.writable(repo):
            exists = branch in repository.branches
            repository.branches.setdefault(branch, list(repository.branches["main"]))
            self.reply(409 if exists else 200, {})

    def refs(self, repo: str) -> None:
        if repository := self.found(repo):
            heads = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1]}
                for name, commits in repository.branches.items()
            ]
            self.reply(200, {"branches": heads, "converts": [], "tags": []})

    def info(self, repo: str, revision: str = "main") -> None:
        if (repository := self.found(repo)) and (sha := self.revision(repository, revision)):
            files = [{"rfilename": path} for path in repository.trees[sha]]
            names = {"id": repo, "modelId": repo, "sha": sha}
            self.reply(200, {**names, "private": repository.private, "tags": [], "siblings": files})

    def tree(self, repo: str, revision: str, under: str = "") -> None:
        if (repository := self.found(repo)) and (sha := self.revision(repository, revision)):
            start = f"{under}/" if under else ""
            inside = {path: data for path, data in repository.trees[sha].items() if path.startswith(start)}
            deep = "recursive=true" in urlsplit(self.path).query.lower()
            files = {path: data for path, data in inside.items() if deep or "/" not in path.removeprefix(start)}
            names = {start + path.removeprefix(start).split("/")[0] for path in inside if path not in files}
            folders = [{"type": "directory", "path": name, "oid": "0", "size": 0} for name in sorted(names)]
            self.reply(*((200, folders + entries(files)) if inside else (404, {"error": "no such folder"})))

    def paths(self, repo: str, revision: str) -> None:
        if (repository := self.found(repo)) and (sha := self.revision(repository, revision)):
            asked = parse_qs(self.body.decode()).get("paths") or json.loads(self.body or b"{}").get("paths", [])
            files = repository.trees[sha]
            self.reply(200, entries({path: files[path] for path in asked if path in files}))

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if not (repository := self.found(repo)) or not (sha := self.revision(repository, revision)):
            return
        data = repository.trees[sha].get(path)
        if data is None:
            self.reply(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        self.reply(200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": sha})

    def revision(self, repository: Repo, revision: str) -> str | None:
        sha = repository.sha(revision)
        if sha is None:
            self.reply(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        return sha
