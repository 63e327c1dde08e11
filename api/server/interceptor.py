"""Around every call of ours: errors get their form, and a stopping server sees what still runs."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, Protocol, TypeVar, cast

import grpc
import structlog
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from api.errors import Violation, internal_error, invalid_argument
from api.pb import info_service_pb2 as info_pb
from api.pb import template_manager_pb2 as pb
from api.server.access import (
    NEEDED,
    Access,
    CallsAtOnce,
    Right,
    address_of,
    audit,
    current_caller,
)
from api.server.error_translation import to_api_error
from api.server.request_limits import require_within_limits

SERVICE = "TemplateService"
SERVICES = (SERVICE, "InfoService")
OPEN_SERVICES = (health.SERVICE_NAME, reflection.SERVICE_NAME)
"""Those that everybody may call: they tell of nobody's builds. All others ask who calls."""
CHANGES_OF_A_BUILD = (
    pb.TemplateBuildRetryRequest,
    pb.TemplateBuildCancelRequest,
    pb.TemplateBuildDeleteRequest,
)

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Context = grpc.aio.ServicerContext[Message, Message]

_log = structlog.get_logger(__name__)


class _Handler(Protocol):
    """A handler of ours. grpc's own types know only those of a synchronous server."""

    request_deserializer: Callable[[bytes], Message]
    unary_unary: Callable[[Message, Context], Awaitable[Message]]
    unary_stream: Callable[[Message, Context], AsyncIterator[Message]]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Turns whatever a handler raises into a typed status: never UNKNOWN, never a stack trace."""

    def __init__(self, access: Access, at_once: CallsAtOnce) -> None:
        self._access = access
        self._at_once = at_once
        self._running = 0

    @property
    def running(self) -> int:
        """How many calls are being answered now."""
        return self._running

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Request, Answer] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Request, Answer] | None:
        """Wrap the handlers of all services but those that everybody may call."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or method.split("/")[1] in OPEN_SERVICES:
            return handler
        ours = cast("_Handler", handler)  # why: see _Handler
        # The request is decoded in here: gRPC itself would answer garbage with UNKNOWN.
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(method, ours), response_serializer=handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(method, ours), response_serializer=handler.response_serializer
        )

    def _unary(
        self, name: str, handler: _Handler
    ) -> Callable[[bytes, Context], Awaitable[Message]]:
        async def call(request: bytes, context: Context) -> Message:
            with self._counted(name):
                try:
                    with self._admitted(name, context):
                        return await _audited(name, handler, _decoded(handler, request), context)
                except Exception as error:
                    await _abort(context, name, error)

        return call

    def _stream(
        self, name: str, handler: _Handler
    ) -> Callable[[bytes, Context], AsyncIterator[Message]]:
        async def call(request: bytes, context: Context) -> AsyncIterator[Message]:
            with self._counted(name):
                try:
                    with self._admitted(name, context):
                        asked = _decoded(handler, request)
                        async for answer in handler.unary_stream(asked, context):
                            yield answer
                except Exception as error:
                    await _abort(context, name, error)

        return call

    @contextmanager
    def _admitted(self, name: str, context: Context) -> Iterator[None]:
        metadata = dict(context.invocation_metadata() or ())
        peer = address_of(context.peer())
        names = _certificate_names(context)
        caller = self._access.admit(name.rpartition("/")[2], metadata, peer, names)
        current_caller.set(caller)  # of this call's own task
        structlog.contextvars.bind_contextvars(caller=caller.name, tenant=caller.tenant)
        with self._at_once.one(caller.limited_as(peer)):
            yield

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        self._running += 1
        try:
            with structlog.contextvars.bound_contextvars(rpc=name, caller="", tenant=""):
                yield
        finally:
            self._running -= 1


async def _audited(name: str, handler: _Handler, request: Message, context: Context) -> Message:
    """Call the handler; a call that changes something leaves a line, whatever comes of it."""
    method = name.rpartition("/")[2]
    if NEEDED.get(method, Right.ADMIN) < Right.BUILD:
        return await handler.unary_unary(request, context)
    try:
        answer = await handler.unary_unary(request, context)
    except asyncio.CancelledError:
        audit(method, "client gone", **_subject(request))
        raise
    except Exception as error:
        told = to_api_error(error)
        audit(method, told.reason if told else "INTERNAL", **_subject(request))
        raise
    audit(method, "ok", **_subject(request))
    return answer


def _certificate_names(context: Context) -> set[str]:
    """Return the names in a client's certificate, which TLS has checked; none without one."""
    told = context.auth_context()
    keys = ("x509_common_name", "x509_subject_alternative_name")
    return {name.decode(errors="replace") for key in keys for name in told.get(key, ())}


def _subject(request: Message) -> dict[str, str]:
    """Say what a request is about; of a name:tag the build, once it has been looked up."""
    if isinstance(request, pb.TemplateCreateRequest):
        return {"build": request.template.build_id}
    if isinstance(request, CHANGES_OF_A_BUILD):
        return {"build": request.build_id}
    if isinstance(request, pb.TemplateTagsAssignRequest):
        return {"name": request.name, "build": request.build_id}
    if isinstance(request, pb.TemplateNameReserveRequest | pb.TemplateTagsRemoveRequest):
        return {"name": request.name}
    if isinstance(request, info_pb.ServiceStatusChangeRequest):
        return {"status": info_pb.ServiceInfoStatus.Name(request.service_status)}
    assert isinstance(request, pb.InitLayerFileUploadRequest)
    return {"files": request.hash}


def _decoded(handler: _Handler, request: bytes) -> Message:
    try:
        message = handler.request_deserializer(request)
    except DecodeError as error:
        raise invalid_argument(
            [Violation("", "the request is not the expected message")]
        ) from error
    require_within_limits(message)
    return message


async def _abort(context: Context, name: str, error: Exception) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    told = to_api_error(error)
    if told is None:
        incident = uuid.uuid4().hex[:12]
        _log.error("a call failed", incident=incident, exc_info=error)
        told = internal_error(incident)
    await context.abort(told.code, told.short_message, told.trailers())
    raise asyncio.CancelledError  # not reached: abort raises
