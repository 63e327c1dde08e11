"""An ECR endpoint on this machine: answers GetAuthorizationToken as AWS does."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.support.local_http import QuietHandler, serving

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

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            self.body()
            assert self.headers["X-Amz-Target"] == TARGET
            ecr.asked.append(dict(self.headers))
            status, body = ecr.answer()
            self.answer(
                status, json.dumps(body).encode(), Content_Type="application/x-amz-json-1.1"
            )

    with serving(Handler) as address:
        ecr.address = f"http://{address}"
        yield ecr
