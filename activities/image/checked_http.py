"""HTTP to a registry that a stranger has named: no call to the inside, no end that is not ours.

A name is resolved once in a conversation, all its addresses are checked, and the connection is made
to one of those. Every redirect is followed by us, and checked as the first request is. All
connections are cut when the conversation's time is over, whatever the other side still sends.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import urljoin

import requests
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies, select_proxy
from urllib3 import ProxyManager
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, LocationParseError
from urllib3.util import parse_url

from activities.contract.errors import RegistryRefusedError
from activities.process.addresses import (
    Address,
    InternalRegistries,
    is_inner_name,
    is_inside,
    literal_address,
    own_addresses,
)

USER_AGENT = "template-manager"
TIMEOUT_SECONDS = (5.0, 20.0)  # to connect, and between two bytes
MAX_REDIRECTS = 5
MAX_ADDRESSES_TRIED = 4
REDIRECTS = frozenset({301, 302, 303, 307, 308})
POLL_SECONDS = 0.1
READ_BYTES = 64 * 1024
NO_URL = "the registry sends us to something that is no URL"
PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Origin:
    """Where a URL leads to."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Origin:
        """Take a URL apart as the connection does. Raises RegistryRefusedError."""
        try:
            parts = parse_url(url)
        except LocationParseError:
            raise RegistryRefusedError(NO_URL) from None
        scheme, host = (parts.scheme or "").lower(), (parts.host or "").strip("[]").lower()
        if scheme not in PORTS or not host:
            raise RegistryRefusedError("the registry sends us to something that is no web address")
        return cls(scheme, host, parts.port or PORTS[scheme])


class Outgoing:
    """The connections of one conversation with one registry. Safe to use by several threads."""

    def __init__(self, registry: Origin, internal: InternalRegistries) -> None:
        """`registry` is what the user named: only it leads to the inside, and only if allowed."""
        self._registry = registry
        self._internal = internal
        self._own = own_addresses()
        self._is_internal = False
        self._lock = threading.RLock()
        self._resolved: dict[tuple[str, int], list[str]] = {}
        self._open: list[socket.socket] = []
        self.is_cut = False

    def connect(
        self, host: str, port: int, timeout: float | None, *, is_proxy: bool = False
    ) -> socket.socket:
        """Return a connection to a checked address of the host; an operator's proxy has any.

        Raises RegistryRefusedError, and OSError when none can be reached.
        """
        error: OSError = OSError("no address")
        found = _resolve(host, port) if is_proxy else self._addresses(host, port)
        for address in found[:MAX_ADDRESSES_TRIED]:
            try:
                return self._kept(socket.create_connection((address, port), timeout))
            except OSError as failure:
                error = failure
        raise error

    def require_name(self, place: Origin) -> None:
        """Check what a proxy is to resolve: by its name alone. Raises RegistryRefusedError."""
        address = literal_address(place.host)
        if address is not None:
            self._require_allowed(place.host, place.port, [address])
        elif is_inner_name(place.host) and not self._internal.name(place.host, place.port):
            raise RegistryRefusedError(_told(self._registry.host, place.host))

    def cut(self) -> None:
        """End all connections, and let no new one be made."""
        with self._lock:
            self.is_cut = True
            while self._open:
                with self._open.pop() as connection, contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _kept(self, connection: socket.socket) -> socket.socket:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            # A second descriptor: TLS takes the first one away.
            self._open.append(connection.dup())
            if self.is_cut:
                self.cut()
        return connection

    def _addresses(self, host: str, port: int) -> list[str]:
        with self._lock:
            if self.is_cut:
                raise OSError("the conversation is over")
            known = self._resolved.get((host, port))
        if known is None:
            known = _resolve(host, port)
            with self._lock:
                # Another thread may have been quicker: its answer is the one that counts.
                known = self._resolved.setdefault((host, port), known)
        self._require_allowed(host, port, [ipaddress.ip_address(one) for one in known])
        return known

    def _require_allowed(self, host: str, port: int, addresses: list[Address]) -> None:
        inner = [one for one in addresses if is_inside(one) or one in self._own]
        if not inner:
            return
        is_registry = (host, port) == (self._registry.host, self._registry.port)
        is_allowed = self._internal.name(host, port) or all(map(self._internal.hold, inner))
        if not (is_allowed and (is_registry or self._is_internal)):
            raise RegistryRefusedError(_told(self._registry.host, host))
        self._is_internal = True


def _told(registry: str, host: str) -> str:
    leads = "is" if host == registry else f"sends us to {host}, which is"
    return f"registry {registry} {leads} at an address that this host does not call"


@contextmanager
def _nonsense_as_error() -> Iterator[None]:
    """Have one kind of error for what libraries make of an answer that they cannot read."""
    try:
        yield
    except requests.RequestException:
        raise
    except (ValueError, OverflowError):  # a header that is no text, a length below zero, …
        raise requests.exceptions.InvalidHeader from None


def _resolve(host: str, port: int) -> list[str]:
    try:
        found = socket.getaddrinfo(host.rstrip("."), port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise OSError("no name of a host") from None
    # A link-local one has its interface behind a %: it is refused all the same.
    return list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))


class CheckedHttp:
    """HTTP requests of one conversation. Use it as a context: its end closes all connections."""

    def __init__(
        self, registry_url: str, internal: InternalRegistries, verify: str | bool, seconds: float
    ) -> None:
        """`verify` is a file of certificates, or True for the usual authorities."""
        self.registry = Origin.of(registry_url)
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds
        self._outgoing = Outgoing(self.registry, internal)
        self._session = requests.Session()
        self._session.trust_env = False  # no .netrc, no proxy that no setting names
        self._session.verify = verify
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self._session.headers["User-Agent"] = USER_AGENT
        self._session.headers["Accept-Encoding"] = "identity"
        for scheme in PORTS:
            self._session.mount(f"{scheme}://", _CheckedAdapter(self._outgoing))
        self._timer = threading.Timer(seconds, self._outgoing.cut)
        self._timer.daemon = True

    def __enter__(self) -> CheckedHttp:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self.cut()
        self._session.close()

    @property
    def is_over(self) -> bool:
        """Whether its time has run out, or it has been cut."""
        return self._outgoing.is_cut

    def cut(self) -> None:
        """End all requests that are under way; thread-safe. They fail as broken connections do."""
        self._outgoing.cut()

    @contextmanager
    def cut_by(self, check: Callable[[], None]) -> Iterator[None]:
        """Cut when `check` raises, while the body runs; then raise what it raised."""
        done = threading.Event()
        watch = threading.Thread(target=self._watch, args=(check, done), daemon=True)
        watch.start()
        try:
            yield
        except Exception:
            check()
            raise
        finally:
            done.set()
            watch.join()

    def _watch(self, check: Callable[[], None], done: threading.Event) -> None:
        while not done.wait(POLL_SECONDS):
            try:
                check()
            except Exception:
                self.cut()
                return

    def send(
        self, method: str, url: str, headers: Mapping[str, str], authorization: str = ""
    ) -> requests.Response:
        """Send a request, and follow where the registry sends us; the body is not read yet.

        `authorization` goes to the host of the URL alone, and over no redirect to another one.
        Raises RegistryRefusedError and requests.RequestException.
        """
        first = Origin.of(url)
        for _ in range(MAX_REDIRECTS + 1):
            sent = dict(headers)
            if authorization and Origin.of(url) == first:
                sent["Authorization"] = authorization
            response = self._request(method, url, sent)
            if response.status_code not in REDIRECTS or "Location" not in response.headers:
                return response
            if method == "HEAD":  # where a blob is to be had is answer enough
                return response
            response.close()
            url = self._redirected(method, url, response.headers["Location"])
        raise RegistryRefusedError(f"registry {self.registry.host} sends us round and round")

    def _request(self, method: str, url: str, headers: Mapping[str, str]) -> requests.Response:
        proxies = self._proxies(url)
        with _nonsense_as_error():
            return self._session.request(
                method,
                url,
                headers=headers,
                proxies=proxies,
                timeout=TIMEOUT_SECONDS,
                stream=True,
                allow_redirects=False,
            )

    def _proxies(self, url: str) -> dict[str, str]:
        """Return the proxies that the usual variables name for a URL, once it may be sent there."""
        proxies = get_environ_proxies(url)
        if select_proxy(url, proxies):
            self._outgoing.require_name(Origin.of(url))
        return proxies

    def body(self, response: requests.Response) -> Iterator[bytes]:
        """Yield a body's bytes as they were sent. Raises requests.RequestException."""
        try:
            with _nonsense_as_error():
                yield from response.raw.stream(READ_BYTES, decode_content=False)
        except (HTTPError, OSError) as error:
            raise requests.ConnectionError(error) from None
        if self.is_over:  # a body without a length ends where it was cut
            raise requests.Timeout("cut")

    def came_from_registry(self, response: requests.Response) -> bool:
        """Whether the registry itself has answered, not where it has sent us."""
        return Origin.of(response.url) == self.registry

    def _redirected(self, method: str, url: str, location: str) -> str:
        try:
            target = urljoin(url, location)
        except ValueError:
            raise RegistryRefusedError(NO_URL) from None
        if Origin.of(target).scheme != Origin.of(url).scheme or method != "GET":
            raise RegistryRefusedError(
                f"registry {self.registry.host} sends us to {Origin.of(target).host} in a way that "
                "this host does not follow"
            )
        return target


class _CheckedAdapter(HTTPAdapter):
    """Makes its connections by `Outgoing`."""

    def __init__(self, outgoing: Outgoing) -> None:
        self._outgoing = outgoing
        super().__init__(pool_maxsize=16)

    def init_poolmanager(
        self,
        connections: int,
        maxsize: int,
        block: bool = False,
        **pool_kwargs: Any,  # as the base takes them
    ) -> None:
        super().init_poolmanager(connections, maxsize, block, **pool_kwargs)
        self.poolmanager.pool_classes_by_scheme = _pools(self._outgoing)

    def proxy_manager_for(
        self,
        proxy: str,
        **proxy_kwargs: Any,  # as the base takes them
    ) -> ProxyManager:
        manager: ProxyManager = super().proxy_manager_for(proxy, **proxy_kwargs)
        manager.pool_classes_by_scheme = _pools(self._outgoing)
        return manager


def _pools(outgoing: Outgoing) -> dict[str, type[HTTPConnectionPool]]:
    """Return urllib3's pools, with a name's connection made to a checked address.

    What is above the socket stays urllib3's: the name is what Host, SNI and the certificate say.
    """

    def connection(made: HTTPConnection) -> socket.socket:
        seconds = _seconds(made.timeout)
        return outgoing.connect(made._dns_host, made.port, seconds, is_proxy=made.proxy is not None)

    class Plain(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return connection(self)

    class Secure(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return connection(self)

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}


def _seconds(timeout: object) -> float | None:
    return float(timeout) if isinstance(timeout, int | float) else None
