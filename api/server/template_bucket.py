"""What the API does with the bucket: it reads templates and logs of builds that Temporal has
forgotten, and lets clients put files there."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakValueDictionary

from activities.contract.status import BuildStatus, LogEntry
from activities.store.objects import SentFiles, is_layer_id, template_prefix

if TYPE_CHECKING:  # loading Google's client takes longer than starting the rest of the API
    from activities.store.bucket import Bucket
    from activities.store.files import FilesContent, FilesUpload
    from activities.store.inspection import StoredTemplate
    from activities.store.metadata import TemplateMetadata
    from activities.store.names import NamedTemplate, TenantNames
    from activities.store.stored import Stored


T = TypeVar("T")

READERS, READERS_OF_A_TENANT = 4, 2
"""Tars that are read through at the same time."""


class _CallerGone(Exception):
    """Ends a read for whose result nobody waits."""


class TemplateBucket:
    """Reads in threads. Connects at the first read, so that the API starts without a bucket.

    Every method raises StorageUnavailableError or StorageDeniedError when the bucket does not
    answer.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._bucket: Bucket | None = None
        # Of their own: whatever they read, the API's other reads find a thread.
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="files")
        self._of_tenant: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def metadata(self, build_id: str) -> TemplateMetadata | None:
        """Return a template's metadata, or None when there is no such template."""

        def read() -> TemplateMetadata | None:
            from activities.store.metadata import read_metadata

            return read_metadata(self._connect(), build_id)

        return await asyncio.to_thread(read)

    async def inspect(self, metadata: TemplateMetadata) -> StoredTemplate:
        """Return what a template takes, and what of it is shared."""

        def look() -> StoredTemplate:
            from activities.store.inspection import inspect_template

            return inspect_template(self._connect(), metadata)

        return await asyncio.to_thread(look)

    async def archived_log(
        self, build_id: str, tenant: str
    ) -> tuple[BuildStatus, list[LogEntry]] | None:
        """Return the final status and log of a tenant's closed build, or None."""

        def read() -> tuple[BuildStatus, list[LogEntry]] | None:
            from activities.store.log_archive import read_archived_log

            return read_archived_log(self._connect(), build_id, tenant)

        return await asyncio.to_thread(read)

    async def has_objects(self, build_id: str) -> bool:
        """Return whether anything of a build is there, such as the parts of half an upload.

        What lies under the id of a layer is of no build.
        """

        def read() -> bool:
            return self._connect().has_any(template_prefix(build_id))

        if is_layer_id(build_id):
            return False

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

    async def names(self, tenant: str, work: Callable[[TenantNames], T]) -> T:
        """Do something with the names of a tenant's templates. Raises what `work` does."""

        def do() -> T:
            from activities.store.names import TenantNames

            return work(TenantNames(self._connect(), tenant))

        return await asyncio.to_thread(do)

    async def list_names(
        self, tenant: str | None, templates: Container[str] | None = None
    ) -> list[NamedTemplate]:
        """Return the names of a tenant, or of all: by default those of all templates."""

        def read() -> list[NamedTemplate]:
            from activities.store.names import list_names

            return list(list_names(self._connect(), tenant, templates))

        return await asyncio.to_thread(read)

    async def stored(self) -> Stored | None:
        """Return how much each tenant has stored, as the last sweep has counted it."""

        def read() -> Stored | None:
            from activities.store.stored import read_stored

            return read_stored(self._connect())

        return await asyncio.to_thread(read)

    async def files_content(
        self, sent: SentFiles, tenant: str, *, most_bytes: int
    ) -> FilesContent | None:
        """Return the tar that a tenant has sent for a COPY; None when it has not.

        What was sent within a scope is read the first time, if it has at most `most_bytes`, and for
        no longer than somebody waits for the answer.
        """
        is_gone = threading.Event()

        def check() -> None:
            if is_gone.is_set():
                raise _CallerGone

        def look() -> FilesContent | None:
            from activities.store.files import content_of

            bucket = self._connect()
            return content_of(bucket, sent, tenant, most_bytes=most_bytes, check=check)

        at_once = asyncio.Semaphore(READERS_OF_A_TENANT)
        async with self._of_tenant.setdefault(tenant, at_once):
            try:
                return await asyncio.get_running_loop().run_in_executor(self._readers, look)
            finally:
                is_gone.set()

    async def begin_files_upload(self, sent: SentFiles, tenant: str) -> FilesUpload:
        """Return where to PUT the tar of a tenant's COPY, and whether it is there."""

        def begin() -> FilesUpload:
            from activities.store.files import begin_files_upload

            return begin_files_upload(self._connect(), sent, tenant)

        return await asyncio.to_thread(begin)

    def _connect(self) -> Bucket:
        from activities.store.bucket import Bucket

        with self._lock:
            if self._bucket is None:
                self._bucket = Bucket(self.name)
            return self._bucket
