"""Runs in a guest, as root: tries to reach all that it is told to, in every way that it knows.

It prints what came of it as one line of JSON behind `REPORT `. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable

SECONDS = 4.0
GATEWAY, ADDED = "169.254.0.22", "10.9.9.9"
NAME = "files.example.com"
ETH_IPV4, ETH_IPV6 = 0x0800, 0x86DD
ICMP, TCP, UDP, GRE, SCTP = 1, 6, 17, 47, 132
SIOCGIFHWADDR = 0x8927


def tcp(address: str, port: int = 80, source: str = "") -> str:
    """Ask for a page; returns its first line, or what has gone wrong."""
    try:
        with socket.socket() as one:
            one.settimeout(SECONDS)
            if source:
                one.bind((source, 0))
            one.connect((address, port))
            one.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with one.makefile("rb") as answer:
                return answer.read(400).decode(errors="replace")
    except OSError as error:
        return f"! {error}"


def udp(address: str, port: int, data: bytes) -> str:
    """Send a datagram; returns the answer in hex, or what has gone wrong."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.settimeout(SECONDS)
            one.connect((address, port))
            for _ in range(2):
                one.send(data)
                with contextlib.suppress(TimeoutError):
                    return one.recv(512).hex()
            return "! timed out"
    except OSError as error:
        return f"! {error}"


def question() -> bytes:
    """Return a question for the name's address (RFC 1035)."""
    labels = b"".join(bytes([len(part)]) + part.encode() for part in NAME.split("."))
    return struct.pack(">HHHHHH", 7, 0x0100, 1, 0, 0, 0) + labels + b"\0\0\1\0\1"


def resolve() -> str:
    """Resolve the name as any program does."""
    try:
        return socket.gethostbyname(NAME)
    except OSError as error:
        return f"! {error}"


def six(address: str) -> str:
    """Reach for an address of IPv6."""
    try:
        with socket.socket(socket.AF_INET6) as one:
            one.settimeout(SECONDS)
            one.connect((address, 80))
            return "reached"
    except OSError as error:
        return f"! {error}"


def checksum(data: bytes) -> int:
    """Return the checksum of IP (RFC 1071)."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def packet(source: str, target: str, kind: int) -> bytes:
    """Return an IPv4 packet with a payload that makes sense."""
    ends = socket.inet_aton(source) + socket.inet_aton(target)
    if kind == TCP:  # a SYN
        body = struct.pack(">HHIIBBHHH", 40000, 80, 1, 0, 0x50, 2, 65535, 0, 0)
        body = (
            body[:16]
            + struct.pack(">H", checksum(ends + struct.pack(">HH", TCP, 20) + body))
            + body[18:]
        )
    elif kind == UDP:
        body = struct.pack(">HHHH", 40000, 80, 8, 0)
    elif kind == ICMP:
        body = struct.pack(">BBHHH", 8, 0, 0xF7FD, 1, 1)
    else:
        body = bytes(16)
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, kind, 0) + ends
    return head[:10] + struct.pack(">H", checksum(head)) + head[12:] + body


def six_packet(source: str, target: str) -> bytes:
    """Return an empty datagram in IPv6."""
    ends = b"".join(socket.inet_pton(socket.AF_INET6, end) for end in (source, target))
    return struct.pack(">IHBB", 0x60000000, 8, UDP, 64) + ends + struct.pack(">HHHH", 9, 80, 8, 0)


def hardware(ip: str) -> bytes:
    """Return the MAC address of the gateway."""
    tcp(ip, 9)
    with open("/proc/net/arp") as file:
        for line in file:
            fields = line.split()
            if fields[0] == ip:
                return bytes.fromhex(fields[3].replace(":", ""))
    return b"\xff" * 6


def own_hardware(one: socket.socket) -> bytes:
    """Return the MAC address of eth0."""
    told = fcntl.ioctl(one.fileno(), SIOCGIFHWADDR, struct.pack("256s", b"eth0"))
    return told[18:24]


def raw(sources: list[str], targets: list[str]) -> str:
    """Send frames with any source to any target, and some that are not IPv4; returns how many."""
    count = 0
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as one:
        one.bind(("eth0", 0))
        ends = hardware(GATEWAY) + own_hardware(one)
        for target in targets:
            for source in sources:
                for kind in (ICMP, TCP, UDP, GRE, SCTP):
                    one.send(ends + struct.pack(">H", ETH_IPV4) + packet(source, target, kind))
                    count += 1
        six_head = struct.pack(">IHBB", 0x60000000, 8, UDP, 64)
        for end in ("fd00::2", "fd00::3", "2001:db8::1", "::ffff:10.9.8.7"):
            six_ends = socket.inet_pton(socket.AF_INET6, "fd00::100") + socket.inet_pton(
                socket.AF_INET6, end
            )
            one.send(
                ends
                + struct.pack(">H", ETH_IPV6)
                + six_head
                + six_ends
                + struct.pack(">HHHH", 9, 80, 8, 0)
            )
            count += 1
    return f"{count} frames"


def main() -> None:
    """Do all of it, side by side."""
    with open(sys.argv[1]) as file:
        told = json.load(file)
    report: dict[str, str] = {}
    threads: list[threading.Thread] = []

    def do(name: str, function: Callable[..., str], *arguments: object) -> None:
        def run() -> None:
            report[name] = function(*arguments)

        threads.append(threading.Thread(target=run))
        threads[-1].start()

    for address in told["tcp"]:
        do(f"tcp {address}", tcp, address)
    for address in told["udp"]:
        do(f"udp {address}", udp, address, 80, b"hello")
    for address in told["ports"]:
        host, _, port = address.partition(":")
        do(f"port {address}", tcp, host, int(port))
    for address in told["dns"]:
        do(f"dns {address}", udp, address, 53, question())
    do("resolve", resolve)
    for address in told["six"]:
        do(f"six {address}", six, address)
    for thread in threads:
        thread.join()
    report["raw"] = raw(told["forged"], told["raw"])
    # An address that is not the guest's, from which the kernel itself sends.
    busybox = ["busybox", "ip", "addr", "add", f"{ADDED}/32", "dev", "eth0"]
    os.spawnv(os.P_WAIT, "/bin/busybox", busybox)
    report["forged"] = tcp(told["raw"][0], source=ADDED)
    time.sleep(0.5)
    print("REPORT " + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
