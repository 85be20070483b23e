"""A small stand-in for Google Cloud Storage on loopback: python tests/gcs_server.py --port=9056

It answers what TensorStore asks of the JSON API: upload, download, list and delete, with generations and conditions.
gcp-storage-emulator ignores conditions and sends no generation, so the lock cannot be tried with it. Every bucket
exists but those whose names begin with "absent". Objects live in memory. There is no authentication.
"""

import argparse
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

OBJECT = re.compile(r"/(upload/)?storage/v1/b/([^/]+)/o(?:/(.+))?")
PAGE = 1000  # objects in an answer to a list request, as at Google


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        bucket, name, given = self.asked()
        with self.server.lock:
            if name is None:
                return self.answer(200, json.dumps(self.server.listed(bucket, given)).encode())
            content, generation = self.server.objects.get((bucket, name), (b"", 0))
        if not generation:
            return self.answer(404)
        if given.get("ifGenerationNotMatch") == str(generation):
            return self.answer(304)
        if given.get("alt") != "media":
            with self.server.lock:
                return self.answer(200, json.dumps(self.server.described(bucket, name)).encode())
        headers = {"x-goog-generation": str(generation)}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            if first >= len(content):
                return self.answer(416)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.answer(206, content[first : last + 1], headers)
        return self.answer(200, content, headers)

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        bucket, _, given = self.asked()
        with self.server.lock:
            if not self.matches(bucket, given["name"], given):
                return self.answer(412)
            self.server.generation += 1
            self.server.objects[bucket, given["name"]] = content, self.server.generation
            described = self.server.described(bucket, given["name"])
        return self.answer(200, json.dumps(described).encode())

    def do_DELETE(self):
        bucket, name, given = self.asked()
        with self.server.lock:
            if (bucket, name) not in self.server.objects:
                return self.answer(404)
            if not self.matches(bucket, name, given):
                return self.answer(412)
            del self.server.objects[bucket, name]
        return self.answer(204)

    def matches(self, bucket, name, given) -> bool:
        wanted = given.get("ifGenerationMatch")
        return wanted is None or int(wanted) == self.server.objects.get((bucket, name), (b"", 0))[1]

    def asked(self) -> tuple[str, str | None, dict]:
        """The bucket, the object's name and the parameters of a request."""
        url = urlsplit(self.path)
        found = OBJECT.fullmatch(url.path)
        given = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        return found[2], found[3] and unquote(found[3]), given

    def answer(self, code: int, content: bytes = b"", headers: dict | None = None) -> None:
        if self.path.partition("/b/")[2].startswith("absent"):
            code, content, headers = 404, b"", None
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if code not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.objects, self.generation, self.lock = {}, 0, threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def described(self, bucket: str, name: str) -> dict:
        content, generation = self.objects[bucket, name]
        return {"bucket": bucket, "name": name, "generation": str(generation), "size": str(len(content))}

    def listed(self, bucket: str, given: dict) -> dict:
        prefix, start, end = (given.get(name, "") for name in ("prefix", "startOffset", "endOffset"))
        after = given.get("pageToken", "")
        names = sorted(name for where, name in self.objects if where == bucket and name.startswith(prefix))
        names = [name for name in names if name >= start and name > after and (not end or name < end)]
        more = {"nextPageToken": names[PAGE - 1]} if len(names) > PAGE else {}
        return {"items": [self.described(bucket, name) for name in names[:PAGE]]} | more


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    Server(parser.parse_args().port).serve_forever()
