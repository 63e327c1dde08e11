"""A client of the API: what the CLI is made of, and others can use.

Errors are `CallError`: the server's message, reason, bad fields and hint in one place.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeVar

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from api.client.credentials import ClientCredentials
from api.errors import DETAILS_TRAILER, Violation
from api.pb import template_manager_pb2 as pb
from api.pb import template_manager_pb2_grpc as pb_grpc

CALL_SECONDS = 30.0
# Undoing a build and deleting a template take as long as the hosts and the bucket need.
UNDO_SECONDS = 1800.0
RECONNECT_SECONDS = 1.0
CLOSE_SECONDS = 2.0
OPTIONS = (
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
    ("grpc.keepalive_time_ms", 30_000),  # a followed log can be silent for long
)

T = TypeVar("T")
Request = TypeVar("Request", bound=Message)


@dataclass
class CallError(Exception):
    """A call that did not succeed, in words for a person."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    hint: str = ""
    violations: tuple[Violation, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    retry_after_seconds: float | None = None

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class CreatedBuild:
    """What the headers of a create call say."""

    build_id: str
    workflow_id: str
    run_id: str


@dataclass(frozen=True)
class UndoneBuild:
    """A build that was cancelled or deleted."""

    build_id: str
    """Its id, also where it was called by a name:tag."""
    names: tuple[str, ...] = ()
    """The tags and names that went with it."""


class TemplateClient:
    """One connection to the API, as an async context manager."""

    def __init__(self, address: str, credentials: ClientCredentials | None = None) -> None:
        """Without credentials, those of the environment. Raises CredentialsError."""
        self.address = address
        self._channel = (credentials or ClientCredentials()).channel(address, OPTIONS)
        self._stub: pb_grpc.TemplateServiceAsyncStub = pb_grpc.TemplateServiceStub(self._channel)

    async def __aenter__(self) -> TemplateClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # An interrupted call may keep the channel open: leaving must not wait for it.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._channel.close(), CLOSE_SECONDS)

    async def create(self, template: pb.TemplateConfig) -> CreatedBuild:
        """Start a build, or find the one that the same request has started. Raises CallError."""
        request = pb.TemplateCreateRequest(template=template)
        return await self._started(self._stub.TemplateCreate(request, timeout=CALL_SECONDS))

    async def image_of(self, template: pb.TemplateConfig) -> str:
        """Return the image that a build would be of, by its whole name; nothing is started.

        What TemplateCreate would refuse is refused. Raises CallError.
        """
        request = pb.TemplateCreateRequest(template=template)
        answer: pb.TemplateBuildImageResponse = await self._answer(
            self._stub.TemplateBuildImage(request, timeout=CALL_SECONDS)
        )
        return answer.image

    async def retry(self, build_id: str) -> CreatedBuild:
        """Go on with a failed build where it failed. Raises CallError."""
        request = pb.TemplateBuildRetryRequest(build_id=build_id)
        return await self._started(self._stub.TemplateBuildRetry(request, timeout=CALL_SECONDS))

    async def list_builds(
        self, request: pb.TemplateBuildListRequest
    ) -> pb.TemplateBuildListResponse:
        """Return a page of builds, latest first. Raises CallError."""
        return await self._answer(self._stub.TemplateBuildList(request, timeout=CALL_SECONDS))

    async def status(self, build_id: str, *, log_lines: int = 0) -> pb.TemplateBuildStatusResponse:
        """Return a build's status with its last `log_lines` lines, the latest first.

        Raises CallError.
        """
        request = pb.TemplateStatusRequest(
            build_id=build_id, limit=log_lines, direction=pb.Backward
        )
        status: pb.TemplateBuildStatusResponse = await self._answer(
            self._stub.TemplateBuildStatus(request, timeout=CALL_SECONDS)
        )
        status.build_id = status.build_id or build_id  # servers of before do not tell it
        return status

    async def inspect(self, build_id: str) -> pb.TemplateBuildInspectResponse:
        """Return what a template takes in the bucket, and what is shared. Raises CallError."""
        request = pb.TemplateBuildInspectRequest(build_id=build_id)
        return await self._answer(self._stub.TemplateBuildInspect(request, timeout=CALL_SECONDS))

    async def cancel(self, build_id: str) -> UndoneBuild:
        """Stop a build and wait until it is undone. Raises CallError."""
        request = pb.TemplateBuildCancelRequest(build_id=build_id)
        call = self._stub.TemplateBuildCancel(request, timeout=UNDO_SECONDS)
        await self._answer(call)
        return UndoneBuild((await _trailers(call)).get("build-id", build_id))

    async def delete(self, build_id: str) -> UndoneBuild:
        """Delete a template and wait until it is gone, with the tags and names that are its alone.

        Raises CallError.

        The server calls the delete of an unknown build a success, as E2B's clients expect; here it
        is NOT_FOUND, since a person may have misspelt it.
        """
        request = pb.TemplateBuildDeleteRequest(build_id=build_id)
        call = self._stub.TemplateBuildDelete(request, timeout=UNDO_SECONDS)
        await self._answer(call)
        trailers = await _trailers(call)
        if trailers.get("found") == "false":
            raise CallError(
                grpc.StatusCode.NOT_FOUND,
                f"there is no build {build_id}",
                reason="BUILD_NOT_FOUND",
                hint="Check the build id; template-manager list shows the builds.",
            )
        names = filter(None, trailers.get("names", "").split(","))
        return UndoneBuild(trailers.get("build-id", build_id), tuple(names))

    async def names(self, request: pb.TemplateNameListRequest) -> pb.TemplateNameListResponse:
        """Return a page of templates' names with their tags. Raises CallError."""
        return await self._answer(self._stub.TemplateNameList(request, timeout=CALL_SECONDS))

    async def assign_tags(self, request: pb.TemplateTagsAssignRequest) -> pb.TemplateName:
        """Let tags stand for a build, or roll one back. Raises CallError."""
        return await self._answer(self._stub.TemplateTagsAssign(request, timeout=CALL_SECONDS))

    async def remove_tags(self, name: str, tags: Sequence[str]) -> pb.TemplateName:
        """Take tags away, or a name with all of them; return what is left. Raises CallError."""
        request = pb.TemplateTagsRemoveRequest(name=name, tags=tags)
        return await self._answer(self._stub.TemplateTagsRemove(request, timeout=CALL_SECONDS))

    async def files_address(self, template_id: str, sha256: str) -> str:
        """Return where to PUT the tar of a COPY's files, or '' when it is there.

        Raises CallError.
        """
        request = pb.InitLayerFileUploadRequest(template_id=template_id, hash=sha256)
        answer: pb.InitLayerFileUploadResponse = await self._answer(
            self._stub.InitLayerFileUpload(request, timeout=CALL_SECONDS)
        )
        return "" if answer.present else answer.url

    async def health(self) -> pb.HealthStatusResponse:
        """Return whether the server takes new work. Raises CallError."""
        return await self._answer(self._stub.HealthStatus(Empty(), timeout=CALL_SECONDS))

    async def logs(
        self,
        build_id: str,
        *,
        cursor: int = 0,
        run_id: str = "",
        follow: bool = False,
        level: pb.LogLevel | str | None = None,
        patience_seconds: float = 60,
    ) -> AsyncIterator[pb.TemplateBuildLogsResponse]:
        """Yield log lines from `cursor`, of run `run_id`, on; with `follow` until the build ends.

        When the connection breaks it goes on at the line after the last one, until the server
        has been away for `patience_seconds`. Raises CallError.
        """
        loop = asyncio.get_running_loop()
        away_since: float | None = None
        while True:
            request = pb.TemplateBuildLogsRequest(
                build_id=build_id, cursor=cursor, run_id=run_id, follow=follow, level=level
            )
            call = self._stub.TemplateBuildLogs(request)
            try:
                await call.initial_metadata()  # it is there, even if the build is silent
                away_since = None
                async for line in call:
                    cursor, run_id = line.next_cursor, line.run_id
                    yield line
                return
            except grpc.aio.AioRpcError as error:
                away_since = away_since or loop.time()
                gave_up = loop.time() - away_since > patience_seconds
                if error.code() is not grpc.StatusCode.UNAVAILABLE or not follow or gave_up:
                    raise explain(error, self.address) from None
            finally:
                call.cancel()
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _started(self, call: grpc.aio.UnaryUnaryCall[Request, Empty]) -> CreatedBuild:
        await self._answer(call)
        headers = {str(key): str(value) for key, value in await call.initial_metadata()}
        return CreatedBuild(headers["build-id"], headers["workflow-id"], headers["run-id"])

    async def _answer(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise explain(error, self.address) from None


async def _trailers(call: grpc.aio.UnaryUnaryCall[Request, Empty]) -> dict[str, str]:
    trailers = await call.trailing_metadata() or ()
    return {str(key): str(value) for key, value in trailers}


def explain(error: grpc.aio.AioRpcError, address: str) -> CallError:
    """Read the google.rpc details of a failed call."""
    explained = CallError(error.code(), error.details() or error.code().name)
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_TRAILER and isinstance(value, bytes):
            _add_details(explained, status_pb2.Status.FromString(value))
    if explained.code is grpc.StatusCode.UNAVAILABLE and not explained.reason:
        explained.message = f"the API at {address} cannot be reached: {explained.message}"
        explained.hint = "Check that the API runs there (template-manager api) and the address."
    return explained


def _add_details(explained: CallError, status: status_pb2.Status) -> None:
    info = error_details_pb2.ErrorInfo()
    bad = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info):
            explained.reason = info.reason
            explained.metadata = dict(info.metadata)
            explained.hint = info.metadata.get("hint", "")
        elif detail.Unpack(bad):
            explained.violations = tuple(
                Violation(v.field, v.description) for v in bad.field_violations
            )
        elif detail.Unpack(retry):
            explained.retry_after_seconds = retry.retry_delay.ToMilliseconds() / 1000
