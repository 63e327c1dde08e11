"""Large files that are read for calls which their clients give up."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping

import pytest

from activities.contract.results import StoredObject
from activities.store.bucket import Bucket
from activities.store.files import RANGE_BYTES
from activities.store.objects import SentFiles
from api.server.template_bucket import READERS, READERS_OF_A_TENANT, TemplateBucket

SENT = SentFiles("src@1", "team")
PATIENCE = 30.0


class SlowBucket(Bucket):
    """Has a large tar under every name, and a byte range of it takes a while."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reading = self.most = self.read = 0

    def list_with_metadata(
        self, prefix: str | None = None
    ) -> Iterator[tuple[StoredObject, Mapping[str, str]]]:
        size_bytes = 100_000 * RANGE_BYTES
        yield StoredObject(name=prefix or "", generation=1, size_bytes=size_bytes, crc32c=""), {}

    def read_range(self, stored: StoredObject, start: int, length: int) -> bytes:
        with self._lock:
            self.reading += 1
            self.read += 1
            self.most = max(self.most, self.reading)
        time.sleep(0.02)
        with self._lock:
            self.reading -= 1
        return b""

    def has_any(self, prefix: str) -> bool:
        return True


@pytest.fixture
def slow() -> SlowBucket:
    return SlowBucket()


@pytest.fixture
def bucket(slow: SlowBucket) -> TemplateBucket:
    made = TemplateBucket("bucket")
    made._bucket = slow
    return made


async def at_rest(slow: SlowBucket) -> None:
    """Wait until nothing is read any more."""
    async with asyncio.timeout(PATIENCE):
        before = -1
        while before != slow.read or slow.reading:
            before = slow.read
            await asyncio.sleep(0.3)


async def test_reads_end_with_the_calls_that_they_are_for(
    bucket: TemplateBucket, slow: SlowBucket
) -> None:
    """Else who sends a file and gives up a hundred calls has all threads of the API read it."""
    for number in range(100):
        call = bucket.files_content(SENT, f"tenant-{number % 10}", most_bytes=1 << 62)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(call, 0.01)
    async with asyncio.timeout(PATIENCE):
        assert await bucket.has_objects("4f2c6f0e-5d1c-4c8e-9d43-0a7c6a1b2c3d")
    assert 1 <= slow.most <= READERS
    await at_rest(slow)


async def test_one_tenant_s_files_do_not_keep_another_s_waiting(
    bucket: TemplateBucket, slow: SlowBucket
) -> None:
    first = [
        asyncio.create_task(bucket.files_content(SENT, "acme", most_bytes=1 << 62))
        for _ in range(2 * READERS)
    ]
    async with asyncio.timeout(PATIENCE):
        while slow.most < 1:
            await asyncio.sleep(0.01)
        small = bucket.files_content(SENT, "b", most_bytes=1)  # looked up, and not read
        assert await small is not None
    assert slow.most <= READERS_OF_A_TENANT
    for call in first:
        call.cancel()
    await asyncio.gather(*first, return_exceptions=True)
    await at_rest(slow)
