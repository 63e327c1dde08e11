"""Sealing secrets: the API closes them, only the activity that needs one opens it.

AES-256-GCM from the `cryptography` package (NIST SP 800-38D): a random 12-byte nonce, the build
id as associated data, so that a token copied into another build does not open.
"""

from __future__ import annotations

import base64
import binascii
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import SecretStr

from activities.contract.errors import SealedSecretError
from activities.contract.registry_logins import Sealed

NONCE_BYTES = 12
KEY_BYTES = 32


class Sealer:
    """Seals and opens secrets with the keys of the settings (`secret_keys`)."""

    def __init__(self, secret_keys: SecretStr) -> None:
        """Parse `<key id>:<base64>,…`. Raises SealedSecretError on a malformed key."""
        self._keys = dict(_parse(part) for part in _parts(secret_keys))
        self._first = next(iter(self._keys), None)

    @property
    def can_seal(self) -> bool:
        """Whether any key is configured."""
        return self._first is not None

    def seal(self, secret: str, build_id: str) -> Sealed:
        """Encrypt `secret` for that build. Raises SealedSecretError when no key is configured."""
        if self._first is None:
            raise SealedSecretError("no key is configured to seal the registry's secret with")
        nonce = os.urandom(NONCE_BYTES)
        closed = self._keys[self._first].encrypt(nonce, secret.encode(), build_id.encode())
        return Sealed(key_id=self._first, token=base64.b64encode(nonce + closed).decode())

    def open(self, sealed: Sealed, build_id: str) -> str:
        """Decrypt. Raises SealedSecretError when the key is unknown or the token is not ours."""
        key = self._keys.get(sealed.key_id)
        if key is None:
            raise SealedSecretError(f"this host does not know the secret key {sealed.key_id!r}")
        raw = base64.b64decode(sealed.token)
        try:
            opened = key.decrypt(raw[:NONCE_BYTES], raw[NONCE_BYTES:], build_id.encode())
        except InvalidTag:
            raise SealedSecretError("the sealed secret does not belong to this build") from None
        return opened.decode()


def _parts(secret_keys: SecretStr) -> list[str]:
    return [part for part in secret_keys.get_secret_value().split(",") if part]


def _parse(part: str) -> tuple[str, AESGCM]:
    key_id, _, encoded = part.strip().partition(":")
    try:
        raw = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        raw = b""
    if not key_id or len(raw) != KEY_BYTES:
        # The key itself must not reach a log: say only which one it is.
        raise SealedSecretError(
            f"TEMPLATE_MANAGER_SECRET_KEYS: key {key_id!r} is not base64 of {KEY_BYTES} bytes"
        )
    return key_id, AESGCM(raw)
