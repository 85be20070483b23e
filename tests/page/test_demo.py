"""`igpt demo` as a process of its own: how it ends."""

import re
import signal
import socket
import subprocess
import sys
import time

from tests.helpers import ROOT, write_run


def test_an_interrupt_during_a_drawing_ends_the_demo_quietly(tmp_path):
    run = write_run(tmp_path / "run", "digits", steps=(2,), depth=6, width=256)
    command = [sys.executable, "-m", "igpt", "demo", f"--model={run}", "--port=0", "--compilation_cache=off"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # What a shell starts in the background ignores SIGINT, and so would its children.
    heeds = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    with subprocess.Popen(command, cwd=ROOT, **pipes, **heeds) as demo:
        try:
            port = int(re.search(r":(\d+)/", demo.stdout.readline())[1])
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(
                    b"POST /sample?num=16&seed=0 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
                )
                time.sleep(1.5)  # the drawing compiles, or draws
                demo.send_signal(signal.SIGINT)
                _, said = demo.communicate(timeout=60)
        finally:
            demo.kill()
    assert demo.returncode == 0 and said == ""
