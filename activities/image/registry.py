"""Asking a registry what an image is, before anything is pulled (OCI distribution spec 1.1).

Docker's own `/distribution` call does not tell the digest of one platform's manifest in a
multi-platform index, nor when to come back after a 429, so this asks the registry itself.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import ipaddress
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NoReturn, TypeVar
from urllib.parse import urlencode

import requests
from pydantic import ValidationError

from activities.contract.errors import (
    ImageNotFoundError,
    ImageUnusableError,
    RegistryAuthError,
    RegistryRefusedError,
    RegistryUnavailableError,
)
from activities.contract.image_reference import DOCKER_HUB, DOCKER_HUB_API, ImageReference
from activities.contract.model import Model
from activities.image.checked_http import CheckedHttp, Origin
from activities.image.manifests import (
    DIGEST,
    INDEX_TYPES,
    MANIFEST_TYPES,
    ImageFile,
    Manifest,
    TagPage,
    Token,
    read_image_file,
)
from activities.image.platform_search import PlatformSearch
from activities.process.addresses import InternalRegistries
from activities.process.settings import Settings

M = TypeVar("M", bound=Model)

MAX_JSON_BYTES = 8 * 1024 * 1024
DELETE_SECONDS = 240.0  # every other tag of the repository is looked at
CERTIFICATES = Path("/etc/docker/certs.d")
TAGS_A_PAGE = 100
MAX_RESUMED = 4
MAX_CHALLENGE_CHARS = 4096
ACCEPTED_MANIFESTS = ", ".join((*MANIFEST_TYPES, *INDEX_TYPES))
SUCCESSES = frozenset({200, 202, 206})
MAX_RETRY_AFTER_SECONDS = 3600.0


@dataclass(frozen=True)
class Credentials:
    """A user name and password for a registry. Its repr shows no password."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True)
class RegistryAccess:
    """How this machine speaks to registries."""

    plain: frozenset[str] = frozenset()
    """Those that speak plain HTTP, besides those on 127.0.0.0/8."""
    internal: InternalRegistries = field(default_factory=InternalRegistries)
    mirrors: Mapping[str, str] = field(default_factory=dict)
    """`host[:port][/path]` of what is asked instead of a registry, where nobody logs in."""
    seconds: float = 60.0
    """What asking for an image may take altogether."""

    @classmethod
    def of(cls, settings: Settings, plain: Iterable[str] = ()) -> RegistryAccess:
        """Return what the settings say; `plain` are more registries that speak plain HTTP."""
        return cls(
            frozenset(settings.insecure_registries).union(plain),
            InternalRegistries(settings.allowed_inside),
            settings.registry_mirrors,
            settings.registry_seconds,
        )

    def place_of(self, reference: ImageReference, *, anonymous: bool) -> tuple[str, str]:
        """Return the host that has an image, and the repository's name there."""
        mirror = self.mirrors.get(reference.registry) if anonymous else None
        if mirror is None:
            return _api_host(reference), reference.repository
        host, _, path = mirror.partition("/")
        return host, f"{path}/{reference.repository}".lstrip("/")

    def scheme_of(self, registry: str) -> str:
        """Return how to speak to a registry: `http` or `https`."""
        return "http" if _is_plain(registry, self.plain) else "https"


@dataclass(frozen=True)
class RemoteLayer:
    """A layer as a registry has it: packed."""

    digest: str
    bytes: int
    media_type: str
    diff_id: str
    """The digest of what it unpacks to, as the image's config says."""


@dataclass(frozen=True)
class RemoteImage:
    """What a registry tells of an image for this platform."""

    reference: ImageReference
    digest: str
    """Of this platform's manifest, never of an index over several."""
    config_digest: str
    config_bytes: int
    architecture: str
    layers: tuple[RemoteLayer, ...]
    """From below; the same one may come twice."""

    @property
    def layer_bytes(self) -> dict[str, int]:
        """Packed size of each layer, by digest."""
        return {layer.digest: layer.bytes for layer in self.layers}


def resolve(
    reference: ImageReference,
    architecture: str,
    credentials: Credentials | None = None,
    access: RegistryAccess | None = None,
    check: Callable[[], None] = lambda: None,
) -> RemoteImage:
    """Ask the registry for the image's manifest for linux on `architecture`.

    Blocking, bounded by the access's seconds; ends soon after `check` raises, with what it raised.
    Raises ImageNotFoundError, RegistryAuthError, RegistryRefusedError, RegistryUnavailableError,
    and what a `PlatformSearch` does.
    """
    access = access or RegistryAccess()
    talk = RegistryConversation(reference, credentials, access, access.seconds)
    with talk as registry, registry.cut_by(check):
        found = PlatformSearch(registry, reference, architecture).find()
    layers = tuple(
        RemoteLayer(layer.digest, layer.size, layer.media_type or "", diff_id)
        for layer, diff_id in zip(found.manifest.layers or (), found.diff_ids, strict=True)
    )
    config = found.config
    return RemoteImage(reference, found.digest, config.digest, config.size, architecture, layers)


def delete_tag(
    reference: ImageReference,
    credentials: Credentials | None = None,
    access: RegistryAccess | None = None,
) -> str:
    """Remove a tag; returns '' when it is gone, else why it was left.

    A plain registry deletes by digest, with every tag on it, so a digest that has another tag is
    left alone. Blocking, bounded by DELETE_SECONDS. Raises RegistryAuthError, RegistryRefusedError
    and RegistryUnavailableError.
    """
    access = replace(access or RegistryAccess(), mirrors={})  # the tag is in the registry itself
    with RegistryConversation(reference, credentials, access, DELETE_SECONDS) as registry:
        try:
            digest, _ = registry.manifest(reference.version)
            tags = [tag for tag in registry.tags() if tag != reference.version]
            other = next((tag for tag in tags if registry.has(tag, digest)), None)
            if other:
                return f"{digest} also has the tag {other}"
            registry.delete_manifest(digest)
        except ImageNotFoundError:
            return ""
        except _NotAllowedError:
            return f"registry {reference.registry} does not allow deletion"
    return ""


class _NotAllowedError(RegistryUnavailableError):
    """The registry does not do this at all (HTTP 405)."""

    retryable = False


class RegistryConversation:
    """Some requests to one registry about one repository, with one login."""

    def __init__(
        self,
        reference: ImageReference,
        credentials: Credentials | None,
        access: RegistryAccess,
        total_seconds: float,
    ) -> None:
        self._reference = reference
        self._credentials = credentials
        self._access = access
        host, self._repository = access.place_of(reference, anonymous=credentials is None)
        registry_url = f"{access.scheme_of(host)}://{host}"
        self._base = f"{registry_url}/v2/{self._repository}"
        certificate = CERTIFICATES / host / "ca.crt"
        usual = os.environ.get("REQUESTS_CA_BUNDLE") or True
        verify = str(certificate) if certificate.exists() else usual
        self._http = CheckedHttp(registry_url, access.internal, verify, total_seconds)
        self._authorization = ""
        self.cut_by = self._http.cut_by
        self.cut = self._http.cut

    def __enter__(self) -> RegistryConversation:
        self._http.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.__exit__()

    def config(self, digest: str) -> bytes:
        """Return an image's config, checked by its digest.

        Raises RegistryUnavailableError when it is not that one.
        """
        body = self._get(f"blobs/{digest}", "*/*")
        if "sha256:" + hashlib.sha256(body).hexdigest() != digest:
            raise RegistryUnavailableError(f"{self._reference.name}: blob {digest} came damaged")
        return body

    def blob(self, digest: str) -> Iterator[bytes]:
        """Return a layer's bytes as they come.

        A connection that breaks is taken up again where it broke. The bytes are not checked.
        Raises ImageUnusableError when the registry does not have it.
        """
        return self._parts(digest, self._open_blob(digest, 0))

    def has_blob(self, digest: str) -> bool:
        """Whether the registry says that it would give us a layer."""
        try:
            self._open(f"blobs/{digest}", "*/*", "HEAD").close()
        except ImageNotFoundError:
            return False
        return True

    def _open_blob(self, digest: str, offset: int) -> requests.Response:
        more = {"Range": f"bytes={offset}-"} if offset else {}
        try:
            return self._open(f"blobs/{digest}", "*/*", more=more)
        except ImageNotFoundError:
            raise ImageUnusableError(
                f"{self._reference} cannot be pulled: the registry lacks a layer of it ({digest})",
                hint="Push the image again with all its layers, non-distributable ones included.",
            ) from None

    def _parts(self, digest: str, response: requests.Response) -> Iterator[bytes]:
        done = tries = 0
        while True:
            try:
                with response:
                    for part in self._rest(response, done):
                        done += len(part)
                        yield part
                return
            except requests.RequestException as error:
                tries += 1
                if tries > MAX_RESUMED or self._http.is_over:
                    raise RegistryUnavailableError(
                        f"registry {self._reference.registry} broke off in layer {digest} after "
                        f"{done} bytes: {self._why(error)}"
                    ) from None
            response = self._open_blob(digest, done)

    def _rest(self, response: requests.Response, done: int) -> Iterator[bytes]:
        """Yield what follows the bytes that are there, whether or not the registry begins there."""
        skip = done
        if response.status_code == requests.codes.partial_content:
            if not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
                raise requests.ConnectionError("another part than was asked for")
            skip = 0
        for part in self._http.body(response):
            if kept := part[skip:]:
                yield kept
            skip = max(0, skip - len(part))

    def manifest(self, version: str) -> tuple[str, Manifest]:
        """Return a manifest or index with the digest of what was received."""
        body = self._get(f"manifests/{version}", ACCEPTED_MANIFESTS)
        digest = "sha256:" + hashlib.sha256(body).hexdigest()
        if DIGEST.fullmatch(version) and digest != version:
            raise RegistryUnavailableError(f"{self._reference.name}: {version} came damaged")
        return digest, self._parse(body, Manifest)

    def image_file(self, digest: str) -> ImageFile:
        """Return an image's config, checked by its digest."""
        try:
            return read_image_file(self.config(digest))
        except ValidationError:
            raise ImageUnusableError(
                f"{self._reference}: its config is not one of an image"
            ) from None
        except ValueError as error:
            raise ImageUnusableError(
                f"{self._reference}: its config is not clear: {error}"
            ) from None

    def tags(self) -> list[str]:
        """Return the repository's tags, by pages."""
        tags: list[str] = []
        last = ""
        while True:
            page = self._parse(self._get(f"tags/list?n={TAGS_A_PAGE}{last}", "*/*"), TagPage)
            names = page.tags or ()
            tags += names
            if len(names) < TAGS_A_PAGE:
                return tags
            last = f"&last={names[-1]}"

    def has(self, tag: str, digest: str) -> bool:
        """Whether that tag is on that manifest."""
        try:
            return self.manifest(tag)[0] == digest
        except ImageNotFoundError:
            return False

    def delete_manifest(self, digest: str) -> None:
        """Delete a manifest with all its tags."""
        self._get(f"manifests/{digest}", "*/*", method="DELETE")

    def _parse(self, body: bytes, kind: type[M]) -> M:
        try:
            return kind.model_validate_json(body)
        except ValidationError:
            raise RegistryUnavailableError(
                f"{self._reference.registry} answered with something that is not a manifest"
            ) from None

    def _get(self, path: str, accept: str, method: str = "GET") -> bytes:
        with self._open(path, accept, method) as response:
            return self._read(response)

    def _open(
        self,
        path: str,
        accept: str,
        method: str = "GET",
        more: Mapping[str, str] | None = None,
    ) -> requests.Response:
        """Return a successful answer whose body is still to be read. Logs in when asked to."""
        url, headers = f"{self._base}/{path}", {"Accept": accept, **(more or {})}
        response = self._request(url, headers, method, self._authorization)
        unauthorized = response.status_code == requests.codes.unauthorized
        if unauthorized and self._http.came_from_registry(response):
            challenge = response.headers.get("WWW-Authenticate", "")
            response.close()
            self._log_in(challenge)
            response = self._request(url, headers, method, self._authorization)
        with contextlib.ExitStack() as closing:
            closing.enter_context(response)
            self._require_success(response)
            closing.pop_all()
        return response

    def _request(
        self, url: str, headers: Mapping[str, str], method: str = "GET", authorization: str = ""
    ) -> requests.Response:
        try:
            return self._http.send(method, url, headers, authorization)
        except requests.RequestException as error:
            raise RegistryUnavailableError(
                f"registry {self._reference.registry} cannot be reached: {self._why(error)}"
            ) from None  # the chain could show a URL with a token in it

    def _read(self, response: requests.Response) -> bytes:
        body = b""
        try:
            for part in self._http.body(response):
                body += part
                if len(body) > MAX_JSON_BYTES:
                    raise RegistryUnavailableError(
                        f"registry {self._reference.registry} sent more than {MAX_JSON_BYTES} "
                        "bytes where a manifest or config belongs"
                    )
        except requests.RequestException as error:
            raise RegistryUnavailableError(
                f"registry {self._reference.registry} broke off: {self._why(error)}"
            ) from None
        return body

    def _why(self, error: requests.RequestException) -> str:
        return f"too slow for {self._http.seconds:g} s" if self._http.is_over else _why(error)

    def _log_in(self, challenge: str) -> None:
        kind, parameters = _parse_challenge(challenge)
        basic = _basic(self._credentials) if self._credentials else ""
        if kind == "basic" and basic:
            self._authorization = basic
        elif kind == "bearer" and "realm" in parameters:
            self._authorization = f"Bearer {self._token(parameters, basic)}"
        else:
            raise RegistryAuthError(
                f"registry {self._reference.registry} asks for credentials for "
                f"{self._reference.repository}"
            )

    def _token(self, parameters: Mapping[str, str], basic: str) -> str:
        realm = parameters["realm"]
        self._require_realm(realm)
        scope = parameters.get("scope") or f"repository:{self._repository}:pull"
        asked = urlencode({"service": parameters.get("service", ""), "scope": scope})
        joint = "&" if "?" in realm else "?"
        with self._request(f"{realm}{joint}{asked}", {}, authorization=basic) as response:
            self._require_success(response)
            return self._parse(self._read(response), Token).value

    def _require_realm(self, realm: str) -> None:
        """Refuse plain HTTP, but for registries that an operator has told us speak it."""
        place = Origin.of(realm)
        is_plain = self._access.scheme_of(f"{place.host}:{place.port}") == "http"
        if place.scheme != "https" and not (is_plain and self._http.registry.scheme == "http"):
            raise RegistryRefusedError(
                f"registry {self._reference.registry} wants its token fetched in the clear"
            )

    def _require_success(self, response: requests.Response) -> None:
        # A HEAD is not sent on to where a blob is: that it is somewhere is the answer.
        if response.status_code in SUCCESSES or response.is_redirect:
            return
        _raise_for(self._reference, response, anonymous=self._credentials is None)


def _raise_for(
    reference: ImageReference, response: requests.Response, *, anonymous: bool
) -> NoReturn:
    status = response.status_code
    registry = reference.registry
    if status == requests.codes.not_found:
        raise ImageNotFoundError(f"registry {registry} has no image {reference}")
    if status in (requests.codes.unauthorized, requests.codes.forbidden):
        raise RegistryAuthError(
            f"registry {registry} does not show {reference} without credentials"
            if anonymous
            else f"registry {registry} refused the credentials for {reference} (HTTP {status})"
        )
    if status == requests.codes.method_not_allowed:
        raise _NotAllowedError(f"registry {registry} does not allow this for {reference}")
    if status == requests.codes.too_many_requests:
        raise RegistryUnavailableError(
            f"registry {registry} asks us to slow down (HTTP 429)",
            retry_after_seconds=_retry_after(response),
        )
    raise RegistryUnavailableError(
        f"registry {registry} answered HTTP {status} for {reference}",
        retry_after_seconds=_retry_after(response),
    )


def _api_host(reference: ImageReference) -> str:
    return DOCKER_HUB_API if reference.registry == DOCKER_HUB else reference.registry


def _is_plain(registry: str, insecure: frozenset[str]) -> bool:
    host = registry.rsplit(":", 1)[0]
    if host == "localhost" or registry in insecure:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _basic(credentials: Credentials) -> str:
    pair = f"{credentials.username}:{credentials.password}".encode()
    return f"Basic {base64.b64encode(pair).decode()}"


def _parse_challenge(header: str) -> tuple[str, dict[str, str]]:
    kind, _, rest = header[:MAX_CHALLENGE_CHARS].partition(" ")
    return kind.lower(), dict(re.findall(r'(\w{1,64})="([^"]*)"', rest))


def _retry_after(response: requests.Response) -> float | None:
    """Return the header's seconds (RFC 9110: a number or a date), within reason."""
    value = response.headers.get("Retry-After", "")
    if value.isascii() and value.isdecimal():
        return min(float(value), MAX_RETRY_AFTER_SECONDS)
    try:
        seconds = parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 1.0), MAX_RETRY_AFTER_SECONDS)


def _why(error: requests.RequestException) -> str:
    """Say what went wrong without the URL, which may carry a token."""
    if isinstance(error, requests.exceptions.SSLError):
        return "its TLS certificate is not trusted, or it does not speak TLS"
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.exceptions.InvalidHeader):
        return "an answer that makes no sense"
    text = str(error)
    for known in (
        "Name or service not known",
        "Temporary failure in name resolution",
        "Connection refused",
        "No route to host",
        "Network is unreachable",
        "Connection reset",
        "Connection aborted",
    ):
        if known in text:
            return known
    return type(error).__name__
