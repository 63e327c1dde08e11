"""An ECR endpoint on this machine: answers GetAuthorizationToken as AWS does."""

from __future__ import annotations

import base64
import http.server
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

TARGET = "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken"


@dataclass
class FakeEcr:
    """Gives these passwords one after the other, the last one again and again."""

    passwords: Sequence[str]
    error: str = ""
    user: str = "AWS"
    address: str = ""
    asked: list[dict[str, str]] = field(default_factory=list)

    def answer(self) -> tuple[int, dict[str, Any]]:
        """Return status and body of the next answer."""
        if self.error:
            return 400, {"__type": self.error, "message": "no"}
        password = self.passwords[min(len(self.asked), len(self.passwords)) - 1]
        token = base64.b64encode(f"{self.user}:{password}".encode()).decode()
        data = {"authorizationToken": token, "expiresAt": 4e9, "proxyEndpoint": "https://x"}
        return 200, {"authorizationData": [data]}


@contextmanager
def running_ecr(*passwords: str, error: str = "", user: str = "AWS") -> Iterator[FakeEcr]:
    """Run one; `AWS_ENDPOINT_URL_ECR` must lead to its address."""
    ecr = FakeEcr(passwords, error, user)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            assert self.headers["X-Amz-Target"] == TARGET
            ecr.asked.append(dict(self.headers))
            status, body = ecr.answer()
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/x-amz-json-1.1")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ecr.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield ecr
    finally:
        server.shutdown()
        server.server_close()
