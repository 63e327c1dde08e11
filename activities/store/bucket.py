"""The one object store client: a Google Cloud Storage bucket.

Blocking and thread-safe; activities call it in threads. Every write verifies its CRC32C and every
change names the generation that it expects, so that a request sent twice does no harm. Google's
exceptions become ours here and nowhere else.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, Protocol

import google_crc32c
import requests
from google.api_core import exceptions as google_errors
from google.api_core.page_iterator import Page
from google.auth import exceptions as auth_errors
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption
from google.cloud.storage.retry import DEFAULT_RETRY

from activities.contract.errors import (
    PreconditionFailedError,
    StorageCorruptionError,
    StorageDeniedError,
    StorageUnavailableError,
)
from activities.contract.results import StoredObject
from activities.contract.units import MIB
from activities.disk.leftovers import Leftover
from activities.store.objects import ObjectKind, parse_object_name

CONNECT_SECONDS = 5.0
READ_SECONDS = 30.0
TIMEOUT = (CONNECT_SECONDS, READ_SECONDS)
# urllib3 sends a body's next bytes within the time to connect, however slow the line is.
SEND_TIMEOUT = (READ_SECONDS, READ_SECONDS)
RETRY_SECONDS = 20.0
MAX_RETRY_DELAY_SECONDS = 3.0
MAX_COMPOSE_SOURCES = 32  # of one compose request, by Google's documentation
MULTIPART_BYTES = 8 * MIB
"""So much Google's client sends in one request, as one piece of memory."""
REQUEST_BYTES = 32 * MIB
"""What one request of a larger upload carries at most: a part of the usual size goes in one.

Each costs a round trip, and the emulator a checksum of all that came before it.
"""
SENT_BYTES = MIB
"""What of it is sent at once: then an upload can be stopped. It must go within `SEND_TIMEOUT`."""
CONNECTIONS = 64
DELETERS = 8
LOOKERS = 8
REPLACED_TRIES = 20
# Google answers 403 both for what is forbidden for good and for what passes.
PASSING_REASONS = frozenset({"rateLimitExceeded", "userRateLimitExceeded"})

# What Google's client takes for transient, with our patience.
RETRY = DEFAULT_RETRY.with_delay(
    initial=0.2, maximum=MAX_RETRY_DELAY_SECONDS, multiplier=2
).with_timeout(RETRY_SECONDS)

Check = Callable[[], None]
Request = Callable[..., object]


class _Checksum(Protocol):
    """What we use of `google_crc32c.Checksum`, which is untyped."""

    def update(self, chunk: bytes) -> None: ...
    def digest(self) -> bytes: ...


class Crc32c:
    """A running CRC32C, written as Google Cloud Storage does: base64 of the big-endian bytes."""

    def __init__(self) -> None:
        self._checksum: _Checksum = google_crc32c.Checksum()  # type: ignore[no-untyped-call] # untyped upstream

    def update(self, data: bytes) -> None:
        """Go on with more data."""
        self._checksum.update(data)

    def value(self) -> str:
        """Return the checksum of all data so far."""
        return base64.b64encode(self._checksum.digest()).decode()


def crc32c_of(data: bytes) -> str:
    """Return the CRC32C of `data`, see `Crc32c`."""
    checksum = Crc32c()
    checksum.update(data)
    return checksum.value()


class Listed(NamedTuple):
    """An object of a listing."""

    stored: StoredObject
    written_at: float
    """Seconds of the wall clock."""
    metadata: Mapping[str, str]
    """Its custom metadata."""


class Bucket:
    """A bucket, by name. `STORAGE_EMULATOR_HOST` sends it to an emulator."""

    def __init__(self, name: str) -> None:
        self.name = name
        client = _client()
        _widen_pool(client)
        self._bucket: storage.Bucket = client.bucket(name)

    def read_object(self, name: str) -> tuple[bytes, int] | None:
        """Return content and generation, or None when there is no such object.

        Raises StorageCorruptionError when what came is not what is stored, and
        PreconditionFailedError when it is being replaced again and again.
        """
        for _ in range(REPLACED_TRIES):
            with contextlib.suppress(PreconditionFailedError):  # replaced just now: look again
                return self._read_current(name)
        return self._read_current(name)

    def _read_current(self, name: str) -> tuple[bytes, int] | None:
        with _errors(f"read {name}"):
            blob = self._bucket.get_blob(name, timeout=TIMEOUT, retry=_retry())
            if blob is None:
                return None
            stored = _stored(blob)
            try:
                content: bytes = blob.download_as_bytes(
                    raw_download=True,
                    if_generation_match=stored.generation,
                    timeout=TIMEOUT,
                    retry=_retry(),
                    checksum="crc32c",
                )
            except google_errors.NotFound:
                return None
        try:
            _require_same(stored, len(content), crc32c_of(content))
        except StorageCorruptionError:
            now = self.stat_object(name)
            if now is None or now.generation == stored.generation:
                raise
            raise PreconditionFailedError(f"{name} was replaced while it was read") from None
        return content, stored.generation

    def read_range(self, stored: StoredObject, start: int, length: int) -> bytes:
        """Return `length` bytes from `start` on, of exactly that generation of the object.

        Raises StorageCorruptionError when fewer arrive.
        """
        if length == 0:  # no range can say that
            return b""
        with _errors(f"read {stored.name}"):
            blob = self._bucket.blob(stored.name, generation=stored.generation)
            content: bytes = blob.download_as_bytes(
                start=start,
                end=start + length - 1,
                raw_download=True,
                timeout=TIMEOUT,
                retry=_retry(),
                checksum=None,  # a range has none; the caller checks the whole
            )
        if len(content) != length:
            raise StorageCorruptionError(f"{stored.name}: {len(content)} of {length} bytes came")
        return content

    def write_object(
        self,
        name: str,
        data: bytes,
        *,
        if_generation_match: int | None = None,
        check: Check = lambda: None,
        metadata: Mapping[str, str] | None = None,
    ) -> StoredObject:
        """Write an object whole. `if_generation_match=0` means that it must not exist.

        `metadata` is the object's custom metadata.

        `check` is called before each request and retry, and every MiB of a large object; it ends
        the upload by raising. Raises PreconditionFailedError; StorageCorruptionError when it did
        not arrive as sent.
        """
        checksum = crc32c_of(data)
        is_large = len(data) > MULTIPART_BYTES
        with _errors(f"write {name}"):
            blob = self._bucket.blob(name, chunk_size=REQUEST_BYTES)
            blob.metadata = metadata and dict(metadata)
            blob.upload_from_file(
                _Bodies(data, check) if is_large else _Checked(data, check),
                size=len(data),
                content_type="application/octet-stream",
                if_generation_match=if_generation_match,
                checksum=None if is_large else "crc32c",  # of bytes, which a body is not
                crc32c_checksum_value=checksum,
                timeout=SEND_TIMEOUT,
                # Without a precondition a second try could overwrite what came in between.
                retry=_retry(check) if if_generation_match is not None else None,
            )
            stored = _stored(blob)
        _require_same(stored, len(data), checksum)
        return stored

    def begin_upload(self, name: str, *, if_generation_match: int) -> str:
        """Return an address to which whoever has it may PUT an object's content, without a login.

        It is a resumable upload's session URI, good for a week; the condition counts when the
        content has arrived (https://cloud.google.com/storage/docs/resumable-uploads).
        """
        with _errors(f"begin the upload of {name}"):
            address: str = self._bucket.blob(name).create_resumable_upload_session(
                content_type="application/octet-stream",
                if_generation_match=if_generation_match,
                checksum=None,
                timeout=TIMEOUT,
                retry=_retry(),
            )
        return address

    def stat_object(self, name: str) -> StoredObject | None:
        """Return an object's generation, size and checksum, or None."""
        with _errors(f"look at {name}"):
            blob = self._bucket.get_blob(name, timeout=TIMEOUT, retry=_retry())
            return None if blob is None else _stored(blob)

    def changed_objects(self, objects: Iterable[StoredObject]) -> list[StoredObject]:
        """Return those that are gone, or are not what they were; several are looked at at a time.

        Each by its name: beside it there may be any number of others, of which a listing tells.
        """
        with ThreadPoolExecutor(LOOKERS, thread_name_prefix="look") as pool:
            known = list(objects)
            found = pool.map(lambda stored: self.stat_object(stored.name), known)
            return [was for was, now in zip(known, found, strict=True) if was != now]

    def delete_object(self, name: str, generation: int) -> bool:
        """Delete exactly that generation; False when it is not there (any more)."""
        with _errors(f"delete {name}"):
            blob = self._bucket.blob(name)
            try:
                blob.delete(if_generation_match=generation, timeout=TIMEOUT, retry=_retry())
            except (google_errors.NotFound, google_errors.PreconditionFailed):
                return False
        return True

    def delete_objects(self, objects: Iterable[StoredObject]) -> int:
        """Delete exactly those generations, several at a time; returns how many were there."""
        with ThreadPoolExecutor(DELETERS, thread_name_prefix="delete") as pool:
            return sum(pool.map(lambda o: self.delete_object(o.name, o.generation), objects))

    def list_objects(self, prefix: str) -> list[StoredObject]:
        """Return all objects whose names begin with `prefix`, in order of their names."""
        with _errors(f"list {prefix or 'all objects'}"):
            return [_stored(blob) for blob in self._blobs(prefix)]

    def has_any(self, prefix: str) -> bool:
        """Whether there is an object whose name begins with `prefix`, however many there are."""
        with _errors(f"list {prefix}"):
            return next(self._blobs(prefix, most=1), None) is not None

    def list_with_metadata(
        self, prefix: str | None = None
    ) -> Iterator[tuple[StoredObject, Mapping[str, str]]]:
        """Yield objects by prefix, by default every one, each with its custom metadata."""
        with _errors(f"list {prefix or 'all objects'}"):
            for blob in self._blobs(prefix):
                yield _stored(blob), blob.metadata or {}

    def look_through(self, glob: str) -> Iterator[Listed]:
        """Yield objects by glob (`**` crosses slashes), with all that a listing tells.

        A server that does not know globs lists everything: look at the names again.
        """
        with _errors(f"list {glob}"):
            for blob in self._blobs(None, glob):
                yield Listed(_stored(blob), blob.updated.timestamp(), blob.metadata or {})

    def list_dated(
        self, *, prefix: str | None = None, glob: str | None = None
    ) -> list[tuple[StoredObject, float]]:
        """Return objects by prefix or glob (`**` crosses slashes), each with when it was written.

        Times are seconds of the wall clock.
        """
        with _errors(f"list {prefix or glob or 'all objects'}"):
            return [(_stored(blob), blob.updated.timestamp()) for blob in self._blobs(prefix, glob)]

    def leftovers(
        self, kind: ObjectKind, *, prefix: str | None = None, glob: str | None = None
    ) -> Iterator[Leftover]:
        """Yield the objects of a kind among those of a listing, each removed by its generation."""
        for stored, written_at in self.list_dated(prefix=prefix, glob=glob):
            named = parse_object_name(stored.name)
            # Looked at again: a server that does not know globs lists everything.
            if named is None or named.kind is not kind:
                continue
            remove = partial(self.delete_object, stored.name, stored.generation)
            yield Leftover(
                kind, stored.name, remove, named.build_id, None, written_at, stored.size_bytes
            )

    def _blobs(
        self, prefix: str | None, glob: str | None = None, most: int | None = None
    ) -> Iterator[storage.Blob]:
        blobs = self._bucket.list_blobs(
            max_results=most, prefix=prefix, match_glob=glob, timeout=TIMEOUT, retry=_retry()
        )
        for page in blobs.pages:
            yield from _require_listing(page)

    def compose(
        self, name: str, sources: Sequence[str], metadata: Mapping[str, str] | None = None
    ) -> StoredObject:
        """Join up to 32 objects into a new one, with that custom metadata.

        Raises PreconditionFailedError when it exists, or when a source has gone: then another
        attempt has composed them and removed them.
        """
        with _errors(f"compose {name}"):
            blob = self._bucket.blob(name)
            blob.content_type = "application/octet-stream"
            blob.metadata = metadata and dict(metadata)
            parts = [self._bucket.blob(source) for source in sources]
            try:
                blob.compose(parts, if_generation_match=0, timeout=TIMEOUT, retry=_retry())
            except google_errors.NotFound as error:
                raise PreconditionFailedError(
                    f"could not compose {name}: {_reason(error)}"
                ) from error
            return _stored(blob)

    def copy(
        self,
        source: StoredObject,
        name: str,
        *,
        if_generation_match: int,
        metadata: Mapping[str, str] | None = None,
    ) -> StoredObject:
        """Write exactly that generation of an object under another name, within the bucket.

        `metadata` is the new one's custom metadata. Raises PreconditionFailedError, also when the
        source has changed or gone.
        """
        with _errors(f"copy {source.name}"):
            blob = self._bucket.blob(name)
            blob.content_type = "application/octet-stream"
            blob.metadata = metadata and dict(metadata)
            try:
                blob.compose(
                    [self._bucket.blob(source.name)],
                    if_generation_match=if_generation_match,
                    if_source_generation_match=[source.generation],
                    timeout=TIMEOUT,
                    retry=_retry(),
                )
            except google_errors.NotFound as error:
                raise PreconditionFailedError(
                    f"could not copy {source.name}: {_reason(error)}"
                ) from error
            return _stored(blob)


class _Bodies:
    """Content of which Google's client reads the body of one request after the other."""

    def __init__(self, data: bytes, check: Check) -> None:
        self._data = memoryview(data)
        self._check = check
        self._position = 0

    def tell(self) -> int:
        """Return how much has been read."""
        return self._position

    def read(self, size: int) -> _Body:
        """Return the next body, of at most `size` bytes."""
        body = _Body(self._data[self._position : self._position + size], self._check)
        self._position += len(body)
        return body


class _Body:
    """The body of a request, no copy of the content, which `requests` sends a piece at a time.

    It looks before each whether to go on, and has all of them again for a retry.
    """

    def __init__(self, data: memoryview, check: Check) -> None:
        self._data = data
        self._check = check

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[memoryview]:
        for start in range(0, len(self._data), SENT_BYTES):
            self._check()
            yield self._data[start : start + SENT_BYTES]


class _Checked(io.BytesIO):
    """Content to send that looks before it is sent whether to go on."""

    def __init__(self, data: bytes, check: Check) -> None:
        super().__init__(data)
        self._check = check

    def read(self, size: int | None = -1, /) -> bytes:
        self._check()
        return super().read(size)


def _retry(check: Check = lambda: None) -> Callable[[Request], Request]:
    """Ride out a blip; longer waits are the workflow's business, where they can be seen.

    The client calls it with a request and gets the request that is tried again. `check` is called
    before each further try.
    """
    return partial(RETRY, on_error=lambda _: check())


def _require_same(stored: StoredObject, size_bytes: int, checksum: str) -> None:
    if (stored.size_bytes, stored.crc32c) != (size_bytes, checksum):
        raise StorageCorruptionError(f"{stored.name} did not arrive as it was sent")


def _require_listing(page: Page) -> Page:
    # An error sent with status 200 would read as an empty bucket, and a template as gone.
    if page.raw_page.get("kind") != "storage#objects":
        raise ValueError("not a listing")
    return page


def _client() -> storage.Client:
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        credentials = AnonymousCredentials()  # type: ignore[no-untyped-call] # untyped upstream
        return storage.Client(project="emulator", credentials=credentials)
    try:
        return storage.Client()
    except auth_errors.DefaultCredentialsError as error:
        raise StorageDeniedError(f"no Google credentials: {error}") from error


def _widen_pool(client: storage.Client) -> None:
    # Otherwise parallel parts share ten connections, and urllib3 warns about each one more. The
    # client has no public way to its session: `_http`, also as an argument of its own, is all.
    adapter = requests.adapters.HTTPAdapter(pool_connections=4, pool_maxsize=CONNECTIONS)
    for scheme in ("http://", "https://"):
        client._http.mount(scheme, adapter)


def _stored(blob: storage.Blob) -> StoredObject:
    if blob.generation is None or blob.size is None:
        raise ValueError("the answer describes no object")
    return StoredObject(
        name=blob.name,
        generation=int(blob.generation),
        size_bytes=int(blob.size),
        crc32c=blob.crc32c or "",
    )


@contextmanager
def _errors(doing: str) -> Iterator[None]:
    try:
        yield
    except google_errors.PreconditionFailed as error:
        raise PreconditionFailedError(f"could not {doing}: its generation differs") from error
    except (google_errors.NotFound, google_errors.Forbidden, google_errors.Unauthorized) as error:
        if PASSING_REASONS.intersection(_reasons(error)):
            raise _unavailable(doing, error) from error
        raise StorageDeniedError(f"could not {doing}: {_reason(error)}") from error
    except auth_errors.RefreshError as error:
        raise StorageUnavailableError(f"could not {doing}: {error}") from error
    except DataCorruption as error:
        raise StorageCorruptionError(f"could not {doing}: its checksum is wrong") from error
    except google_errors.RetryError as error:
        raise _unavailable(doing, error.cause or error) from error
    except (google_errors.GoogleAPICallError, requests.RequestException, OSError) as error:
        raise _unavailable(doing, error) from error
    except (
        ValueError,
        KeyError,
        TypeError,
    ) as error:  # 200 with a body that is not what was asked for
        raise StorageUnavailableError(f"could not {doing}: the answer makes no sense") from error


def _unavailable(doing: str, error: BaseException) -> StorageUnavailableError:
    response = getattr(error, "response", None)
    header = (getattr(response, "headers", None) or {}).get("Retry-After", "")
    return StorageUnavailableError(
        f"could not {doing}: {_reason(error)}",
        retry_after_seconds=float(header) if header.isdigit() else None,
    )


def _reasons(error: google_errors.GoogleAPICallError) -> list[str]:
    return [str(detail.get("reason")) for detail in error.errors if isinstance(detail, dict)]


def _reason(error: BaseException) -> str:
    code = getattr(error, "code", None)
    message = getattr(error, "message", None) or str(error) or type(error).__name__
    return f"{code} {message}"[:300] if code else f"{type(error).__name__}: {message}"[:300]
