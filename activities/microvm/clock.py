"""Reaching a guest without an agent in it: ICMP echo and ICMP timestamp (RFC 792).

The sockets are made in the VM's netns and then used from any thread.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from activities.contract.errors import SnapshotNotResumableError
from activities.contract.guest_network import GUEST_ADDRESS
from activities.microvm.network import in_network

# A request's type, and its reply's.
ECHO = (8, 0)
TIMESTAMP = (13, 14)
HEADER = struct.Struct("!BBHHH")
TIMES = struct.Struct("!III")
DAY_MS = 86_400_000
ATTEMPT_SECONDS = 0.2
CLOCK_ATTEMPT_SECONDS = 2.0
CLOCK_ATTEMPTS = 5
EXACT_MS = 5.0
IP_HEADER_WORDS = 0x0F


def ping_until_answered(network: str, seconds: float, check: Callable[[], None]) -> None:
    """Send ICMP echo requests until the guest answers. Raises SnapshotNotResumableError."""
    deadline = time.monotonic() + seconds
    with in_network(network, _icmp_socket) as icmp:
        for sequence in range(1_000_000):
            check()
            if _ask(icmp, ECHO, sequence & 0xFFFF, b"template") is not None:
                return
            if time.monotonic() > deadline:
                raise SnapshotNotResumableError(
                    f"the resumed guest did not answer a ping within {seconds:.0f} s"
                )


@dataclass(frozen=True)
class ClockReading:
    """What a guest's clock showed."""

    skew_ms: float
    """The guest's clock minus the host's."""
    error_ms: float
    """How wrong that may be: half of the time that the answer took, and a millisecond."""


def read_clock(network: str, check: Callable[[], None]) -> ClockReading | None:
    """Read the guest's clock, of several readings the best; None when the guest does not tell.

    An ICMP timestamp has milliseconds since midnight UTC, so a skew over twelve hours wraps.
    """
    best: ClockReading | None = None
    with in_network(network, _icmp_socket) as icmp:
        for sequence in range(CLOCK_ATTEMPTS):
            check()
            reading = _read_once(icmp, sequence)
            if reading and (best is None or reading.error_ms < best.error_ms):
                best = reading
            if best and best.error_ms < EXACT_MS:
                break
    return best


def _read_once(icmp: socket.socket, sequence: int) -> ClockReading | None:
    before, began = _ms_of_day(), time.monotonic()
    payload = TIMES.pack(before, 0, 0)
    answer = _ask(icmp, TIMESTAMP, sequence, payload, CLOCK_ATTEMPT_SECONDS)
    if answer is None or len(answer) < TIMES.size:  # a guest answers what it likes
        return None
    half_ms = (time.monotonic() - began) * 1000 / 2
    received = int(TIMES.unpack_from(answer)[1])
    skew = (received - before - half_ms + DAY_MS / 2) % DAY_MS - DAY_MS / 2
    return ClockReading(skew, half_ms + 1)


def _icmp_socket() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)


def _ms_of_day() -> int:
    return int(time.time() * 1000) % DAY_MS


def _ask(
    icmp: socket.socket,
    kinds: tuple[int, int],
    sequence: int,
    payload: bytes,
    seconds: float = ATTEMPT_SECONDS,
) -> bytes | None:
    kind, reply = kinds
    identity = os.getpid() & 0xFFFF
    head = HEADER.pack(kind, 0, 0, identity, sequence)
    packet = HEADER.pack(kind, 0, _checksum(head + payload), identity, sequence) + payload
    try:
        icmp.sendto(packet, (GUEST_ADDRESS, 0))
    except OSError:  # the neighbour is not there yet
        time.sleep(ATTEMPT_SECONDS / 4)
        return None
    return _answer(icmp, reply, identity, sequence, seconds)


def _answer(
    icmp: socket.socket, reply: int, identity: int, sequence: int, seconds: float
) -> bytes | None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        icmp.settimeout(left)
        try:
            packet = icmp.recv(2048)
        except (TimeoutError, OSError):
            return None
        body = packet[(packet[0] & IP_HEADER_WORDS) * 4 :]
        if len(body) < HEADER.size:
            continue
        kind, _, _, found_identity, found_sequence = HEADER.unpack_from(body)
        if (kind, found_identity, found_sequence) == (reply, identity, sequence):
            return body[HEADER.size :]
    return None


def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071); `data` has an even length here."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF
