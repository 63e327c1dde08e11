"""Asking a registry what an image is, before anything is pulled (OCI distribution spec 1.1).

Docker's own `/distribution` call does not tell the digest of one platform's manifest in a
multi-platform index, nor when to come back after a 429, so this asks the registry itself.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NoReturn, TypeVar
from urllib.parse import urlsplit

import requests
from pydantic import ValidationError
from requests.auth import HTTPBasicAuth

from activities.contract.errors import (
    ImageNotFoundError,
    ImageUnusableError,
    RegistryAuthError,
    RegistryUnavailableError,
)
from activities.contract.image_reference import DOCKER_HUB, DOCKER_HUB_API, ImageReference
from activities.contract.model import Model
from activities.image.manifests import (
    DIGEST,
    INDEX_TYPES,
    MANIFEST_TYPES,
    ImageFile,
    Manifest,
    TagPage,
    Token,
)
from activities.image.platform_search import PlatformSearch

M = TypeVar("M", bound=Model)

MAX_JSON_BYTES = 8 * 1024 * 1024
TIMEOUT_SECONDS = (5.0, 20.0)  # to connect, and between two bytes
TOTAL_SECONDS = 60.0
DELETE_SECONDS = 240.0  # every other tag of the repository is looked at
CERTIFICATES = Path("/etc/docker/certs.d")
TAGS_A_PAGE = 100
MAX_RETRY_AFTER_SECONDS = 3600.0


@dataclass(frozen=True)
class Credentials:
    """A user name and password for a registry. Its repr shows no password."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True)
class RemoteImage:
    """What a registry tells of an image for this platform."""

    reference: ImageReference
    digest: str
    """Of this platform's manifest, never of an index over several."""
    config_digest: str
    architecture: str
    layer_bytes: Mapping[str, int]
    """Compressed size of each layer, by digest."""
    layer_types: tuple[str, ...] = ()
    """Media type of each layer; the same layer may come twice."""


def resolve(
    reference: ImageReference,
    architecture: str,
    credentials: Credentials | None = None,
    insecure: frozenset[str] = frozenset(),
) -> RemoteImage:
    """Ask the registry for the image's manifest for linux on `architecture`.

    Blocking, bounded by TOTAL_SECONDS. `insecure` are registries that speak plain HTTP, besides
    those on 127.0.0.0/8. Raises ImageNotFoundError, RegistryAuthError, RegistryUnavailableError,
    and what a `PlatformSearch` does.
    """
    with _Conversation(reference, credentials, insecure) as registry:
        found = PlatformSearch(registry, reference, architecture).find()
    manifest = found.manifest
    layers = {layer.digest: layer.size for layer in manifest.layers or ()}
    return RemoteImage(
        reference, found.digest, found.config_digest, architecture, layers, manifest.layer_types
    )


def delete_tag(
    reference: ImageReference,
    credentials: Credentials | None = None,
    insecure: frozenset[str] = frozenset(),
) -> str:
    """Remove a tag; returns '' when it is gone, else why it was left.

    A plain registry deletes by digest, with every tag on it, so a digest that has another tag is
    left alone. Blocking, bounded by DELETE_SECONDS. Raises RegistryAuthError and
    RegistryUnavailableError.
    """
    with _Conversation(reference, credentials, insecure, DELETE_SECONDS) as registry:
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


class _Conversation:
    """Some requests to one registry about one repository, with one login."""

    def __init__(
        self,
        reference: ImageReference,
        credentials: Credentials | None,
        insecure: frozenset[str],
        total_seconds: float = TOTAL_SECONDS,
    ) -> None:
        self._reference = reference
        self._credentials = credentials
        scheme = "http" if _is_plain(reference.registry, insecure) else "https"
        self._base = f"{scheme}://{_api_host(reference)}/v2/{reference.repository}"
        self._session = requests.Session()
        self._session.trust_env = True
        self._deadline = time.monotonic() + total_seconds
        certificate = CERTIFICATES / reference.registry / "ca.crt"
        if certificate.exists():
            self._session.verify = str(certificate)

    def __enter__(self) -> _Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def manifest(self, version: str) -> tuple[str, Manifest]:
        """Return a manifest or index with the digest of what was received."""
        body = self._get(f"manifests/{version}", ", ".join((*MANIFEST_TYPES, *INDEX_TYPES)))
        digest = "sha256:" + hashlib.sha256(body).hexdigest()
        if DIGEST.fullmatch(version) and digest != version:
            raise RegistryUnavailableError(f"{self._reference.name}: {version} came damaged")
        return digest, self._parse(body, Manifest)

    def image_file(self, digest: str) -> ImageFile:
        """Return an image's config, checked by its digest."""
        body = self._get(f"blobs/{digest}", "*/*")
        if "sha256:" + hashlib.sha256(body).hexdigest() != digest:
            raise RegistryUnavailableError(f"{self._reference.name}: blob {digest} came damaged")
        try:
            return ImageFile.model_validate_json(body)
        except ValidationError:
            raise ImageUnusableError(
                f"{self._reference}: its config is not one of an image"
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
        url = f"{self._base}/{path}"
        response = self._request(url, {"Accept": accept}, method)
        if response.status_code == requests.codes.unauthorized:
            challenge = response.headers.get("WWW-Authenticate", "")
            response.close()
            self._log_in(challenge)
            response = self._request(url, {"Accept": accept}, method)
        with response:
            self._require_success(response)
            return self._read(response)

    def _request(
        self,
        url: str,
        headers: dict[str, str],
        method: str = "GET",
        params: dict[str, str] | None = None,
        auth: HTTPBasicAuth | None = None,
    ) -> requests.Response:
        try:
            return self._session.request(
                method,
                url,
                headers=headers,
                params=params,
                auth=auth,
                timeout=TIMEOUT_SECONDS,
                stream=True,
            )
        except requests.RequestException as error:
            raise RegistryUnavailableError(
                f"registry {self._reference.registry} cannot be reached: {_why(error)}"
            ) from None  # the chain could show a URL with a token in it

    def _read(self, response: requests.Response) -> bytes:
        body = b""
        try:
            for part in response.iter_content(64 * 1024):
                body += part
                if len(body) > MAX_JSON_BYTES or time.monotonic() > self._deadline:
                    raise RegistryUnavailableError(
                        f"registry {self._reference.registry} sent too much, or too slowly"
                    )
        except requests.RequestException as error:
            raise RegistryUnavailableError(
                f"registry {self._reference.registry} broke off: {_why(error)}"
            ) from None
        return body

    def _log_in(self, challenge: str) -> None:
        kind, parameters = _parse_challenge(challenge)
        basic = (
            HTTPBasicAuth(self._credentials.username.encode(), self._credentials.password.encode())
            if self._credentials
            else None
        )
        if kind == "basic" and basic:
            self._session.auth = basic
        elif kind == "bearer" and "realm" in parameters:
            self._session.headers["Authorization"] = f"Bearer {self._token(parameters, basic)}"
        else:
            raise RegistryAuthError(
                f"registry {self._reference.registry} asks for credentials for "
                f"{self._reference.repository}"
            )

    def _token(self, parameters: Mapping[str, str], basic: HTTPBasicAuth | None) -> str:
        realm = parameters["realm"]
        if basic and self._base.startswith("https:") and urlsplit(realm).scheme != "https":
            raise RegistryAuthError(
                f"registry {self._reference.registry} wants the password sent in the clear"
            )
        scope = parameters.get("scope") or f"repository:{self._reference.repository}:pull"
        asked = {"service": parameters.get("service", ""), "scope": scope}
        with self._request(realm, {}, params=asked, auth=basic) as response:
            self._require_success(response)
            return self._parse(self._read(response), Token).value

    def _require_success(self, response: requests.Response) -> None:
        if response.status_code in (requests.codes.ok, requests.codes.accepted):
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


def _parse_challenge(header: str) -> tuple[str, dict[str, str]]:
    kind, _, rest = header.partition(" ")
    return kind.lower(), dict(re.findall(r'(\w+)="([^"]*)"', rest))


def _retry_after(response: requests.Response) -> float | None:
    """Return the header's seconds (RFC 9110: a number or a date), within reason."""
    value = response.headers.get("Retry-After", "")
    if value.isdigit():
        return min(float(value), MAX_RETRY_AFTER_SECONDS)
    try:
        seconds = parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError):
        return None
    return min(max(seconds, 1.0), MAX_RETRY_AFTER_SECONDS)


def _why(error: requests.RequestException) -> str:
    """Say what went wrong without the URL, which may carry a token."""
    if isinstance(error, requests.exceptions.SSLError):
        return "its TLS certificate is not trusted, or it does not speak TLS"
    if isinstance(error, requests.Timeout):
        return "no answer in time"
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
