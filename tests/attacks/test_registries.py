"""Registries that want the host to call the inside, to wait for ever, or to give secrets away.

Each is a server of this test. The inner one stands for whatever a host can reach and a tenant
cannot: it must hear nothing.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from activities.contract.errors import (
    RegistryAuthError,
    RegistryRefusedError,
    RegistryUnavailableError,
    TemplateManagerError,
)
from activities.contract.image_reference import ImageReference
from activities.image.registry import Credentials, RegistryAccess, resolve
from activities.process.addresses import InternalRegistries
from tests.support.local_http import QuietHandler, serving

pytestmark = [pytest.mark.counts_nothing, pytest.mark.usefixtures("undisturbed")]

CREDENTIALS = Credentials("robot", "s3cret-pass-word")
SECRET = "Basic cm9ib3Q6czNjcmV0LXBhc3Mtd29yZA=="
LIMIT_SECONDS = 3.0


@dataclass
class Server:
    """A server whose answers the test writes."""

    address: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Path and Authorization of each request."""

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def named(self, host: str) -> str:
        return f"{host}:{self.port}"


@contextmanager
def running(answer: Callable[[QuietHandler], None]) -> Iterator[Server]:
    server = Server()

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            server.asked.append((self.path, self.headers.get("Authorization", "")))
            with contextlib.suppress(ConnectionError):
                answer(self)

    with serving(Handler) as server.address:
        yield server


@pytest.fixture
def inner() -> Iterator[Server]:
    with running(lambda request: request.answer(200, b'{"token": "of-the-inside"}')) as server:
        yield server


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Sequence[str]]:
    """What a name's address is, the first answer first; the last one stays."""
    told: dict[str, list[str]] = {}
    real = socket.getaddrinfo

    def getaddrinfo(host: str, *arguments: Any, **more: Any) -> Any:
        answers = told.get(host)
        if answers is None:
            return real(host, *arguments, **more)
        return real(answers.pop(0) if len(answers) > 1 else answers[0], *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return told  # type: ignore[return-value] # tests give lists


def allowing(*entries: str, seconds: float = 60) -> RegistryAccess:
    return RegistryAccess(internal=InternalRegistries(entries), seconds=seconds)


def ask(
    registry_address: str,
    *more: str,
    credentials: Credentials | None = None,
    seconds: float = 60,
) -> TemplateManagerError:
    """Ask a registry, which is allowed, for an image; returns the error."""
    reference = ImageReference.parse(f"{registry_address}/some/image:1")
    access = allowing(registry_address, *more, seconds=seconds)
    with pytest.raises(TemplateManagerError) as caught:
        resolve(reference, "amd64", credentials, access)
    return caught.value


def sending_to(location: str) -> Callable[[QuietHandler], None]:
    return lambda request: request.answer(307, b"", Location=location)


def asking_for_token_at(realm: str) -> Callable[[QuietHandler], None]:
    return lambda request: request.answer(
        401, b"", WWW_Authenticate=f'Bearer realm="{realm}",service="x"'
    )


# ---- The inside, named by the tenant


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "127.1", "2130706433", "inner.example.com"]
)
def test_a_registry_of_the_inside_is_not_called(
    inner: Server, names: dict[str, Sequence[str]], host: str
) -> None:
    names["inner.example.com"] = ["127.0.0.1"]
    reference = ImageReference.parse(f"{inner.named(host)}/some/image:1")
    with pytest.raises(RegistryRefusedError, match="does not call"):
        resolve(reference, "amd64", CREDENTIALS)
    assert not inner.asked


def test_an_error_does_not_tell_which_ports_are_open(inner: Server) -> None:
    def told(address: str) -> tuple[type, str]:
        with pytest.raises(TemplateManagerError) as caught:
            resolve(ImageReference.parse(f"{address}/some/image:1"), "amd64")
        return type(caught.value), caught.value.message

    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
        mute = f"127.0.0.1:{silent.getsockname()[1]}"
        assert told(inner.address) == told("127.0.0.1:9") == told(mute)


def test_of_two_addresses_neither_is_called_when_one_is_inside(
    inner: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def both(host: str, port: int, **_: Any) -> list[Any]:
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*kind, ("192.0.2.1", port)), (*kind, ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    reference = ImageReference.parse(f"{inner.named('two.example.com')}/some/image:1")
    with pytest.raises(RegistryRefusedError):
        resolve(reference, "amd64")
    assert not inner.asked


def test_a_name_that_changes_its_address_is_asked_once(
    inner: Server, names: dict[str, Sequence[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: the first answer is checked, the second one leads inside."""
    names["rebinding.example.com"] = ["1.1.1.1", "127.0.0.1"]
    called: list[str] = []

    def connect(address: tuple[str, int], *_: object, **__: object) -> socket.socket:
        called.append(address[0])
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", connect)
    reference = ImageReference.parse(f"{inner.named('rebinding.example.com')}/some/image:1")
    with pytest.raises(RegistryUnavailableError):
        resolve(reference, "amd64")
    assert called == ["1.1.1.1"]


# ---- The inside, named by the registry


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "inner.example.com", "[::ffff:7f00:1]"])
def test_a_redirect_to_the_inside_is_not_followed(
    inner: Server, names: dict[str, Sequence[str]], host: str
) -> None:
    names["inner.example.com"] = ["127.0.0.1"]
    with running(sending_to(f"http://{inner.named(host)}/latest/meta-data")) as evil:
        assert isinstance(ask(evil.address), RegistryRefusedError)
    assert len(evil.asked) == 1
    assert not inner.asked


def test_a_redirect_to_the_metadata_server_is_not_followed() -> None:
    with running(sending_to("http://169.254.169.254/computeMetadata/v1/")) as evil:
        error = ask(evil.address)
    assert isinstance(error, RegistryRefusedError)
    assert "169.254.169.254" in error.message


@pytest.mark.parametrize(
    "location",
    ["https://127.0.0.1:{port}/", "ftp://127.0.0.1/", "file:///etc/shadow", "//127.0.0.1:{port}/x"],
)
def test_a_redirect_to_another_scheme_is_not_followed(inner: Server, location: str) -> None:
    with running(sending_to(location.format(port=inner.port))) as evil:
        assert isinstance(ask(evil.address), RegistryRefusedError)
    assert not inner.asked


def test_an_endless_chain_of_redirects_ends() -> None:
    with running(lambda request: request.answer(302, b"", Location=f"{request.path}x")) as evil:
        assert isinstance(ask(evil.address), RegistryRefusedError)
    assert len(evil.asked) <= 6


def test_a_stranger_does_not_lead_to_a_registry_that_is_allowed(
    inner: Server, names: dict[str, Sequence[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is allowed may be named by tenants; it is not for other registries to send us there."""
    with running(sending_to(f"http://{inner.address}/v2/")) as evil:
        monkeypatch.setattr(
            "activities.image.checked_http.is_inside", lambda one: str(one) == "127.0.0.9"
        )
        names["allowed.example.com"] = ["127.0.0.9"]
        monkeypatch.setattr("activities.image.checked_http.own_addresses", frozenset)
        target = inner.named("allowed.example.com")
        with running(sending_to(f"http://{target}/v2/")) as stranger:
            reference = ImageReference.parse(f"{stranger.address}/some/image:1")
            with pytest.raises(RegistryRefusedError, match=r"allowed\.example\.com"):
                resolve(reference, "amd64", None, allowing(target))
    assert not inner.asked
    assert not evil.asked


@pytest.mark.parametrize("credentials", [None, CREDENTIALS])
def test_a_token_server_of_the_inside_is_not_called(
    inner: Server, credentials: Credentials | None
) -> None:
    with running(asking_for_token_at(f"http://{inner.address}/token")) as evil:
        assert isinstance(ask(evil.address, credentials=credentials), RegistryRefusedError)
    assert not inner.asked


@pytest.mark.parametrize("realm", ["http://token.example.com/", "ftp://x/", "nonsense", "http://["])
def test_a_token_is_not_fetched_in_the_clear(realm: str) -> None:
    with running(asking_for_token_at(realm)) as evil:
        assert isinstance(ask(evil.address, credentials=CREDENTIALS), RegistryRefusedError)


# ---- Credentials


def test_a_redirect_takes_no_credentials_to_another_host(inner: Server) -> None:
    def answer(request: QuietHandler) -> None:
        if request.headers.get("Authorization") == SECRET:
            request.answer(307, b"", Location=f"http://{inner.address}/blob")
        else:
            request.answer(401, b"", WWW_Authenticate='Basic realm="here"')

    with running(answer) as evil:
        ask(evil.address, inner.address, credentials=CREDENTIALS)
    assert [authorization for _, authorization in inner.asked] == [""]
    assert SECRET in [authorization for _, authorization in evil.asked]


@pytest.mark.parametrize("challenge", ['Basic realm="x"', 'Bearer realm="http://{own}/token"'])
def test_another_host_that_asks_for_credentials_gets_none(challenge: str) -> None:
    def greedy(request: QuietHandler) -> None:
        own = request.headers["Host"]
        request.answer(401, b"", WWW_Authenticate=challenge.format(own=own))

    with running(greedy) as thief, running(sending_to(f"http://{thief.address}/steal")) as evil:
        error = ask(evil.address, thief.address, credentials=CREDENTIALS)
    assert isinstance(error, RegistryAuthError)
    assert thief.asked == [("/steal", "")]


def test_the_password_goes_to_no_page_of_the_token_server_s_choice(inner: Server) -> None:
    """The token server redirects to another host: without the password."""

    def answer(request: QuietHandler) -> None:
        own = request.headers["Host"]
        if request.path.startswith("/token"):
            request.answer(302, b"", Location=f"http://{inner.address}/take")
        else:
            request.answer(401, b"", WWW_Authenticate=f'Bearer realm="http://{own}/token"')

    with running(answer) as evil:
        ask(evil.address, inner.address, credentials=CREDENTIALS)
    assert {authorization for _, authorization in inner.asked} == {""}


# ---- No end


def endless(request: QuietHandler) -> None:
    request.send_response(200)
    request.end_headers()
    while True:
        request.wfile.write(b" " * 65536)


def dripping(request: QuietHandler) -> None:
    request.send_response(200)
    request.send_header("Content-Length", "1000000")
    request.end_headers()
    while True:
        request.wfile.write(b" ")
        time.sleep(0.1)


def dripping_headers(request: QuietHandler) -> None:
    request.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        request.wfile.write(b"X: y\r\n"[:1])
        time.sleep(0.1)


def lying_about_its_length(request: QuietHandler) -> None:
    request.send_response(200)
    request.send_header("Content-Length", "1000")
    request.end_headers()
    request.wfile.write(b"{}")


@pytest.mark.parametrize("answer", [endless, dripping, dripping_headers, lying_about_its_length])
def test_an_answer_without_end_is_ended(answer: Callable[[QuietHandler], None]) -> None:
    began = time.monotonic()
    with running(answer) as evil:
        error = ask(evil.address, seconds=LIMIT_SECONDS)
    assert isinstance(error, RegistryUnavailableError)
    assert time.monotonic() - began < LIMIT_SECONDS + 10


def test_a_step_that_is_stopped_does_not_wait_for_the_registry() -> None:
    stopped = threading.Event()

    class Stopped(Exception):
        pass

    def check() -> None:
        if stopped.is_set():
            raise Stopped

    began = time.monotonic()
    with running(dripping) as evil:
        threading.Timer(0.5, stopped.set).start()
        with pytest.raises(Stopped):
            reference = ImageReference.parse(f"{evil.address}/some/image:1")
            resolve(reference, "amd64", None, allowing(evil.address), check)
    assert time.monotonic() - began < 5


# ---- No sense


def saying(answer: bytes) -> Callable[[QuietHandler], None]:
    """Answer with these bytes, whatever they mean, and close the connection."""

    def say(request: QuietHandler) -> None:
        request.wfile.write(answer)
        request.close_connection = True

    return say


def with_headers(status: int, *headers: bytes, body: bytes = b"") -> bytes:
    lines = [b"HTTP/1.1 %d it" % status, *headers, b"Connection: close"]
    return b"\r\n".join([*lines, b"", body])


LONG = b"9" * 5000
NONSENSE = [
    *(
        with_headers(429, b"Retry-After: " + value)
        for value in (b"\xb2", LONG, b"-1", b"Mon, 01 Jan 99999999999999 00:00:00 GMT", b"1e9")
    ),
    *(with_headers(200, b"Content-Length: " + n) for n in (b"2, 3", b"-5", LONG, b"\xb2")),
    *(
        with_headers(307, b"Location: " + place)
        for place in (
            b"http://[",
            b"http://a:99999999/",
            b"http://a..example/",
            b"http://" + b"a" * 300 + b".example/",
            b"http://\xe4..xn--/",
            b"/\xe4\xff",
            b"http://[fe80::1%25eth0]/",
            b"\x00",
        )
    ),
    *(
        with_headers(200, b"Transfer-Encoding: chunked", body=chunk)
        for chunk in (b"zz\r\n", b"-5\r\nxx", b"f" * 18 + b"\r\nxx", b"1;" + b"x" * (1 << 20))
    ),
    with_headers(200, *[b"a: b"] * 200),
    with_headers(200, b"a: " + b"b" * 70_000),
    with_headers(401, b'WWW-Authenticate: Bearer realm="\xb2",scope="\xff"'),
    b"HTTP/1.1 9999 it\r\n\r\n",
    b"hello\n",
]


@pytest.mark.parametrize("answer", NONSENSE, ids=lambda answer: ascii(answer[9:60]))
def test_an_answer_that_makes_no_sense_is_a_typed_error(answer: bytes) -> None:
    """Before: a raw ValueError or UnicodeError, tried again as a fault of the host."""
    with running(saying(answer)) as evil:
        error = ask(evil.address, credentials=CREDENTIALS)
    assert error.message.isprintable()
    assert len(error.message) < 500


@pytest.mark.parametrize("token", ["\u202e", "a\r\nX-Header: 1", "a" * 5_000_000, "\x00", ""])
def test_a_token_that_makes_no_sense_is_a_typed_error(token: str) -> None:
    def answer(request: QuietHandler) -> None:
        own = request.headers["Host"]
        if request.path.startswith("/token"):
            request.answer(200, json.dumps({"token": token}).encode())
        else:
            request.answer(401, b"", WWW_Authenticate=f'Bearer realm="http://{own}/token"')

    with running(answer) as evil:
        error = ask(evil.address, credentials=CREDENTIALS)
    assert isinstance(error, RegistryUnavailableError | RegistryAuthError)
    assert token not in error.message or not token


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "xn--" + "a" * 70])
def test_a_registry_s_name_that_is_none_is_a_typed_error(host: str) -> None:
    """The tenant's own words, which no resolver takes."""
    with pytest.raises(TemplateManagerError):
        resolve(ImageReference.parse(f"{host}/some/image:1"), "amd64")
