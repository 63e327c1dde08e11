"""What is asked of templates and builds, by calls of the gRPC API: all raise CallError."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from starlette.requests import Request

from api.client.client import CallError
from api.client.paging import rows_of_pages
from api.pb import template_manager_pb2 as pb
from api.rest.answers import NamedTemplate
from api.rest.calls import Calls
from api.rest.errors import RestError
from api.rest.requests import number_in

MAX_LISTED_BUILDS = 2_000
"""So many builds, latest first, are looked at for a list of templates."""
MAX_LISTED_NAMES = 2_000
MAX_LOG_LINES = 100
LEVELS = {"debug": pb.Debug, "info": pb.Info, "warn": pb.Warn, "error": pb.Error}
DELETES_AT_ONCE = 8


async def name_of(calls: Calls, template: str) -> pb.TemplateName:
    """Return the name of a template that is called by it, or by the template's id."""
    template = template.lower()
    with contextlib.suppress(_NotFound), _not_found():
        return await calls.name(pb.TemplateNameGetRequest(name=template))
    try:
        with _not_found():
            return await calls.name(pb.TemplateNameGetRequest(template_id=template))
    except _NotFound:
        told = f"there is no template {template[:100]!r}"
        raise RestError(404, "TEMPLATE_NOT_FOUND", told) from None


async def base_of(calls: Calls, template: str) -> pb.FromTemplateConfig:
    """Return the build that `fromTemplate` means: its id, a name or a template's id, with a tag."""
    if _is_build_id(template):
        return pb.FromTemplateConfig(build_id=template)
    called, has_tag, tag = template.partition(":")
    name = _as_called(called, await name_of(calls, called))
    return pb.FromTemplateConfig(alias=f"{name}:{tag}" if has_tag else name)


def _is_build_id(text: str) -> bool:
    """Whether that is one and no name: names may be the digits of one alone."""
    try:
        return str(uuid.UUID(text)) == text.lower()
    except ValueError:
        return False


def _as_called(called: str, name: pb.TemplateName) -> str:
    """Return a name as the gRPC API takes it: with its tenant where the caller has said one."""
    return f"{name.tenant}/{name.name}" if "/" in called else name.name


async def template_of(calls: Calls, template: str) -> NamedTemplate:
    """Return a template with its builds."""
    name = await name_of(calls, template)
    # Several tenants have templates of one id, and an operator sees them all.
    request = pb.TemplateBuildListRequest(template_id=name.template_id, tenant=name.tenant)
    return NamedTemplate(name, [build async for build in _builds(calls, request)])


async def all_templates(calls: Calls) -> list[NamedTemplate]:
    """Return the templates that have a name and that the caller sees, in the order of names."""
    builds: dict[str, list[pb.TemplateBuildSummary]] = {}
    async for build in _builds(calls, pb.TemplateBuildListRequest()):
        builds.setdefault(f"{build.tenant}/{build.template_id}", []).append(build)
    return [
        NamedTemplate(name, builds.get(f"{name.tenant}/{name.template_id}", ()))
        async for name in _names(calls)
    ]


async def tag_build(calls: Calls, target: str, tags: list[str]) -> str:
    """Let tags stand for what `name:tag` stands for; return the build."""
    called, _, tag = target.partition(":")
    name = await name_of(calls, called)
    build_id = next((each.build_id for each in name.tags if each.tag == (tag or "default")), "")
    if not build_id:
        raise RestError(404, "TAG_NOT_FOUND", f"there is no {target[:200]!r}")
    request = pb.TemplateTagsAssignRequest(name=name.name, tags=tags, build_id=build_id)
    await calls.assign(request)
    return build_id


async def delete_template(calls: Calls, template: str) -> None:
    """Delete all builds of a template, and its name; returns when they are gone."""
    found = await template_of(calls, template)
    at_once = asyncio.Semaphore(DELETES_AT_ONCE)

    async def delete(build_id: str) -> None:
        async with at_once:
            await calls.delete(pb.TemplateBuildDeleteRequest(build_id=build_id))

    builds = {*(build.build_id for build in found.builds), *found.tagged.values()}
    await asyncio.gather(*map(delete, builds))
    with contextlib.suppress(_NotFound), _not_found():  # it may have gone with its last build
        await calls.remove(pb.TemplateTagsRemoveRequest(name=found.name.name))


async def status_of(calls: Calls, request: Request) -> pb.TemplateBuildStatusResponse:
    """Return a build's status, with the log lines from `logsOffset` on."""
    asked = pb.TemplateStatusRequest(
        build_id=request.path_params["build_id"],
        template_id=request.path_params["template_id"],
        offset=number_in(request, "logsOffset", 0, 2**31 - 1),
        limit=number_in(request, "limit", MAX_LOG_LINES, MAX_LOG_LINES),
        level=_level(request),
    )
    return await _told(calls, asked)


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
    return await _told(calls, asked)


async def _told(calls: Calls, asked: pb.TemplateStatusRequest) -> pb.TemplateBuildStatusResponse:
    """Ask for a build, whose template may be called by its name as well as by its id.

    By the name only where there is none by the id: the SDK, which has the id, asks often.
    """
    try:
        return await calls.status(asked)
    except CallError as error:
        if error.code is not grpc.StatusCode.NOT_FOUND:
            raise
        with contextlib.suppress(RestError):
            asked.template_id = (await name_of(calls, asked.template_id)).template_id
            return await calls.status(asked)
        raise


class _NotFound(Exception):
    """There is none, or none for this caller."""


@contextmanager
def _not_found() -> Iterator[None]:
    """Raise _NotFound where the gRPC API says so, or that such a thing can have no such name."""
    try:
        yield
    except CallError as error:
        if error.code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT):
            raise _NotFound from error
        raise


async def remove_tags(calls: Calls, called: str, tags: list[str]) -> None:
    """Take tags of a template away."""
    name = _as_called(called, await name_of(calls, called))
    await calls.remove(pb.TemplateTagsRemoveRequest(name=name, tags=tags))


def _level(request: Request) -> pb.LogLevel | None:
    name = request.query_params.get("level")
    if name is None:
        return None
    if name not in LEVELS:
        raise RestError(400, "INVALID_REQUEST", f"level: must be one of {', '.join(LEVELS)}")
    return LEVELS[name]


def _builds(
    calls: Calls, request: pb.TemplateBuildListRequest
) -> AsyncIterator[pb.TemplateBuildSummary]:
    return rows_of_pages(calls.builds, request, lambda page: page.builds, MAX_LISTED_BUILDS)


def _names(calls: Calls) -> AsyncIterator[pb.TemplateName]:
    request = pb.TemplateNameListRequest()
    return rows_of_pages(calls.names, request, lambda page: page.names, MAX_LISTED_NAMES)
