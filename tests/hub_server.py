"""A local server that is as much of the Hub as models need, and processes that know no other Hub."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import torch

TOKEN = "hf_dummy"
ADDRESS = re.compile(r"/(?:api/models/)?(?P<name>[\w.-]+/[\w.-]+)(?P<rest>/.*)?")


def run_python(code, *arguments, **environment):
    """Run code in a fresh process with as many threads as this one has, since last digits hang on them."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    env = {name: value for name, value in {**os.environ, **threads, **environment}.items() if value is not None}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass
class Repository:
    """What it was created with, and its content by path, as committed."""

    created: dict
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def commit_id(self) -> str:
        """Of what is committed now; another content has another id."""
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


class HubServer(ThreadingHTTPServer):
    """A Hub in memory.

    Attributes:
        repositories: By name.
        private: Whether reading needs the token; writing always does.
        broken_commits: How many of the next commits lose their connection half-way.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.private = False
        self.broken_commits = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home, token: str | None = TOKEN) -> dict[str, str | None]:
        """Of a process for which this server is the Hub, and `home` its cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": token,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": None,
            "NO_PROXY": "127.0.0.1",
        }

    def handle_error(self, request, client_address):
        """Say nothing of clients that went away."""


class Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *args):
        pass

    def answer(self, content, status=200, head=False, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def refuse(self, code, status=404, **headers):
        self.answer({"error": code}, status=status, X_Error_Code=code, **headers)

    def admits(self, needs_token: bool) -> bool:
        """Whether the token is right; otherwise answer as the Hub does: a wrong token is named, a missing one not."""
        given = self.headers["Authorization"]
        if given == f"Bearer {TOKEN}" or (given is None and not needs_token):
            return True
        if given is None:
            self.refuse("RepoNotFound", status=401, X_Error_Message="Invalid username or password.")
        else:
            message = "Invalid credentials in Authorization header"
            self.answer({"error": message}, status=401, X_Error_Message=message)
        return False

    def repository(self) -> tuple[str, Repository | None, str]:
        """The name in the request's path, the repository if there is one, and the rest of the path."""
        match = ADDRESS.fullmatch(unquote(urlsplit(self.path).path))
        return match["name"], self.server.repositories.get(match["name"]), match["rest"] or ""

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        name, repository, rest = self.repository()
        if rest.startswith("/commit/") and self.server.broken_commits:
            self.server.broken_commits -= 1
            self.rfile.read(length // 2)
            self.connection.close()
            return
        body = self.rfile.read(length)
        if not self.admits(needs_token=True):
            return
        if self.path == "/api/repos/create":
            created = json.loads(body)
            name = f"{created['organization']}/{created['name']}"
            if "answers-" in name:  # with what the name says
                self.refuse("Failure", status=int(name.rpartition("-")[2]))
                return
            self.server.repositories.setdefault(name, Repository(created))
            self.answer({"url": f"{self.server.url}/{name}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif repository is not None and rest.startswith("/preupload/"):
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif repository is not None and rest.startswith("/commit/"):
            for item in (json.loads(line) for line in body.split(b"\n") if line):
                if item["key"] == "file":
                    repository.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            commit = repository.commit_id
            self.answer(
                {"success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/{name}/commit/{commit}"}
            )
        else:
            self.refuse("RepoNotFound")

    def do_GET(self, head=False):
        name, repository, rest = self.repository()
        if not self.admits(needs_token=self.server.private):
            return
        if repository is None:
            self.refuse("RepoNotFound")
        elif rest and rest.split("/")[2] not in ("main", repository.commit_id):
            self.refuse("RevisionNotFound")
        elif rest.startswith("/tree/"):
            files = repository.files.items()
            tree = [{"type": "file", "path": n, "size": len(c), "oid": etag(c)} for n, c in files]
            self.answer(tree, head=head)
        elif rest == "" or rest.startswith("/revision/"):
            siblings = [{"rfilename": name} for name in repository.files]
            self.answer({"id": name, "sha": repository.commit_id, "siblings": siblings}, head=head)
        else:
            content = repository.files.get(rest.removeprefix("/resolve/").split("/", 1)[1])
            if content is None:
                self.refuse("EntryNotFound")
            else:
                self.answer(content, head=head, ETag=f'"{etag(content)}"', X_Repo_Commit=repository.commit_id)

    def do_HEAD(self):
        self.do_GET(head=True)


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serve():
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
