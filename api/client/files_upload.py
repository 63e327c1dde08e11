"""Sending the files of COPY steps to where the API says: one PUT of a tar, with progress."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import requests

from api.client.client import CallError, TemplateClient

ATTEMPTS = 4
RETRY_SECONDS = 1.0
TIMEOUT = (10.0, 120.0)  # to connect; then for each answer and each piece
TAKEN = 412  # somebody else has put the same files there meanwhile
PASSING = frozenset({404, 408, 410, 429, TAKEN})  # 404 and 410: the address holds no longer

Show = Callable[[int], None]


class _Passing(Exception):
    """The upload has failed in a way that another try can mend."""


async def upload_files(
    client: TemplateClient, template_id: str, tar: Path, sha256: str, show: Show
) -> bool:
    """Put a tar into the bucket unless it is there; return whether it was sent.

    `show` is told the bytes that are sent so far. Raises CallError.
    """
    for attempt in range(ATTEMPTS):
        if attempt > 0:
            await asyncio.sleep(RETRY_SECONDS * 2 ** (attempt - 1))
        address = await client.files_address(template_id, sha256)
        if not address:
            return attempt > 0
        try:
            await _put(address, tar, show)
        except _Passing as error:
            failure = str(error)
        else:
            return True
    raise _unavailable(address, failure)


async def _put(address: str, tar: Path, show: Show) -> None:
    stopped = threading.Event()
    try:
        await asyncio.to_thread(_put_in_thread, address, tar, show, stopped)
    finally:
        stopped.set()


def _put_in_thread(address: str, tar: Path, show: Show, stopped: threading.Event) -> None:
    # What requests raises is told by its kind alone: the address is as good as a password.
    try:
        with _Content(tar, show, stopped) as content:
            response = requests.put(
                address,
                data=content,
                headers={"Content-Type": "application/octet-stream"},
                timeout=TIMEOUT,
            )
    except requests.RequestException as error:
        raise _Passing(type(error).__name__) from None
    if response.status_code in PASSING or response.status_code >= 500:
        raise _Passing(f"HTTP {response.status_code}")
    if not response.ok:
        raise _unavailable(address, f"HTTP {response.status_code}")


class _Content(io.FileIO):
    """A file to send that tells how far it is, and ends when nobody waits for it any more."""

    def __init__(self, path: Path, show: Show, stopped: threading.Event) -> None:
        super().__init__(path)
        self._show = show
        self._stopped = stopped

    def read(self, size: int | None = -1, /) -> bytes:
        if self._stopped.is_set():
            raise requests.ConnectionError("stopped")
        data = super().read(-1 if size is None else size)
        self._show(self.tell())
        return data


def _unavailable(address: str, why: str) -> CallError:
    return CallError(
        grpc.StatusCode.UNAVAILABLE,
        f"the files of a COPY could not be sent to {urlsplit(address).netloc}: {why}",
        reason="FILES_UPLOAD_FAILED",
        hint="Check that this machine reaches that address, and start the build again.",
    )
