"""What strangers send to the parsers of images: whatever it is, only typed errors come of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tarfile
import time
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from activities.contract.errors import RegistryRefusedError, TemplateManagerError
from activities.contract.image_reference import ImageReference, ImageReferenceError
from activities.image.checked_http import Origin
from activities.image.layer_check import ImageBudget, ImageLimits, unpacked_layer
from activities.image.manifests import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    ImageFile,
    Manifest,
    TagPage,
    Token,
)
from activities.image.platform_search import PlatformSearch
from activities.image.registry import _parse_challenge
from activities.image.tar_headers import TarError, TarHeaders
from tests.support import hostile_layers as layers
from tests.support.hostile_layers import PACKERS

REFERENCE = ImageReference.parse("registry.test/some/image:1")
LIMITS = ImageLimits(1 << 20, 1 << 22, 1000, 4096)
quick = settings(
    max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.too_slow], database=None
)

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
anything: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
kinds = st.sampled_from([*MANIFEST_TYPES, *INDEX_TYPES, "application/x", ""])
digests = st.sampled_from([f"sha256:{n:064x}" for n in range(4)]) | st.text(max_size=80)
platforms = st.fixed_dictionaries(
    {},
    optional={
        "os": st.sampled_from(["linux", "Linux", ""]) | anything,
        "architecture": st.sampled_from(["amd64", "x86_64"]) | anything,
        "variant": anything,
    },
)
descriptors = st.fixed_dictionaries(
    {"digest": digests},
    optional={"mediaType": kinds | anything, "size": anything, "platform": platforms | anything},
)
manifests = st.fixed_dictionaries(
    {},
    optional={
        "schemaVersion": anything,
        "mediaType": kinds | anything,
        "artifactType": anything,
        "config": descriptors | anything,
        "layers": st.lists(descriptors, max_size=4) | anything,
        "manifests": st.lists(descriptors, max_size=4) | anything,
    },
)
configs = st.fixed_dictionaries(
    {},
    optional={
        "os": anything,
        "architecture": anything,
        "rootfs": st.fixed_dictionaries({"diff_ids": st.lists(st.text(), max_size=4)}) | anything,
        "history": st.lists(st.fixed_dictionaries({"empty_layer": anything}), max_size=4)
        | anything,
    },
)


class Fuzzed:
    """A registry that answers each question with the next of some documents."""

    def __init__(self, answers: list[Manifest], config: ImageFile) -> None:
        self._answers = answers
        self._config = config
        self.asked = 0

    def manifest(self, version: str) -> tuple[str, Manifest]:
        self.asked += 1
        return f"sha256:{'0' * 64}", self._answers[self.asked % len(self._answers)]

    def image_file(self, digest: str) -> ImageFile:
        return self._config


def as_json(value: object) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


@quick
@given(st.binary(max_size=200) | anything.map(as_json) | manifests.map(as_json))
def test_any_body_is_read_or_refused(body: bytes) -> None:
    for model in (Manifest, ImageFile, TagPage, Token):
        with contextlib.suppress(ValidationError):
            model.model_validate_json(body)


def test_a_body_that_nests_for_ever_is_refused() -> None:
    for body in (b"[" * 1_000_000, b'{"config":' * 1_000_000):
        began = time.monotonic()
        with contextlib.suppress(ValidationError):
            Manifest.model_validate_json(body)
        assert time.monotonic() - began < 20


@quick
@given(st.lists(manifests, min_size=1, max_size=5), configs)
def test_any_index_gives_an_image_or_a_typed_error(told: list[Any], config: Any) -> None:
    try:
        answers = [Manifest.model_validate_json(as_json(one)) for one in told]
        source = Fuzzed(answers, ImageFile.model_validate_json(as_json(config)))
    except ValidationError:
        return
    try:
        found = PlatformSearch(source, REFERENCE, "amd64").find()
    except TemplateManagerError as error:
        assert "\n" not in error.message
    else:
        assert len(found.manifest.layers or ()) == len(found.diff_ids)
    assert source.asked < 1000


@quick
@given(st.text(max_size=300) | st.from_regex(r"\A[a-z./:@-]{0,60}\Z"))
def test_any_reference_is_read_or_refused(text: str) -> None:
    try:
        found = ImageReference.parse(text)
    except ImageReferenceError:
        return
    assert found.registry
    assert ImageReference.parse(str(found)).name == found.name


@quick
@given(st.text(max_size=300) | st.from_regex(r"\A(Basic|bearer) [a-z]+=\"[^\"]{0,20}\".{0,20}\Z"))
def test_any_challenge_is_read(header: str) -> None:
    kind, parameters = _parse_challenge(header)
    assert kind == kind.lower()
    assert all(isinstance(value, str) for value in parameters.values())


def test_a_long_challenge_takes_no_long_time() -> None:
    for header in ("Bearer " + "a" * 60_000, "Bearer " + 'a="' * 20_000, "Bearer " + '="' * 30_000):
        began = time.monotonic()
        _parse_challenge(header)
        assert time.monotonic() - began < 10


@quick
@given(st.text(max_size=200) | st.from_regex(r"\A[a-z]{1,6}:[/\\]{0,3}[^ ]{0,40}\Z"))
def test_any_location_is_a_web_address_or_refused(url: str) -> None:
    try:
        origin = Origin.of(url)
    except RegistryRefusedError:
        return
    assert origin.scheme in ("http", "https")
    assert origin.host


tars = st.lists(
    st.binary(max_size=600)
    | st.integers(0, 1 << 62).map(layers.claim)
    | st.builds(
        layers.header,
        st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=40),
        st.integers(0, 5000),
        st.sampled_from([b"0", b"1", b"5", b"x", b"g", b"L", b"K", b"S", b"7", b"\0"]),
    ),
    max_size=6,
).map(b"".join)


@quick
@given(tars, st.integers(1, 700))
def test_any_tar_is_followed_to_its_end(tar: bytes, size: int) -> None:
    told: list[object] = []
    headers = TarHeaders(told.append)
    with contextlib.suppress(TarError):
        for at in range(0, len(tar), size):
            headers.feed(tar[at : at + size])
    assert len(told) <= len(tar) // tarfile.BLOCKSIZE


@quick
@given(
    tars, st.sampled_from([bytes, *PACKERS.values()]), st.binary(max_size=40), st.integers(0, 999)
)
def test_any_layer_passes_or_is_refused(tar: bytes, pack: Any, noise: bytes, at: int) -> None:
    packed = pack(tar)
    packed = packed[:at] + noise + packed[at + len(noise) :]
    digest = f"sha256:{hashlib.sha256(packed).hexdigest()}"
    budget = ImageBudget("an image", LIMITS)
    with contextlib.suppress(TemplateManagerError):
        unpacked = b"".join(unpacked_layer("an image", digest, [packed], budget))
        assert len(unpacked) <= LIMITS.unpacked_bytes
        assert noise or pack is bytes or unpacked == tar
