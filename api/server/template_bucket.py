"""What the API does with the bucket: it reads templates and logs of builds that Temporal has
forgotten, and lets clients put files there."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

from activities.contract.status import BuildStatus, LogEntry
from activities.store.objects import files_name, template_prefix

if TYPE_CHECKING:  # loading Google's client takes longer than starting the rest of the API
    from activities.store.bucket import Bucket
    from activities.store.files import FilesUpload
    from activities.store.metadata import TemplateMetadata
    from activities.store.stored import Stored


class TemplateBucket:
    """Reads in threads. Connects at the first read, so that the API starts without a bucket.

    Every method raises StorageUnavailableError or StorageDeniedError when the bucket does not
    answer.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._bucket: Bucket | None = None

    async def metadata(self, build_id: str) -> TemplateMetadata | None:
        """Return a template's metadata, or None when there is no such template."""

        def read() -> TemplateMetadata | None:
            from activities.store.metadata import read_metadata

            return read_metadata(self._connect(), build_id)

        return await asyncio.to_thread(read)

    async def archived_log(
        self, build_id: str, tenant: str
    ) -> tuple[BuildStatus, list[LogEntry]] | None:
        """Return the final status and log of a tenant's closed build, or None."""

        def read() -> tuple[BuildStatus, list[LogEntry]] | None:
            from activities.store.log_archive import read_archived_log

            return read_archived_log(self._connect(), build_id, tenant)

        return await asyncio.to_thread(read)

    async def has_objects(self, build_id: str) -> bool:
        """Return whether anything of a build is there, such as the parts of half an upload."""

        def read() -> bool:
            return bool(self._connect().list_objects(template_prefix(build_id)))

        return await asyncio.to_thread(read)

    async def owner(self, build_id: str) -> str | None:
        """Return the tenant to which a build id is bound; None while it is nobody's."""

        def read() -> str | None:
            from activities.store.owners import read_owner

            return read_owner(self._connect(), build_id)

        return await asyncio.to_thread(read)

    async def claim(self, build_id: str, tenant: str) -> str:
        """Bind a build id to a tenant, unless it is another's; return whose it is."""

        def write() -> str:
            from activities.store.owners import claim

            return claim(self._connect(), build_id, tenant)

        return await asyncio.to_thread(write)

    async def stored(self) -> Stored | None:
        """Return how much each tenant has stored, as the last sweep has counted it."""

        def read() -> Stored | None:
            from activities.store.stored import read_stored

            return read_stored(self._connect())

        return await asyncio.to_thread(read)

    async def files_bytes(self, sha256: str, tenant: str) -> int | None:
        """Return the size of a COPY's tar; None when that tenant has not sent it."""

        def look() -> int | None:
            stored = self._connect().stat_object(files_name(sha256, tenant))
            return None if stored is None else stored.size_bytes

        return await asyncio.to_thread(look)

    async def begin_files_upload(self, sha256: str, tenant: str) -> FilesUpload:
        """Return where to PUT the tar of a tenant's COPY, and whether it is there."""

        def begin() -> FilesUpload:
            from activities.store.files import begin_files_upload

            return begin_files_upload(self._connect(), sha256, tenant)

        return await asyncio.to_thread(begin)

    def _connect(self) -> Bucket:
        from activities.store.bucket import Bucket

        with self._lock:
            if self._bucket is None:
                self._bucket = Bucket(self.name)
            return self._bucket
