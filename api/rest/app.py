"""The endpoints, by method and path, as the SDK's generated client calls them."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Awaitable, Callable

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from api.client.client import CallError
from api.pb import template_manager_pb2 as pb
from api.rest.answers import (
    build_answer,
    log_entries,
    status_answer,
    tag_answer,
    template_answer,
)
from api.rest.calls import Calls, Upstream
from api.rest.errors import RestError, error_response
from api.rest.requests import (
    BuildStart,
    Change,
    NewBuild,
    RequestLimits,
    TagsOfBuild,
    TagsOfName,
    body_of,
    number_in,
)
from api.rest.starting import CACHE_SCOPE, create_request, reserve_request
from api.rest.templates import (
    all_templates,
    base_of,
    delete_template,
    logs_of,
    name_of,
    remove_tags,
    status_of,
    tag_build,
    template_of,
)

MAX_PAGE = 100
NEXT_PAGE = "X-Next-Token"
TOKEN = re.compile(r"[!-~]{1,512}")
NOT_HERE = "is not served here: this service builds templates, and runs no sandboxes"

Handler = Callable[[Request, Calls], Awaitable[Response]]
Observe = Callable[[str, str, int, float], None]
"""Is told of each request that was answered: method, path with its parameters' names, status,
seconds."""

_log = structlog.get_logger(__name__)


def rest_app(upstream: Upstream, observe: Observe, limits: RequestLimits) -> Starlette:
    """Return the application. It keeps nothing between requests."""

    def route(method: str, path: str, handler: Handler) -> Route:
        async def answer(request: Request) -> Response:
            began = time.monotonic()
            response = await _answered(handler, upstream, request)
            observe(method, path, response.status_code, time.monotonic() - began)
            return response

        return Route(path, answer, methods=[method])

    async def health(request: Request) -> Response:
        reason = await upstream.readiness()
        return PlainTextResponse(reason or "ok", 503 if reason else 200)

    build = "/templates/{template_id}/builds/{build_id}"
    routes = [
        Route("/health", health),
        route("POST", "/v3/templates", _ask_for_build),
        route("GET", "/templates/{template_id}/files/{hash}", _files),
        route("POST", f"/v2{build}", _start_build),
        route("GET", f"{build}/status", _status),
        route("GET", f"{build}/logs", _logs),
        route("GET", "/templates", _list),
        route("GET", "/v2/templates", _list_page),
        route("GET", "/templates/aliases/{template_id}", _alias),
        route("POST", "/templates/tags", _assign_tags),
        route("DELETE", "/templates/tags", _remove_tags),
        route("GET", "/templates/{template_id}/tags", _tags),
        route("GET", "/templates/{template_id}", _template),
        route("PATCH", "/templates/{template_id}", _change),
        route("PATCH", "/v2/templates/{template_id}", _change_v2),
        route("DELETE", "/templates/{template_id}", _delete),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _not_here})
    app.state.limits = limits
    return app


async def _answered(handler: Handler, upstream: Upstream, request: Request) -> Response:
    try:
        return await handler(request, await upstream.of_caller(_token_of(request)))
    except (CallError, RestError) as error:
        return error_response(error)
    except Exception:
        incident = uuid.uuid4().hex[:12]
        _log.exception("a request failed", incident=incident, path=request.url.path[:200])
        told = f"the service failed; its log has the details under incident {incident}"
        return error_response(RestError(500, "INTERNAL", told))


def _token_of(request: Request) -> str:
    """Return the token that a request brings. Whose it is, the gRPC API says.

    Without one it gets no further: this process may have a certificate of its own, and rights with
    it, which are nobody else's.
    """
    bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
    token = request.headers.get("x-api-key", bearer).strip()
    if not token:
        told = "this API wants a token: set E2B_API_KEY to one of this service"
        raise RestError(401, "TOKEN_MISSING", told)
    if not TOKEN.fullmatch(token):
        raise RestError(401, "TOKEN_UNKNOWN", "this token is not known here")
    return token


async def _not_here(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    told = f"{request.method} {request.url.path[:200]} {NOT_HERE}"
    return error_response(RestError(status, "NOT_SERVED", told))


async def _ask_for_build(request: Request, calls: Calls) -> Response:
    reserved = await calls.reserve(reserve_request(await body_of(request, NewBuild)))
    answer = {
        "templateID": reserved.template_id,
        "buildID": reserved.build_id,
        "public": False,
        "names": [reserved.name],
        "tags": list(reserved.tags),
        "aliases": [reserved.name],
    }
    return JSONResponse(answer, 202)


async def _files(request: Request, calls: Calls) -> Response:
    name = await name_of(calls, request.path_params["template_id"])
    answer = await calls.files(
        pb.InitLayerFileUploadRequest(
            template_id=name.template_id,
            hash=request.path_params["hash"],
            cache_scope=CACHE_SCOPE,
        )
    )
    url = {"url": answer.url} if answer.url else {}
    return JSONResponse({"present": answer.present} | url, 201)


async def _start_build(request: Request, calls: Calls) -> Response:
    start = await body_of(request, BuildStart)
    name = await name_of(calls, request.path_params["template_id"])
    asked = create_request(name, request.path_params["build_id"], start)
    if start.from_template:
        asked.template.from_template.CopyFrom(await base_of(calls, start.from_template))
    await calls.create(asked)
    return Response(status_code=202)


async def _status(request: Request, calls: Calls) -> Response:
    params, status = request.path_params, await status_of(calls, request)
    return JSONResponse(status_answer(params["build_id"], params["template_id"], status))


async def _logs(request: Request, calls: Calls) -> Response:
    return JSONResponse({"logs": log_entries(await logs_of(calls, request))})


async def _list(request: Request, calls: Calls) -> Response:
    return JSONResponse([template_answer(each) for each in await all_templates(calls)])


async def _list_page(request: Request, calls: Calls) -> Response:
    """Tell a page. Its token is the template with which the page before has ended."""
    after = request.query_params.get("nextToken", "")
    templates = [each for each in await all_templates(calls) if each.place > after]
    page = templates[: max(1, number_in(request, "limit", MAX_PAGE, MAX_PAGE))]
    headers = {NEXT_PAGE: page[-1].place} if len(page) < len(templates) else {}
    return JSONResponse([template_answer(each) for each in page], headers=headers)


async def _alias(request: Request, calls: Calls) -> Response:
    name = await name_of(calls, request.path_params["template_id"].partition(":")[0])
    return JSONResponse({"templateID": name.template_id, "public": False})


async def _template(request: Request, calls: Calls) -> Response:
    template = await template_of(calls, request.path_params["template_id"])
    builds = [build_answer(build) for build in template.builds]
    return JSONResponse(template_answer(template) | {"builds": builds})


async def _change(request: Request, calls: Calls) -> Response:
    await _changed(request, calls)
    return Response(status_code=200)


async def _change_v2(request: Request, calls: Calls) -> Response:
    return JSONResponse({"names": [await _changed(request, calls)]})


async def _changed(request: Request, calls: Calls) -> str:
    """Return the template whose change was asked for. All there is to change is `public`."""
    change = await body_of(request, Change)
    name = await name_of(calls, request.path_params["template_id"])
    if change.public:
        told = "public: a template of this service is its tenant's alone"
        raise RestError(501, "NOT_SERVED", told)
    return name.name


async def _delete(request: Request, calls: Calls) -> Response:
    await delete_template(calls, request.path_params["template_id"])
    return Response(status_code=204)


async def _tags(request: Request, calls: Calls) -> Response:
    name = await name_of(calls, request.path_params["template_id"])
    return JSONResponse([tag_answer(tag) for tag in name.tags])


async def _assign_tags(request: Request, calls: Calls) -> Response:
    asked = await body_of(request, TagsOfBuild)
    build_id = await tag_build(calls, asked.target, asked.tags)
    return JSONResponse({"tags": asked.tags, "buildID": build_id}, 201)


async def _remove_tags(request: Request, calls: Calls) -> Response:
    asked = await body_of(request, TagsOfName)
    await remove_tags(calls, asked.name, asked.tags)
    return Response(status_code=204)
