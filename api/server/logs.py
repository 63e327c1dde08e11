"""Build logs: read, and followed by any number of clients.

A build's log is the workflow's durable stream; the offset of a line in it is a client's cursor.
However many clients follow a build, this process reads its stream once (`_Feed`) and each follower
goes through what has been read at its own pace. The stream is read by queries: they work the same
on a closed workflow, are not limited in number, and leave no trace in the history. A build that
Temporal has forgotten is read from the archive in the bucket.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from itertools import takewhile

import structlog
from temporalio.api.common.v1 import Payload
from temporalio.client import (
    Client,
    WorkflowFailureError,
    WorkflowQueryFailedError,
    WorkflowQueryRejectedError,
)
from temporalio.contrib.workflow_streams import PollInput, PollResult
from temporalio.service import RPCError, RPCStatusCode

from activities.contract.names import LOG_TOPIC
from activities.contract.status import LogEntry
from activities.store.log_archive import POLL_QUERY
from api.errors import ApiError, temporal_unavailable
from api.server.error_translation import to_api_error
from api.server.finding import QUERY_LIMIT, run_of_build
from api.server.template_bucket import TemplateBucket
from api.server.view import BuildView

MIN_POLL_SECONDS = 0.25
MAX_POLL_SECONDS = 2.0
# So long a follower waits for a Temporal that is away, before it is told to come back.
OUTAGE_SECONDS = 15.0
WORKER_OUTAGE_SECONDS = 60.0

_log = structlog.get_logger(__name__)


class _Unreadable(Exception):
    """The stream cannot be read now, or not at all."""


class _Forgotten(_Unreadable):
    """Temporal does not know the run (any more)."""


class BuildLogs:
    """The logs of all builds."""

    def __init__(self, client: Client, bucket: TemplateBucket) -> None:
        self._client = client
        self._bucket = bucket
        self._feeds: dict[str, _Feed] = {}

    @property
    def followed(self) -> int:
        """How many builds are followed now."""
        return len(self._feeds)

    async def read(self, view: BuildView, cursor: int, limit: int | None = None) -> list[LogEntry]:
        """Return the lines that are there now from `cursor` on, at most `limit` of them if given.

        Lines that no worker can tell at the moment are left out while the build runs.
        """
        source = _Source(self._client, self._bucket, view)
        entries: list[LogEntry] = []
        more = view.is_answered
        if not more and view.is_closed:
            return (await source.archive())[cursor:][:limit]
        while more and (limit is None or len(entries) < limit):
            try:
                page, more = await source.page(cursor + len(entries))
            except _Unreadable:
                if view.is_closed:
                    return (await source.archive())[cursor:][:limit]
                break
            entries.extend(page)
        return entries[:limit]

    async def cursor_in(self, view: BuildView, cursor: int, run_id: str) -> int:
        """Return where a client that has read another run up to `cursor` goes on in this one."""
        if cursor == 0 or run_id in ("", view.run_id):
            return cursor
        return min(cursor, await self.first_difference(replace(view, run_id=run_id), view))

    async def first_difference(self, earlier: BuildView, later: BuildView) -> int:
        """Return where the logs of two runs of a build part: a reset run repeats the first lines
        of the earlier one, a retried build has a log of its own.

        Waits for a worker that can tell both: a log read in part would part too early, and its
        follower see lines twice. Raises ApiError UNAVAILABLE when none comes.
        """
        pairs = zip(await self._whole(earlier), await self._whole(later), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    async def _whole(self, view: BuildView) -> list[LogEntry]:
        source = _Source(self._client, self._bucket, view)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + WORKER_OUTAGE_SECONDS
        while True:
            try:
                return await source.lines_from(0)
            except _Forgotten:
                return await source.archive()
            except (_Unreadable, RPCError) as error:
                if loop.time() > deadline:
                    raise temporal_unavailable("no worker answers for this build") from error
                await asyncio.sleep(MIN_POLL_SECONDS)

    async def follow(
        self, view: BuildView, cursor: int
    ) -> AsyncGenerator[tuple[int, LogEntry], None]:
        """Yield the lines from `cursor` on, each with its own offset, until the build has ended.

        Close it (`contextlib.aclosing`): left alone it goes on until it is collected as garbage.
        Raises ApiError UNAVAILABLE when Temporal stays away; the caller goes on at its cursor.
        """
        key = f"{view.workflow_id} {view.run_id}"
        feed = self._feeds.get(key)
        if feed is None:
            feed = self._feeds[key] = _Feed(_Source(self._client, self._bucket, view))
        feed.followers += 1
        try:
            async for offset, entry in feed.lines(cursor):
                yield offset, entry
        finally:
            feed.followers -= 1
            if feed.followers == 0:
                feed.stop()
            if (feed.followers == 0 or feed.error) and self._feeds.get(key) is feed:
                del self._feeds[key]


class _Source:
    """Where one run's log comes from."""

    def __init__(self, client: Client, bucket: TemplateBucket, view: BuildView) -> None:
        self._converter = client.data_converter.payload_converter
        self._bucket = bucket
        self._view = view
        self._build = run_of_build(client, view.workflow_id, view.run_id) if view.run_id else None

    async def page(self, offset: int) -> tuple[list[LogEntry], bool]:
        """Return lines of the stream from `offset` on, and whether more are there already.

        Raises _Unreadable, and RPCError UNAVAILABLE when Temporal is away.
        """
        if self._build is None:
            raise _Forgotten("Temporal has forgotten the build")
        poll = PollInput(topics=[LOG_TOPIC], from_offset=offset)
        try:
            page = await self._build.query(
                POLL_QUERY, poll, result_type=PollResult, rpc_timeout=QUERY_LIMIT
            )
        except (WorkflowQueryFailedError, WorkflowQueryRejectedError) as error:
            raise _Unreadable(str(error)) from error
        except RPCError as error:
            if error.status is RPCStatusCode.UNAVAILABLE:
                raise
            if error.status is RPCStatusCode.NOT_FOUND:
                raise _Forgotten(error.message) from error
            raise _Unreadable(error.message) from error
        return [self._entry(item.data) for item in page.items], page.more_ready

    async def lines_from(self, offset: int) -> list[LogEntry]:
        """Return all lines of the stream from `offset` on. Raises as `page` does."""
        entries: list[LogEntry] = []
        more = True
        while more:
            page, more = await self.page(offset + len(entries))
            entries.extend(page)
        return entries

    async def archive(self) -> list[LogEntry]:
        """Return the lines that were kept of a closed build."""
        archived = await self._bucket.archived_log(self._view.build_id, self._view.tenant)
        return archived[1] if archived else []

    async def wait_closed(self) -> None:
        """Wait until the build has ended, however often Temporal goes away meanwhile."""
        while self._build is not None:
            try:
                await self._build.result(follow_runs=False)
                return
            except WorkflowFailureError:
                return
            except RPCError as error:
                if error.status is RPCStatusCode.NOT_FOUND:
                    return
                await asyncio.sleep(MAX_POLL_SECONDS)

    def _entry(self, data: str) -> LogEntry:
        payload = Payload.FromString(base64.b64decode(data))
        return self._converter.from_payload(payload, LogEntry)


class _Feed:
    """Reads one run's log once, for all who follow it.

    It keeps every line from the first on, since followers come at any cursor: the stream is
    bounded, and a feed lives only while somebody follows.
    """

    def __init__(self, source: _Source) -> None:
        self.followers = 0
        self.error: ApiError | None = None
        self._source = source
        self._lines: list[LogEntry] = []
        self._ended = False
        self._changed = asyncio.Condition()
        self._task = asyncio.create_task(self._read_to_the_end())

    async def lines(self, cursor: int) -> AsyncIterator[tuple[int, LogEntry]]:
        """Yield each line from `cursor` on; ends with the build, or raises the feed's error."""
        while True:
            while cursor < len(self._lines):
                yield cursor, self._lines[cursor]
                cursor += 1
            if self.error is not None:
                raise self.error
            if self._ended:
                return
            await self._wait_beyond(cursor)

    def stop(self) -> None:
        """Read no further: nobody follows any more."""
        self._task.cancel()

    async def _read_to_the_end(self) -> None:
        try:
            await self._read_while_it_runs()
        except Exception as error:  # whatever it is, followers must not wait for ever
            _log.warning("a build log cannot be read", error=str(error))
            self.error = to_api_error(error) or temporal_unavailable("the log cannot be read")
        self._ended = True
        await self._tell()

    async def _read_while_it_runs(self) -> None:
        closed = asyncio.create_task(self._source.wait_closed())
        try:
            delay, ended = MIN_POLL_SECONDS, False
            while not ended:
                ended = closed.done()  # asked before reading: what is read after it is the rest
                grew = await self._read_new(ended)
                delay = MIN_POLL_SECONDS if grew else min(delay * 1.5, MAX_POLL_SECONDS)
                await asyncio.wait([closed], timeout=delay)
        finally:
            closed.cancel()

    async def _read_new(self, ended: bool) -> bool:
        """Read all that is there; True if anything was."""
        before, more = len(self._lines), True
        while more:
            try:
                page, more = await self._page()
            except _Unreadable as error:
                if not ended:  # the worker is being restarted, or has not begun: it will answer
                    _log.debug("a build log cannot be read yet", error=str(error))
                    break
                page, more = await self._rest(error), False
            if page:
                self._lines.extend(page)
                await self._tell()
        return len(self._lines) > before

    async def _rest(self, error: _Unreadable) -> list[LogEntry]:
        """Return the last lines of a closed build that no worker tells: from the archive.

        If that has none (yet), a busy worker gets more time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + WORKER_OUTAGE_SECONDS
        while True:
            kept = (await self._source.archive())[len(self._lines) :]
            if kept or isinstance(error, _Forgotten) or loop.time() > deadline:
                return kept
            await asyncio.sleep(MIN_POLL_SECONDS)
            with contextlib.suppress(_Unreadable, RPCError):
                return await self._source.lines_from(len(self._lines))

    async def _page(self) -> tuple[list[LogEntry], bool]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + OUTAGE_SECONDS
        while True:
            try:
                return await self._source.page(len(self._lines))
            except RPCError:
                if loop.time() > deadline:
                    raise
                await asyncio.sleep(MIN_POLL_SECONDS)

    async def _wait_beyond(self, cursor: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._ended or cursor < len(self._lines))

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
