from __future__ import annotations

import base64

import pytest
from pydantic import SecretStr

from activities.contract.errors import SealedSecretError
from activities.process.sealing import Sealer

BUILD = "11111111-1111-4111-8111-111111111111"
OTHER = "22222222-2222-4222-8222-222222222222"


def keys(*ids: str) -> SecretStr:
    encoded = {name: base64.b64encode(name.encode().ljust(32, b"x")).decode() for name in ids}
    return SecretStr(",".join(f"{name}:{key}" for name, key in encoded.items()))


def test_a_sealed_secret_opens_for_its_own_build() -> None:
    sealed = Sealer(keys("k1")).seal("pässword\n", BUILD)
    assert "pässword" not in sealed.model_dump_json()
    assert Sealer(keys("k1")).open(sealed, BUILD) == "pässword\n"


def test_a_sealed_secret_does_not_open_for_another_build() -> None:
    sealer = Sealer(keys("k1"))
    with pytest.raises(SealedSecretError, match="does not belong"):
        sealer.open(sealer.seal("secret", BUILD), OTHER)


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
