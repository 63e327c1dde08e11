from __future__ import annotations

import base64

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import SecretStr

from activities.contract.errors import SealedSecretError
from activities.contract.registry_logins import Sealed
from activities.process.sealing import SealedFor, Sealer

ID = "11111111-1111-4111-8111-111111111111"
BUILD = SealedFor(ID, "registry.test")
OTHERS = [
    SealedFor("22222222-2222-4222-8222-222222222222", "registry.test"),
    SealedFor(ID, "other.test"),
    SealedFor(ID, "registry.test:443"),
    SealedFor(ID, "registry.test", "tenant"),
]


def keys(*ids: str) -> SecretStr:
    encoded = {name: base64.b64encode(name.encode().ljust(32, b"x")).decode() for name in ids}
    return SecretStr(",".join(f"{name}:{key}" for name, key in encoded.items()))


def test_a_sealed_secret_opens_for_its_own_build() -> None:
    sealed = Sealer(keys("k1")).seal("pässword\n", BUILD)
    assert "pässword" not in sealed.model_dump_json()
    assert Sealer(keys("k1")).open(sealed, BUILD) == "pässword\n"


@pytest.mark.parametrize("other", OTHERS)
def test_a_sealed_secret_opens_for_nothing_else(other: SealedFor) -> None:
    sealer = Sealer(keys("k1"))
    with pytest.raises(SealedSecretError, match="does not belong"):
        sealer.open(sealer.seal("secret", BUILD), other)


def test_keys_can_be_rotated() -> None:
    old = Sealer(keys("k1")).seal("secret", BUILD)
    rotated = Sealer(keys("k2", "k1"))
    assert rotated.open(old, BUILD) == "secret"
    assert rotated.seal("secret", BUILD).key_id == "k2"
    with pytest.raises(SealedSecretError, match="'k1'"):
        Sealer(keys("k2")).open(old, BUILD)


def test_without_a_key_nothing_is_sealed() -> None:
    assert not Sealer(SecretStr("")).can_seal
    with pytest.raises(SealedSecretError, match="no key"):
        Sealer(SecretStr("")).seal("secret", BUILD)


def test_a_malformed_key_is_named_but_not_shown() -> None:
    with pytest.raises(SealedSecretError) as caught:
        Sealer(SecretStr("k1:c2hvcnQ="))
    assert "'k1'" in str(caught.value)
    assert "c2hvcnQ" not in str(caught.value)


def sealed_by_an_earlier_version(secret: str, build_id: str) -> Sealed:
    encoded = keys("k1").get_secret_value().partition(":")[2]
    nonce = bytes(12)
    closed = AESGCM(base64.b64decode(encoded)).encrypt(nonce, secret.encode(), build_id.encode())
    return Sealed(key_id="k1", token=base64.b64encode(nonce + closed).decode())


def test_what_was_sealed_before_the_upgrade_opens_for_its_own_build_alone() -> None:
    sealed = sealed_by_an_earlier_version("secret", ID)
    assert Sealer(keys("k1")).open(sealed, BUILD) == "secret"
    with pytest.raises(SealedSecretError):
        Sealer(keys("k1")).open(sealed, OTHERS[0])


def test_what_is_sealed_now_does_not_open_as_an_earlier_one() -> None:
    sealed = Sealer(keys("k1")).seal("secret", BUILD)
    raw = base64.b64decode(sealed.token)
    key = AESGCM(base64.b64decode(keys("k1").get_secret_value().partition(":")[2]))
    with pytest.raises(InvalidTag):
        key.decrypt(raw[:12], raw[12:], ID.encode())


def test_a_mark_is_of_its_key_and_its_data() -> None:
    sealers = [Sealer(key) for key in (keys("k1"), keys("k2"), SecretStr(""))]
    marks = {sealer.mark(data) for sealer in sealers for data in (b"", b"1")}
    assert len(marks) == 6
    assert {len(mark) for mark in marks} == {32}
    assert Sealer(keys("k1", "k2")).mark(b"1") == Sealer(keys("k1")).mark(b"1")
