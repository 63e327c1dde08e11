"""Sealing secrets: the API closes them, only the activity that needs one opens it.

AES-256-GCM from the `cryptography` package (NIST SP 800-38D): a random 12-byte nonce; what the
secret is for as associated data, so that it opens in no other build and for no other registry.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hmac
import json
import os
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import SecretStr

from activities.contract.errors import SealedSecretError
from activities.contract.registry_logins import Sealed

NONCE_BYTES = 12
KEY_BYTES = 32


@dataclass(frozen=True)
class SealedFor:
    """What a secret may be opened for, and nothing else."""

    build_id: str
    registry: str
    """Its host, with its port if it has one."""
    tenant: str = ""
    variable: str = ""
    """Of a secret variable: its name; it is for no registry then."""

    def associated_data(self) -> bytes:
        """Return it as AES-GCM takes it: no two say the same."""
        parts = ["v2", self.build_id, self.registry, self.tenant]
        return json.dumps([*parts, self.variable] if self.variable else parts).encode()

    def accepted_data(self) -> tuple[bytes, ...]:
        """Return with what associated data it may have been sealed.

        Versions up to 0.2 bound a registry's secret to the build alone, and knew no other.
        """
        earlier = () if self.variable else (self.build_id.encode(),)
        return (self.associated_data(), *earlier)


class Sealer:
    """Seals and opens secrets with the keys of the settings (`secret_keys`)."""

    def __init__(self, secret_keys: SecretStr) -> None:
        """Parse `<key id>:<base64>,…`. Raises SealedSecretError on a malformed key."""
        keys = dict(_parse(part) for part in _parts(secret_keys))
        self._keys = {key_id: AESGCM(raw) for key_id, raw in keys.items()}
        self._first = next(iter(keys), None)
        self._marking = keys[self._first] if self._first is not None else b""

    @property
    def can_seal(self) -> bool:
        """Whether any key is configured."""
        return self._first is not None

    def mark(self, data: bytes) -> bytes:
        """Return 32 bytes by which this service knows `data` for its own.

        Where no key is configured anybody can write them.
        """
        return hmac.digest(self._marking, b"mark:" + data, "sha256")

    def seal(self, secret: str, only_for: SealedFor) -> Sealed:
        """Encrypt `secret`. Raises SealedSecretError when no key is configured."""
        if self._first is None:
            raise SealedSecretError("no key is configured to seal secrets with")
        nonce = os.urandom(NONCE_BYTES)
        data = only_for.associated_data()
        closed = self._keys[self._first].encrypt(nonce, secret.encode(), data)
        return Sealed(key_id=self._first, token=base64.b64encode(nonce + closed).decode())

    def open(self, sealed: Sealed, wanted_for: SealedFor) -> str:
        """Decrypt. Raises SealedSecretError when the key is unknown or it is for something else."""
        key = self._keys.get(sealed.key_id)
        if key is None:
            raise SealedSecretError(f"this host does not know the secret key {sealed.key_id!r}")
        raw = base64.b64decode(sealed.token)
        nonce, closed = raw[:NONCE_BYTES], raw[NONCE_BYTES:]
        for data in wanted_for.accepted_data():
            with contextlib.suppress(InvalidTag):
                return key.decrypt(nonce, closed, data).decode()
        raise SealedSecretError(
            "the sealed secret does not belong to this build and "
            f"{wanted_for.variable or wanted_for.registry}"
        )


def _parts(secret_keys: SecretStr) -> list[str]:
    return [part for part in secret_keys.get_secret_value().split(",") if part]


def _parse(part: str) -> tuple[str, bytes]:
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
    return key_id, raw
