"""A thin reverse proxy that makes `fake-gcs-server` keep Cloud Storage's promises.

The emulator stores and serves objects well, but (as tried with the bundled binary):

* it checks `ifGenerationMatch` on multipart uploads only. Resumable and media uploads, compose,
  rewrite, copy, delete, patch and reads ignore it, and so is every other precondition;
* it takes a status query (`Content-Range: bytes */*`, which clients send after a failed chunk) for
  the end of a resumable upload and stores what came so far as if it were whole;
* it answers 500 where a source of a compose is missing (Cloud Storage: 404);
* it forgets a resumable session when the upload ends, so that the retry of a final chunk whose
  answer was lost gets 404 instead of the object.

This proxy mends these. All mutations of objects pass one lock: the precondition is checked and the
mutation made under it. An upload's body streams outside of the lock; only its last piece, which is
what makes the emulator commit, waits for it. (The emulator commits under one mutex itself, so the
lock costs no parallelism.)

Generations are microseconds since the epoch, kept in the files' extended attributes: they survive
the emulator's restart and grow as long as the clock does. One difference stays: a metadata patch
changes the generation (Cloud Storage would change the metageneration). Preconditions other than
the generation on a multipart upload are not checked, batch requests are refused, and because
objects are files, `a` and `a/b` cannot both exist (500, also after the deletion of `a/b`).
The emulator keeps an object in memory while it stores it: composing n bytes takes it up to 4 n.

Faults are injected by `POST /_faults` (see `gcs_faults.py`), read by `GET`, removed by `DELETE`.
`GET /_log` shows the last requests and the sums per operation, `DELETE /_log` forgets them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import socket
import struct
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import aiohttp
from aiohttp import web
from gcs_faults import BadRule, Rule, Rules
from yarl import URL

PIECE_BYTES = 256 * 1024
SMALL_BODY_BYTES = 4 * 1024 * 1024
LOG_ENTRIES = 10_000
WRONG_CRC = "AAAAAA=="
# Only what concerns one connection; everything else passes.
HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"}
OBJECT_PATH = re.compile(r"^/(?:download/)?storage/v1/b/([^/]+)/o/(.+)$")
UPLOAD_PATH = re.compile(r"^/(?:upload/)?storage/v1/b/([^/]+)/o/?$")
REWRITE_PATH = re.compile(r"^(.+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/(.+)$")


@dataclass(frozen=True)
class ObjectName:
    """An object's bucket and name, decoded."""

    bucket: str
    name: str

    @property
    def path(self) -> str:
        """The path of its metadata in the JSON API."""
        return f"/storage/v1/b/{quote(self.bucket, safe='')}/o/{quote(self.name, safe='')}"


@dataclass(frozen=True)
class Call:
    """What a request means: the operation and the objects that it is about."""

    operation: str
    target: ObjectName | None = None
    source: ObjectName | None = None
    query: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_upload(self) -> bool:
        """Whether its body is an object's content, to be streamed."""
        return self.operation in {"upload", "resumable-chunk"}


class ApiError(Exception):
    """An answer in Cloud Storage's error shape, instead of the emulator's."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason

    def response(self, headers: Mapping[str, str] | None = None) -> web.Response:
        """The HTTP response that says so."""
        if self.status == 304:
            return web.Response(status=304)
        detail = {"message": str(self), "domain": "global", "reason": self.reason}
        body = {"code": self.status, "message": str(self), "errors": [detail]}
        return web.json_response({"error": body}, status=self.status, headers=headers)


class Dropped(Exception):
    """The client's connection was reset on purpose: there is nobody left to answer."""


def precondition_failed() -> ApiError:
    """Cloud Storage's 412, word for word."""
    message = "At least one of the pre-conditions you specified did not hold."
    return ApiError(412, "conditionNotMet", message)


def understand(method: str, raw_path: str) -> Call:
    """Read operation and objects from a request line."""
    parts = urlsplit(raw_path)
    query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    if match := UPLOAD_PATH.match(parts.path):
        return _understand_collection(method, unquote(match[1]), query)
    if match := OBJECT_PATH.match(parts.path):
        return _understand_object(method, unquote(match[1]), match[2], query)
    return Call("batch" if parts.path.startswith("/batch/") else "bucket", query=query)


def _understand_collection(method: str, bucket: str, query: dict[str, str]) -> Call:
    target = ObjectName(bucket, query["name"]) if "name" in query else None
    if "upload_id" in query:
        # Deleting a session is how a client cancels it; it carries no content.
        operation = "resumable-cancel" if method == "DELETE" else "resumable-chunk"
        return Call(operation, target, query=query)
    if query.get("uploadType") == "resumable":
        return Call("resumable-start", target or ObjectName(bucket, ""), query=query)
    if method in {"POST", "PUT"}:
        return Call("upload", target, query=query)
    return Call("list", query=query)


def _understand_object(method: str, bucket: str, rest: str, query: dict[str, str]) -> Call:
    if method == "POST":
        if match := REWRITE_PATH.match(rest):
            source = ObjectName(bucket, unquote(match[1]))
            return Call("rewrite", ObjectName(unquote(match[2]), unquote(match[3])), source, query)
        if rest.endswith("/compose"):
            target = ObjectName(bucket, unquote(rest.removesuffix("/compose")))
            return Call("compose", target, query=query)
    names = {"DELETE": "delete", "PATCH": "patch", "PUT": "patch", "POST": "patch"}
    reading = "download" if query.get("alt") == "media" else "get"
    return Call(names.get(method, reading), ObjectName(bucket, unquote(rest)), query=query)


@dataclass
class Session:
    """A resumable upload: its conditions, how far it is, and its answer once it has ended."""

    target: ObjectName
    conditions: Mapping[str, str]
    received: int = 0
    answer: bytes | None = None


class Traffic:
    """What went through, for tests that count requests and bytes."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start counting anew."""
        self._entries: deque[dict[str, Any]] = deque(maxlen=LOG_ENTRIES)
        self._sums: dict[str, dict[str, int]] = {}

    def record(self, entry: dict[str, Any]) -> None:
        """Add one finished request."""
        self._entries.append(entry)
        sums = self._sums.setdefault(
            entry["operation"], {"requests": 0, "bytes_in": 0, "bytes_out": 0, "faults": 0}
        )
        sums["requests"] += 1
        sums["bytes_in"] += entry["bytes_in"]
        sums["bytes_out"] += entry["bytes_out"]
        sums["faults"] += entry["fault"] is not None

    def as_json(self) -> dict[str, Any]:
        """Entries and sums."""
        return {"operations": self._sums, "requests": list(self._entries)}


class CommitGate:
    """The lock of one mutation, taken at most once and let go exactly once."""

    def __init__(self, lock: asyncio.Lock) -> None:
        self._lock = lock
        self._held = False

    async def enter(self) -> None:
        """Wait for the turn."""
        await self._lock.acquire()
        self._held = True

    def leave(self) -> None:
        """Let the next one in; harmless if it was never entered."""
        if self._held:
            self._held = False
            self._lock.release()


@dataclass
class Exchange:
    """One request on its way through the proxy."""

    request: web.Request
    call: Call
    fault: Rule | None
    gate: CommitGate
    bytes_in: int = 0
    bytes_out: int = 0
    status: int = 0
    failure: ApiError | Dropped | None = None

    def has_fault(self, kind: str) -> bool:
        """Whether this request suffers that kind of fault."""
        return self.fault is not None and self.fault.kind == kind

    async def pace(self, size: int) -> None:
        """Hold a piece back as long as the `slow` fault wants."""
        if self.has_fault("slow") and self.fault and self.fault.bytes_per_second:
            await asyncio.sleep(size / self.fault.bytes_per_second)

    def drop(self) -> Dropped:
        """Reset the client's connection (RST, not a polite close)."""
        transport = self.request.transport
        if transport is not None:
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        return Dropped()


class Proxy:
    """The request handlers and the state between requests."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream.rstrip("/")
        self._lock = asyncio.Lock()
        self._sessions: dict[str, Session] = {}
        self._rules = Rules()
        self._traffic = Traffic()

    def application(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=SMALL_BODY_BYTES)
        app.cleanup_ctx.append(self._client_session)
        app.router.add_post("/_faults", self._post_faults)
        app.router.add_get("/_faults", self._get_faults)
        app.router.add_delete("/_faults", self._delete_faults)
        app.router.add_get("/_log", self._get_log)
        app.router.add_delete("/_log", self._delete_log)
        app.router.add_route("*", "/{path:.*}", self._handle)
        return app

    async def _client_session(self, app: web.Application) -> AsyncIterator[None]:
        self._http = aiohttp.ClientSession(
            # A big upload takes as long as it takes: only connecting is bounded.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
            connector=aiohttp.TCPConnector(limit=0),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )
        yield
        await self._http.close()

    # Control endpoints

    async def _post_faults(self, request: web.Request) -> web.Response:
        try:
            document = await request.json()
            self._rules.add(document if isinstance(document, list) else [document])
        except (BadRule, json.JSONDecodeError) as error:
            return web.json_response({"error": str(error)}, status=400)
        return web.json_response(self._rules.as_json())

    async def _get_faults(self, request: web.Request) -> web.Response:
        return web.json_response(self._rules.as_json())

    async def _delete_faults(self, request: web.Request) -> web.Response:
        self._rules.clear()
        return web.json_response([])

    async def _get_log(self, request: web.Request) -> web.Response:
        return web.json_response(self._traffic.as_json())

    async def _delete_log(self, request: web.Request) -> web.Response:
        self._traffic.clear()
        return web.json_response(self._traffic.as_json())

    # The way through

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        call = understand(request.method, request.raw_path)
        fault = self._rules.pick(request.method, request.raw_path, call.operation)
        exchange = Exchange(request, call, fault, CommitGate(self._lock))
        started = time.monotonic()
        try:
            response = await self._answer(exchange)
            exchange.status = response.status
            return response
        except Dropped:
            return web.Response(status=499)
        finally:
            exchange.gate.leave()
            self._traffic.record(self._entry(exchange, time.monotonic() - started))

    @staticmethod
    def _entry(exchange: Exchange, seconds: float) -> dict[str, Any]:
        call = exchange.call
        return {
            "method": exchange.request.method,
            "path": exchange.request.raw_path,
            "operation": call.operation,
            "object": call.target.name if call.target else None,
            "status": exchange.status,
            "fault": exchange.fault.kind if exchange.fault else None,
            "bytes_in": exchange.bytes_in,
            "bytes_out": exchange.bytes_out,
            "began": round(time.time() - seconds, 4),
            "seconds": round(seconds, 4),
        }

    async def _answer(self, exchange: Exchange) -> web.StreamResponse:
        try:
            if early := await self._fault_before(exchange):
                return early
            return await self._serve(exchange)
        except ApiError as error:
            return error.response()
        except aiohttp.ClientConnectionError as error:
            if isinstance(exchange.failure, Dropped):
                raise exchange.failure from None
            if exchange.failure is not None:
                return exchange.failure.response()
            return ApiError(503, "backendError", f"the emulator is away: {error}").response()

    async def _fault_before(self, exchange: Exchange) -> web.Response | None:
        fault = exchange.fault
        if fault is None:
            return None
        if fault.kind == "status":
            retry = {} if fault.retry_after is None else {"Retry-After": f"{fault.retry_after:g}"}
            return ApiError(fault.status, "backendError", "injected fault").response(retry)
        if fault.kind == "error_body":
            return web.json_response({"error": {"code": 500, "message": "injected fault"}})
        if fault.kind == "reset" and not exchange.request.body_exists:
            raise exchange.drop()
        if fault.kind == "slow":
            await asyncio.sleep(fault.delay)
        return None

    async def _serve(self, exchange: Exchange) -> web.StreamResponse:
        call = exchange.call
        if call.operation == "batch":
            raise ApiError(400, "invalid", "batches would bypass the preconditions: not supported")
        if call.operation == "resumable-start":
            return await self._start_session(exchange)
        if call.is_upload:
            return await self._upload(exchange)
        if call.operation in {"get", "download"} and call.target:
            await self._check(call.target, call.query, must_exist=True, reading=True)
        if call.operation in {"compose", "rewrite", "delete", "patch"}:
            return await self._mutate(exchange)
        return await self._forward(exchange, await self._small_body(exchange))

    async def _small_body(self, exchange: Exchange) -> bytes:
        pieces = [piece async for piece in self._incoming(exchange)]
        return b"".join(pieces)

    async def _incoming(self, exchange: Exchange) -> AsyncIterator[bytes]:
        """The request's body in pieces, with the faults that strike on the way in."""
        fault = exchange.fault
        async for piece in exchange.request.content.iter_chunked(PIECE_BYTES):
            exchange.bytes_in += len(piece)
            await exchange.pace(len(piece))
            if fault and fault.kind == "reset" and exchange.bytes_in > fault.after_bytes:
                exchange.failure = exchange.drop()
                raise exchange.failure
            yield piece
        if exchange.has_fault("reset"):
            exchange.failure = exchange.drop()
            raise exchange.failure

    # Mutations without content

    async def _mutate(self, exchange: Exchange) -> web.StreamResponse:
        call = exchange.call
        body = await self._small_body(exchange)
        await exchange.gate.enter()
        assert call.target is not None
        must_exist = call.operation in {"delete", "patch"}
        await self._check(call.target, call.query, must_exist=must_exist)
        if call.source is not None:
            await self._check_source(call.source, call.query)
        if call.operation == "compose":
            await self._check_components(call.target.bucket, body)
        return await self._forward(exchange, body)

    async def _check_source(self, source: ObjectName, query: Mapping[str, str]) -> None:
        conditions = {
            key.replace("ifSource", "if").replace("sourceGeneration", "generation"): value
            for key, value in query.items()
            if key.lower().startswith(("ifsource", "source"))
        }
        await self._check(source, conditions, must_exist=True)

    async def _check_components(self, bucket: str, body: bytes) -> None:
        for component in json.loads(body).get("sourceObjects", []):
            source = ObjectName(bucket, component["name"])
            wanted = component.get("objectPreconditions", {}).get("ifGenerationMatch")
            generation = int((await self._stat(source)).get("generation", 0))
            if wanted is not None and int(wanted) != generation:
                raise precondition_failed()
            if int(component.get("generation") or generation) != generation or not generation:
                raise ApiError(404, "notFound", f"No such object: {bucket}/{source.name}")

    async def _check(
        self,
        target: ObjectName,
        query: Mapping[str, str],
        *,
        must_exist: bool = False,
        reading: bool = False,
    ) -> None:
        """Hold the conditions in a query against the object as it is now."""
        if not any(key.startswith("if") or key == "generation" for key in query):
            return
        now = await self._stat(target)
        wanted = query.get("generation", now.get("generation"))
        # Where the object is what the request is about, its absence comes before all conditions.
        if must_exist and (not now or wanted != now["generation"]):
            raise ApiError(404, "notFound", f"No such object: {target.bucket}/{target.name}")
        for kind in ("Generation", "Metageneration"):
            current = int(now.get(kind.lower(), 0))
            if int(query.get(f"if{kind}Match", current)) != current:
                raise precondition_failed()
            if int(query.get(f"if{kind}NotMatch", -1)) == current:
                raise ApiError(304, "notModified", "") if reading else precondition_failed()

    async def _stat(self, target: ObjectName) -> dict[str, Any]:
        """The object's metadata; empty if it does not exist."""
        async with self._http.get(URL(self._upstream + target.path, encoded=True)) as response:
            if response.status == 404:
                return {}
            response.raise_for_status()
            answer: dict[str, Any] = await response.json(content_type=None)
            return answer

    # Uploads

    async def _start_session(self, exchange: Exchange) -> web.StreamResponse:
        call = exchange.call
        body = await self._small_body(exchange)
        assert call.target is not None
        name = call.target.name or json.loads(body or b"{}").get("name", "")
        target = ObjectName(call.target.bucket, name)
        await self._check(target, call.query)
        response = await self._forward(exchange, body)
        if match := re.search(r"upload_id=([^&]+)", response.headers.get("Location", "")):
            self._sessions[match[1]] = Session(target, call.query)
        return response

    async def _upload(self, exchange: Exchange) -> web.StreamResponse:
        if exchange.call.operation == "upload":
            return await self._forward(exchange, self._until_commit(exchange, None))
        session = self._sessions.get(exchange.call.query.get("upload_id", ""))
        if session is None:
            raise ApiError(404, "notFound", "no such upload; it ends with a restart of the proxy")
        if session.answer is not None:
            return web.Response(body=session.answer, content_type="application/json")
        content_range = exchange.request.headers.get("Content-Range", "")
        if early := self._answer_state(session, content_range):
            return early
        return await self._forward(exchange, self._until_commit(exchange, session), session)

    @staticmethod
    def _answer_state(session: Session, content_range: str) -> web.Response | None:
        """Answer what must not reach the emulator: a status query, or a chunk out of turn."""
        match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", content_range)
        if match is None or match[1] == str(session.received) or match[2] == str(session.received):
            return None
        # A range is inclusive: with nothing received there is none to tell.
        span = {"Range": f"bytes=0-{session.received - 1}"} if session.received else {}
        return web.Response(status=308, headers=span)

    @staticmethod
    def _note_progress(
        session: Session, status: int, headers: Mapping[str, str], body: bytes
    ) -> None:
        if status == 308 and "Range" in headers:
            session.received = int(headers["Range"].rpartition("-")[2]) + 1
        elif status == 200:
            session.answer = body

    async def _until_commit(
        self, exchange: Exchange, session: Session | None
    ) -> AsyncIterator[bytes]:
        """The body, its last piece held back until the lock is ours and the conditions hold."""
        last = b""
        async for piece in self._incoming(exchange):
            if last:
                yield last
            last = piece
        await exchange.gate.enter()
        target = session.target if session else exchange.call.target
        if target and _ends_upload(exchange.request.headers.get("Content-Range")):
            try:
                await self._check(target, session.conditions if session else exchange.call.query)
            except ApiError as error:
                # Raising breaks the request to the emulator off, so it stores nothing.
                exchange.failure = error
                raise
        if last:
            yield last

    # Forwarding

    async def _forward(
        self,
        exchange: Exchange,
        body: bytes | AsyncIterator[bytes],
        session: Session | None = None,
    ) -> web.StreamResponse:
        request = exchange.request
        async with self._http.request(
            request.method,
            URL(self._upstream + request.raw_path, encoded=True),
            headers=_end_to_end(request.headers),
            data=body or None,
            allow_redirects=False,
        ) as upstream:
            if session:
                content = await upstream.read()
                self._note_progress(session, upstream.status, upstream.headers, content)
            if exchange.has_fault("lost_response"):
                await upstream.read()
                raise exchange.drop()
            headers = self._headers_for_client(exchange, upstream)
            if request.method == "HEAD" or exchange.call.operation == "download":
                return await self._stream(exchange, upstream, headers)
            return await self._whole(exchange, upstream, headers)

    def _headers_for_client(
        self, exchange: Exchange, upstream: aiohttp.ClientResponse
    ) -> dict[str, str]:
        headers = _end_to_end(upstream.headers)
        if "Location" in headers:
            # A session's URL must lead through here again, wherever the emulator thinks it is.
            there = urlsplit(headers["Location"])
            headers["Location"] = there._replace(
                scheme="http", netloc=exchange.request.host
            ).geturl()
        if exchange.has_fault("wrong_crc") and "X-Goog-Hash" in headers:
            headers["X-Goog-Hash"] = f"crc32c={WRONG_CRC}"
        return headers

    async def _stream(
        self, exchange: Exchange, upstream: aiohttp.ClientResponse, headers: dict[str, str]
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=upstream.status, headers=headers)
        await response.prepare(exchange.request)
        async for piece in upstream.content.iter_chunked(PIECE_BYTES):
            await exchange.pace(len(piece))
            await response.write(await self._cut(exchange, piece, response))
            exchange.bytes_out += len(piece)
        await response.write_eof()
        return response

    async def _cut(self, exchange: Exchange, piece: bytes, response: web.StreamResponse) -> bytes:
        fault = exchange.fault
        if fault is None or fault.kind != "truncate":
            return piece
        left = fault.after_bytes - exchange.bytes_out
        if len(piece) <= left:
            return piece
        await response.write(piece[:left])
        if exchange.request.transport is not None:
            exchange.request.transport.close()
        raise Dropped

    async def _whole(
        self, exchange: Exchange, upstream: aiohttp.ClientResponse, headers: dict[str, str]
    ) -> web.StreamResponse:
        body = await upstream.read()
        exchange.gate.leave()
        if exchange.has_fault("wrong_crc"):
            body = re.sub(rb'"crc32c":"[^"]*"', b'"crc32c":"%s"' % WRONG_CRC.encode(), body)
        if exchange.fault and exchange.has_fault("truncate"):
            response = web.StreamResponse(status=upstream.status, headers=headers)
            await response.prepare(exchange.request)
            await self._cut(exchange, body, response)
        exchange.bytes_out += len(body)
        headers.pop("Content-Length", None)
        return web.Response(status=upstream.status, headers=headers, body=body)


def _ends_upload(content_range: str | None) -> bool:
    """Whether a request with this range is the last of its upload."""
    match = re.fullmatch(r"bytes (?:\d+-(\d+)|\*)/(\d+|\*)", content_range or "")
    if match is None:
        return True
    return match[2] != "*" and (match[1] is None or int(match[1]) + 1 == int(match[2]))


def _end_to_end(headers: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in headers.items() if key.lower() not in HOP_HEADERS}


def main() -> None:
    """Run the proxy until it is told to stop."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--listen", default="127.0.0.1:4443", metavar="HOST:PORT")
    parser.add_argument("--upstream", default="http://127.0.0.1:4444", metavar="URL")
    arguments = parser.parse_args()
    host, _, port = arguments.listen.rpartition(":")

    async def application() -> web.Application:
        return Proxy(arguments.upstream).application()

    web.run_app(application(), host=host, port=int(port), access_log=None, print=None)


if __name__ == "__main__":
    main()
