"""The page's web server: a few fixed addresses, small requests only, and nothing from elsewhere.

    GET /, /page.js, /page.css, /about, /probe.png, /examples/N.png
    POST /picture, /complete, /sample, /nearest    the body is a picture file, or empty with ?example=N

/complete and /sample answer with a line of JSON for each row of pixels, as soon as the row is drawn.
"""

import base64
import contextlib
import errno
import ipaddress
import json
import socket
import threading
import urllib.parse
from collections.abc import Generator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources

from igpt.draw import Sampling
from igpt.errors import UserError, first_line
from igpt.page.answers import Answers, png

MAX_UPLOAD = 16 << 20  # bytes; igpt/data/images.py limits the pixels
MAX_CONNECTIONS = 16
SECONDS_TO_SEND = 30  # a client that sends or reads nothing for so long is cut off
FILES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Server(ThreadingHTTPServer):
    """Serves at most MAX_CONNECTIONS requests at a time, and closes further connections."""

    daemon_threads = True

    def __init__(self, address, handler):
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(address, handler)

    def process_request(self, request, client_address):
        if self.free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def handle_error(self, request, client_address):
        """A client that goes away is no error."""


LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


def make_server(answers: Answers, host: str, port: int) -> Server:
    """A server that listens. Raises UserError if the address cannot be used."""

    class Handler(PageHandler):
        pass

    Handler.answers = answers
    if not host:
        raise UserError("--host is empty, which means every interface; give 127.0.0.1 for this machine, or 0.0.0.0")
    try:
        server = Server((host, port), Handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        is_port = isinstance(error, OverflowError) or error.errno in (errno.EADDRINUSE, errno.EACCES)
        remedy = "--port=0 takes a free port" if is_port else "--host=127.0.0.1 is this machine"
        raise UserError(f"--host={host} --port={port} cannot be used: {reason}; {remedy}") from None
    address = server.server_address[0]
    Handler.local_names = LOCAL | {address, host.lower()} if ipaddress.ip_address(address).is_loopback else None
    return server


class RefusedError(UserError):
    """A request that is refused, with the HTTP status of the answer."""

    def __init__(self, status: HTTPStatus, message: str):
        super().__init__(message)
        self.status = status


class PageHandler(BaseHTTPRequestHandler):
    """Answers one request. `make_server` sets the class's `answers` and `local_names`.

    local_names: how this machine may be called by a page on itself. None: the page is for other machines, too.
    """

    answers: Answers
    local_names: frozenset[str] | None
    timeout = SECONDS_TO_SEND
    server_version, sys_version = "igpt", ""

    def do_GET(self) -> None:
        with self.answered():
            path = self.address().path
            if path in FILES:
                name, kind = FILES[path]
                self.send(resources.files("igpt.page").joinpath(name).read_bytes(), f"{kind}; charset=utf-8")
            elif path == "/about":
                self.send_json(self.answers.about() | {"max_upload": MAX_UPLOAD})
            elif path == "/probe.png" and self.answers.about()["has_probe_picture"]:
                self.send((self.answers.probe_folder / "probe.png").read_bytes(), "image/png")
            elif path.startswith("/examples/") and path.endswith(".png"):
                number = whole_number(path.removeprefix("/examples/").removesuffix(".png"), "the example")
                self.send(png(self.answers.picture(b"", number)), "image/png")
            else:
                raise RefusedError(HTTPStatus.NOT_FOUND, f"there is no {path}")

    def do_POST(self) -> None:
        with self.answered():
            address, body = self.address(), self.body()
            fields = dict(urllib.parse.parse_qsl(address.query))
            answer = {
                "/picture": self.picture,
                "/complete": self.complete,
                "/sample": self.sample,
                "/nearest": self.nearest,
            }.get(address.path)
            if answer is None:
                raise RefusedError(HTTPStatus.NOT_FOUND, f"there is no {address.path}")
            answer(body, fields)

    def picture(self, body: bytes, fields: dict) -> None:
        """The picture as the model reads it."""
        self.send(png(self.answers.quantised(self.given(body, fields))), "image/png")

    def complete(self, body: bytes, fields: dict) -> None:
        image = self.given(body, fields)
        keep, (num, seed, sampling) = number(fields, "keep", 0.5), settings(fields)
        self.draw(self.answers.complete(image, keep, num, seed, sampling))

    def sample(self, body: bytes, fields: dict) -> None:
        self.draw(self.answers.sample(*settings(fields)))

    def nearest(self, body: bytes, fields: dict) -> None:
        image, layer = self.given(body, fields), whole_number(fields.get("layer", ""), "the layer")
        with self.answers.computing:
            found = self.answers.nearest(image, layer)
        self.send_json([{"image": data_url(one), "cosine": cosine, "class": name} for one, cosine, name in found])

    def draw(self, states: Generator) -> None:
        """Sends the images after each row. The drawing ends when the client goes away."""
        with self.answers.computing, contextlib.closing(states):
            first = next(states)  # a wrong setting is refused before the answer begins
            self.begin("application/x-ndjson")
            for images in [first], states:
                for state in images:
                    line = json.dumps([data_url(image) for image in state])
                    self.wfile.write(line.encode() + b"\n")
                    self.wfile.flush()

    def given(self, body: bytes, fields: dict):
        """The picture of a request."""
        example = whole_number(fields["example"], "the example") if "example" in fields else None
        return self.answers.picture(body, example)

    def address(self) -> urllib.parse.SplitResult:
        """The request's address. Raises RefusedError for a request that another site's page makes.

        A page elsewhere could otherwise reach this server through the user's browser: by its address, or by a name that
        is made to point to it.
        """
        host = self.headers.get("Host", "")
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        origin = self.headers.get("Origin")
        if self.local_names is not None and name not in self.local_names:
            raise RefusedError(HTTPStatus.FORBIDDEN, f"this page is not {host}")
        if origin is not None and origin != f"http://{host}":
            raise RefusedError(HTTPStatus.FORBIDDEN, f"{origin} may not use this page")
        return urllib.parse.urlsplit(self.path)

    def body(self) -> bytes:
        """The request's body. Raises RefusedError if it is longer than MAX_UPLOAD, or of unknown length."""
        length = whole_number(self.headers.get("Content-Length", ""), "Content-Length")
        if not 0 <= length <= MAX_UPLOAD:
            message = f"the picture has {length:,} bytes; the limit is {MAX_UPLOAD:,}: shrink it first"
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
        return self.rfile.read(length)

    @contextlib.contextmanager
    def answered(self):
        """Sends an error that the user can correct as text. Ends quietly when the client goes away."""
        self.begun = False
        try:
            yield
        except UserError as error:
            self.send(
                str(error).encode(), "text/plain; charset=utf-8", getattr(error, "status", HTTPStatus.BAD_REQUEST)
            )
        except (TimeoutError, ConnectionError):
            self.close_connection = True
        except Exception as error:
            self.log_error("%s: %s", type(error).__name__, first_line(error))
            if not self.begun:
                message = b"this went wrong; the terminal of igpt demo says more"
                self.send(message, "text/plain; charset=utf-8", HTTPStatus.INTERNAL_SERVER_ERROR)

    def begin(self, kind: str, status=HTTPStatus.OK, length: int | None = None) -> None:
        self.begun = True
        self.send_response(status)
        for name, value in ({"Content-Type": kind} | HEADERS).items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def send(self, content: bytes, kind: str, status=HTTPStatus.OK) -> None:
        self.begin(kind, status, len(content))
        self.wfile.write(content)

    def send_json(self, content) -> None:
        self.send(json.dumps(content).encode(), "application/json")

    def log_request(self, code="-", size="-") -> None:
        """Requests are not logged, only errors."""


def data_url(image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def settings(fields: dict) -> tuple[int, int, Sampling]:
    """The number of pictures, the seed, and how tokens are drawn."""
    num, seed = (whole_number(fields.get(name, ""), name) for name in ("num", "seed"))
    top_k = whole_number(fields.get("top_k", "0"), "top_k")
    return num, seed, Sampling(number(fields, "temperature", 1.0), top_k)


def whole_number(text: str, name: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 12:
        raise UserError(f"{name} is {text[:20]!r}; a whole number is needed")
    return int(text)


def number(fields: dict, name: str, default: float) -> float:
    try:
        return float(fields.get(name, default))
    except ValueError:
        raise UserError(f"{name} is {fields[name][:20]!r}; a number is needed") from None
