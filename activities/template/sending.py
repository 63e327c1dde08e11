"""Sending a file of this host to the bucket, and telling how far it is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Semaphore

from activities.contract.results import StoredObject
from activities.contract.units import MIB
from activities.disk.sparse_files import allocated_bytes
from activities.process.settings import Settings
from activities.step.running_step import RunningStep
from activities.store.bucket import Bucket
from activities.store.headers import BLOCK_BYTES
from activities.template.upload import Below, LeftOut, PartSender, Scan, scan


@dataclass(frozen=True)
class SentParts:
    """What was found in a file, and the parts in the bucket that have what is stored of it."""

    found: Scan
    parts: list[StoredObject]


class FileSender:
    """Sends files, no more of them at a time than a host's memory takes."""

    def __init__(self, settings: Settings, bucket: Bucket) -> None:
        self._settings = settings
        self._bucket = bucket
        # One more than are sent: the next part is ready when a connection becomes free.
        self._room = Semaphore(settings.upload_workers + 1)

    def send(
        self,
        path: Path,
        name: str,
        prefix: str,
        running: RunningStep,
        *,
        left_out: LeftOut = LeftOut.ZEROS,
        below: Below | None = None,
    ) -> SentParts:
        """Send what is to be stored of a file, see `scan`, in parts. Blocking.

        `name` is what users read; the parts' names begin with `prefix`. Those that are there
        already are not sent again.
        """
        meter = _Meter(name, allocated_bytes(path), running)
        sender = PartSender(
            self._bucket,
            prefix,
            chunk_bytes=self._settings.upload_chunk_mb * MIB,
            workers=self._settings.upload_workers,
            room=self._room,
            check=running.check,
            sent=meter.add,
        )
        try:
            found = scan(
                path, BLOCK_BYTES, sender.add, running.check, left_out=left_out, below=below
            )
            parts = sender.finish()
        finally:
            sender.close()
        running.log.info(meter.summary(found, sender.sent_bytes))
        return SentParts(found, parts)


class _Meter:
    """How much of a file is in the bucket, and how fast it gets there. Thread-safe."""

    def __init__(self, name: str, total_bytes: int, running: RunningStep) -> None:
        self._name = name
        self._running = running
        self._total = total_bytes
        self._started = time.monotonic()
        self._done = 0
        self._lock = Lock()
        self.add(0)  # its speed is measured from here on

    def add(self, size_bytes: int) -> None:
        with self._lock:
            self._done += size_bytes
            done = self._done
        total = max(self._total, done)
        self._running.progress(f"uploading {self._name}", done, total, "bytes")

    def summary(self, found: Scan, sent_bytes: int) -> str:
        return (
            f"{self._name}: sent {sent_bytes / MIB:.1f} MiB at {self._rate(sent_bytes):.0f} MiB/s; "
            f"{found.stored_bytes / MIB:.1f} MiB stored of {found.size_bytes / MIB:.1f} MiB"
        )

    def _rate(self, size_bytes: int) -> float:
        return size_bytes / MIB / max(time.monotonic() - self._started, 0.001)
