"""Who may do what: bearer tokens with rights, images they may use, and how many calls a second.

The token file has a line a token: `name sha256-of-the-token rights [image-pattern,…]`, with rights
`read`, `build` (and read) or `admin` (and build, and delete). `#` begins a comment. A change of the
file counts at once; one that cannot be read keeps the last that could.
"""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import grpc
import structlog

from activities.contract.image_reference import ImageReference, ImageReferenceError
from api.errors import ApiError

BEARER = "bearer "
MAX_CALLERS = 10_000

_log = structlog.get_logger(__name__)


class Right(IntEnum):
    """What a token allows; each includes those before it."""

    NONE = 0
    READ = 1
    BUILD = 2
    ADMIN = 3


NEEDED = {
    "HealthStatus": Right.NONE,
    "TemplateBuildStatus": Right.READ,
    "TemplateBuildLogs": Right.READ,
    "TemplateBuildList": Right.READ,
    "TemplateCreate": Right.BUILD,
    "TemplateBuildImage": Right.BUILD,
    "InitLayerFileUpload": Right.BUILD,
    "TemplateBuildRetry": Right.BUILD,
    "TemplateBuildCancel": Right.BUILD,
    "TemplateBuildDelete": Right.ADMIN,
    # Of InfoService: a control plane looks for services before it has a token for any.
    "ServiceInfo": Right.NONE,
    "ServiceStatusOverride": Right.ADMIN,
}


class TokenFileError(ValueError):
    """A token file that cannot be read; the message names the line."""


@dataclass(frozen=True)
class Caller:
    """Who makes a call. Without a token file everybody is `anonymous` and may do everything."""

    name: str
    right: Right
    images: tuple[str, ...] = ()
    """Patterns of images, as in a shell; none means all."""

    def may_use(self, image: str | None) -> bool:
        """Whether this caller may build from an image; None is one that nobody knows any more."""
        if not self.images:
            return True
        if image is None:
            return False
        try:
            full = ImageReference.parse(image).name
        except ImageReferenceError:
            return False
        return any(
            fnmatch.fnmatchcase(name, pattern) for pattern in self.images for name in (image, full)
        )


ANONYMOUS = Caller("anonymous", Right.ADMIN)
current_caller: ContextVar[Caller] = ContextVar("current_caller", default=ANONYMOUS)


def hash_token(token: str) -> str:
    """Return what the token file has of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def parse_tokens(text: str) -> dict[str, Caller]:
    """Read a token file: callers by the hash of their token. Raises TokenFileError."""
    callers = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) not in (3, 4) or len(words[1]) != 64:
            raise TokenFileError(f"line {number}: write: name sha256 rights [images]")
        name, digest, right = words[:3]
        if right.upper() not in Right.__members__ or right.upper() == "NONE":
            raise TokenFileError(f"line {number}: rights are read, build or admin, not {right}")
        images = tuple(words[3].split(",")) if len(words) == 4 else ()
        callers[digest.lower()] = Caller(name, Right[right.upper()], images)
    return callers


class Tokens:
    """The token file, read again when it changes."""

    def __init__(self, path: Path) -> None:
        """Raises TokenFileError and OSError when it cannot be read now."""
        self._path = path
        self._changed = self._stamp()
        self._callers = parse_tokens(path.read_text())

    def find(self, token: str) -> Caller | None:
        """Return whose token it is. Takes as long for a wrong one as for a right one."""
        self._reload()
        digest, found = hash_token(token), None
        for known, caller in self._callers.items():
            if hmac.compare_digest(known, digest):
                found = caller
        return found

    def _stamp(self) -> tuple[int, int, int]:
        status = self._path.stat()
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _reload(self) -> None:
        try:
            stamp = self._stamp()
            if stamp != self._changed:
                self._callers = parse_tokens(self._path.read_text())
                self._changed = stamp
                _log.info("token file read again", tokens=len(self._callers))
        except (OSError, TokenFileError) as error:
            _log.error("token file cannot be read: the last one counts", error=str(error))


@dataclass
class RateLimit:
    """So many calls a second for each caller, and a few more at once."""

    per_second: float
    burst: int
    _left: dict[str, tuple[float, float]] = field(default_factory=dict, repr=False)

    def wait_seconds(self, name: str, now: float | None = None) -> float:
        """Take one call; returns 0, or after how many seconds the next is allowed."""
        now = time.monotonic() if now is None else now
        left, since = self._left.get(name, (float(self.burst), now))
        left = min(self.burst, left + (now - since) * self.per_second)
        if left < 1:
            self._left[name] = (left, now)
            return (1 - left) / self.per_second
        if len(self._left) >= MAX_CALLERS:
            self._left.clear()
        self._left[name] = (left - 1, now)
        return 0.0


class Access:
    """Decides about each call."""

    def __init__(self, tokens: Tokens | None, limit: RateLimit | None) -> None:
        self._tokens = tokens
        self._limit = limit

    def admit(self, method: str, metadata: Mapping[str, str | bytes], peer: str) -> Caller:
        """Return who calls.

        Raises ApiError UNAUTHENTICATED, PERMISSION_DENIED or RESOURCE_EXHAUSTED.
        """
        needed = NEEDED.get(method, Right.ADMIN)
        caller = self._caller(metadata, needed)
        self._require_rate(caller.name if self._tokens else peer)
        if caller.right < needed:
            raise ApiError(
                grpc.StatusCode.PERMISSION_DENIED,
                "RIGHT_MISSING",
                f"{caller.name} may not call {method}: it takes the right {needed.name.lower()}",
                hint="Use a token with that right, or ask an operator for it.",
                metadata={"right": needed.name.lower()},
            )
        return caller

    def _caller(self, metadata: Mapping[str, str | bytes], needed: Right) -> Caller:
        if self._tokens is None:
            return ANONYMOUS
        given = str(metadata.get("authorization", ""))
        is_token = given.lower().startswith(BEARER)
        caller = self._tokens.find(given[len(BEARER) :].strip()) if is_token else None
        if caller is None and needed is Right.NONE:
            return Caller("anonymous", Right.NONE)
        if caller is None:
            raise ApiError(
                grpc.StatusCode.UNAUTHENTICATED,
                "TOKEN_MISSING" if not given else "TOKEN_UNKNOWN",
                "this API wants a bearer token" if not given else "this token is not known here",
                hint="Set TEMPLATE_MANAGER_TOKEN to a token of this service.",
            )
        return caller

    def _require_rate(self, name: str) -> None:
        seconds = self._limit.wait_seconds(name) if self._limit else 0.0
        if seconds > 0:
            raise ApiError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "TOO_MANY_CALLS",
                f"{name} makes too many calls",
                hint="Call less often; follow a log instead of asking for the status.",
                retry_after_seconds=seconds,
            )


def require_image(image: str | None) -> None:
    """Raise ApiError PERMISSION_DENIED unless the current caller may build from the image.

    None is one that nobody knows any more: only who may use all images may use that.
    """
    caller = current_caller.get()
    if caller.may_use(image):
        return
    raise ApiError(
        grpc.StatusCode.PERMISSION_DENIED,
        "IMAGE_NOT_ALLOWED",
        f"{caller.name} may not build from {image or 'an image that is not known any more'}",
        hint=f"Allowed are: {', '.join(caller.images)}",
    )


def audit(method: str, outcome: str, **subject: str) -> None:
    """Write the line that says who has changed what: `build=…`, `status=…`, `files=…` by hash."""
    _log.info(
        "audit",
        caller=current_caller.get().name,
        rpc=method,
        outcome=outcome,
        **subject,
    )
