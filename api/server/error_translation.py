"""From what Temporal, the bucket and our own code raise to what clients are told."""

from __future__ import annotations

import asyncio
import re

import grpc
from temporalio.service import RPCError, RPCStatusCode

from activities.contract.errors import (
    NamesBeyondLimitError,
    NameTakenError,
    StorageDeniedError,
    TemplateManagerError,
    TemplateNotFoundError,
)
from activities.process.temporal import is_connect_error
from api.errors import RETRY_SECONDS, ApiError, failed_precondition, temporal_unavailable


def to_api_error(error: BaseException) -> ApiError | None:
    """Translate what calls to Temporal and the bucket raise; None for what is our own bug."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RPCError):
        return _of_temporal(error)
    if isinstance(error, TemplateManagerError):
        return _of_template_manager(error)
    if isinstance(error, asyncio.TimeoutError):
        return temporal_unavailable("it did not answer in time")
    if is_connect_error(error):
        return temporal_unavailable()
    return None


def build_not_found(build_id: str, template_id: str = "") -> ApiError:
    """Return the error for a build that is not there (any more), or is of another template."""
    of_template = f" of template {template_id}" if template_id else ""
    return ApiError(
        grpc.StatusCode.NOT_FOUND,
        "BUILD_NOT_FOUND",
        f"there is no build {build_id}{of_template}",
        hint=TemplateNotFoundError.hint,
        metadata={"build_id": build_id},
    )


def build_not_published(build_id: str) -> ApiError:
    """Return the error for a build that has no template (any more, or yet)."""
    return failed_precondition(
        "BUILD_NOT_PUBLISHED",
        f"build {build_id} has no template in the bucket",
        "Wait until it is completed; a failed or cancelled one has none.",
    )


def build_id_taken(build_id: str) -> ApiError:
    """Return the error for another tenant's build id.

    It tells as little as can be told: not whose it is, nor whether anything of it is there.
    """
    return ApiError(
        grpc.StatusCode.ALREADY_EXISTS,
        "BUILD_ID_TAKEN",
        f"build id {build_id} cannot be used",
        hint="Use a new random UUID.",
        metadata={"build_id": build_id},
    )


def reason_of(error: TemplateManagerError) -> str:
    """Return an error class's name as a google.rpc reason: TemplateNotFoundError, for example, as
    TEMPLATE_NOT_FOUND."""
    name = type(error).__name__.removesuffix("Error")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).upper()


_TEMPORAL_CODES = {
    RPCStatusCode.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    RPCStatusCode.DEADLINE_EXCEEDED: grpc.StatusCode.UNAVAILABLE,
    RPCStatusCode.CANCELLED: grpc.StatusCode.UNAVAILABLE,
    RPCStatusCode.ABORTED: grpc.StatusCode.UNAVAILABLE,
    RPCStatusCode.RESOURCE_EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    RPCStatusCode.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
}


def _of_temporal(error: RPCError) -> ApiError:
    code = _TEMPORAL_CODES.get(error.status, grpc.StatusCode.INTERNAL)
    if code is grpc.StatusCode.UNAVAILABLE:
        return temporal_unavailable(error.message)
    may_retry = code is grpc.StatusCode.RESOURCE_EXHAUSTED
    return ApiError(
        code,
        f"TEMPORAL_{error.status.name}",
        f"Temporal answered: {error.message}",
        hint="Check the API's namespace and credentials for Temporal." if not may_retry else "",
        retry_after_seconds=RETRY_SECONDS if may_retry else None,
    )


def _of_template_manager(error: TemplateManagerError) -> ApiError:
    if isinstance(error, TemplateNotFoundError):
        code = grpc.StatusCode.NOT_FOUND
    elif isinstance(error, NameTakenError):
        code = grpc.StatusCode.ALREADY_EXISTS
    elif isinstance(error, NamesBeyondLimitError):
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
    elif error.retryable:
        code = grpc.StatusCode.UNAVAILABLE
    elif error.users_fault or isinstance(error, StorageDeniedError):
        code = grpc.StatusCode.FAILED_PRECONDITION
    else:
        code = grpc.StatusCode.INTERNAL
    retry = error.retry_after_seconds or RETRY_SECONDS
    return ApiError(
        code,
        reason_of(error),
        error.message,
        hint=error.hint,
        retry_after_seconds=retry if error.retryable else None,
    )
