"""Which image a reference names, whatever a registry sends."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

import pytest
from devstack.registry import CONFIG, INDEX, MANIFEST
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from activities.contract.errors import (
    ImageFormatUnsupportedError,
    ImageUnusableError,
    NotAnImageError,
    RegistryUnavailableError,
    TemplateManagerError,
    TooManyLayersError,
    WrongArchitectureError,
)
from activities.contract.image_reference import ImageReference
from activities.image.platform_search import MAX_DEPTH, MAX_LOOKED_INTO
from activities.image.pull import require_taken
from activities.image.registry import RegistryAccess, RemoteImage, RemoteLayer, resolve
from activities.process.addresses import InternalRegistries
from tests.support.served_images import ServedImages, digest_of, serving_images


@pytest.fixture(scope="module")
def images() -> Iterator[ServedImages]:
    with serving_images() as serving:
        yield serving


def resolved(images: ServedImages, tag: str, architecture: str = "amd64") -> RemoteImage:
    access = RegistryAccess(internal=InternalRegistries((images.address,)))
    return resolve(ImageReference.parse(images.reference(tag)), architecture, access=access)


def of(os: str, architecture: str, variant: str = "") -> dict[str, object]:
    platform = {"os": os, "architecture": architecture, "variant": variant}
    return {"platform": {name: value for name, value in platform.items() if value}}


@pytest.mark.parametrize(
    ("architecture", "entry", "fits"),
    [
        ("amd64", of("linux", "amd64", "v1"), True),
        ("amd64", of("linux", "x86_64"), True),
        ("amd64", of("", "amd64"), True),
        ("amd64", of("linux", "amd64", "v2"), False),
        ("amd64", of("linux", "386"), False),
        ("arm64", of("linux", "arm64", "v8"), True),
        ("arm64", of("linux", "aarch64"), True),
        ("arm64", of("linux", "arm", "v7"), False),
        ("arm64", of("linux", "arm64", "v9"), False),
    ],
)
def test_an_entry_fits_as_docker_says(
    images: ServedImages, architecture: str, entry: dict[str, object], fits: bool
) -> None:
    image = images.image("one", architecture=architecture)
    images.index("index", {**image, **entry})
    if fits:
        assert resolved(images, "index", architecture).digest == image["digest"]
    else:
        with pytest.raises(WrongArchitectureError, match="index that holds linux/"):
            resolved(images, "index", architecture)


def test_an_index_that_does_not_fit_says_what_it_holds(images: ServedImages) -> None:
    arm = images.image("arm", architecture="arm64")
    chart = images.image("chart", types=(MANIFEST, "application/vnd.cncf.helm.config.v1+json", ""))
    nested = images.index("nested", {**arm, **of("linux", "arm64", "v8")})
    entries = [
        {**arm, **of("linux", "arm", "v7")},
        {**arm, **of("unknown", "unknown")},
        {**arm, **of("windows", "amd64")},
        chart,
        nested,
    ]
    images.index("index", *entries)
    with pytest.raises(WrongArchitectureError) as error:
        resolved(images, "index")
    assert error.value.message.endswith(
        "is an index that holds linux/arm/v7, linux/arm64, windows/amd64, attestations, something "
        "of type application/vnd.cncf.helm.config.v1+json; this host runs linux/amd64"
    )


def test_an_index_without_any_image_is_no_image(images: ServedImages) -> None:
    chart = images.image("chart", types=(MANIFEST, "application/vnd.cncf.helm.config.v1+json", ""))
    images.index("charts", chart, {**chart, **of("unknown", "unknown")})
    told = r"holds attestations, something of type application/vnd\.cncf\.helm.*: no image$"
    with pytest.raises(NotAnImageError, match=told):
        resolved(images, "charts")
    images.index("empty")
    with pytest.raises(NotAnImageError, match="holds nothing: no image"):
        resolved(images, "empty")


def test_a_search_has_an_end(images: ServedImages) -> None:
    deep = images.image("deep")
    for _ in range(MAX_DEPTH + 1):
        deep = images.index("deep", deep)
    with pytest.raises(ImageUnusableError, match="more than 4 deep"):
        resolved(images, "deep")
    arm = images.image("arm", architecture="arm64")
    images.index("wide", *[arm] * (MAX_LOOKED_INTO + 1))
    with pytest.raises(ImageUnusableError, match="more than 32 entries"):
        resolved(images, "wide")


def test_linux_has_one_spelling_in_a_config(images: ServedImages) -> None:
    """dockerd 20.10 dies of another, and does not start again."""
    image = images.image("caps", os="Linux")
    images.index("index", {**image, **of("linux", "amd64")})
    for tag in ("caps", "index"):
        with pytest.raises(WrongArchitectureError, match="is for Linux/amd64"):
            resolved(images, tag)


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"schemaVersion": 1, "fsLayers": []}, ImageFormatUnsupportedError, "schema 1"),
        ({"schemaVersion": 2}, NotAnImageError, "no config"),
        ({"mediaType": "application/x", "blobs": []}, NotAnImageError, "is application/x"),
        ({"config": {"digest": "sha512:1", "size": 1}}, ImageUnusableError, "sha512:1"),
        ({"manifests": [{"digest": "../../x"}]}, ImageUnusableError, r"\.\./\.\./x"),
        ({"config": {"digest": "a", "size": -1}}, RegistryUnavailableError, "not a manifest"),
        (
            {"artifactType": "a\x1b[31m\n", "config": {"digest": "x", "mediaType": "y"}},
            NotAnImageError,
            r"is a\?\[31m\?$",
        ),
    ],
)
def test_what_is_no_image_is_told_by_name(
    images: ServedImages,
    fields: dict[str, object],
    kind: type[TemplateManagerError],
    text: str,
) -> None:
    images.put(json.dumps(fields).encode(), "", "odd")
    with pytest.raises(kind, match=text):
        resolved(images, "odd")


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b'"\\ud800"', b""])
def test_what_cannot_be_read_is_an_error_of_the_registry(images: ServedImages, body: bytes) -> None:
    images.put(body, "", "odd")
    with pytest.raises(RegistryUnavailableError, match="not a manifest"):
        resolved(images, "odd")


# ---- Whatever it is

TEXTS = st.sampled_from(["", "linux", "amd64", "v1", "unknown", INDEX, MANIFEST, CONFIG, "\x1b"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | TEXTS
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
PLATFORMS = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("os", "architecture", "variant"), TEXTS | ANYTHING)
)
CONFIGS: st.SearchStrategy[dict[str, object]] = st.fixed_dictionaries(
    {},
    optional={
        "os": TEXTS | ANYTHING,
        "architecture": TEXTS | ANYTHING,
        "rootfs": st.just({"diff_ids": []}) | st.just({"diff_ids": ["x"]}) | ANYTHING,
        "history": st.lists(st.just({}) | st.just({"empty_layer": True}), max_size=2) | ANYTHING,
    },
)


@st.composite
def registries(draw: st.DrawFn) -> list[bytes]:
    """Documents of which each may name those before it by their digests."""
    written = [json.dumps(draw(CONFIGS)).encode() for _ in range(2)]
    for _ in range(draw(st.integers(1, 5))):
        written.append(json.dumps(draw(_documents([digest_of(body) for body in written]))).encode())
    return written


def _documents(digests: list[str]) -> st.SearchStrategy[object]:
    descriptors = st.fixed_dictionaries(
        {"digest": st.sampled_from([*digests, "", "../x"])},
        optional={
            "mediaType": TEXTS | ANYTHING,
            "size": st.integers(0, 2**70) | ANYTHING,
            "platform": PLATFORMS | ANYTHING,
        },
    )
    manifests = st.fixed_dictionaries(
        {"config": descriptors},
        optional={"layers": st.lists(descriptors, max_size=2) | ANYTHING, "mediaType": TEXTS},
    )
    indexes = st.fixed_dictionaries(
        {"manifests": st.lists(descriptors, max_size=3)},
        optional={"schemaVersion": ANYTHING, "mediaType": TEXTS},
    )
    return manifests | indexes | ANYTHING


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(written=registries())
@example(written=[b"null"])
def test_a_hostile_registry_gets_a_typed_error(images: ServedImages, written: list[bytes]) -> None:
    images.contents.clear()
    for body in written:
        images.put(body, "", "odd")
    try:
        found = resolved(images, "odd")
        require_taken(found)
    except TemplateManagerError as error:
        assert str(error).isprintable()
        return
    assert len(found.layers) <= 125


@pytest.mark.parametrize(
    ("kind", "taken"),
    [
        ("application/vnd.oci.image.layer.v1.tar+zstd", True),
        ("application/vnd.docker.image.rootfs.diff.tar.zstd", True),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", True),
        ("application/octet-stream", True),
        ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", False),
        ("application/vnd.cncf.helm.chart.content.v1.tar+gzip", False),
        ("application/vnd.oci.images", False),
    ],
)
def test_the_kinds_of_layers_are_those_of_images(kind: str, taken: bool) -> None:
    remote = image_of([kind])
    if taken:
        require_taken(remote)
    else:
        with pytest.raises(ImageFormatUnsupportedError) as error:
            require_taken(remote)
        assert error.value.hint


def image_of(kinds: Iterable[str]) -> RemoteImage:
    layers = tuple(RemoteLayer("", 0, kind, "") for kind in kinds)
    return RemoteImage(ImageReference.parse("registry.invalid/x"), "", "", 0, "amd64", layers)


def test_too_many_layers_are_told_with_both_numbers() -> None:
    require_taken(image_of([""] * 125))
    with pytest.raises(TooManyLayersError, match=r"126 layers; Docker takes 125"):
        require_taken(image_of([""] * 126))
