"""A stand-in for the Hugging Face hub on loopback: as much of its protocol as huggingface_hub's client needs.

It keeps repositories in memory: making one, commits with files and LFS objects, listing, and downloads with ranges.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN, READER = "hf_writes", "hf_reads"  # tokens that the hub knows; only the first one may write, and only as USER
USER = "someone"


class Hub:
    """The state: repositories by (kind, id), each with its files, and LFS objects by SHA-256."""

    def __init__(self):
        self.repos, self.objects, self.requests = {}, {}, []

    def add(self, repo: str, files: dict[str, bytes], kind: str = "models", private: bool = False) -> None:
        self.repos[kind, repo] = {"private": private, "files": dict(files), "commits": 0}

    @staticmethod
    def sha(repo: dict) -> str:
        content = json.dumps({path: hashlib.sha1(data).hexdigest() for path, data in sorted(repo["files"].items())})
        return hashlib.sha1(content.encode()).hexdigest()


@contextlib.contextmanager
def served():
    """Yields (the Hub, its address) while a thread serves it."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub, f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append(f"{self.command} {path}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        for pattern, answer in ROUTES:
            if (match := re.fullmatch(pattern, f"{self.command} {path}")) and token in ("", TOKEN, READER):
                return answer(self, match.groupdict(), body, token)
        known = token in ("", TOKEN, READER)
        return self._json({"error": "no such page" if known else "no such token"}, 404 if known else 401)

    def _send(self, content: bytes, status: int = 200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content, status: int = 200, **headers):
        self._send(json.dumps(content).encode(), status, Content_Type="application/json", **headers)

    def _repo(self, kind: str | None, repo: str, token: str) -> dict | None:
        """A repository; answers with 401 and returns None if there is none, or it is private and there is no token."""
        found = self.hub.repos.get((kind or "models", repo))
        if found is None or (found["private"] and not token):
            self._json({"error": "Repository not found"}, 401, X_Error_Code="RepoNotFound")
            return None
        return found

    def create(self, _, body, token):
        asked = json.loads(body)
        owner, repo = asked["organization"] or USER, f"{asked['organization'] or USER}/{asked['name']}"
        if token != TOKEN or owner != USER:
            return self._json({"error": f"You don't have the rights to create a model under {owner}"}, 403)
        address = f"http://{self.headers['Host']}/{repo}"
        if ("models", repo) in self.hub.repos:
            return self._json({"error": "You already created this model repo", "url": address}, 409)
        self.hub.add(repo, {}, private=asked.get("visibility") == "private")
        return self._json({"url": address, "name": repo})

    def validate(self, parts, body, _):
        """Checks the metadata of a card, as YAML."""
        metadata = yaml.safe_load(json.loads(body)["content"].split("---")[1])
        errors = [] if isinstance(metadata, dict) and metadata.get("license") else [{"message": "no license"}]
        return self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, parts, body, _):
        files = json.loads(body)["files"]
        large = (".safetensors", ".png")
        modes = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(large) else "regular"} for f in files]
        return self._json({"files": [mode | {"shouldIgnore": False} for mode in modes]})

    def batch(self, parts, body, token):
        found = []
        for one in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"http://{self.headers['Host']}/lfs/{one['oid']}"}}
            found.append(one | ({} if one["oid"] in self.hub.objects else {"actions": upload}))
        return self._json({"transfer": "basic", "objects": found})

    def put(self, parts, body, _):
        assert hashlib.sha256(body).hexdigest() == parts["oid"]
        self.hub.objects[parts["oid"]] = body
        return self._send(b"")

    def commit(self, parts, body, token):
        repo = self._repo(parts["kind"], parts["repo"], token)
        for line in map(json.loads, body.splitlines()):
            match line:
                case {"key": "file", "value": {"path": path, "content": content}}:
                    repo["files"][path] = base64.b64decode(content)
                case {"key": "lfsFile", "value": {"path": path, "oid": oid}}:
                    repo["files"][path] = self.hub.objects[oid]
                case {"key": "deletedFile", "value": {"path": path}}:
                    del repo["files"][path]
        repo["commits"] += 1
        oid = self.hub.sha(repo)
        address = f"http://{self.headers['Host']}/{parts['repo']}/commit/{oid}"
        return self._json({"commitUrl": address, "commitOid": oid})

    def info(self, parts, _, token):
        if repo := self._repo(parts["kind"], parts["repo"], token):
            siblings = [{"rfilename": path} for path in repo["files"]]
            known = {"id": parts["repo"], "private": repo["private"], "siblings": siblings, "tags": []}
            return self._json(known | {"sha": self.hub.sha(repo)})

    def tree(self, parts, _, token):
        """The files below a folder; without ?recursive only those in it, and its folders."""
        if repo := self._repo(parts["kind"], parts["repo"], token):
            below = f"{parts['folder']}/" if parts["folder"] else ""
            found = {}
            for path in (path for path in repo["files"] if path.startswith(below)):
                inner = path.removeprefix(below).split("/")
                for depth in range(1, len(inner)):
                    folder = below + "/".join(inner[:depth])
                    found[folder] = {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40}
                found[path] = self._entry(path, repo["files"][path])
            deep = "recursive=true" in urlsplit(self.path).query.lower()
            return self._json([x for x in found.values() if deep or "/" not in x["path"].removeprefix(below)])

    def paths(self, parts, body, token):
        if repo := self._repo(parts["kind"], parts["repo"], token):
            asked = json.loads(body)["paths"]
            return self._json([self._entry(path, repo["files"][path]) for path in asked if path in repo["files"]])

    @staticmethod
    def _entry(path: str, data: bytes) -> dict:
        return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def download(self, parts, _, token):
        repo = self._repo(parts["kind"], parts["repo"], token)
        if repo is None:
            return None
        if parts["path"] not in repo["files"]:
            return self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        data = repo["files"][parts["path"]]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": self.hub.sha(repo)}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            return self._send(data[first : last + 1], 206, **headers)
        return self._send(data, Accept_Ranges="bytes", **headers)


REPO, API = r"(?P<repo>[^/]+/[^/]+)", r"/api/(?P<kind>models|datasets)"
ROUTES = [
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"POST {API}/{REPO}/preupload/[^/]+", _Handler.preupload),
    (rf"POST /(?P<kind>datasets(?=/))?/?{REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /lfs/(?P<oid>\w+)", _Handler.put),
    (rf"POST {API}/{REPO}/commit/[^/]+", _Handler.commit),
    (rf"GET {API}/{REPO}(/revision/[^/]+)?", _Handler.info),
    (rf"GET {API}/{REPO}/tree/[^/]+/?(?P<folder>.*)", _Handler.tree),
    (rf"POST {API}/{REPO}/paths-info/[^/]+", _Handler.paths),
    (rf"(?:GET|HEAD) /(?:(?P<kind>datasets)/)?{REPO}/resolve/[^/]+/(?P<path>.+)", _Handler.download),
]
