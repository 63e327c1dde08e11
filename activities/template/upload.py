"""Sending one file to the bucket: find its data, hash it and send it, in one pass over the disk.

The data between the zero blocks goes up in chunks, several at a time, each an object of its own
under `<build_id>/.parts/<artifact>/` that is named by its position and checksum. What an earlier
attempt has sent is not sent again. The parts are composed into the artifact and then removed
(docs/decisions/0039-parts-and-compose.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, auto
from io import BufferedReader
from pathlib import Path
from threading import Lock, Semaphore

from activities.contract.errors import (
    CheckpointLostError,
    PreconditionFailedError,
    StorageCorruptionError,
)
from activities.contract.names import Step
from activities.contract.results import StoredObject
from activities.disk.leftovers import Leftover
from activities.disk.sparse_files import CHUNK_BYTES, ZEROS, data_extents
from activities.store.bucket import (
    MAX_COMPOSE_SOURCES,
    Bucket,
    Check,
    Crc32c,
    crc32c_of,
)
from activities.store.headers import BlockKind, Extent, ExtentBuilder, Header, block_runs
from activities.store.objects import PARTS_GLOB, ObjectKind, composed_part_name, part_name
from activities.template.repeats import Repeats

PART_TRIES = 3  # at a part whose checksum is wrong


class LeftOut(Enum):
    """Which blocks of a file are not stored."""

    NOTHING = auto()
    ZEROS = auto()
    """And those that the disk below has in the same place."""
    REPEATS = auto()
    """Those of ZEROS, and those that the file had before."""


@dataclass(frozen=True)
class Scan:
    """What one pass over a file showed."""

    size_bytes: int
    sha256: str
    extents: tuple[Extent, ...]
    stored_bytes: int
    stored_crc32c: str


@dataclass(frozen=True)
class Below:
    """The disk below one: what of it is the same need not be sent again."""

    path: Path
    """On this host, with the very bytes that the bucket has of it."""
    header: Header
    """Where in the bucket they are."""
    mtime_ns: int
    """Of the file with these bytes: another build may put others in its place."""

    def open(self) -> BufferedReader:
        """Open the file. Raises CheckpointLostError when it is not the one that was meant."""
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as stack:
            file = stack.enter_context(self.path.open("rb"))
            if os.fstat(file.fileno()).st_mtime_ns == self.mtime_ns:
                stack.pop_all()
                return file
        raise CheckpointLostError(f"{self.path} was replaced meanwhile", step=Step.UPLOAD)


def scan(
    path: Path,
    block_size: int,
    emit: Callable[[bytes], None],
    check: Check,
    *,
    left_out: LeftOut = LeftOut.ZEROS,
    below: Below | None = None,
) -> Scan:
    """Read a file once: hash it whole, and hand on the blocks that are to be stored, in order.

    Where there are very many short stretches of those that are left out, the later of these are
    stored, too. The size must be of whole blocks unless nothing is left out. `check` is called
    about every 4 MiB. Raises OSError, and CheckpointLostError when `below` is not what it was.
    """
    dense = left_out is LeftOut.NOTHING
    digest, crc = hashlib.sha256(), Crc32c()
    with path.open("rb") as file, _Sorter(block_size, file.fileno(), left_out, below) as sorter:
        size = os.fstat(file.fileno()).st_size
        for position, piece in _pieces(file.fileno(), size, block_size, check, dense=dense):
            if isinstance(piece, int) and sorter.extents.may_leave_out(piece):
                sorter.extents.zeros(piece)
                _hash_zeros(piece, digest)
                continue
            data = ZEROS[:piece] if isinstance(piece, int) else piece
            digest.update(data)
            for run in sorter.stored_of(data, position):
                crc.update(run)
                emit(run)
    extents = sorter.extents
    return Scan(size, digest.hexdigest(), extents.extents(), extents.stored_bytes, crc.value())


def _pieces(
    descriptor: int, size: int, block_size: int, check: Check, *, dense: bool
) -> Iterator[tuple[int, bytes | int]]:
    """Yield data in chunks, and the lengths of the holes between them (none when `dense`).

    Each comes with its position.
    """
    position = 0
    for start, length in [(0, size)] if dense else data_extents(descriptor, size):
        start_block = max(position, start - start % block_size)
        end = min(size, -(-(start + length) // block_size) * block_size)
        if start_block > position:
            yield position, start_block - position
        position = start_block
        while position < end:
            check()
            data = os.pread(descriptor, min(CHUNK_BYTES, end - position), position)
            if not data:
                raise OSError("the file became shorter while it was read")
            yield position, data
            position += len(data)
    if position < size:
        yield position, size - position


def _hash_zeros(length: int, digest: hashlib._Hash) -> None:
    while length > 0:
        step = min(len(ZEROS), length)
        digest.update(ZEROS[:step] if step < len(ZEROS) else ZEROS)
        length -= step


class _Sorter:
    """Tells the blocks of a file that are stored from those that are left out."""

    def __init__(
        self, block_size: int, descriptor: int, left_out: LeftOut, below: Below | None
    ) -> None:
        """`descriptor` is the file's own; `below` has it as `Below` says."""
        self._block_size = block_size
        self._below = below
        self._dense = left_out is LeftOut.NOTHING
        self._repeats = Repeats(descriptor) if left_out is LeftOut.REPEATS else None
        self._stack = contextlib.ExitStack()
        self._lower = self._stack.enter_context(below.open()) if below else None
        self.extents = ExtentBuilder()

    def __enter__(self) -> _Sorter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def stored_of(self, data: bytes, position: int) -> Iterator[bytes]:
        """Yield the stretches of `data` that are to be stored, and note where all of them are."""
        if self._dense:
            self.extents.data(len(data))
            yield data
            return
        lower = os.pread(self._lower.fileno(), len(data), position) if self._lower else None
        for kind, begin, end in block_runs(data, self._block_size, lower):
            for first, last in self._left_over(kind, position + begin, position + end):
                stretch = data[first - position : last - position]
                if self._repeats is None:
                    yield from self._stored(stretch)
                else:
                    yield from self._once(self._repeats, stretch, first)

    def _once(self, repeats: Repeats, data: bytes, position: int) -> Iterator[bytes]:
        """Yield what of a stretch the file has not had before, and note where all of it is."""
        begin = 0
        for at, first in repeats.of(data, position, self._block_size):
            if self.extents.may_leave_out(self._block_size):
                yield from self._stored(data[begin:at])
                self.extents.again(self._block_size, first)
                begin = at + self._block_size
        yield from self._stored(data[begin:])

    def _stored(self, data: bytes) -> Iterator[bytes]:
        if data:
            self.extents.data(len(data))
            yield data

    def _left_over(self, kind: BlockKind, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield what of a stretch of one kind is stored; note the rest, which is not."""
        if kind is BlockKind.SHARED and self._below is not None:
            for extent in self._below.header.parts(begin, end):
                yield from self._shared(extent)
        elif kind is BlockKind.ZEROS and self.extents.may_leave_out(end - begin):
            self.extents.zeros(end - begin)
        else:
            yield begin, end

    def _shared(self, extent: Extent) -> Iterator[tuple[int, int]]:
        where, owner = extent.storage_offset, extent.build_id
        if where is None or owner is None or not self.extents.may_leave_out(extent.length):
            yield extent.offset, extent.offset + extent.length
        else:
            self.extents.shared(extent.length, where, owner)


class PartSender:
    """Cuts a stream into parts and sends them in parallel.

    The parts in memory are bounded by `room`, which all senders of a host share, so that many
    builds at once take no more memory than one.
    """

    def __init__(
        self,
        bucket: Bucket,
        prefix: str,
        *,
        chunk_bytes: int,
        workers: int,
        room: Semaphore,
        check: Check,
        sent: Callable[[int], None],
    ) -> None:
        """`prefix` is the artifact's own under `.parts/`; `sent` is told each part's bytes."""
        self._bucket = bucket
        self._prefix = prefix
        self._chunk_bytes = chunk_bytes
        self._check = check
        self._sent = sent
        self._there = {stored.name: stored for stored in bucket.list_objects(prefix)}
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="upload")
        self._room = room
        self._has_room = False
        self._parts: list[Future[StoredObject]] = []
        self._pieces: list[bytes] = []  # of the next part
        self._pieces_bytes = 0
        self._lock = Lock()
        self.sent_bytes = 0

    def add(self, data: bytes) -> None:
        """Take more of the stream; waits while too many parts are under way."""
        while data:
            self._take_room()
            fits = self._chunk_bytes - self._pieces_bytes
            piece, data = data[:fits], data[fits:]
            self._pieces.append(piece)
            self._pieces_bytes += len(piece)
            if self._pieces_bytes == self._chunk_bytes:
                self._submit()

    def finish(self) -> list[StoredObject]:
        """Send the rest and return all parts in order. Raises what a part failed with."""
        if self._pieces or not self._parts:
            self._take_room()
            self._submit()
        return [part.result() for part in self._parts]

    def close(self) -> None:
        """Stop: parts that have not begun are dropped, those under way end."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pieces = []
        if self._has_room:
            self._has_room = False
            self._room.release()

    def _take_room(self) -> None:
        while not self._has_room:
            self._check()
            self._has_room = self._room.acquire(timeout=0.5)

    def _submit(self) -> None:
        # The one copy of what was read: no memory is touched for the first time twice.
        part = b"".join(self._pieces)
        self._pieces, self._pieces_bytes = [], 0
        future = self._pool.submit(self._send, len(self._parts), part)
        self._has_room = False  # it is the part's from here on
        future.add_done_callback(lambda _: self._room.release())
        self._parts.append(future)
        self._raise_failed()

    def _raise_failed(self) -> None:
        for future in self._parts[-2 * MAX_COMPOSE_SOURCES :]:
            if future.done():
                future.result()

    def _send(self, number: int, part: bytes) -> StoredObject:
        crc = crc32c_of(part)
        name = part_name(self._prefix, number, crc, len(part))
        for _ in range(PART_TRIES):
            self._check()
            stored = self._there.pop(name, None) or self._write(name, part)
            if stored is not None and (stored.size_bytes, stored.crc32c) == (len(part), crc):
                self._sent(len(part))
                return stored
            self._remove_wrong(name, len(part), crc)
        raise StorageCorruptionError(f"part {name} did not arrive as it was sent")

    def _write(self, name: str, part: bytes) -> StoredObject | None:
        try:
            stored = self._bucket.write_object(name, part, if_generation_match=0, check=self._check)
        except PreconditionFailedError:  # another attempt, or the first try of this request
            return self._bucket.stat_object(name)
        except StorageCorruptionError:
            return None
        with self._lock:
            self.sent_bytes += len(part)
        return stored

    def _remove_wrong(self, name: str, size_bytes: int, crc: str) -> None:
        # Looks first: it may have been the answer that was wrong, and not the object.
        found = self._bucket.stat_object(name)
        if found is None:
            return
        if (found.size_bytes, found.crc32c) == (size_bytes, crc):
            with self._lock:
                self._there[name] = found
        else:
            self._bucket.delete_object(name, found.generation)


def leftover_parts(bucket: Bucket) -> Iterator[Leftover]:
    """Yield the parts of all uploads. Raises StorageUnavailableError and StorageDeniedError."""
    yield from bucket.leftovers(ObjectKind.PART, glob=PARTS_GLOB)


def compose_tree(
    bucket: Bucket,
    name: str,
    parts: Sequence[StoredObject],
    prefix: str,
    check: Check,
    *,
    metadata: Mapping[str, str] | None = None,
) -> StoredObject:
    """Compose any number of parts into `name`, 32 at a time, with that custom metadata.

    Raises PreconditionFailedError when `name` exists already.
    """
    names = [part.name for part in parts]
    level = 0
    while len(names) > MAX_COMPOSE_SOURCES:
        groups = [
            names[start : start + MAX_COMPOSE_SOURCES]
            for start in range(0, len(names), MAX_COMPOSE_SOURCES)
        ]
        names = [
            _compose_group(bucket, prefix, (level, number), group, check)
            for number, group in enumerate(groups)
        ]
        level += 1
    check()
    return bucket.compose(name, names, metadata)


def _compose_group(
    bucket: Bucket, prefix: str, place: tuple[int, int], group: Sequence[str], check: Check
) -> str:
    check()
    key = hashlib.sha256("\n".join(group).encode()).hexdigest()[:16]
    name = composed_part_name(prefix, *place, key)
    with contextlib.suppress(PreconditionFailedError):  # the same parts: the same content
        bucket.compose(name, group)
    return name
