from __future__ import annotations

import json

import pytest

from activities.image.manifests import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    Descriptor,
    Manifest,
    Token,
    read_image_file,
)

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


CLEAR = b'{"os": "linux", "rootfs": {"diff_ids": ["a"]}, "history": [{"empty_layer": true}, {}]}'


@pytest.mark.parametrize(
    ("said", "instead"),
    [
        (b'"os": "linux"', b'"os": "linux", "OS": "Linux"'),
        (b'"os": "linux"', b'"Os": "Linux"'),
        (b'"os": "linux"', '"o\N{LATIN SMALL LETTER LONG S}": "Linux"'.encode()),
        (b'"os": "linux"', b'"o\\u017f": "Linux"'),
        (b'"os": "linux"', b'"os": "Linux", "os": null'),
        (b'"os": "linux"', b'"os": "linux", "Architecture": "arm64"'),
        (b'"rootfs"', b'"RootFS": {"diff_ids": ["b"]}, "rootfs"'),
        (b'"diff_ids"', b'"Diff_IDs": ["b"], "diff_ids"'),
        (b'"empty_layer"', b'"EMPTY_LAYER": false, "empty_layer"'),
    ],
)
def test_a_config_that_go_reads_otherwise_is_not_read(said: bytes, instead: bytes) -> None:
    """It takes a name in capitals, too, and a null for nothing: dockerd 20.10 dies of `Linux`."""
    assert read_image_file(CLEAR).history_count == 1
    assert said in CLEAR
    with pytest.raises(ValueError, match="twice, or in capitals"):
        read_image_file(CLEAR.replace(said, instead, 1))


def test_names_of_others_may_be_anything() -> None:
    labels = b'{"config": {"Env": [], "Labels": {"os": "a", "OS": "b"}}, "os": "linux", "Size": 1}'
    assert read_image_file(labels).os == "linux"
    for nothing in (b"{}", b'{"rootfs": null, "history": null}'):
        assert read_image_file(nothing).diff_ids == ()
