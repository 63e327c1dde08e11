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
    ListedTemplate,
    build_answer,
    log_entries,
    status_answer,
    template_answer,
)
from api.rest.build_ids import new_build_id
from api.rest.calls import Calls, Upstream
from api.rest.errors import RestError, error_response
from api.rest.requests import BuildStart, Change, NewBuild, body_of, number_in
from api.rest.starting import CACHE_SCOPE, create_request, size_of
from api.rest.templates import (
    all_templates,
    builds_of,
    delete_template,
    logs_of,
    published_build,
    require_template,
    status_of,
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


def rest_app(upstream: Upstream, observe: Observe) -> Starlette:
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
        route("GET", "/templates/{template_id}", _template),
        route("PATCH", "/templates/{template_id}", _change),
        route("PATCH", "/v2/templates/{template_id}", _change_v2),
        route("DELETE", "/templates/{template_id}", _delete),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _not_here})


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
    asked = await body_of(request, NewBuild)
    template_id = (asked.name or asked.alias or "").lower()
    if not template_id:
        raise RestError(400, "INVALID_REQUEST", "name: must be given")
    if asked.tags or ":" in template_id:
        raise RestError(501, "NOT_SERVED", "tags: this service keeps none")
    # Says at once when the name or the token is wrong.
    await calls.builds(pb.TemplateBuildListRequest(template_id=template_id, page_size=1))
    answer = {
        "templateID": template_id,
        "buildID": new_build_id(size_of(asked)),
        "public": False,
        "names": [template_id],
        "tags": [],
        "aliases": [template_id],
    }
    return JSONResponse(answer, 202)


async def _files(request: Request, calls: Calls) -> Response:
    answer = await calls.files(
        pb.InitLayerFileUploadRequest(
            template_id=request.path_params["template_id"],
            hash=request.path_params["hash"],
            cache_scope=CACHE_SCOPE,
        )
    )
    url = {"url": answer.url} if answer.url else {}
    return JSONResponse({"present": answer.present} | url, 201)


async def _start_build(request: Request, calls: Calls) -> Response:
    start = await body_of(request, BuildStart)
    params = request.path_params
    asked = create_request(params["template_id"], params["build_id"], start)
    if start.from_template:
        base = await published_build(calls, start.from_template)
        asked.template.from_template.build_id = base
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
    templates = await all_templates(calls)
    after = request.query_params.get("nextToken")
    ids = [each.template_id for each in templates]
    if after and after not in ids:
        raise RestError(400, "INVALID_REQUEST", "nextToken: must be the one of the page before")
    start = ids.index(after) + 1 if after else 0
    page = templates[start:][: max(1, number_in(request, "limit", MAX_PAGE, MAX_PAGE))]
    more = start + len(page) < len(templates)
    headers = {NEXT_PAGE: page[-1].template_id} if more else {}
    return JSONResponse([template_answer(each) for each in page], headers=headers)


async def _alias(request: Request, calls: Calls) -> Response:
    template_id = request.path_params["template_id"].lower()
    await require_template(calls, template_id)
    return JSONResponse({"templateID": template_id, "public": False})


async def _template(request: Request, calls: Calls) -> Response:
    template_id = request.path_params["template_id"]
    builds = await builds_of(calls, template_id)
    answer = template_answer(ListedTemplate(template_id, builds))
    return JSONResponse(answer | {"builds": [build_answer(build) for build in builds]})


async def _change(request: Request, calls: Calls) -> Response:
    await _changed(request, calls)
    return Response(status_code=200)


async def _change_v2(request: Request, calls: Calls) -> Response:
    return JSONResponse({"names": [await _changed(request, calls)]})


async def _changed(request: Request, calls: Calls) -> str:
    """Return the template whose change was asked for. All there is to change is `public`."""
    template_id = request.path_params["template_id"]
    change = await body_of(request, Change)
    await require_template(calls, template_id)
    if change.public:
        told = "public: a template of this service is its tenant's alone"
        raise RestError(501, "NOT_SERVED", told)
    return str(template_id)


async def _delete(request: Request, calls: Calls) -> Response:
    await delete_template(calls, request.path_params["template_id"])
    return Response(status_code=204)
