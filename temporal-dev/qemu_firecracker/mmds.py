"""The metadata service: a JSON document that the API sets and the guest reads by HTTP.

Firecracker answers the guest inside its network device. Here QEMU's own user network does so, by a
wire to the hub that the guest and its TAP are on. It knows one address and port, and starts
`mmds_link.py` for each connection, which leads to this process.
"""

from __future__ import annotations

import ctypes
import json
import secrets
import shlex
import socket
import socketserver
import struct
import time
from http.server import BaseHTTPRequestHandler
from ipaddress import AddressValueError, IPv4Address, IPv4Network
from pathlib import Path
from threading import Thread
from typing import Any

from .errors import Fault, unsupported
from .schema import Json, malformed

DEFAULT_ADDRESS = "169.254.169.254"
_PORT = 80
_DATA_BYTES_MAX = 51200
_TOKEN_SECONDS_MAX = 21600
_TOKEN_PATH = "/latest/api/token"
_IDLE_SECONDS = 60
_LINK = Path(__file__).with_name("mmds_link.py")
_SO_ATTACH_FILTER = 26
_LOAD_HALF, _LOAD_WORD, _EQUAL, _RETURN = 0x28, 0x20, 0x15, 0x06
_IPV4, _ARP = 0x0800, 0x0806
# In a frame: its type, and the addresses in IPv4's header and in ARP.
_TYPE_AT = 12
_FROM, _TO = (26, 28), (30, 38)
_LINK_LOCAL = IPv4Network("169.254.0.0/16")
# Version 1 is what Firecracker takes where none is said.
_DEFAULTS: Json = {"version": "V1", "ipv4_address": DEFAULT_ADDRESS, "imds_compat": False}


class Mmds:
    """The document, and the tokens with which the guest may read it."""

    def __init__(self) -> None:
        self._data: Any = None
        self._tokens: dict[str, float] = {}

    def put(self, data: Any) -> None:
        """Replace the document."""
        if len(_compact(data)) > _DATA_BYTES_MAX:
            message = "MMDS limit exceeded error: The MMDS patch request doesn't fit."
            raise Fault(message, status=413)
        self._data = data

    def patch(self, change: Any) -> None:
        """Merge a change into the document (RFC 7396)."""
        if self._data is None:
            raise Fault("MMDS error: The MMDS data store is not initialized.")
        self.put(_merged(self._data, change))

    def get(self) -> Any:
        """The document as the API shows it."""
        return {} if self._data is None else self._data

    def new_token(self, seconds: int) -> str:
        """A token for the guest that is good for so long."""
        now = time.monotonic()
        self._tokens = {token: end for token, end in self._tokens.items() if end > now}
        token = secrets.token_urlsafe(32)
        self._tokens[token] = now + seconds
        return token

    def knows(self, token: str) -> bool:
        """Whether it is one of ours and still good."""
        return self._tokens.get(token, 0) > time.monotonic()

    def find(self, path: str) -> Any:
        """What is at a path of the document. Raises LookupError."""
        found = self._data
        for key in [key for key in path.split("/") if key]:
            if isinstance(found, list) and key.isdecimal():
                found = found[int(key)]
            elif isinstance(found, dict):
                found = found[key.replace("~1", "/").replace("~0", "~")]
            else:
                raise KeyError(key)
        return found


def checked_config(config: Json, interfaces: list[str]) -> Json:
    """A configuration of the service, whole; a `Fault` if it cannot be."""
    config = {**_DEFAULTS, **config}
    names = config["network_interfaces"]
    if not all(isinstance(name, str) for name in names):
        raise malformed("network_interfaces: invalid type, expected a string")
    try:
        address = IPv4Address(config["ipv4_address"])
    except AddressValueError:
        raise malformed("invalid IPv4 address syntax") from None
    if not names:
        raise _config_error(
            "The list of network interface IDs that allow forwarding MMDS requests is empty."
        )
    if not set(names) <= set(interfaces):
        raise _config_error(
            "The list of network interface IDs provided contains at least one ID that does not "
            "correspond to any existing network interface."
        )
    if address not in _LINK_LOCAL or address.packed[2] in (0, 255):
        raise _config_error("The MMDS IPv4 address is not link local.")
    if config["version"] != "V2":
        raise unsupported("MMDS version V1")
    if config["imds_compat"]:
        raise unsupported("imds_compat")
    return config


def _config_error(message: str) -> Fault:
    return Fault(f"MMMDS config error: {message}")  # as Firecracker spells it


class Wire:
    """Between the guest's hub and QEMU's user network: it carries what is the service's, only.

    The user network would answer all that it sees: connections between guest and host with a reset,
    a question for an address by DHCP with one.
    """

    def __init__(self, address: IPv4Address) -> None:
        self._address = address
        self._network = _network_of(address)
        hosts = [each for each in self._network.hosts() if each != address]
        self._host, self._dns, self._dhcp = hosts[:3]
        # The user network speaks for the address, and asks for the guest's MAC in its own name.
        ours = (int(address), int(self._host))
        self._ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for end, (ip_at, arp_at) in zip(self._ends, (_FROM, _TO), strict=True):
            _attach(end, _only(ours, ip_at, arp_at))

    @property
    def fds(self) -> tuple[int, int]:
        """The guest's end and the user network's."""
        return self._ends[0].fileno(), self._ends[1].fileno()

    def close(self) -> None:
        """Leave it to QEMU."""
        for end in self._ends:
            end.close()

    def arguments(self, name: str, hubs: tuple[int, int], service: str) -> list[str]:
        """QEMU's arguments to connect the TAP `name`, the service, and the guest's `…-port`."""
        link = [str(Path("/proc/self/exe").readlink()), "-I", "-S", str(_LINK), service]
        forward = f"tcp:{self._address}:{_PORT}-cmd:{shlex.join(link)}".replace(",", ",,")
        user = f"user,id={name}-mmds,ipv6=off,restrict=on,net={self._network},host={self._host}"
        user += f",dns={self._dns},dhcpstart={self._dhcp},guestfwd={forward}"
        ends = [
            f"dgram,id={name}-wire{number},local.type=fd,local.str={fd}"
            for number, fd in enumerate(self.fds)
        ]
        ports = [
            f"hubport,id={name}-port,hubid={hubs[0]}",
            f"hubport,id={name}-tap,hubid={hubs[0]},netdev={name}",
            f"hubport,id={name}-out,hubid={hubs[0]},netdev={name}-wire0",
            f"hubport,id={name}-in,hubid={hubs[1]},netdev={name}-wire1",
            f"hubport,id={name}-user,hubid={hubs[1]},netdev={name}-mmds",
        ]
        return [word for netdev in (user, *ends, *ports) for word in ("-netdev", netdev)]


def _network_of(address: IPv4Address) -> IPv4Network:
    """A small network in which the address is one of a host."""
    networks = (IPv4Network((address, bits), strict=False) for bits in range(29, 15, -1))
    return next(each for each in networks if address in set(each.hosts()))


def _only(addresses: tuple[int, int], ip_at: int, arp_at: int) -> bytes:
    """A socket filter (linux/filter.h) for frames of IPv4 and ARP that are of these addresses."""
    first, second = addresses
    program = (
        (_LOAD_HALF, 0, 0, _TYPE_AT),
        (_EQUAL, 0, 2, _IPV4),
        (_LOAD_WORD, 0, 0, ip_at),
        (_EQUAL, 4, 5, first),
        (_EQUAL, 0, 4, _ARP),
        (_LOAD_WORD, 0, 0, arp_at),
        (_EQUAL, 1, 0, first),
        (_EQUAL, 0, 1, second),
        (_RETURN, 0, 0, 0xFFFF),
        (_RETURN, 0, 0, 0),
    )
    return b"".join(struct.pack("=HBBI", *each) for each in program)


def _attach(end: socket.socket, program: bytes) -> None:
    """Have the kernel drop what comes to a socket and is not let through."""
    code = ctypes.create_string_buffer(program, len(program))
    length = len(program) // struct.calcsize("=HBBI")
    end.setsockopt(
        socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", length, ctypes.addressof(code))
    )


class Service(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Answers the guest. Its socket has a name of this network namespace, and no file."""

    daemon_threads = True

    def __init__(self, mmds: Mmds) -> None:
        self.mmds = mmds
        self.name = f"qemu-firecracker-mmds-{secrets.token_hex(8)}"
        self.wires: list[Wire] = []
        super().__init__(f"\0{self.name}", _Handler)

    def netdevs(self, config: Json, name: str, hubs: tuple[int, int]) -> list[str]:
        """QEMU's arguments for an interface of the guest's, and a wire for it in `wires`."""
        self.wires.append(Wire(IPv4Address(config["ipv4_address"])))
        return self.wires[-1].arguments(name, hubs, self.name)

    def start(self) -> None:
        """Serve until this process ends."""
        Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A guest that hangs up, or sends nothing that makes sense, is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_SECONDS
    server: Service

    def do_GET(self) -> None:
        """Answer what is at a path, to who has a token."""
        self._forget_body()
        token = self._header("token")
        if token is None:
            hint = "Use `X-metadata-token` header to specify the session token."
            return self._answer(401, f"No MMDS token provided. {hint}")
        if not self.server.mmds.knows(token):
            return self._answer(401, "MMDS token not valid.")
        try:
            found = self.server.mmds.find(self.path)
        except LookupError:
            return self._answer(404, f"Resource not found: {self.path}.")
        if self.headers.get("Accept") == "application/json":
            return self._answer(200, _compact(found), "application/json")
        return self._answer_plainly(found)

    def do_PUT(self) -> None:
        """Make a token."""
        self._forget_body()
        if "X-Forwarded-For" in self.headers:
            reason = "Reason: Unsupported header name. Key: x-forwarded-for"
            return self._answer(400, f"Invalid header. {reason}")
        if self.path.replace("//", "/") != _TOKEN_PATH:
            return self._answer(404, f"Resource not found: {self.path}.")
        stated = self._header("token-ttl-seconds")
        if stated is None:
            return self._answer(
                400,
                "Token time to live value not found. Use `X-metadata-token-ttl-seconds` header to "
                "specify the token's lifetime.",
            )
        seconds = int(stated) if stated.isdecimal() and len(stated) < 10 else 0
        if not 1 <= seconds <= _TOKEN_SECONDS_MAX:
            return self._answer(
                400,
                f"Invalid time to live value provided for token: {seconds}. Please provide a value "
                f"between 1 and {_TOKEN_SECONDS_MAX}.",
            )
        return self._answer(200, self.server.mmds.new_token(seconds))

    def do_POST(self) -> None:
        """Refuse."""
        self._forget_body()
        self._answer(405, "Not allowed HTTP method.")

    do_PATCH = do_DELETE = do_HEAD = do_POST

    def _answer_plainly(self, found: Any) -> None:
        """As EC2's service does: the names in an object, or the text itself."""
        if isinstance(found, dict):
            names = [f"{name}/" if isinstance(each, dict) else name for name, each in found.items()]
            return self._answer(200, "\n".join(sorted(names)))
        if isinstance(found, str):
            return self._answer(200, found)
        return self._answer(501, "Cannot retrieve value. The value has an unsupported type.")

    def _header(self, name: str) -> str | None:
        for prefix in ("X-metadata", "X-aws-ec2-metadata"):
            value = self.headers.get(f"{prefix}-{name}")
            if value is not None:
                return value
        return None

    def _forget_body(self) -> None:
        # No request of this service has one. Some is read: who closes before resets the answer.
        stated = self.headers.get("Content-Length", "0")
        if stated != "0":
            self.close_connection = True
            self.rfile.read1(_DATA_BYTES_MAX)

    def _answer(self, code: int, body: str, kind: str = "text/plain") -> None:
        content = body.encode()
        self.send_response_only(code, "")
        self.send_header("Server", "Firecracker API")
        if code == 405:
            self.send_header("Allow", "GET, PUT")
        self.send_header("Connection", "close" if self.close_connection else "keep-alive")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def address_string(self) -> str:
        """There is no address on a unix socket."""
        return "guest"

    def log_message(self, format: str, *args: object) -> None:
        """What the guest asks is its own."""


def _merged(target: Any, change: Any) -> Any:
    if not isinstance(change, dict):
        return change
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in change.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merged(merged.get(key), value)
    return merged


def _compact(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False)
