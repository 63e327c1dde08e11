"""What a caller is told when a request fails: an HTTP status and `{code, message, error_code}`."""

from __future__ import annotations

import math
import re

import grpc
from starlette.responses import JSONResponse

from api.client.client import CallError

HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.FAILED_PRECONDITION: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
"""What each error of the gRPC API is here; any other is 500."""
OF_GRPC = "template."
WORDS = {
    "memory_mb": "memoryMB",
    "vcpu_count": "cpuCount",
    "disk_size_mb": "minFreeDiskMB",
    "template_id": "name",
}
"""Fields that are called otherwise here, besides in another spelling."""
FIELD_WORD = re.compile(r"[a-z]+(?:_[a-z]+)*")


class RestError(Exception):
    """A request that is refused here, before the gRPC API is asked."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


def error_response(error: RestError | CallError) -> JSONResponse:
    """Return the answer to a request that has failed."""
    if isinstance(error, RestError):
        return _response(error.status, error.reason, str(error), {})
    status = HTTP_STATUS.get(error.code, 500)
    return _response(status, error.reason, _message(error), _retry_headers(error, status))


def _response(status: int, reason: str, message: str, headers: dict[str, str]) -> JSONResponse:
    content = {"code": status, "message": message}
    return JSONResponse(content | ({"error_code": reason} if reason else {}), status, headers)


def _retry_headers(error: CallError, status: int) -> dict[str, str]:
    """Say whether to try again: the SDK would do so after each 429, but some are for good."""
    if error.retry_after_seconds is not None:
        seconds = max(1, math.ceil(error.retry_after_seconds))
        return {"Retry-After": str(seconds), "Should-Retry": "true"}
    return {"Should-Retry": "false"} if status == 429 else {}


def _message(error: CallError) -> str:
    told = error.message
    if error.code is grpc.StatusCode.INVALID_ARGUMENT:
        told = "; ".join(f"{_field(each.field)}: {each.description}" for each in error.violations)
    return f"{told} → {error.hint}" if error.hint else told


def _field(path: str) -> str:
    """Return a field of a gRPC request as it is called here."""
    return FIELD_WORD.sub(lambda found: _word(found[0]), path.removeprefix(OF_GRPC))


def _word(word: str) -> str:
    first, *more = word.split("_")
    return WORDS.get(word) or first + "".join(each.capitalize() for each in more)
