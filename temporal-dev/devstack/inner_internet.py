"""An internet within this machine: network namespaces that nothing leads out of.

`host` is the netns in which the host of a test works: its one way out is a wire to the netns
`internet`, where servers of the outside, a resolver, a metadata service and a private network have
their addresses. What comes by that wire is noted, packet by packet, so that a test sees also what
nobody has answered.
"""

from __future__ import annotations

import contextlib
import http.server
import os
import socket
import socketserver
import struct
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from pyroute2 import IPRoute, netns

from activities.disk.mounts import MS_REC, MS_SLAVE, mount
from activities.disk.namespaces import Namespace, in_own_thread, unshare
from activities.microvm.network import in_network, remove_network

T = TypeVar("T")

HOST_ADDRESS = "203.0.113.2"
GATEWAY = "203.0.113.1"
PUBLIC = "198.51.100.7"
OTHER_PUBLIC = "198.51.100.8"
NAME = "files.example.com"
RESOLVER = "198.51.100.53"
DOCKER_BRIDGE = "172.17.0.1"
METADATA = "169.254.169.254"
PRIVATE = ("10.9.8.7", "172.20.1.2", "192.168.77.7", "100.64.3.3")
DENIED = "198.51.100.99"
"""Public, but the operator's own."""
PORT = 80
MS_BIND = 0x1000  # linux/mount.h
ETH_IPV4, ETH_IPV6, ETH_ALL = 0x0800, 0x86DD, 0x0003
IPV6_MULTICAST = 0xFF
# linux/if_packet.h
SOL_PACKET, PACKET_OUTGOING = 263, 4
A_RECORD = 1
LOCAL = 255  # linux/rtnetlink.h


@dataclass
class InnerInternet:
    """Both namespaces while they are there."""

    host: str
    internet: str
    place: Path
    reached: list[str] = field(default_factory=list)
    """Addresses at which a server has been asked, in order, wherever it is."""
    seen: set[str] = field(default_factory=set)
    """Addresses to which a packet has come by the wire, but for what IPv6 sends to all."""
    names: dict[str, str] = field(default_factory=lambda: {NAME: PUBLIC})
    pages: dict[str, bytes] = field(default_factory=lambda: {"/": b"public\n"})

    def give_host(self, *, address: str, network: str) -> None:
        """Let an address, and a network that is routed to it, be the host's own from now on."""

        def give() -> None:
            with IPRoute() as route:
                lo = route.link_lookup(ifname="lo")[0]
                route.addr("add", index=lo, address=address, prefixlen=32)
                route.route("add", dst=network, oif=lo, type="local", table=LOCAL, scope="host")

        in_network(self.host, give)

    @contextmanager
    def lending(self, *ports: int) -> Iterator[None]:
        """Have ports of this thread's loopback answer at the host's, too, for a block."""
        with contextlib.ExitStack() as held:
            for port in ports:
                held.enter_context(_lent(self.host, port))
            yield

    def from_host(self, function: Callable[[], T]) -> T:
        """Run `function` in a thread of its own that works on that host, with its resolver.

        Threads and processes that it starts do, too.
        """

        def run() -> T:
            netns.setns(self.host, flags=0)
            unshare(Namespace.MOUNT)
            mount("none", Path("/"), "", MS_REC | MS_SLAVE)
            mount(str(self.place / "resolv.conf"), Path("/etc/resolv.conf").resolve(), "", MS_BIND)
            return function()

        return in_own_thread(run, "inner-host")


@contextmanager
def inner_internet(place: Path) -> Iterator[InnerInternet]:
    """Have them for a block. `place` is an empty directory."""
    mark = uuid.uuid4().hex[:8]
    inner = InnerInternet(f"inner-host-{mark}", f"inner-net-{mark}", place)
    (place / "resolv.conf").write_text(f"nameserver {RESOLVER}\n")
    with contextlib.ExitStack() as held:
        for name in (inner.host, inner.internet):
            in_own_thread(partial(_make, name), "netns")
            held.callback(remove_network, name)
        wire_between(inner.host, "eth0", inner.internet, "eth0")
        in_network(inner.internet, lambda: _settle(_internet_addresses(), "eth0", None))
        in_network(inner.host, lambda: _settle([HOST_ADDRESS, DOCKER_BRIDGE], "eth0", GATEWAY))
        for name in (inner.internet, inner.host):
            held.enter_context(_served(inner, name))
        held.enter_context(_resolving(inner))
        held.enter_context(_noting(inner))
        yield inner


def _internet_addresses() -> list[str]:
    return [GATEWAY, PUBLIC, OTHER_PUBLIC, RESOLVER, METADATA, *PRIVATE, DENIED]


def _make(name: str) -> None:
    unshare(Namespace.NETWORK)
    netns.attach(name, threading.get_native_id())


def wire_between(one: str, link: str, other: str, other_link: str) -> None:
    """Lay a wire between two netns, by the names that its ends have there."""
    end = os.open(f"/run/netns/{other}", os.O_RDONLY)
    try:

        def make() -> None:
            with IPRoute() as route:
                peer = {"ifname": other_link, "net_ns_fd": end}
                route.link("add", ifname=link, kind="veth", peer=peer)

        in_network(one, make)
    finally:
        os.close(end)


def _settle(addresses: list[str], link: str, gateway: str | None) -> None:
    """In a netns: bring all up. The first address is that of the wire."""
    with IPRoute() as route:
        lo = route.link_lookup(ifname="lo")[0]
        wire = route.link_lookup(ifname=link)[0]
        route.link("set", index=lo, state="up")
        route.addr("add", index=wire, address=addresses[0], prefixlen=24)
        for address in addresses[1:]:
            route.addr("add", index=lo, address=address, prefixlen=32)
        route.link("set", index=wire, state="up")
        if gateway:
            route.route("add", dst="default", gateway=gateway)


@contextmanager
def _served(inner: InnerInternet, name: str) -> Iterator[None]:
    """Serve pages at every address of a netns, over TCP; and note who was asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            inner.reached.append(self.connection.getsockname()[0])
            body = inner.pages.get(self.path)
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Type", "text/html")  # or pip does not read it
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with _serving(in_network(name, lambda: http.server.ThreadingHTTPServer(("", PORT), Handler))):
        yield


@contextmanager
def _lent(name: str, port: int) -> Iterator[None]:
    """Pass on what comes to a port of a netns' loopback, to that of this one's."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", port)) as there:
                back = threading.Thread(target=_pass_on, args=(there, self.request), daemon=True)
                back.start()
                _pass_on(self.request, there)
                back.join()

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, block_on_close = True, False

    with _serving(in_network(name, lambda: Server(("127.0.0.1", port), Handler))):
        yield


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for one, how in ((source, socket.SHUT_RD), (target, socket.SHUT_WR)):
        with contextlib.suppress(OSError):
            one.shutdown(how)


@contextmanager
def _serving(server: socketserver.BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, args=(0.1,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def _resolving(inner: InnerInternet) -> Iterator[None]:
    """Answer questions for addresses, over UDP."""

    def listen() -> socket.socket:
        listening = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        listening.bind((RESOLVER, 53))
        return listening

    with _reading(in_network(inner.internet, listen)) as read:

        def answer(listening: socket.socket) -> None:
            question, whence = listening.recvfrom(512)
            listening.sendto(_answer(question, inner.names), whence)

        read(answer)
        yield


def _answer(question: bytes, names: dict[str, str]) -> bytes:
    """Return the answer to a question of one name (RFC 1035)."""
    end = question.index(b"\0", 12)
    labels, at = [], 12
    while at < end:
        labels.append(question[at + 1 : at + 1 + question[at]].decode())
        at += 1 + question[at]
    asked = question[12 : end + 5]
    address = names.get(".".join(labels).lower())
    is_found = (
        address is not None and struct.unpack(">H", question[end + 1 : end + 3])[0] == A_RECORD
    )
    flags = 0x8180 if address is not None else 0x8183
    head = question[:2] + struct.pack(">HHHHH", flags, 1, int(is_found), 0, 0)
    if not is_found or address is None:
        return head + asked
    record = struct.pack(">HHHIH", 0xC00C, A_RECORD, 1, 60, 4) + socket.inet_aton(address)
    return head + asked + record


@contextmanager
def _noting(inner: InnerInternet) -> Iterator[None]:
    """Note to where each packet goes that comes by the wire."""

    def listen() -> socket.socket:
        listening = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_ALL))
        listening.bind(("eth0", ETH_ALL))
        return listening

    with _reading(in_network(inner.internet, listen)) as read:

        def note(listening: socket.socket) -> None:
            packet, (_, kind, direction, *_) = listening.recvfrom(64)
            if direction == PACKET_OUTGOING:
                return
            if kind == ETH_IPV4:
                inner.seen.add(socket.inet_ntoa(packet[16:20]))
            elif kind == ETH_IPV6 and packet[24] != IPV6_MULTICAST:
                inner.seen.add(socket.inet_ntop(socket.AF_INET6, packet[24:40]))

        read(note)
        yield


@contextmanager
def _reading(
    listening: socket.socket,
) -> Iterator[Callable[[Callable[[socket.socket], None]], None]]:
    """Have a thread that calls what it is given for each thing to read, until the block ends."""
    is_over = threading.Event()
    threads: list[threading.Thread] = []
    listening.settimeout(0.1)

    def run(take: Callable[[socket.socket], None]) -> None:
        while not is_over.is_set():
            with contextlib.suppress(TimeoutError):
                take(listening)

    def start(take: Callable[[socket.socket], None]) -> None:
        threads.append(threading.Thread(target=run, args=(take,)))
        threads[-1].start()

    with listening:
        try:
            yield start
        finally:
            is_over.set()
            for thread in threads:
                thread.join()
