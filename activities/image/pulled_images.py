"""Which images this host has pulled for builds, and when a build last used each.

dockerd keeps what it has pulled for ever. The sweep removes what no build has used for long; what
the machine's owner has pulled is not on this list, and stays. A record is a file
`<data>/images/<sha256 of the reference>` with the reference in it; its mtime is the last use.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from functools import partial
from http import HTTPStatus
from pathlib import Path

import docker
import docker.errors

from activities.disk.data_dir import DataDir
from activities.disk.leftovers import Leftover, entries, made_at
from activities.image.docker_daemon import docker_errors

RECORD = re.compile("[0-9a-f]{64}")


class PulledImages:
    """The list of one host. Safe to use by several threads and processes."""

    def __init__(self, data_dir: DataDir) -> None:
        self._directory = data_dir.images

    def add(self, reference: str) -> None:
        """Note that this host pulls `reference` (`name@digest` or `name:tag`), before it does."""
        self._directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self._directory, delete=False) as draft:
            draft.write(reference)
        Path(draft.name).replace(self._path(reference))

    def used(self, reference: str) -> None:
        """Note that a build uses an image that is there already. Not on the list: not ours."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._path(reference))

    def unused_since(self, moment: float) -> Iterator[tuple[str, float]]:
        """Yield references that no build has used since `moment`, with their last use.

        Both are wall clock seconds.
        """
        with contextlib.suppress(FileNotFoundError):
            for path in sorted(self._directory.iterdir()):
                with contextlib.suppress(FileNotFoundError):
                    used_at = path.stat().st_mtime
                    if used_at < moment and path.name == _name(reference := path.read_text()):
                        yield reference, used_at

    def old(self, client: docker.APIClient, unused_since: float) -> Iterator[Leftover]:
        """Yield the images that no build has used since then; one that misses it pulls it again.

        Raises DockerUnavailableError.
        """
        for reference, _ in self.unused_since(unused_since):
            remove = partial(self.remove_image, client, reference)
            yield Leftover("image", reference, remove, bytes=_size_of(client, reference))

    def drafts(self) -> Iterator[Leftover]:
        """Yield records that were being written, by processes that may have died."""
        for path in entries(self._directory):
            if not RECORD.fullmatch(path.name):
                remove = partial(path.unlink, missing_ok=True)
                yield Leftover("image record", path.name, remove, made_at=made_at(path))

    def remove(self, reference: str) -> None:
        """Take a reference off the list."""
        self._path(reference).unlink(missing_ok=True)

    def remove_image(self, client: docker.APIClient, reference: str) -> None:
        """Remove an image by this reference, and the reference from the list.

        Raises DockerUnavailableError.
        """
        with docker_errors():
            try:
                client.remove_image(reference)
            except docker.errors.NotFound:
                pass
            except docker.errors.APIError as error:
                # A container of somebody else's has it: then it is theirs from now on.
                if error.status_code != HTTPStatus.CONFLICT:
                    raise
        self.remove(reference)

    def _path(self, reference: str) -> Path:
        return self._directory / _name(reference)


def _size_of(client: docker.APIClient, reference: str) -> int:
    with docker_errors(), contextlib.suppress(docker.errors.NotFound):
        inspected = client.inspect_image(reference)  # type: ignore[no-untyped-call] # untyped upstream
        return int(inspected["Size"])
    return 0


def _name(reference: str) -> str:
    return hashlib.sha256(reference.encode()).hexdigest()
