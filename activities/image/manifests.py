"""What registries answer, as far as it is read (OCI image and distribution spec 1.1).

Docker's own manifests are alike. Fields may be null where they may be absent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from activities.contract.model import Model

INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
DOCKER_MANIFEST = MANIFEST_TYPES[1]
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
# Old registries and builders wrote these of configs and layers, and dockerd takes them.
OLD_TYPES = frozenset({"application/octet-stream", "application/json", "text/html", ""})
IMAGE_CONFIG_TYPES = OLD_TYPES | {"application/vnd.oci.image.config.v1+json", DOCKER_CONFIG}
LAYER_TYPES = ("application/vnd.oci.image.", "application/vnd.docker.")
"""How those of layers begin: as dockerd, which looks no further, takes them."""
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# What is read of a config here, and by dockerd.
IMAGE_FIELDS = frozenset({"os", "architecture", "variant", "rootfs", "history"})
INNER_FIELDS = {"rootfs": frozenset({"diff_ids"}), "history": frozenset({"empty_layer"})}
LARGEST_INT64 = 2**63 - 1
MAX_TOLD_CHARS = 100
# As containerd normalizes them: other names of an architecture, and the variant that goes unsaid.
ARCHITECTURES = {"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "i386": "386"}
PLAIN_VARIANTS = {("amd64", "v1"), ("arm64", "8"), ("arm64", "v8")}

Bytes = Annotated[int, Field(ge=0, le=LARGEST_INT64)]


class Platform(Model):
    """What an image runs on. Says nothing where it is not told."""

    os: str | None = None
    architecture: str | None = None
    variant: str | None = None

    @property
    def is_told(self) -> bool:
        """Whether it says anything: dockerd takes one of empty fields for none."""
        return bool(self.os or self.architecture or self.variant)

    @property
    def is_unknown(self) -> bool:
        """Whether it is what BuildKit gives to attestations."""
        return (self.os, self.architecture) == ("unknown", "unknown")

    @property
    def normal_architecture(self) -> str:
        """Its architecture by the name that Go uses."""
        told = (self.architecture or "").lower()
        return ARCHITECTURES.get(told, told)

    @property
    def normal_variant(self) -> str:
        """Its variant, '' for the one that needs no saying."""
        variant = (self.variant or "").lower()
        return "" if (self.normal_architecture, variant) in PLAIN_VARIANTS else variant

    def fits(self, architecture: str) -> bool:
        """Whether dockerd chooses it from an index, on linux on `architecture`."""
        system = (self.os or "linux").lower()
        return (system, self.normal_architecture, self.normal_variant) == (
            "linux",
            architecture,
            "",
        )

    def __str__(self) -> str:
        """Return `os/architecture[/variant]`."""
        parts = [self.os or "unknown", self.normal_architecture or "unknown", self.normal_variant]
        return printable("/".join(part for part in parts if part))


class Descriptor(Model):
    """What a manifest says of something else: a config, a layer or another manifest."""

    media_type: str | None = Field(None, alias="mediaType")
    digest: str
    size: Bytes = 0
    platform: Platform | None = None


class Manifest(Model):
    """The manifest of one image, or an index over those of several platforms."""

    schema_version: int | None = Field(None, alias="schemaVersion")
    media_type: str | None = Field(None, alias="mediaType")
    artifact_type: str | None = Field(None, alias="artifactType")
    config: Descriptor | None = None
    layers: tuple[Descriptor, ...] | None = None
    manifests: tuple[Descriptor, ...] | None = None

    @property
    def is_index(self) -> bool:
        """Whether it is an index."""
        return self.media_type in INDEX_TYPES or self.manifests is not None


class LayerDigests(Model):
    """The layers of an image by the digests of what they unpack to."""

    diff_ids: tuple[str, ...] | None = None


class HistoryEntry(Model):
    """One line of an image's history."""

    empty_layer: bool | None = None


class ImageFile(Platform):
    """An image's config, as far as it is looked at before a pull; it also is its platform."""

    rootfs: LayerDigests | None = None
    history: tuple[HistoryEntry, ...] | None = None

    @property
    def diff_ids(self) -> tuple[str, ...]:
        """The digest of what each layer unpacks to."""
        return (self.rootfs and self.rootfs.diff_ids) or ()

    @property
    def history_count(self) -> int:
        """How many layers its history tells of."""
        return sum(not entry.empty_layer for entry in self.history or ())


def read_image_file(body: bytes) -> ImageFile:
    """Read an image's config as dockerd does, or not at all.

    Go takes a field's name in capitals for the field, and of two of them the last, or neither
    if that is null. So `OS` says something to dockerd, and nothing to us. Raises ValueError.
    """
    found = ImageFile.model_validate_json(body)
    try:
        image: _Fields = json.loads(body, object_pairs_hook=_Fields)
    except RecursionError:
        raise ValueError("it is too deep") from None
    _require_clear(image, IMAGE_FIELDS)
    for name, value in image:
        if name in INNER_FIELDS:
            for inner in [value] if isinstance(value, _Fields) else value or ():
                _require_clear(inner, INNER_FIELDS[name])
    return found


class _Fields(list[tuple[str, "Iterable[_Fields] | None"]]):
    """An object of JSON, with the fields that it has twice."""


def _require_clear(fields: _Fields, known: frozenset[str]) -> None:
    meant = [name for name, _ in fields if name.casefold() in known]
    if len(set(meant)) < len(meant) or not known.issuperset(meant):
        raise ValueError(f"a field is there twice, or in capitals: {printable(', '.join(meant))}")


class TagPage(Model):
    """Some of a repository's tags."""

    tags: tuple[str, ...] | None = None


class Token(Model):
    """What a registry's token server gives; the names are alike."""

    token: str | None = None
    access_token: str | None = None

    @property
    def value(self) -> str:
        """The token itself."""
        return self.token or self.access_token or ""


def printable(text: str) -> str:
    """Return what a registry says in a form that fits into one line of a message."""
    plain = "".join(char if char.isprintable() else "?" for char in text[: MAX_TOLD_CHARS + 1])
    return plain if len(plain) <= MAX_TOLD_CHARS else f"{plain[:MAX_TOLD_CHARS]}…"
