"""What registries answer, as far as it is read (OCI image and distribution spec 1.1).

Docker's own manifests are alike. Fields may be null where they may be absent.
"""

from __future__ import annotations

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


class Platform(Model):
    """What an image runs on; also the part of an image's config that says so."""

    os: str = "unknown"
    architecture: str = "unknown"
    variant: str | None = None

    def __str__(self) -> str:
        return f"{self.os}/{self.architecture}"


class Descriptor(Model):
    """What a manifest says of something else: a config, a layer or another manifest."""

    digest: str
    size: int = 0
    platform: Platform | None = None


class Manifest(Model):
    """The manifest of one image, or an index over those of several platforms."""

    media_type: str | None = Field(None, alias="mediaType")
    config: Descriptor | None = None
    layers: tuple[Descriptor, ...] | None = None
    manifests: tuple[Descriptor, ...] | None = None

    @property
    def is_index(self) -> bool:
        """Whether it is an index."""
        return self.media_type in INDEX_TYPES or self.manifests is not None


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
