"""Which registry has given which layer to this host.

dockerd takes a layer that it has already for any image that names what it unpacks to. A tenant who
knows no more than the digests of another's private layers must not get them that way: an image is
used only when each layer has come from its own registry once, as one that does unpack to that, and
the registry still shows it to who asks. A mark is an empty file `<data>/layers/<sha256 of
registry/digest/digest of what it unpacks to>`; its mtime is the last use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from activities.disk.data_dir import DataDir
from activities.disk.leftovers import Leftover, entries, made_at


class LayerMarks:
    """The marks of one host. Safe to use by several threads and processes."""

    def __init__(self, data_dir: DataDir) -> None:
        self._directory = data_dir.layers

    def add(self, registry: str, digest: str, diff_id: str) -> None:
        """Note that the registry has given us this layer, or shows it still."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._path(registry, digest, diff_id).touch()

    def has(self, registry: str, digest: str, diff_id: str) -> bool:
        """Whether it has given us this layer."""
        return self._path(registry, digest, diff_id).exists()

    def _path(self, registry: str, digest: str, diff_id: str) -> Path:
        told = f"{registry}/{digest}/{diff_id}".encode()
        return self._directory / hashlib.sha256(told).hexdigest()

    def old(self, unused_since: float) -> Iterator[Leftover]:
        """Yield the marks that no pull has used since then (wall clock, seconds)."""
        for path in entries(self._directory):
            if made_at(path) < unused_since:
                yield Leftover("layer mark", path.name, partial(path.unlink, missing_ok=True))
