"""A stand-in for Firecracker without a machine in it: it answers the API's calls and pings at once.

Usage: `standin_vmm.py --api-sock PATH …`, in the VM's netns. What its guest says on the console is
named by what is in the kernel's file, one of `GUESTS`; then it says that it is ready, or that its
step is done or has failed, as the step is to.
Standard library alone, and nothing of ours: a VMM starts often.
"""

import fcntl
import json
import os
import socketserver
import struct
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

MIB = 1 << 20
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
GUEST_MAC = bytes.fromhex("02fc00000005")
ARP, IPV4, ICMP = 0x0806, 0x0800, 1
ECHO, TIMESTAMP = 8, 13
FRAME_BYTES = 4096
FORGED = (
    b"@tm@ ready-attempt 99999999999999999999 x\n@tm@ start-exit \xff\n@tm@ nothing\n@tm@\n"
    b"@tm@ ready-out " + b"o" * 9000 + b"\n@tm@ out-part " + b"p" * 9000 + b"\n"
    b"@tm@ ready-attempt 1 127\n@tm@ fact " + b"f" * 9000 + b"\n@tm@ exit \xff 1\n@tm@ err\n"
)
GUESTS: dict[str, bytes] = {
    "quiet": b"",
    "endless": b"x" * (60 * MIB) + b"\n",
    "short": b"ab\n" * (3 * MIB),
    "escapes": b"\x1b]0;title\x1b[31m\x00\xff\xc3\r50 %\r\x1b[" * 200_000 + b"\n",
    "forged": FORGED * 300,
}
READY = b"\n@tm@ start other /sbin/init\n@tm@ ready time\n"
DONE = b"\n@tm@ start other /sbin/init\n@tm@ exit 0\n@tm@ done\n"
FAILED = b"\n@tm@ start other /sbin/init\n@tm@ exit 7\n"
FAILURE = b"exit 7 # as the stand-in for Firecracker knows it"
"""In the command of a step that is to fail."""
STEP_DRIVE = Path("/fc-vm/step.ext4")


class Handler(BaseHTTPRequestHandler):
    """Answers one call of the API."""

    protocol_version = "HTTP/1.1"
    state = "Not started"
    kernel = ""

    def do_GET(self) -> None:
        """Answer `/` and `/version`."""
        self._answer(200, {"state": Handler.state, "firecracker_version": "1.13.1"})

    def do_PUT(self) -> None:
        """Do what is asked for, as far as anybody would see it."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/boot-source":
            Handler.kernel = body["kernel_image_path"]
        if self.path == "/actions":
            Handler.state = "Running"
            threading.Thread(target=_say, daemon=True).start()
        if self.path == "/snapshot/create":
            _write_snapshot(Path(body["snapshot_path"]), Path(body["mem_file_path"]))
        if self.path == "/snapshot/load":
            Handler.state = "Running"
            threading.Thread(target=_answer_pings, daemon=True).start()
        self._answer(204)

    def do_PATCH(self) -> None:
        """Pause."""
        self.rfile.read(int(self.headers["Content-Length"]))
        Handler.state = "Paused"
        self._answer(204)

    def address_string(self) -> str:
        """Nobody has an address here."""
        return ""

    def log_message(self, *_: object) -> None:
        """Say nothing: the output is the guest's console."""

    def _answer(self, code: int, body: object = None) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _say() -> None:
    guest = Path(Handler.kernel).read_text()
    end = _end_of_step() if STEP_DRIVE.exists() else READY
    output = GUESTS[guest] + end
    # The supervisor keeps the first 8 MiB: what comes last would not be heard.
    kept = GUESTS[guest][: 7 * MIB] + end
    for content in (kept, output):
        view = memoryview(content)
        while view:
            view = view[os.write(1, view) :]


def _end_of_step() -> bytes:
    return FAILED if FAILURE in STEP_DRIVE.read_bytes() else DONE


def _write_snapshot(snapfile: Path, memfile: Path) -> None:
    snapfile.write_bytes(os.urandom(64 << 10))
    with memfile.open("wb") as file:
        file.write(os.urandom(4 * MIB))
        file.truncate(256 * MIB)


def _answer_pings() -> None:
    tap = open_tap()
    while True:
        if reply := reply_to(os.read(tap, FRAME_BYTES), _icmp_answer):
            os.write(tap, reply)


def open_tap() -> int:
    """Open the VM's end of its network, in its netns."""
    tap = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", b"tap0", IFF_TAP | IFF_NO_PI))
    return tap


def reply_to(frame: bytes, answer: Callable[[bytes], bytes]) -> bytes:
    """Return what a guest sends when it gets a frame, b"" for nothing.

    `answer` is what it makes of an ICMP message: one without its checksum.
    """
    kind = int.from_bytes(frame[12:14], "big")
    if kind == ARP:
        return _arp_reply(frame)
    return _icmp_reply(frame, answer) if kind == IPV4 and frame[23] == ICMP else b""


def _arp_reply(frame: bytes) -> bytes:
    sender, asked = frame[22:32], frame[38:42]
    if frame[20:22] != b"\0\1":
        return b""
    head = frame[6:12] + GUEST_MAC + frame[12:20] + b"\0\2"
    return head + GUEST_MAC + asked + sender


def _icmp_answer(body: bytes) -> bytes:
    now = struct.pack("!I", int(time.time() * 1000) % 86_400_000)
    if body[0] == ECHO:
        return b"\0\0" + body[4:]
    return b"\x0e\0" + body[4:12] + now + now if body[0] == TIMESTAMP else b""


def _icmp_reply(frame: bytes, answer: Callable[[bytes], bytes]) -> bytes:
    size = int.from_bytes(frame[16:18], "big")
    said = answer(frame[34 : 14 + size])
    if not said:
        return b""
    checked = said[:2] + _checksum(said[:2] + b"\0\0" + said[2:]) + said[2:]
    start = frame[14:16] + struct.pack("!H", 20 + len(checked)) + frame[18:24] + b"\0\0"
    header = start + frame[30:34] + frame[26:30]
    header = header[:10] + _checksum(header) + header[12:]
    return frame[6:12] + GUEST_MAC + frame[12:14] + header + checked


def _checksum(data: bytes) -> bytes:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF)


def serve(arguments: list[str], handler: type[Handler]) -> None:
    """Be the program."""
    if "--version" in arguments:
        print("Firecracker v1.13.1")
        return
    path = arguments[arguments.index("--api-sock") + 1]
    with socketserver.ThreadingUnixStreamServer(path, handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    serve(sys.argv, Handler)
