"""HTTP on the unix socket, as Firecracker's own server speaks it."""

from __future__ import annotations

import json
import select
import socket
import socketserver
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

_BODY_BYTES_MAX = 51200
_CONNECTIONS_MAX = 10
_METHODS = ("GET", "PUT", "PATCH", "DELETE")
_TOO_MANY = b'{ "error": "Too many open connections" }'

# Method, path and body to status and answer; what is done after the answer was sent.
Answered = tuple[int, Any, Callable[[], None]]
Serve = Callable[[str, str, bytes], Answered]


class ApiServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Accepts ten connections at a time and hands their requests to `serve`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, path: str, serve: Serve) -> None:
        self.serve = serve
        self._open: set[socket.socket] = set()
        super().__init__(path, _Handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Turn a connection too many away before it says a word."""
        self._open = {other for other in self._open if not _has_hung_up(other)}
        if len(self._open) < _CONNECTIONS_MAX:
            self._open.add(request)
            return True
        head = "HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\n"
        request.sendall(f"{head}Content-Length: {len(_TOO_MANY)}\r\n\r\n".encode() + _TOO_MANY)
        return False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up early is no news; anything else is."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _has_hung_up(connection: socket.socket) -> bool:
    """Whether a connection is closed on one of its ends, seen by its handler or not yet."""
    if connection.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return bool(poll.poll(0))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ApiServer

    def parse_request(self) -> bool:
        """Refuse what Firecracker's HTTP server does not let through to the API."""
        if not super().parse_request():
            return False
        stated = self.headers.get("Content-Length") or "0"
        if not stated.isdecimal():
            self.close_connection = True
            reason = f"Invalid header. Reason: Invalid value. Key:Content-Length; Value: {stated}"
            return self._drop(reason)
        length = int(stated)
        # Read in any case: who closes with something unread resets the connection.
        self._body = self.rfile.read(length)
        if self.command not in _METHODS:
            return self._drop("Invalid HTTP Method: Unsupported HTTP method.")
        if length > _BODY_BYTES_MAX:
            return self._drop(
                f"Request payload with size {length} is larger than the limit of "
                f"{_BODY_BYTES_MAX} allowed by server."
            )
        return True

    def handle_method(self) -> None:
        """Answer one request."""
        status, answer, after = self.server.serve(self.command, self.path, self._body)
        self._respond(status, None if answer is None else json.dumps(answer, separators=(",", ":")))
        after()

    do_GET = do_PUT = do_PATCH = do_DELETE = handle_method

    def _drop(self, reason: str) -> bool:
        # Firecracker's own text: no JSON to the letter, for the line break in it.
        self._respond(
            400,
            f'{{ "error": "{reason}\nAll previous unanswered requests will be dropped." }}',
        )
        return False

    def _respond(self, status: int, body: str | None) -> None:
        self.send_response(status, "")
        self.send_header("Connection", "keep-alive")
        if body is not None:
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        if body is not None:
            self.wfile.write(body.encode())

    def send_response(self, code: int, message: str | None = None) -> None:
        """Begin a response. Firecracker tells no date."""
        self.send_response_only(code, message)
        self.send_header("Server", "Firecracker API")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is not HTTP."""
        self.close_connection = True
        self.request_version = self.protocol_version
        wrong_version = "version" in (message or "")
        self._drop(
            "Invalid HTTP Version: Unsupported HTTP version."
            if wrong_version
            else "Invalid request."
        )

    def address_string(self) -> str:
        """There is no address on a unix socket."""
        return "unix"

    def log_message(self, format: str, *args: object) -> None:
        """The main thread logs."""
