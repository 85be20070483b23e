"""A page in the browser: complete pictures row by row, sample, and see what the layers know.

    igpt demo --model=runs/digits
    igpt demo --model=runs/digits --probe=runs/digits/probe --port=8080

The page comes from this machine alone and works offline. It listens on the loopback address, so that other machines
cannot reach it; --host=0.0.0.0 opens it to everyone on the network, without a password.
"""

import os

from igpt.command import Parser, add_shared, at_least
from igpt.page.answers import Answers
from igpt.page.server import make_server
from igpt.trained import load


def add_arguments(parser: Parser) -> None:
    add_shared(parser, "model", "step")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=at_least(0, 65535), default=8008, help="0: any free port (default 8008)")
    probe = "eval_probe.py's --workdir, or its probe.json (default: the run's folder probe)"
    parser.add_argument("--probe", help=probe)
    nearest = "training images among which the nearest are searched (default 500)"
    parser.add_argument("--images", type=at_least(1), default=500, help=nearest)


def run(args) -> None:
    """Serves the page until Ctrl-C."""
    server = make_server(Answers(load(args.model, args.step), args.images, args.probe), args.host, args.port)
    host, port = server.server_address[:2]
    host = f"[{host}]" if ":" in host else host
    print(f"the page of {args.model}: http://{host}:{port}/ (Ctrl-C ends it)", flush=True)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(flush=True)
            os._exit(0)  # sys.exit would crash if a thread computes: XLA cannot return into a Python that has ended
