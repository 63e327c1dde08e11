"""Calls of the gRPC API in the name of the caller of a request, with the caller's own token."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable
from typing import TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from api.client.client import CALL_SECONDS, OPTIONS, UNDO_SECONDS, CallError, explain
from api.client.credentials import ClientCredentials
from api.pb import template_manager_pb2 as pb
from api.pb import template_manager_pb2_grpc as pb_grpc
from api.rest.errors import RestError

T = TypeVar("T")
CREATE_SECONDS = 55.0
"""The SDK waits for an answer for 60 s."""
HEALTH_SECONDS = 3.0


class Calls:
    """The rpcs that a request may need. Each raises CallError."""

    def __init__(self, stub: pb_grpc.TemplateServiceAsyncStub, address: str, token: str) -> None:
        self._stub = stub
        self._address = address
        self._metadata = (("authorization", f"Bearer {token}"),)

    async def create(self, request: pb.TemplateCreateRequest) -> None:
        """Start a build, or find the one that the same request has started.

        The API may read the files of its COPYs through before it answers.
        """
        await self._told(
            self._stub.TemplateCreate(request, timeout=CREATE_SECONDS, metadata=self._metadata)
        )

    async def status(self, request: pb.TemplateStatusRequest) -> pb.TemplateBuildStatusResponse:
        """Return a build's state, with log lines."""
        return await self._told(
            self._stub.TemplateBuildStatus(request, timeout=CALL_SECONDS, metadata=self._metadata)
        )

    async def builds(self, request: pb.TemplateBuildListRequest) -> pb.TemplateBuildListResponse:
        """Return a page of builds, latest first."""
        return await self._told(
            self._stub.TemplateBuildList(request, timeout=CALL_SECONDS, metadata=self._metadata)
        )

    async def delete(self, request: pb.TemplateBuildDeleteRequest) -> None:
        """Stop a build and remove all that it has made; returns when that is gone."""
        await self._told(
            self._stub.TemplateBuildDelete(request, timeout=UNDO_SECONDS, metadata=self._metadata)
        )

    async def reserve(
        self, request: pb.TemplateNameReserveRequest
    ) -> pb.TemplateNameReserveResponse:
        """Let a name be a template's, and give its next build an id."""
        return await self._told(
            self._stub.TemplateNameReserve(request, timeout=CALL_SECONDS, metadata=self._metadata)
        )

    async def name(self, request: pb.TemplateNameGetRequest) -> pb.TemplateName:
        """Return a template's name with its tags."""
        return await self._told(
            self._stub.TemplateNameGet(request, timeout=CALL_SECONDS, metadata=self._metadata)
        )

    async def names(self, request: pb.TemplateNameListRequest) -> pb.TemplateNameListResponse:
        """Return a page of names, in order."""
        return await self._told(
            self._stub.TemplateNameList(request, timeout=CALL_SECONDS, metadata=self._metadata)
        )

    async def assign(self, request: pb.TemplateTagsAssignRequest) -> pb.TemplateName:
        """Let tags stand for a build."""
        return await self._told(
            self._stub.TemplateTagsAssign(request, timeout=CALL_SECONDS, metadata=self._metadata)
        )

    async def remove(self, request: pb.TemplateTagsRemoveRequest) -> pb.TemplateName:
        """Take tags away."""
        return await self._told(
            self._stub.TemplateTagsRemove(request, timeout=CALL_SECONDS, metadata=self._metadata)
        )

    async def files(self, request: pb.InitLayerFileUploadRequest) -> pb.InitLayerFileUploadResponse:
        """Return where to send the files of a COPY, and whether they are there."""
        return await self._told(
            self._stub.InitLayerFileUpload(request, timeout=CALL_SECONDS, metadata=self._metadata)
        )

    async def _told(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise explain(error, self._address) from None


class Upstream:
    """The connection to the gRPC API that all requests share."""

    def __init__(
        self, address: str, credentials: ClientCredentials, *, must_know_callers: bool
    ) -> None:
        """The credentials' own token is never used. Raises CredentialsError."""
        self._address = address
        self._is_safe = not must_know_callers
        self._channel = credentials.without_token().channel(address, OPTIONS)
        self._stub: pb_grpc.TemplateServiceAsyncStub = pb_grpc.TemplateServiceStub(self._channel)
        self._health: health_pb2_grpc.HealthStub = health_pb2_grpc.HealthStub(self._channel)

    async def of_caller(self, token: str) -> Calls:
        """Return the calls of who has this token.

        Raises RestError when the API would take everybody and must not.
        """
        if not self._is_safe:
            await self._require_known_callers()
        return Calls(self._stub, self._address, token)

    async def readiness(self) -> str:
        """Tell why the gRPC API takes no calls, or ""."""
        request = health_pb2.HealthCheckRequest()
        try:
            answer = await self._health.Check(request, timeout=HEALTH_SECONDS)
        except grpc.aio.AioRpcError:
            return f"the API at {self._address} does not answer"
        serving = answer.status == health_pb2.HealthCheckResponse.SERVING
        return "" if serving else f"the API at {self._address} does not serve"

    async def _require_known_callers(self) -> None:
        stranger = Calls(self._stub, self._address, secrets.token_hex(16))
        try:
            await stranger.builds(pb.TemplateBuildListRequest(page_size=1))
        except CallError as error:
            if error.code is not grpc.StatusCode.UNAUTHENTICATED:
                raise
            self._is_safe = True
            return
        told = "the gRPC API asks nobody who he is, and this address can be reached by others"
        raise RestError(503, "CALLERS_NOT_KNOWN", told)

    async def close(self) -> None:
        """End the connection."""
        await self._channel.close()
