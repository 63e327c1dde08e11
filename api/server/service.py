"""The rpcs of `TemplateService`: from messages to calls of ours, and back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp

from activities.contract.sources import FromImage
from activities.contract.status import BuildState, LogEntry
from activities.process.sealing import Sealer
from activities.process.settings import Settings
from api.errors import ApiError, Violation, draining, invalid_argument
from api.pb import template_manager_pb2 as pb
from api.pb import template_manager_pb2_grpc as pb_grpc
from api.server.access import current_caller, require_image
from api.server.ending import BuildEnder
from api.server.error_translation import build_not_published, to_api_error
from api.server.finding import BuildFinder
from api.server.info import ServiceStatus
from api.server.interceptor import Context
from api.server.last_known import LastKnown
from api.server.listing import BuildListing, list_query
from api.server.logs import BuildLogs
from api.server.naming import TemplateNaming
from api.server.required_agent import RequiredAgent
from api.server.starting import BuildStarter, StartedBuild
from api.server.template_bucket import TemplateBucket
from api.server.temporal_health import TemporalHealth
from api.server.validation import require_build_id, require_sent_files, validate
from api.server.view import BuildView
from api.server.waiting import WaitingLine
from api.server.wire import (
    layer_message,
    level_number,
    log_message,
    status_message,
    summary_message,
    waiting_message,
)

# An answer must fit into the 4 MiB that gRPC clients take by default.
MAX_STATUS_LINES = 1_000
MAX_STATUS_LOG_BYTES = 2 * 1024 * 1024
MAX_NAMES_TOLD = 20  # gRPC refuses trailers of more than 8 KiB
BUILD_ID = "build-id"
"""Of headers and trailers: the build that an rpc was about, whatever it was called."""

AboutABuild = (
    pb.TemplateStatusRequest
    | pb.TemplateBuildLogsRequest
    | pb.TemplateBuildInspectRequest
    | pb.TemplateBuildRetryRequest
    | pb.TemplateBuildCancelRequest
    | pb.TemplateBuildDeleteRequest
    | pb.TemplateTagsAssignRequest
)


class TemplateService(pb_grpc.TemplateServiceServicer):
    """Answers clients. A client that goes away never cancels a build."""

    def __init__(
        self,
        settings: Settings,
        *,
        finder: BuildFinder,
        starter: BuildStarter,
        ender: BuildEnder,
        listing: BuildListing,
        line: WaitingLine,
        logs: BuildLogs,
        naming: TemplateNaming,
        agent: RequiredAgent,
        bucket: TemplateBucket,
        temporal: TemporalHealth,
        status: ServiceStatus,
    ) -> None:
        self._settings = settings
        self._sealer = Sealer(settings.secret_keys)
        self._finder = finder
        self._starter = starter
        self._ender = ender
        self._listing = listing
        self._line = line
        self._logs = logs
        self._naming = naming
        self._agent = agent
        self._bucket = bucket
        self._temporal = temporal
        self._status = status
        self._draining = asyncio.Event()
        self._last_known = LastKnown()

    @property
    def is_draining(self) -> bool:
        """Whether this process takes no new work any more."""
        return self._draining.is_set()

    def drain(self) -> None:
        """Say Draining from now on, and send those who follow a log elsewhere."""
        self._draining.set()

    async def TemplateCreate(self, request: pb.TemplateCreateRequest, context: Context) -> Empty:
        """Validate, start the build, and say in the headers which one it is."""
        await self._naming.complete(request)
        valid = validate(request, self._settings, self._sealer)
        await self._temporal.require()
        await self._agent.require()
        await self._listing.require_room(self._settings.max_running_builds)
        await _send_headers(context, await self._starter.create(valid))
        return Empty()

    async def TemplateBuildImage(
        self, request: pb.TemplateCreateRequest, context: Context
    ) -> pb.TemplateBuildImageResponse:
        """Validate, and say of which image the build would be."""
        await self._naming.complete(request)
        source = validate(request, self._settings, self._sealer).config.source
        if not isinstance(source, FromImage):
            return pb.TemplateBuildImageResponse()
        require_image(source.reference)
        return pb.TemplateBuildImageResponse(image=source.reference)

    async def TemplateBuildRetry(
        self, request: pb.TemplateBuildRetryRequest, context: Context
    ) -> Empty:
        """Start a failed build again, from the last step that it has finished."""
        build_id = await self._resolve(request)
        await self._temporal.require()
        await self._listing.require_room(self._settings.max_running_builds)
        await _send_headers(context, await self._starter.retry(build_id, request.template_id))
        return Empty()

    async def TemplateBuildList(
        self, request: pb.TemplateBuildListRequest, context: Context
    ) -> pb.TemplateBuildListResponse:
        """Tell a page of builds."""
        query = list_query(request)
        await self._temporal.require()
        page = await self._listing.page(query, request.page_size, request.page_token)
        names = await self._naming.tags_of_builds(page.builds)
        return pb.TemplateBuildListResponse(
            builds=[summary_message(build, names.get(build.build_id, ())) for build in page.builds],
            next_page_token=page.next_page_token,
        )

    async def TemplateBuildStatus(
        self, request: pb.TemplateStatusRequest, context: Context
    ) -> pb.TemplateBuildStatusResponse:
        """Tell everything about a build, and the log lines that are asked for.

        While Temporal is away it is what was last known, if anything is.
        """
        await self._resolve(request)
        try:
            return await self._looked_up(request)
        except Exception as error:
            told = to_api_error(error)
            if told is None or told.code is not grpc.StatusCode.UNAVAILABLE:
                raise
            known = self._last_known.status(request.build_id, request.template_id)
            if known is None:
                raise
            return known

    async def TemplateBuildLogs(
        self, request: pb.TemplateBuildLogsRequest, context: Context
    ) -> AsyncIterator[pb.TemplateBuildLogsResponse]:
        """Stream the log from a cursor on; the trailers of a success tell what was built."""
        await self._resolve(request)
        view = await self._view(request)
        run_id = require_build_id(request.run_id, "run_id") if request.run_id else ""
        await context.send_initial_metadata(())  # now: the first line may be long in coming
        lowest = request.level if request.HasField("level") else pb.Debug
        cursor = await self._logs.cursor_in(view, request.cursor, run_id)
        while True:
            async for offset, entry in self._lines(view, cursor, request.follow):
                if level_number(entry.level) >= lowest:
                    yield pb.TemplateBuildLogsResponse(
                        entry=log_message(entry), next_cursor=offset + 1, run_id=view.run_id
                    )
            ended = await self._view_at_end(view, request)
            if ended.run_id == view.run_id:
                break
            # A reset or a retry has begun a new run: go on where its log becomes another.
            cursor, view = await self._logs.first_difference(view, ended), ended
        if ended.state is BuildState.COMPLETED:
            context.set_trailing_metadata(
                (
                    ("rootfs_size", str(ended.rootfs_size_mb)),
                    ("envd_version", ended.agent_version),
                )
            )

    async def TemplateBuildInspect(
        self, request: pb.TemplateBuildInspectRequest, context: Context
    ) -> pb.TemplateBuildInspectResponse:
        """Tell what a template takes in the bucket, and which of it is shared."""
        await self._resolve(request)
        view = await self._view(request)
        metadata = await self._finder.template(view.build_id)
        if metadata is None:
            raise build_not_published(view.build_id)
        found = await self._bucket.inspect(metadata)
        layers = [layer_message(layer) for layer in found.layers]
        return pb.TemplateBuildInspectResponse(
            build_id=metadata.build_id,
            template_id=metadata.template_id,
            own_bytes=found.own_bytes,
            freed_bytes=found.freed_bytes,
            layers=layers,
        )

    async def TemplateBuildCancel(
        self, request: pb.TemplateBuildCancelRequest, context: Context
    ) -> Empty:
        """Stop a build; answer when all is undone. The trailers say which build it was."""
        build_id = await self._resolve(request)
        await self._temporal.require()
        await self._ender.cancel(build_id, request.template_id)
        context.set_trailing_metadata(((BUILD_ID, build_id),))
        return Empty()

    async def TemplateBuildDelete(
        self, request: pb.TemplateBuildDeleteRequest, context: Context
    ) -> Empty:
        """Remove a template, or whatever a build has left.

        The trailers say which build it was, if there was any, and which of its names are gone.
        """
        build_id = await self._resolve(request)
        await self._temporal.require()
        deleted = await self._ender.delete(build_id, request.template_id)
        names = ",".join(deleted.names[:MAX_NAMES_TOLD]) if deleted else ""
        told = ((BUILD_ID, build_id), ("found", str(deleted is not None).lower()))
        context.set_trailing_metadata((*told, *((("names", names),) if names else ())))
        return Empty()

    async def TemplateNameReserve(
        self, request: pb.TemplateNameReserveRequest, context: Context
    ) -> pb.TemplateNameReserveResponse:
        """Let a name be a template's, and give its next build an id."""
        return await self._naming.reserve(request)

    async def TemplateNameGet(
        self, request: pb.TemplateNameGetRequest, context: Context
    ) -> pb.TemplateName:
        """Tell a name and its tags."""
        return await self._naming.get(request)

    async def TemplateNameList(
        self, request: pb.TemplateNameListRequest, context: Context
    ) -> pb.TemplateNameListResponse:
        """Tell a page of names."""
        return await self._naming.page(request)

    async def TemplateTagsAssign(
        self, request: pb.TemplateTagsAssignRequest, context: Context
    ) -> pb.TemplateName:
        """Let tags stand for a published build, or roll one back."""
        if request.roll_back:
            return await self._naming.roll_back(request)
        await self._resolve(request)
        return await self._naming.assign(request, await self._view(request))

    async def TemplateTagsRemove(
        self, request: pb.TemplateTagsRemoveRequest, context: Context
    ) -> pb.TemplateName:
        """Take tags away; tell what is left."""
        return await self._naming.remove(request)

    async def InitLayerFileUpload(
        self, request: pb.InitLayerFileUploadRequest, context: Context
    ) -> pb.InitLayerFileUploadResponse:
        """Say where to put the files of a COPY, or that they are there."""
        upload = await self._bucket.begin_files_upload(
            require_sent_files(request), current_caller.get().tenant
        )
        return pb.InitLayerFileUploadResponse(present=upload.is_present, url=upload.url)

    async def HealthStatus(self, request: Empty, context: Context) -> pb.HealthStatusResponse:
        """Say whether this process takes new work."""
        return pb.HealthStatusResponse(status=pb.Draining if self._drains() else pb.Healthy)

    async def _looked_up(self, request: pb.TemplateStatusRequest) -> pb.TemplateBuildStatusResponse:
        try:
            view = await self._view(request)
        except ApiError as error:
            if error.code is grpc.StatusCode.NOT_FOUND:
                self._last_known.forget(request.build_id)
            raise
        message = status_message(view)
        if view.waits_for_host and view.started is not None:
            waiting = await self._line.look(view.started, for_turn=view.waits_for_turn)
            message.waiting.CopyFrom(waiting_message(waiting))
        self._last_known.keep(view.build_id, view.tenant, message)
        message.log_entries.extend(await self._log_entries(view, request))
        return message

    def _drains(self) -> bool:
        """Whether it is ending, or was told to say another status than Healthy."""
        return self.is_draining or self._status.is_told

    async def _resolve(self, request: AboutABuild) -> str:
        """Put the build's id in the place of a name:tag, once for the whole call; return it."""
        request.build_id = await self._naming.build_id(request.build_id)
        return request.build_id

    async def _view(
        self,
        request: pb.TemplateStatusRequest
        | pb.TemplateBuildLogsRequest
        | pb.TemplateBuildInspectRequest
        | pb.TemplateTagsAssignRequest,
    ) -> BuildView:
        await self._temporal.require()
        template_id = (
            "" if isinstance(request, pb.TemplateTagsAssignRequest) else request.template_id
        )
        return await self._finder.view(request.build_id, template_id)

    async def _view_at_end(
        self, view: BuildView, request: pb.TemplateBuildLogsRequest
    ) -> BuildView:
        """Look again at a build whose log has ended; it may have been deleted by now."""
        if not request.follow:
            return view
        try:
            return await self._view(request)
        except ApiError as error:
            if error.code is grpc.StatusCode.NOT_FOUND:
                return view
            raise

    async def _lines(
        self, view: BuildView, cursor: int, follow: bool
    ) -> AsyncIterator[tuple[int, LogEntry]]:
        if not follow:
            for offset, entry in enumerate(await self._logs.read(view, cursor), cursor):
                yield offset, entry
            return
        drained = asyncio.create_task(self._draining.wait())
        try:
            async with aclosing(self._logs.follow(view, cursor)) as lines:
                async for line in _until(drained, lines):
                    yield line
        finally:
            drained.cancel()

    async def _log_entries(
        self, view: BuildView, request: pb.TemplateStatusRequest
    ) -> list[pb.TemplateBuildLogEntry]:
        if request.offset < 0:
            raise invalid_argument([Violation("offset", "must not be negative")])
        limit = (
            min(request.limit, MAX_STATUS_LINES) if request.HasField("limit") else MAX_STATUS_LINES
        )
        if limit == 0:
            return []
        if _wants_all_lines(request):
            entries = await self._logs.read(view, request.offset, limit)
        else:
            matching = filter(_matcher(request), await self._logs.read(view, 0))
            entries = list(matching)
            if request.direction == pb.Backward:
                entries.reverse()
            entries = entries[request.offset :][:limit]
        return _within_size([log_message(entry) for entry in entries])


async def _send_headers(context: Context, started: StartedBuild) -> None:
    await context.send_initial_metadata(
        (
            (BUILD_ID, started.build_id),
            ("workflow-id", started.workflow_id),
            ("run-id", started.run_id),
        )
    )


async def _until(
    stop: asyncio.Task[bool], lines: AsyncIterator[tuple[int, LogEntry]]
) -> AsyncIterator[tuple[int, LogEntry]]:
    """Yield from `lines` until `stop` is done; then raise that the server is draining."""
    while True:
        following_line = asyncio.ensure_future(anext(lines))
        try:
            await asyncio.wait([following_line, stop], return_when=asyncio.FIRST_COMPLETED)
            if not following_line.done():
                raise draining()
            yield following_line.result()
        except StopAsyncIteration:
            return
        finally:
            if not following_line.done():
                following_line.cancel()
                await asyncio.wait([following_line])


def _wants_all_lines(request: pb.TemplateStatusRequest) -> bool:
    narrowing = ("level", "start", "end")
    return request.direction == pb.Forward and not any(map(request.HasField, narrowing))


def _matcher(request: pb.TemplateStatusRequest) -> Callable[[LogEntry], bool]:
    start = _nanoseconds(request.start) if request.HasField("start") else None
    end = _nanoseconds(request.end) if request.HasField("end") else None

    def matches(entry: LogEntry) -> bool:
        moment = log_message(entry).timestamp.ToNanoseconds()
        return (
            level_number(entry.level) >= request.level
            and (start is None or moment >= start)
            and (end is None or moment <= end)
        )

    return matches


def _nanoseconds(moment: Timestamp) -> int:
    return moment.ToNanoseconds()


def _within_size(lines: list[pb.TemplateBuildLogEntry]) -> list[pb.TemplateBuildLogEntry]:
    size_bytes = 0
    for count, line in enumerate(lines):
        size_bytes += line.ByteSize()
        if size_bytes > MAX_STATUS_LOG_BYTES:
            return lines[:count]
    return lines
