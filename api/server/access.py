"""Who may do what: bearer tokens and client certificates with their tenant, rights and images, and
how many calls a second.

The token file has a line a token, or a client certificate:
`name sha256-of-the-token|cert:name-in-the-certificate rights [image-pattern,…] [tenant=T]`, with
rights `read`, `build` (and read), `admin` (and build, and delete) or `operator` (the same in all
tenants). Without a tenant it is `default`. `#` begins a comment. A change of the file counts at
once; one that cannot be read keeps the last that could.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from urllib.parse import unquote

import grpc
import structlog

from activities.contract.image_reference import ImageReference, ImageReferenceError
from activities.contract.names import DEFAULT_TENANT, TENANT_NAME
from activities.process.tenants_file import TenantsFile
from activities.process.watched_file import WatchedFile
from api.errors import RETRY_SECONDS, ApiError
from api.server.image_patterns import ImagePattern

BEARER = "bearer "
CERTIFICATE = "cert:"
MAX_CALLERS = 10_000
IPV6_NETWORK_BITS = 64

_log = structlog.get_logger(__name__)


class Right(IntEnum):
    """What a token allows; each includes those before it."""

    NONE = 0
    READ = 1
    BUILD = 2
    ADMIN = 3
    OPERATOR = 4


NEEDED = {
    "HealthStatus": Right.NONE,
    "TemplateBuildStatus": Right.READ,
    "TemplateBuildLogs": Right.READ,
    "TemplateBuildList": Right.READ,
    "TemplateBuildInspect": Right.READ,
    "TemplateCreate": Right.BUILD,
    "TemplateBuildImage": Right.BUILD,
    "InitLayerFileUpload": Right.BUILD,
    "TemplateBuildRetry": Right.BUILD,
    "TemplateBuildCancel": Right.BUILD,
    "TemplateBuildDelete": Right.ADMIN,
    "TemplateNameGet": Right.READ,
    "TemplateNameList": Right.READ,
    "TemplateNameReserve": Right.BUILD,
    "TemplateTagsAssign": Right.BUILD,
    "TemplateTagsRemove": Right.BUILD,
    # Of InfoService: a control plane looks for services before it has a token for any.
    "ServiceInfo": Right.NONE,
    "ServiceStatusOverride": Right.OPERATOR,
}


SHA256 = re.compile("[0-9A-Fa-f]{64}")


class TokenFileError(ValueError):
    """A token file that cannot be read; the message names the line."""


@dataclass(frozen=True)
class Caller:
    """Who makes a call. Without a token file everybody is `anonymous` and may do everything."""

    name: str
    right: Right
    images: tuple[str, ...] = ()
    """Patterns of images, see `ImagePattern`; none means all."""
    tenant: str = DEFAULT_TENANT
    is_known: bool = True
    """False for who calls where nobody has to say who he is."""

    def limited_as(self, peer: str) -> str:
        """Return under which name calls are limited: who is not known counts by address."""
        return f"{self.tenant}/{self.name}" if self.is_known else peer

    def sees(self, tenant: str) -> bool:
        """Whether what belongs to a tenant is there for this caller. Nothing else decides it."""
        return self.right is Right.OPERATOR or tenant == self.tenant

    def may_use(self, image: str | None) -> bool:
        """Whether this caller may build from an image; None is one that nobody knows any more."""
        if not self.images:
            return True
        if image is None:
            return False
        try:
            named = ImageReference.parse(image)
        except ImageReferenceError:
            return False
        return any(ImagePattern.parse(pattern).matches(named) for pattern in self.images)


ANONYMOUS = Caller("anonymous", Right.OPERATOR, is_known=False)
NOBODY = Caller("nobody", Right.NONE, tenant="", is_known=False)
# Outside of a call that was admitted nothing is to be seen.
current_caller: ContextVar[Caller] = ContextVar("current_caller", default=NOBODY)


def hash_token(token: str) -> str:
    """Return what the token file has of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def parse_tokens(text: str) -> dict[str, Caller]:
    """Read a token file: callers by the hash of their token, or `cert:` and a certificate's name.

    Raises TokenFileError.
    """
    callers: dict[str, Caller] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            key, caller = _parse_line(words)
        except ValueError as error:
            raise TokenFileError(f"line {number}: {error}") from None
        if callers.setdefault(key, caller) != caller:
            raise TokenFileError(f"line {number}: an earlier line has it as somebody else's")
    return callers


def _parse_line(words: list[str]) -> tuple[str, Caller]:
    if len(words) < 3 or not (words[1].startswith(CERTIFICATE) or SHA256.fullmatch(words[1])):
        raise ValueError("write: name sha256|cert:name rights [images] [tenant=T]")
    name, key, right = words[:3]
    if right.upper() not in Right.__members__ or right.upper() == "NONE":
        raise ValueError(f"rights are read, build, admin or operator, not {right}")
    images = [word for word in words[3:] if "=" not in word]
    options = dict(word.split("=", 1) for word in words[3:] if "=" in word)
    # What is not understood is refused: a mistyped tenant must not become the default one.
    if len(images) > 1 or len(images) + len(options) < len(words) - 3 or set(options) - {"tenant"}:
        raise ValueError("after the rights come [images] [tenant=T], each once")
    tenant = options.get("tenant", DEFAULT_TENANT)
    if not TENANT_NAME.fullmatch(tenant):
        raise ValueError(f"a tenant is 1 to 63 of a-z, 0-9 and -, not {tenant!r}")
    patterns = tuple(images[0].split(",")) if images else ()
    for pattern in patterns:
        ImagePattern.parse(pattern)
    caller = Caller(name, Right[right.upper()], patterns, tenant)
    return key if key.startswith(CERTIFICATE) else key.lower(), caller


class Tokens:
    """The token file, read again when it changes."""

    def __init__(self, path: Path) -> None:
        """Raises TokenFileError and OSError when it cannot be read now."""
        self._file = WatchedFile(path, parse_tokens)

    def find(self, token: str) -> Caller | None:
        """Return whose token it is. Takes as long for a wrong one as for a right one."""
        digest, found = hash_token(token), None
        for known, caller in self._file.current().items():
            if hmac.compare_digest(known, digest):
                found = caller
        return found

    def of_certificate(self, names: Collection[str]) -> Caller | None:
        """Return whose client certificate it is, by its names; None when lines disagree."""
        callers = self._file.current()
        found = {callers.get(f"{CERTIFICATE}{name}") for name in names} - {None}
        return found.pop() if len(found) == 1 else None


@dataclass
class RateLimit:
    """So many calls a second for each caller, and a few more at once.

    Of more than `MAX_CALLERS` the one that has been silent for longest is forgotten: who calls
    without a pause stays limited, however many others call.
    """

    per_second: float
    burst: int
    _left: dict[str, tuple[float, float]] = field(default_factory=dict, repr=False)
    """What each has left, and when it was so; in the order of their last calls."""

    def wait_seconds(self, name: str, now: float | None = None) -> float:
        """Take one call; returns 0, or after how many seconds the next is allowed."""
        now = time.monotonic() if now is None else now
        left, since = self._left.pop(name, (float(self.burst), now))
        left = min(self.burst, left + (now - since) * self.per_second)
        is_allowed = left >= 1
        self._left[name] = (left - is_allowed, now)
        if len(self._left) > MAX_CALLERS:
            del self._left[next(iter(self._left))]
        return 0.0 if is_allowed else (1 - left) / self.per_second


def address_of(peer: str) -> str:
    """Return what gRPC calls a client, without its port: its address, or of IPv6 its network.

    One machine has all the addresses of such a network, and would be limited by none of them.
    """
    kind, _, rest = peer.partition(":")
    host = unquote(rest.rpartition(":")[0]).strip("[]")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a socket has no address
        return kind
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    host_bits = address.max_prefixlen - IPV6_NETWORK_BITS
    network = int(address) >> host_bits << host_bits
    return str(ipaddress.IPv6Network((network, IPV6_NETWORK_BITS)))


@dataclass
class CallsAtOnce:
    """So many calls of each caller are answered at the same time: who follows a log stays."""

    most: int
    _running: Counter[str] = field(default_factory=Counter, repr=False)

    @contextmanager
    def one(self, name: str) -> Iterator[None]:
        """Count a call while it lasts. Raises ApiError RESOURCE_EXHAUSTED."""
        if self._running[name] >= self.most:
            raise ApiError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "TOO_MANY_CALLS",
                f"{name} has {self.most} calls that have not ended, and may have no more",
                hint="End some; follow a log once.",
                retry_after_seconds=RETRY_SECONDS,
            )
        self._running[name] += 1
        try:
            yield
        finally:
            self._running[name] -= 1
            if not self._running[name]:
                del self._running[name]


class Access:
    """Decides about each call."""

    def __init__(
        self, tokens: Tokens | None, limit: RateLimit | None, tenants: TenantsFile | None = None
    ) -> None:
        self._tokens = tokens
        self._limit = limit
        self._tenants = tenants or TenantsFile(None)
        self._of_tenants: dict[str, RateLimit] = {}

    def admit(
        self,
        method: str,
        metadata: Mapping[str, str | bytes],
        peer: str,
        certificate_names: Collection[str] = (),
    ) -> Caller:
        """Return who calls: a token says it, else the client certificate that TLS has checked.

        `peer` is its address, see `address_of`.

        Raises ApiError UNAUTHENTICATED, PERMISSION_DENIED or RESOURCE_EXHAUSTED.
        """
        needed = NEEDED.get(method, Right.ADMIN)
        try:
            caller = self._caller(metadata, needed, certificate_names)
        except ApiError:
            self._require_rate(peer)  # not the caller's whose token it might have been
            raise
        self._require_rate(caller.limited_as(peer))
        if caller.is_known or self._tokens is None:
            self._require_rate_of_tenant(caller.tenant)
        if caller.right < needed:
            raise ApiError(
                grpc.StatusCode.PERMISSION_DENIED,
                "RIGHT_MISSING",
                f"{caller.name} may not call {method}: it takes the right {needed.name.lower()}",
                hint="Use a token with that right, or ask an operator for it.",
                metadata={"right": needed.name.lower()},
            )
        return caller

    def _caller(
        self,
        metadata: Mapping[str, str | bytes],
        needed: Right,
        certificate_names: Collection[str],
    ) -> Caller:
        if self._tokens is None:
            return ANONYMOUS
        given = str(metadata.get("authorization", ""))
        is_token = given.lower().startswith(BEARER)
        caller = self._tokens.find(given[len(BEARER) :].strip()) if is_token else None
        if not given:
            caller = self._tokens.of_certificate(certificate_names)
        if caller is None and needed is Right.NONE:
            return Caller("anonymous", Right.NONE, is_known=False)
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
        if seconds > 0 and self._limit:
            raise _too_many_calls(name, self._limit, seconds)

    def _require_rate_of_tenant(self, tenant: str) -> None:
        limits = self._tenants.limits_of(tenant)
        if limits.calls_per_second is None:
            return
        limit = self._rate_of(tenant, limits.calls_per_second, limits.burst)
        seconds = limit.wait_seconds(tenant)
        if seconds > 0:
            raise _too_many_calls(f"tenant {tenant}", limit, seconds)

    def _rate_of(self, tenant: str, per_second: float, burst: int) -> RateLimit:
        known = self._of_tenants.get(tenant)
        if known is None or (known.per_second, known.burst) != (per_second, burst):
            known = self._of_tenants[tenant] = RateLimit(per_second, burst)
        return known


def _too_many_calls(who: str, limit: RateLimit, seconds: float) -> ApiError:
    return ApiError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "TOO_MANY_CALLS",
        f"{who} makes too many calls: {limit.per_second:g} a second are allowed here",
        hint="Call less often; follow a log instead of asking for the status.",
        metadata={"limit": "calls_per_second", "allowed": f"{limit.per_second:g}"},
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
    """Write the line that says who has changed what: `build=…`, `name=…`, `files=…`."""
    caller = current_caller.get()
    _log.info(
        "audit",
        caller=caller.name,
        tenant=caller.tenant,
        rpc=method,
        outcome=outcome,
        **subject,
    )
