"""How a client shows who it is: TLS with its certificate, and the token that goes with a call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import grpc
from pydantic import SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from api.pem import PemError, read_pem

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class CredentialsError(Exception):
    """A certificate, key or token that cannot be used. The message names the file."""


class ClientCredentials(BaseSettings):
    """How a client reaches the API: `TEMPLATE_MANAGER_TLS`, `…_TLS_CA`, `…_TOKEN` and so on."""

    model_config = SettingsConfigDict(env_prefix="TEMPLATE_MANAGER_", extra="ignore")

    tls: bool = False
    """TLS with the system's certificate authorities."""
    tls_ca: Path | None = None
    """TLS with this authority instead (PEM)."""
    tls_client_cert: Path | None = None
    tls_client_key: Path | None = None
    token: SecretStr = SecretStr("")
    token_file: Path | None = None

    def channel(self, address: str, options: Sequence[tuple[str, int]]) -> grpc.aio.Channel:
        """Open a channel. Raises CredentialsError when a file cannot be read."""
        token = self._token()
        interceptors = [_UnaryToken(token), _StreamToken(token)] if token else []
        if not (self.tls or self.tls_ca or self.tls_client_cert):
            return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
        return grpc.aio.secure_channel(
            address, self._tls(), options=options, interceptors=interceptors
        )

    def without_token(self) -> ClientCredentials:
        """Return the same way to the API for calls that bring a token of their own."""
        return self.model_copy(update={"token": SecretStr(""), "token_file": None})

    def _tls(self) -> grpc.ChannelCredentials:
        paths = (self.tls_ca, self.tls_client_key, self.tls_client_cert)
        try:
            authority, key, certificate = (read_pem(path) if path else None for path in paths)
        except PemError as error:
            raise CredentialsError(str(error)) from None
        return grpc.ssl_channel_credentials(authority, key, certificate)

    def _token(self) -> str:
        if self.token_file is None:
            return self.token.get_secret_value()
        try:
            return self.token_file.read_text().strip()
        except OSError as error:
            raise CredentialsError(f"cannot read {self.token_file}: {error.strerror}") from None


# Two classes: grpc.aio takes an object that intercepts both kinds of calls for one kind only.


class _UnaryToken(grpc.aio.UnaryUnaryClientInterceptor):
    """Sends the token with every call that has one answer."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_unary_unary(
        self,
        continuation: Callable[
            [grpc.aio.ClientCallDetails, Request],
            Awaitable[grpc.aio.UnaryUnaryCall[Request, Answer]],
        ],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Request,
    ) -> grpc.aio.UnaryUnaryCall[Request, Answer]:
        return await continuation(_with_token(client_call_details, self._token), request)


class _StreamToken(grpc.aio.UnaryStreamClientInterceptor):
    """Sends the token with every call that has a stream of answers."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_unary_stream(
        self,
        continuation: Callable[
            [grpc.aio.ClientCallDetails, Request],
            Awaitable[grpc.aio.UnaryStreamCall[Request, Answer]],
        ],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Request,
    ) -> AsyncIterator[Answer] | grpc.aio.UnaryStreamCall[Request, Answer]:
        return await continuation(_with_token(client_call_details, self._token), request)


def _with_token(details: grpc.aio.ClientCallDetails, token: str) -> grpc.aio.ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    metadata.add("authorization", f"Bearer {token}")
    return grpc.aio.ClientCallDetails(
        details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
    )
