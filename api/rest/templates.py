"""What is asked of templates and builds, by calls of the gRPC API: all raise CallError."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

from google.protobuf.timestamp_pb2 import Timestamp
from starlette.requests import Request

from api.pb import template_manager_pb2 as pb
from api.rest.answers import ListedTemplate
from api.rest.calls import Calls
from api.rest.errors import RestError
from api.rest.requests import number_in

PAGE_BUILDS = 100
MAX_LISTED_BUILDS = 2_000
"""So many builds, latest first, are looked at for a list of templates."""
MAX_LOG_LINES = 100
LEVELS = {"debug": pb.Debug, "info": pb.Info, "warn": pb.Warn, "error": pb.Error}
DELETES_AT_ONCE = 8


async def builds_of(calls: Calls, template_id: str) -> list[pb.TemplateBuildSummary]:
    """Return the builds of a template, latest first; there is at least one."""
    request = pb.TemplateBuildListRequest(template_id=template_id)
    found = [build async for build in _builds(calls, request)]
    if not found:
        raise no_template(template_id)
    return found


async def require_template(calls: Calls, template_id: str) -> None:
    """Raise RestError 404 when there is no build of a template."""
    request = pb.TemplateBuildListRequest(template_id=template_id, page_size=1)
    if not (await calls.builds(request)).builds:
        raise no_template(template_id)


async def published_build(calls: Calls, template: str) -> str:
    """Return the build that a template stands for: the last that has succeeded, or it is an id."""
    try:
        return str(uuid.UUID(template))
    except ValueError:
        pass
    request = pb.TemplateBuildListRequest(template_id=template, states=["completed"], page_size=1)
    found = await calls.builds(request)
    if not found.builds:
        raise no_template(template)
    return found.builds[0].build_id


async def all_templates(calls: Calls) -> list[ListedTemplate]:
    """Return the templates that the caller sees, the one with the latest build first."""
    found: dict[str, list[pb.TemplateBuildSummary]] = {}
    async for build in _builds(calls, pb.TemplateBuildListRequest()):
        found.setdefault(build.template_id, []).append(build)
    return [ListedTemplate(template_id, builds) for template_id, builds in found.items()]


async def delete_template(calls: Calls, template_id: str) -> None:
    """Delete all builds of a template; returns when they are gone."""
    at_once = asyncio.Semaphore(DELETES_AT_ONCE)

    async def delete(build_id: str) -> None:
        async with at_once:
            await calls.delete(
                pb.TemplateBuildDeleteRequest(build_id=build_id, template_id=template_id)
            )

    builds = await builds_of(calls, template_id)
    await asyncio.gather(*(delete(build.build_id) for build in builds))


async def status_of(calls: Calls, request: Request) -> pb.TemplateBuildStatusResponse:
    """Return a build's status, with the log lines from `logsOffset` on."""
    return await calls.status(
        pb.TemplateStatusRequest(
            build_id=request.path_params["build_id"],
            template_id=request.path_params["template_id"],
            offset=number_in(request, "logsOffset", 0, 2**31 - 1),
            limit=number_in(request, "limit", MAX_LOG_LINES, MAX_LOG_LINES),
            level=_level(request),
        )
    )


async def logs_of(calls: Calls, request: Request) -> pb.TemplateBuildStatusResponse:
    """Return a build's log lines from a moment on: `cursor`, in milliseconds, and `direction`."""
    asked = pb.TemplateStatusRequest(
        build_id=request.path_params["build_id"],
        template_id=request.path_params["template_id"],
        limit=number_in(request, "limit", MAX_LOG_LINES, MAX_LOG_LINES),
        level=_level(request),
    )
    backward = request.query_params.get("direction") == "backward"
    if backward:
        asked.direction = pb.Backward
    if "cursor" in request.query_params:
        moment = Timestamp()
        moment.FromMilliseconds(number_in(request, "cursor", 0, 2**43))
        (asked.end if backward else asked.start).CopyFrom(moment)
    return await calls.status(asked)


def no_template(template_id: str) -> RestError:
    """Return the error for a template that is not there, or not for this caller."""
    return RestError(404, "TEMPLATE_NOT_FOUND", f"there is no template {template_id[:100]!r}")


def _level(request: Request) -> pb.LogLevel | None:
    name = request.query_params.get("level")
    if name is None:
        return None
    if name not in LEVELS:
        raise RestError(400, "INVALID_REQUEST", f"level: must be one of {', '.join(LEVELS)}")
    return LEVELS[name]


async def _builds(
    calls: Calls, request: pb.TemplateBuildListRequest
) -> AsyncIterator[pb.TemplateBuildSummary]:
    request.page_size = PAGE_BUILDS
    for _ in range(MAX_LISTED_BUILDS // PAGE_BUILDS):
        page = await calls.builds(request)
        for build in page.builds:
            yield build
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token
