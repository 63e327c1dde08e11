"""What clients are told when a call fails: a gRPC code, a reason, and what to do next.

Every error of the API is an `ApiError` in the end; `error_translation` sees to that. On the wire
it is a `google.rpc.Status` with `ErrorInfo` (reason, and the hint among its metadata),
`BadRequest` for bad fields and `RetryInfo` where trying again can help.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "template-manager"
DETAILS_TRAILER = "grpc-status-details-bin"
RETRY_SECONDS = 2.0
# gRPC refuses trailers of more than 8 KiB, and the details travel in base64 beside the message.
MAX_MESSAGE_CHARS = 1_500
MAX_VIOLATION_CHARS = 240
MAX_VIOLATIONS = 16

Metadata = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True)
class Violation:
    """A bad field of a request: its path, and what it must be."""

    field: str
    description: str


class ApiError(Exception):
    """An answer other than OK. `reason` is for programs, `hint` says what to do next."""

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        *,
        hint: str = "",
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[Violation] = (),
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.hint = hint
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after_seconds = retry_after_seconds

    def trailers(self) -> Metadata:
        """Return the trailer that carries the google.rpc details."""
        status = status_pb2.Status(
            code=self.code.value[0],
            message=self.short_message,
            details=map(_packed, self._details()),
        )
        return ((DETAILS_TRAILER, status.SerializeToString()),)

    @property
    def short_message(self) -> str:
        """Return the message, cut to what gRPC lets through."""
        return self.message[:MAX_MESSAGE_CHARS]

    def _details(self) -> list[Message]:
        info = {**self.metadata, "hint": self.hint} if self.hint else self.metadata
        details: list[Message] = [
            error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=info)
        ]
        if self.violations:
            details.append(_bad_request(self.violations))
        if self.retry_after_seconds is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(int(self.retry_after_seconds * 1000))
            details.append(retry)
        return details


def invalid_argument(violations: Sequence[Violation]) -> ApiError:
    """Return the error that names every bad field."""
    fields = "; ".join(f"{v.field}: {v.description}" for v in violations)
    return ApiError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        fields,
        hint="Correct these fields and send the request again.",
        violations=violations,
    )


def failed_precondition(
    reason: str, message: str, hint: str, *, retry_after_seconds: float | None = None
) -> ApiError:
    """Return the error for a request that is well-formed but cannot be served as things stand."""
    return ApiError(
        grpc.StatusCode.FAILED_PRECONDITION,
        reason,
        message,
        hint=hint,
        retry_after_seconds=retry_after_seconds,
    )


def temporal_unavailable(message: str = "") -> ApiError:
    """Return the error for a Temporal that does not answer."""
    return _unavailable(
        "TEMPORAL_UNAVAILABLE",
        f"Temporal cannot be reached{f': {message}' if message else ''}",
        "Running builds go on. Try again in a moment; an operator checks TEMPORAL_ADDRESS.",
    )


def draining() -> ApiError:
    """Return the error for calls that another API process should take."""
    return _unavailable(
        "DRAINING",
        "this API process is shutting down",
        "Connect again; logs go on at their cursor.",
    )


def tenant_limit(
    tenant: str,
    limit: str,
    allowed: int,
    used: int,
    *,
    asked: int | None = None,
    retry_after_seconds: float | None,
) -> ApiError:
    """Return the error for what a tenant's limit of that name does not allow.

    `asked` is what one more build would use besides. Without a time to retry it will never be
    granted: `used` is what was asked for.
    """
    told = {"limit": limit, "allowed": str(allowed), "used": str(used)}
    more = "" if asked is None else f" are in use, and {asked} more are asked for"
    return ApiError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "TENANT_LIMIT",
        f"{limit} of tenant {tenant}: {used}{more}, of {allowed} that are allowed",
        hint="Wait until builds have ended or delete templates; an operator sets the limits."
        if retry_after_seconds
        else "Ask for less; an operator sets the limits.",
        metadata=told if asked is None else told | {"asked": str(asked)},
        retry_after_seconds=retry_after_seconds,
    )


def internal_error(incident: str) -> ApiError:
    """Return what a client learns of a bug of ours: where to find it in the log."""
    return ApiError(
        grpc.StatusCode.INTERNAL,
        "INTERNAL",
        f"the API failed; its log has the details under incident {incident}",
        hint="Try again; if it happens again, report the incident.",
        metadata={"incident": incident},
    )


def _unavailable(reason: str, message: str, hint: str) -> ApiError:
    return ApiError(
        grpc.StatusCode.UNAVAILABLE,
        reason,
        message,
        hint=hint,
        retry_after_seconds=RETRY_SECONDS,
    )


def _bad_request(violations: Sequence[Violation]) -> error_details_pb2.BadRequest:
    shown = [
        error_details_pb2.BadRequest.FieldViolation(
            field=v.field[:MAX_VIOLATION_CHARS], description=v.description[:MAX_VIOLATION_CHARS]
        )
        for v in violations[:MAX_VIOLATIONS]
    ]
    return error_details_pb2.BadRequest(field_violations=shown)


def _packed(message: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed
