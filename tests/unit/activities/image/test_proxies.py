"""Registries through a proxy, and mirrors of them: what is asked, by whom, and what is refused."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from activities.contract.errors import RegistryRefusedError, RegistryUnavailableError
from activities.contract.image_reference import ImageReference
from activities.image.registry import Credentials, RegistryAccess, resolve
from activities.process.settings import Settings
from tests.support.local_http import QuietHandler, serving
from tests.support.served_images import ServedImages, serving_images

NAME = "registry.example.com"


@pytest.fixture
def images() -> Iterator[ServedImages]:
    with serving_images() as serving:
        serving.image("it")
        yield serving


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch, images: ServedImages) -> Iterator[list[str]]:
    """A proxy that knows one registry; what it has been asked for."""
    asked: list[str] = []

    class Proxy(QuietHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            kind, content = images.contents[self.path.rpartition("/")[2]]
            self.answer(200, content, Content_Type=kind)

        def do_CONNECT(self) -> None:
            asked.append(self.path)
            self.answer(502, b"")

    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with serving(Proxy) as address:
        for name in ("HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://{address}")
        yield asked


def access(**settings: Any) -> RegistryAccess:
    return RegistryAccess.of(Settings(insecure_registries=(NAME,), **settings))


def test_a_registry_is_asked_through_the_proxy_which_resolves_its_name(
    proxied: list[str], images: ServedImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up: list[str] = []
    real = socket.getaddrinfo

    def getaddrinfo(host: str, *more: Any, **named: Any) -> Any:
        looked_up.append(host)
        return real(host, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    found = resolve(ImageReference.parse(f"{NAME}/some/image:it"), "amd64", None, access())
    assert found.config_digest == images.image_id("it")
    assert proxied[0] == f"http://{NAME}/v2/some/image/manifests/it"
    assert NAME not in looked_up


def test_https_goes_through_a_tunnel(proxied: list[str]) -> None:
    with pytest.raises(RegistryUnavailableError):
        resolve(ImageReference.parse("secure.example.com/some/image"), "amd64", None, access())
    assert proxied == ["secure.example.com:443"]


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:5000",
        "10.0.0.1",
        "169.254.169.254",
        "2130706433:80",
        "127.1",
        "localhost",
        "metadata.google.internal",
        "printer.local",
        "intranet:443",
    ],
)
def test_what_is_inside_by_name_is_not_asked_of_the_proxy(proxied: list[str], host: str) -> None:
    with pytest.raises(RegistryRefusedError):
        resolve(ImageReference.parse(f"{host}/some/image"), "amd64", None, access())
    assert not proxied


def test_an_operator_allows_a_name_of_the_inside(proxied: list[str]) -> None:
    allowed = access(internal_registries=("registry.internal",))
    with pytest.raises(RegistryUnavailableError):
        resolve(ImageReference.parse("registry.internal/some/image"), "amd64", None, allowed)
    assert proxied == ["registry.internal:443"]


def test_what_needs_no_proxy_is_checked_by_address(
    proxied: list[str], images: ServedImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    reference = ImageReference.parse(images.reference("it"))
    with pytest.raises(RegistryRefusedError):
        resolve(reference, "amd64", None, access())
    allowed = access(internal_registries=(images.address,))
    assert resolve(reference, "amd64", None, allowed).config_digest == images.image_id("it")
    assert not proxied


# ---- Mirrors


def test_a_mirror_is_asked_instead_of_its_registry(images: ServedImages) -> None:
    mirrored = access(registry_mirrors={"docker.io": f"{images.address}/hub"})
    found = resolve(ImageReference.parse("debian:it"), "amd64", None, mirrored)
    assert found.config_digest == images.image_id("it")
    assert str(found.reference) == "docker.io/library/debian:it"
    assert images.paths[0] == "/v2/hub/library/debian/manifests/it"


def test_a_build_with_credentials_does_not_show_them_to_the_mirror(
    images: ServedImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(*_: object, **__: object) -> Any:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    mirrored = access(registry_mirrors={"docker.io": images.address})
    with pytest.raises(RegistryUnavailableError):
        resolve(ImageReference.parse("debian:it"), "amd64", Credentials("me", "pw"), mirrored)
    assert not images.asked


def test_mirrors_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"docker.io": "mirror.example:5000/hub"}
    monkeypatch.setenv("TEMPLATE_MANAGER_REGISTRY_MIRRORS", json.dumps(told))
    assert Settings().registry_mirrors == told
    assert "mirror.example:5000" in Settings().allowed_inside
