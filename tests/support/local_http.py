"""HTTP on this machine: servers that tests run, and the page that a guest serves."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from activities.contract.guest_network import GUEST_ADDRESS

HTTPD = "/bin/busybox httpd -f -p 8080 -h /srv"
HTTPD_ANSWERS = "/bin/busybox wget -q -O /dev/null http://127.0.0.1:8080/index.html"

# Asks with one process of few system calls: where a guest's kernel is emulated each takes its time,
# and a ready command has 30 s. The port in hexadecimal is that of HTTPD.
HTTPD_LISTENS = "/bin/busybox grep -q :1F90 /proc/net/tcp /proc/net/tcp6"


class QuietHandler(http.server.BaseHTTPRequestHandler):
    """Answers without a line on standard error for each request."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        """Send an answer; `_` in a header's name is `-`."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        """Read the request's body."""
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))


@contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on a free port for the length of a block; yields `127.0.0.1:<port>`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def get_page(seconds: float, path: str = "/index.html") -> bytes:
    """Return a guest's whole answer for a page; call it in the guest's netns."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((GUEST_ADDRESS, 8080), timeout=seconds / 4) as connection:
                connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
                with connection.makefile("rb") as answer:
                    return answer.read()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
