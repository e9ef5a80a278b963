"""A Hugging Face hub on this machine: repositories in memory, and faults on demand.

What it answers was read from huggingface_hub, whose client talks to it: repositories, preupload, LFS batches, PUT,
commits, settings, files. Only TOKEN is known to it.
"""

import base64
import contextlib
import hashlib
import json
import socket
import threading
from dataclasses import dataclass, field

import yaml

from tests.stub_server import StubHandler, StubServer

TOKEN = "hf_StubStubStubStubStubStub"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=lambda: ["0" * 40])

    @property
    def sha(self) -> str:
        return self.commits[-1]

    def commit(self, changes: dict[str, bytes | None]) -> str:
        """A commit that writes these files, and deletes those of None."""
        self.files |= changes
        self.files = {path: content for path, content in self.files.items() if content is not None}
        self.commits.append(hashlib.sha1(f"{len(self.commits)}{sorted(self.files)}".encode()).hexdigest())
        return self.sha


class StubHub(StubServer):
    """faults: (method, part of the path) -> (what to do, how often). seen: method and path of every request."""

    def __init__(self):
        super().__init__(Handler)
        self.reset()

    def reset(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # of LFS
        self.faults: dict[tuple[str, str], list] = {}
        self.seen: list[str] = []
        self.visibility: list[bool] = []  # whether the repository was private, at each change of its files
        self.putting = threading.Event()

    def fail(self, method: str, part: str, what: str | int, times: int = 99) -> None:
        self.faults[method, part] = [what, times]


class Handler(StubHandler):
    def answer(self) -> None:
        path = self.path.partition("?")[0]
        self.server.seen.append(f"{self.command} {path}")
        if self.fault(path):
            return
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if path.startswith("/objects/"):  # signed addresses take no token
            return self.put_object(path.rpartition("/")[2], body)
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self.send(401, {"error": "no"}, X_Error_Message="Invalid credentials in Authorization header")
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2]).removesuffix(".git")
        if name not in self.server.repositories:
            return self.send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        action = parts[4] if parts[0] == "api" and len(parts) > 4 else parts[2] if parts[0] != "api" else "about"
        return getattr(self, "on_" + action)(name, self.server.repositories[name], parts, body)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def fault(self, path: str) -> bool:
        """Does what the test has asked for this request, if anything."""
        for (method, part), left in self.server.faults.items():
            if method == self.command and part in path and left[1] > 0:
                left[1] -= 1
                if isinstance(left[0], int):
                    self.rfile.read(int(self.headers.get("content-length") or 0))
                    # A server that quotes what it was sent.
                    self.send(left[0], {"error": f"no, says the stub to {self.headers.get('authorization')}"})
                    return True
                if left[0] == "drop":  # in the middle of what the client sends
                    self.rfile.read(int(self.headers.get("content-length") or 0) // 2)
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return True
                if left[0] == "hang":
                    self.server.putting.set()
                    threading.Event().wait(600)
                    return True
                if left[0] == "race":  # somebody else commits first
                    for repository in self.server.repositories.values():
                        repository.commit({"notes.txt": b"from somebody else"})
        return False

    def send(self, status: int, content: dict | bytes, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(OSError):
                self.wfile.write(body)

    def create(self, wanted: dict) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.server.repositories:
            return self.send(409, {"error": "You already created this model repo"})
        self.server.repositories[name] = Repository(wanted.get("visibility") == "private")
        return self.send(200, {"url": f"{self.server.url}/{name}"})

    def validate(self, card: str) -> None:
        data = yaml.safe_load(card.split("---")[1])
        errors = [{"message": '"license" must be known'}] if data.get("license") == "nonsense" else []
        remarks = [{"message": '"license" is rare'}] if data.get("license") == "rare" else []
        self.send(400 if errors else 200, {"errors": errors, "warnings": remarks})

    def on_about(self, name, repository, parts, body) -> None:
        siblings = [{"rfilename": path} for path in repository.files]
        self.send(200, {"id": name, "modelId": name, "sha": repository.sha, "private": repository.private,
                        "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})  # fmt: skip

    on_revision = on_about

    def on_preupload(self, name, repository, parts, body) -> None:
        files = []
        for file in json.loads(body)["files"]:
            is_large = file["path"].endswith((".safetensors", ".gguf"))
            content, oid = repository.files.get(file["path"]), None
            if content is not None:
                git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                oid = hashlib.sha256(content).hexdigest() if is_large else git
            mode = "lfs" if is_large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send(200, {"files": files})

    def on_info(self, name, repository, parts, body) -> None:  # NAME.git/info/lfs/objects/batch
        objects = []
        for wanted in json.loads(body)["objects"]:
            href = f"{self.server.url}/objects/{wanted['oid']}"
            is_new = wanted["oid"] not in self.server.objects
            objects.append(wanted | ({"actions": {"upload": {"href": href}}} if is_new else {}))
        self.send(200, {"objects": objects, "transfer": "basic"})

    def put_object(self, oid: str, body: bytes) -> None:
        is_whole = hashlib.sha256(body).hexdigest() == oid
        if is_whole:
            self.server.objects[oid] = body
        self.send(200 if is_whole else 400, {})

    def on_commit(self, name, repository, parts, body) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        header, changes = lines[0]["value"], {}
        if header.get("parentCommit") not in (None, repository.sha):
            return self.send(412, {"error": "A commit has happened since. Please refresh and try again."})
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            if kind == "lfsFile":
                changes[value["path"]] = self.server.objects[value["oid"]]
            else:
                changes[value["path"]] = base64.b64decode(value["content"]) if kind == "file" else None
        self.server.visibility.append(repository.private)
        sha = repository.commit(changes)
        return self.send(200, {"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha})

    def on_settings(self, name, repository, parts, body) -> None:
        repository.private = json.loads(body)["visibility"] == "private"
        self.send(200, {})

    def on_resolve(self, name, repository, parts, body) -> None:
        content = repository.files.get("/".join(parts[4:]))
        if content is None:
            return self.send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self.send(200, content, X_Repo_Commit=repository.sha, ETag=etag)
