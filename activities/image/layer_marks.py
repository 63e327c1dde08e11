"""Which registry has given which layer to this host.

dockerd takes a layer that it has already for any image that names its digest. A tenant who knows
no more than the digests of another's private layers must not get them that way: an image is used
only when each layer has come from its own registry once, and that still shows it to who asks. A
mark is an empty file `<data>/layers/<sha256 of registry and digest>`; its mtime is the last use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial

from activities.disk.data_dir import DataDir
from activities.disk.leftovers import Leftover, entries, made_at


class LayerMarks:
    """The marks of one host. Safe to use by several threads and processes."""

    def __init__(self, data_dir: DataDir) -> None:
        self._directory = data_dir.layers

    def add(self, registry: str, digest: str) -> None:
        """Note that the registry has given us this layer, or shows it still."""
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / _name(registry, digest)).touch()

    def has(self, registry: str, digest: str) -> bool:
        """Whether it has given us this layer."""
        return (self._directory / _name(registry, digest)).exists()

    def old(self, unused_since: float) -> Iterator[Leftover]:
        """Yield the marks that no pull has used since then (wall clock, seconds)."""
        for path in entries(self._directory):
            if made_at(path) < unused_since:
                yield Leftover("layer mark", path.name, partial(path.unlink, missing_ok=True))


def _name(registry: str, digest: str) -> str:
    return hashlib.sha256(f"{registry}/{digest}".encode()).hexdigest()
