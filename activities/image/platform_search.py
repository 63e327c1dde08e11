"""Which image a reference names for this host: the one that `docker pull` takes.

In an index, an entry that names the host's platform comes before one that names none, and the first
of several counts. Docker 20.10 goes no further; as later ones do, this then looks into the entries
that name no platform, and into an index that stands in an index.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Protocol

from activities.contract.errors import (
    ImageFormatUnsupportedError,
    ImageUnusableError,
    NotAnImageError,
    TemplateManagerError,
    WrongArchitectureError,
)
from activities.contract.image_reference import ImageReference
from activities.image.manifests import (
    DIGEST,
    IMAGE_CONFIG_TYPES,
    Descriptor,
    ImageFile,
    Manifest,
    printable,
)

MAX_DEPTH = 4
MAX_LOOKED_INTO = 32
MAX_HELD = 12
IMAGE_INDEX_HINT = "Give the reference of an image, or one entry of the index by its digest."


class ManifestSource(Protocol):
    """Where manifests and configs come from: a registry."""

    def manifest(self, version: str) -> tuple[str, Manifest]:
        """Return a manifest or index, with its digest."""

    def image_file(self, digest: str) -> ImageFile:
        """Return an image's config."""


@dataclass(frozen=True)
class FoundImage:
    """One image's manifest, looked at and fit for this host."""

    digest: str
    config: Descriptor
    manifest: Manifest
    diff_ids: tuple[str, ...]
    """The digest of what each layer unpacks to."""


@dataclass
class PlatformSearch:
    """A search for the image for linux on `architecture`. Used once."""

    source: ManifestSource
    reference: ImageReference
    architecture: str
    _platforms: set[str] = field(default_factory=set)
    """Those that an index has images for, none of them this host's."""
    _others: set[str] = field(default_factory=set)
    """What else it has."""
    _looked_into: int = 0

    def find(self) -> FoundImage:
        """Ask the source. Blocking.

        Raises what the source raises, NotAnImageError, ImageFormatUnsupportedError,
        ImageUnusableError and WrongArchitectureError.
        """
        digest, manifest = self.source.manifest(self.reference.version)
        if not manifest.is_index:
            return self._image(digest, manifest)
        found = self._in_index(manifest, 1)
        if found is None:
            raise self._nothing_fits()
        return found

    # ---- An index

    def _in_index(self, index: Manifest, depth: int) -> FoundImage | None:
        if depth > MAX_DEPTH:
            raise ImageUnusableError(
                f"{self.reference} is an index in an index, more than {MAX_DEPTH} deep",
                hint=IMAGE_INDEX_HINT,
            )
        entries = index.manifests or ()
        for entry in [entry for entry in entries if _names_platform(entry)]:
            if self._may_fit(entry) and (found := self._look_into(entry, depth)):
                return found
        for entry in [entry for entry in entries if not _names_platform(entry)]:
            with contextlib.suppress(NotAnImageError, WrongArchitectureError):  # told at the end
                if found := self._look_into(entry, depth):
                    return found
        return None

    def _may_fit(self, entry: Descriptor) -> bool:
        assert entry.platform is not None
        if entry.platform.fits(self.architecture):
            return True
        if entry.platform.is_unknown:
            self._others.add("attestations")
        else:
            self._platforms.add(str(entry.platform))
        return False

    def _look_into(self, entry: Descriptor, depth: int) -> FoundImage | None:
        self._looked_into += 1
        if self._looked_into > MAX_LOOKED_INTO:
            raise ImageUnusableError(
                f"{self.reference} is an index of more than {MAX_LOOKED_INTO} entries that do not "
                "say what they are for",
                hint=IMAGE_INDEX_HINT,
            )
        self._require_digest(entry.digest)
        digest, manifest = self.source.manifest(entry.digest)
        if manifest.is_index:
            return self._in_index(manifest, depth + 1)
        return self._image(digest, manifest)

    def _nothing_fits(self) -> TemplateManagerError:
        held = [*sorted(self._platforms), *sorted(self._others)]
        more = [f"{len(held) - MAX_HELD} more"] if len(held) > MAX_HELD else []
        holds = ", ".join([*held[:MAX_HELD], *more]) or "nothing"
        told = f"{self.reference} is an index that holds {holds}"
        if not self._platforms:
            return NotAnImageError(f"{told}: no image")
        return WrongArchitectureError(f"{told}; this host runs linux/{self.architecture}")

    # ---- One image

    def _image(self, digest: str, manifest: Manifest) -> FoundImage:
        config = self._config_of(manifest)
        self._require_digest(config.digest)
        image = self.source.image_file(config.digest)
        # dockerd takes an image for the host's when it does not say; but it must not see another
        # spelling of linux: 20.10 dies of it, and does not start again.
        is_linux = (image.os or "linux") == "linux"
        if not is_linux or image.normal_architecture not in ("", self.architecture):
            self._platforms.add(str(image))
            raise WrongArchitectureError(
                f"{self.reference} is for {image}; this host runs linux/{self.architecture}"
            )
        self._require_whole(manifest, image)
        return FoundImage(digest, config, manifest, image.diff_ids)

    def _config_of(self, manifest: Manifest) -> Descriptor:
        config = manifest.config
        if config is None and manifest.schema_version == 1:
            raise ImageFormatUnsupportedError(
                f"{self.reference} is in Docker's old format (manifest schema 1)",
                hint="Pull the image with a Docker that still reads it, and push it again.",
            )
        if config is None:
            told = manifest.artifact_type or manifest.media_type
            raise self._not_an_image(told or "not told, and it has no config")
        if (config.media_type or "") not in IMAGE_CONFIG_TYPES:
            raise self._not_an_image(manifest.artifact_type or config.media_type or "")
        return config

    def _require_digest(self, digest: str) -> None:
        if not DIGEST.fullmatch(digest):
            raise ImageUnusableError(
                f"{self.reference} names its parts by something else than SHA-256: "
                f"{printable(digest)}"
            )

    def _not_an_image(self, media_type: str) -> NotAnImageError:
        self._others.add(f"something of type {printable(media_type)}")
        return NotAnImageError(
            f"{self.reference} is not a container image: its media type is {printable(media_type)}"
        )

    def _require_whole(self, manifest: Manifest, image: ImageFile) -> None:
        """Refuse what dockerd refuses when it has pulled the layers."""
        layers = len(manifest.layers or ())
        if image.rootfs is None:
            raise ImageUnusableError(f"{self.reference}: its config has no rootfs")
        if layers != len(image.diff_ids):
            raise ImageUnusableError(
                f"{self.reference}: its manifest has {layers} layers, its config "
                f"{len(image.diff_ids)}"
            )
        for digest in image.diff_ids:
            self._require_digest(digest)
        if image.history_count > layers:
            raise ImageUnusableError(
                f"{self.reference}: its history tells of {image.history_count} layers, and it has "
                f"{layers}"
            )


def _names_platform(entry: Descriptor) -> bool:
    return entry.platform is not None and entry.platform.is_told
