"""What an image may cost, checked while its layers are unpacked, before dockerd sees the bytes."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from activities.contract.errors import (
    ImageBeyondLimitError,
    ImageUnusableError,
    RegistryUnavailableError,
)
from activities.contract.units import MIB
from activities.image.tar_headers import TarEntry, TarError, TarHeaders
from activities.image.unpacking import DECODING_ERRORS, Unpacker
from activities.process.settings import Settings

PACKED = "TEMPLATE_MANAGER_MAX_IMAGE_MB"
UNPACKED = "TEMPLATE_MANAGER_MAX_UNPACKED_IMAGE_MB"
ENTRIES = "TEMPLATE_MANAGER_MAX_IMAGE_ENTRIES"
NAMES = "TEMPLATE_MANAGER_MAX_IMAGE_PATH_BYTES"
ROOM_EVERY_BYTES = 16 * MIB
UNREADABLE: tuple[type[Exception], ...] = (TarError, *DECODING_ERRORS)


@dataclass(frozen=True)
class ImageLimits:
    """The most that one image may have."""

    packed_bytes: int
    unpacked_bytes: int
    entries: int
    name_bytes: int

    @classmethod
    def of(cls, settings: Settings) -> ImageLimits:
        """Return those of the settings."""
        return cls(
            settings.max_image_mb * MIB,
            settings.max_unpacked_image_mb * MIB,
            settings.max_image_entries,
            settings.max_image_path_bytes,
        )


class ImageBudget:
    """What one image has taken of its limits. Its layers come in several threads."""

    def __init__(
        self, image: str, limits: ImageLimits, require_room: Callable[[int], None] = lambda _: None
    ) -> None:
        """`image` names it in errors.

        `require_room` is called often, with the bytes that are to be written besides those that
        have come: dockerd writes the holes of sparse files out. It ends the pull by raising.
        """
        self._image = image
        self._limits = limits
        self._require_room = require_room
        self._lock = threading.Lock()
        self._packed = self._streamed = self._unpacked = self._entries = self._looked = 0

    @property
    def fetched_bytes(self) -> int:
        """How many bytes have been sent."""
        return self._packed

    def packed(self, count: int) -> None:
        """Count bytes as they are sent. Raises ImageBeyondLimitError."""
        with self._lock:
            self._packed += count
            self._require(PACKED, "bytes to fetch", self._packed, self._limits.packed_bytes)

    def streamed(self, count: int) -> None:
        """Count bytes of a tar, whatever is in them. Raises ImageBeyondLimitError."""
        with self._lock:
            self._streamed += count
            self._require(UNPACKED, "bytes unpacked", self._streamed, self._limits.unpacked_bytes)
            self._look_for_room()

    def entry(self, entry: TarEntry) -> None:
        """Count an entry, by what its header claims. Raises ImageBeyondLimitError."""
        with self._lock:
            self._unpacked += entry.file_bytes
            self._entries += 1
            self._require(UNPACKED, "bytes unpacked", self._unpacked, self._limits.unpacked_bytes)
            self._require(ENTRIES, "files and directories", self._entries, self._limits.entries)
            self._require(NAMES, "bytes in one name", entry.name_bytes, self._limits.name_bytes)
            self._look_for_room()

    def _look_for_room(self) -> None:
        told = self._streamed + self._unpacked
        if told - self._looked >= ROOM_EVERY_BYTES:
            self._looked = told
            self._require_room(max(self._unpacked - self._streamed, 0))

    def _require(self, setting: str, what: str, count: int, limit: int) -> None:
        if count > limit:
            raise ImageBeyondLimitError(
                f"{self._image} has at least {count} {what}; the limit is {limit} ({setting})"
            )


def unpacked_layer(
    image: str, digest: str, parts: Iterable[bytes], budget: ImageBudget
) -> Iterator[bytes]:
    """Yield what a packed layer unpacks to: a tar, each piece after it has been looked at.

    Raises ImageBeyondLimitError, ImageUnusableError for what nobody can unpack, and
    RegistryUnavailableError when the bytes are not those of the digest.
    """
    whole = hashlib.sha256()
    unpacker = Unpacker()
    headers = TarHeaders(budget.entry)
    rest = iter(parts)
    try:
        for part in rest:
            whole.update(part)
            budget.packed(len(part))
            yield from _looked_at(unpacker.feed(part), headers, budget)
        yield from _looked_at(unpacker.finish(), headers, budget)
    except UNREADABLE as error:
        for part in rest:
            whole.update(part)
            budget.packed(len(part))
        _require_whole(image, digest, whole.hexdigest())
        raise ImageUnusableError(
            f"{image} cannot be used: layer {digest} cannot be unpacked ({error})"
        ) from None
    _require_whole(image, digest, whole.hexdigest())


def required_layer(
    image: str, digest: str, diff_id: str, parts: Iterable[bytes], budget: ImageBudget
) -> Iterator[bytes]:
    """Yield what `unpacked_layer` does, of a layer that unpacks to what the image's config says.

    Of any other its end is not yielded: ImageUnusableError comes first.
    """
    whole, last = hashlib.sha256(), b""
    for piece in unpacked_layer(image, digest, parts, budget):
        whole.update(piece)
        yield last
        last = piece
    if diff_id != f"sha256:{whole.hexdigest()}":
        raise ImageUnusableError(
            f"{image} cannot be used: layer {digest} is not the one that its config names"
        )
    yield last


def _looked_at(
    unpacked: Iterable[bytes], headers: TarHeaders, budget: ImageBudget
) -> Iterator[bytes]:
    for piece in unpacked:
        budget.streamed(len(piece))
        headers.feed(piece)
        yield piece


def _require_whole(image: str, digest: str, received: str) -> None:
    if digest != f"sha256:{received}":
        raise RegistryUnavailableError(f"{image}: layer {digest} came damaged")
