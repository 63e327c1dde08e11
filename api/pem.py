"""Certificates and keys in PEM files, as the server and its clients read them."""

from __future__ import annotations

from pathlib import Path


class PemError(Exception):
    """A certificate or key that cannot be used. The message names the file."""


def read_pem(path: Path) -> bytes:
    """Read a PEM file whole. Raises PemError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PemError(f"cannot read {path}: {error.strerror}") from None
    if b"-----BEGIN" not in content:
        raise PemError(f"{path} is not a PEM file")
    return content
