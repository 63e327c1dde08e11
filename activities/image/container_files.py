"""Files of a container, read as a stream: they may be of any size."""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import docker
import docker.errors

from activities.image.output_lines import lines_in

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

READ_BYTES = 64 * 1024


def lines_of_file(
    client: docker.APIClient, container: str, path: str
) -> Generator[str, None, None]:
    """Yield the lines of a container's file; none when it is not there, or is no file.

    Very long ones are cut. Raises docker.errors.APIError.
    """
    try:
        chunks, _ = client.get_archive(container, path)
    except docker.errors.NotFound:
        return
    with (
        contextlib.closing(chunks),
        tarfile.open(fileobj=io.BufferedReader(_Stream(chunks)), mode="r|") as archive,
    ):
        member = archive.next()
        content = archive.extractfile(member) if member and member.isfile() else None
        if content:
            yield from lines_in(iter(lambda: content.read(READ_BYTES), b""))


class _Stream(io.RawIOBase):
    """A stream of chunks as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def readable(self) -> bool:
        """It is for reading."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Read at most one chunk; 0 is the end."""
        self._rest = self._rest or next(self._chunks, b"")
        room = memoryview(buffer)
        taken = self._rest[: len(room)]
        room[: len(taken)] = taken
        self._rest = self._rest[len(taken) :]
        return len(taken)
