"""The server's side of TLS: its own certificate, and who signs those of its clients."""

from __future__ import annotations

from pathlib import Path

import grpc

from api.pem import read_pem


def server_credentials(
    certificate: Path, key: Path, client_authority: Path | None
) -> grpc.ServerCredentials:
    """Return a server's TLS; with an authority for clients it wants their certificates (mTLS).

    Raises PemError when a file cannot be read.
    """
    authority = read_pem(client_authority) if client_authority else None
    return grpc.ssl_server_credentials(
        [(read_pem(key), read_pem(certificate))],
        root_certificates=authority,
        require_client_auth=authority is not None,
    )
