"""TLS of the API: the server's certificate, the client's, and the token that goes with a call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from pydantic import SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


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

    def channel(self, address: str, options: Any) -> grpc.aio.Channel:
        """Open a channel. Raises CredentialsError when a file cannot be read."""
        token = self._token()
        interceptors = [_unary(token), _stream(token)] if token else []
        if not (self.tls or self.tls_ca or self.tls_client_cert):
            return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
        credentials = grpc.ssl_channel_credentials(
            root_certificates=read_pem(self.tls_ca),
            private_key=read_pem(self.tls_client_key),
            certificate_chain=read_pem(self.tls_client_cert),
        )
        return grpc.aio.secure_channel(
            address, credentials, options=options, interceptors=interceptors
        )

    def _token(self) -> str:
        if self.token_file is None:
            return self.token.get_secret_value()
        try:
            return self.token_file.read_text().strip()
        except OSError as error:
            raise CredentialsError(f"cannot read {self.token_file}: {error.strerror}") from None


def server_credentials(
    certificate: Path, key: Path, client_authority: Path | None
) -> grpc.ServerCredentials:
    """Return a server's TLS; with an authority for clients it wants their certificates (mTLS).

    Raises CredentialsError when a file cannot be read.
    """
    authority = read_pem(client_authority)
    return grpc.ssl_server_credentials(
        [(read_pem(key) or b"", read_pem(certificate) or b"")],
        root_certificates=authority,
        require_client_auth=authority is not None,
    )


def read_pem(path: Path | None) -> bytes | None:
    """Read a PEM file. Raises CredentialsError."""
    if path is None:
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CredentialsError(f"cannot read {path}: {error.strerror}") from None
    if b"-----BEGIN" not in content:
        raise CredentialsError(f"{path} is not a PEM file")
    return content


def _unary(token: str) -> grpc.aio.UnaryUnaryClientInterceptor:
    class AddToken(grpc.aio.UnaryUnaryClientInterceptor):
        async def intercept_unary_unary(
            self, continuation: Callable[..., Any], details: Any, request: Any
        ) -> Any:
            return await continuation(_with_token(details, token), request)

    return AddToken()


def _stream(token: str) -> grpc.aio.UnaryStreamClientInterceptor:
    class AddToken(grpc.aio.UnaryStreamClientInterceptor):
        async def intercept_unary_stream(
            self, continuation: Callable[..., Any], details: Any, request: Any
        ) -> Any:
            return await continuation(_with_token(details, token), request)

    return AddToken()


def _with_token(details: Any, token: str) -> Any:
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    metadata.add("authorization", f"Bearer {token}")
    return details._replace(metadata=metadata)
