from __future__ import annotations

import json

import pytest

from activities.image.manifests import INDEX_TYPES, MANIFEST_TYPES, Descriptor, Manifest, Token

DIGEST = "sha256:" + "a" * 64
PLATFORM = {"os": "linux", "architecture": "arm64", "variant": "v8"}


def read(**fields: object) -> Manifest:
    return Manifest.model_validate_json(json.dumps(fields))


def test_a_manifest_names_its_config_and_layers() -> None:
    found = read(
        schemaVersion=2,
        mediaType=MANIFEST_TYPES[0],
        config={"mediaType": "x", "digest": DIGEST, "size": 7},
        layers=[{"mediaType": "x", "digest": DIGEST, "size": 8}],
    )
    assert found.config == Descriptor(mediaType="x", digest=DIGEST, size=7)
    assert found.layers == (Descriptor(mediaType="x", digest=DIGEST, size=8),)
    assert not found.is_index


@pytest.mark.parametrize("media_type", [*INDEX_TYPES, None])
def test_an_index_names_a_manifest_for_each_platform(media_type: str | None) -> None:
    found = read(mediaType=media_type, manifests=[{"digest": DIGEST, "platform": PLATFORM}])
    assert found.is_index
    assert found.manifests is not None
    [entry] = found.manifests
    assert str(entry.platform) == "linux/arm64"


def test_what_is_empty_may_be_null() -> None:
    assert read(layers=None, manifests=None, config=None) == Manifest()


def test_a_token_has_one_of_two_names() -> None:
    assert Token(token="a").value == Token(access_token="a").value == "a"
    assert Token().value == ""
