from __future__ import annotations

import contextlib
import http.server
import json
import os
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from activities.contract.errors import VmmError
from activities.microvm.client import CALL_SECONDS, DriveLimits, FirecrackerClient

# RECV_TIMEOUT_SEC of its source: how long it waits for a vCPU.
FIRECRACKERS_VCPU_SECONDS = 30


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """A VMM that remembers what it is asked for and answers as it is told to."""

    daemon_threads = True
    asked: list[tuple[str, str, Any]]
    answer: tuple[int, bytes]
    answers: list[tuple[int, bytes]]
    """What it answers first."""
    open: int
    headers: dict[str, str]

    def forget(self) -> None:
        """Begin."""
        self.asked, self.answer, self.answers = [], (204, b""), []
        self.open, self.headers = 0, {}


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"  # which keeps connections open

    def handle(self) -> None:
        self.server.open += 1
        try:
            super().handle()
        finally:
            self.server.open -= 1

    def _take(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.command, self.path, json.loads(body or b"null")))
        answers = self.server.answers
        status, content = answers.pop(0) if answers else self.server.answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if content:
            self.wfile.write(content)

    do_GET = do_PUT = do_PATCH = _take

    def log_message(self, *_: Any) -> None:
        pass

    def address_string(self) -> str:
        return "vmm"


@pytest.fixture
def vmm(tmp_path: Path) -> Iterator[tuple[Server, FirecrackerClient]]:
    # Deeper than the 107 bytes that a socket's address may have.
    directory = tmp_path / ("d" * 100)
    directory.mkdir()
    here = Path.cwd()
    os.chdir(directory)
    try:
        server = Server("api.sock", Handler)
    finally:
        os.chdir(here)
    server.forget()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    with FirecrackerClient(directory / "api.sock") as client:
        yield server, client
    server.shutdown()
    server.server_close()


LOAD = {
    "snapshot_path": "snapfile",
    "mem_backend": {"backend_type": "File", "backend_path": "memfile"},
    "resume_vm": True,
}
UNKNOWN_FIELD = (
    "An error occurred when deserializing the json body of a request: unknown field "
    "`clock_realtime`, expected one of `snapshot_path`, `mem_file_path` at line 1 column 38."
)


@pytest.mark.parametrize("set_clock", [False, True])
def test_loading_a_snapshot(vmm: tuple[Server, FirecrackerClient], set_clock: bool) -> None:
    server, client = vmm
    assert client.load("snapfile", "memfile", set_clock=set_clock) is set_clock
    body = LOAD | ({"clock_realtime": True} if set_clock else {})
    assert server.asked == [("PUT", "/snapshot/load", body)]


def test_a_vmm_that_cannot_set_the_clock_loads_without(
    vmm: tuple[Server, FirecrackerClient],
) -> None:
    server, client = vmm
    server.answers = [(400, json.dumps({"fault_message": UNKNOWN_FIELD}).encode())]
    assert client.load("snapfile", "memfile") is False
    assert [body for _, _, body in server.asked] == [LOAD | {"clock_realtime": True}, LOAD]


def test_a_load_that_fails_is_not_tried_without_the_clock(
    vmm: tuple[Server, FirecrackerClient],
) -> None:
    server, client = vmm
    server.answer = (400, b'{"fault_message": "Load snapshot error: clock_realtime"}')
    with pytest.raises(VmmError, match="Load snapshot error"):
        client.load("snapfile", "memfile")
    assert len(server.asked) == 1


def test_no_call_leaves_a_connection_open(vmm: tuple[Server, FirecrackerClient]) -> None:
    """Firecracker turns an eleventh open one away."""
    server, client = vmm
    for number in range(20):
        client.boot_source(f"kernel-{number}", "")
        client.root_drive("disk")
        client.machine_config(1, 128)
        client.entropy()
        deadline = time.monotonic() + 30
        while server.open > 0:
            assert time.monotonic() < deadline, f"{server.open} connections are open"
            time.sleep(0.01)
    assert len(server.asked) == 80


def test_what_the_http_server_refuses_is_in_the_error(
    vmm: tuple[Server, FirecrackerClient],
) -> None:
    server, client = vmm
    server.answer = (503, b'{"error": "Too many open connections"}')
    with pytest.raises(VmmError, match="HTTP 503: Too many open connections"):
        client.start()


def test_firecracker_says_first_what_its_vcpus_do_not_do() -> None:
    assert CALL_SECONDS > 2 * FIRECRACKERS_VCPU_SECONDS


def test_an_initrd_is_named_when_there_is_one(vmm: tuple[Server, FirecrackerClient]) -> None:
    server, client = vmm
    client.boot_source("kernel", "quiet")
    client.boot_source("kernel", "quiet", "initrd.img")
    source = {"kernel_image_path": "kernel", "boot_args": "quiet"}
    named = source | {"initrd_path": "initrd.img"}
    assert [body for _, _, body in server.asked] == [source, named]


def test_a_disk_has_the_limits_that_are_set(vmm: tuple[Server, FirecrackerClient]) -> None:
    server, client = vmm
    client.root_drive("disk")
    client.root_drive("disk", DriveLimits(bytes_per_second=64 << 20))
    client.drive("step", "other", DriveLimits(1 << 20, 500))
    limiters = [body.get("rate_limiter") for _, _, body in server.asked]
    assert limiters == [
        None,
        {"bandwidth": {"size": 64 << 20, "refill_time": 1000}},
        {
            "bandwidth": {"size": 1 << 20, "refill_time": 1000},
            "ops": {"size": 500, "refill_time": 1000},
        },
    ]
    assert "rate_limiter" not in server.asked[0][2]


def test_lifting_the_limits_names_both(vmm: tuple[Server, FirecrackerClient]) -> None:
    """One that is not named stays."""
    server, client = vmm
    client.lift_root_drives_limits()
    none = {"size": 0, "refill_time": 0}
    body = {"drive_id": "rootfs", "rate_limiter": {"bandwidth": none, "ops": none}}
    assert server.asked == [("PATCH", "/drives/rootfs", body)]


def test_what_firecracker_refuses_is_in_the_error(vmm: tuple[Server, FirecrackerClient]) -> None:
    server, client = vmm
    server.answer = (400, b'{"fault_message": "The kernel file cannot be opened"}')
    with pytest.raises(VmmError, match="The kernel file cannot be opened"):
        client.boot_source("kernel", "quiet")


def test_a_vmm_that_is_gone_is_an_error_of_ours(tmp_path: Path) -> None:
    with FirecrackerClient(tmp_path / "api.sock") as client, pytest.raises(VmmError):
        client.version()


@pytest.fixture
def other_socket(tmp_path: Path) -> Iterator[Server]:
    """A socket of somebody else, with a server that must not be asked."""
    place = tmp_path / "other"
    place.mkdir()
    with Server(str(place / "api.sock"), Handler) as server:
        server.forget()
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def test_a_link_at_the_sockets_place_leads_nowhere(tmp_path: Path, other_socket: Server) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "api.sock").symlink_to(str(other_socket.server_address))
    with FirecrackerClient(own / "api.sock") as client:
        for call in (client.version, client.start, lambda: client.wait_until_up(lambda: None)):
            with pytest.raises(VmmError, match=r"is not the VMM's socket"):
                call()
    assert other_socket.asked == []


@pytest.mark.parametrize("kind", ["file", "FIFO", "directory"])
def test_what_is_no_socket_is_not_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "api.sock"
    make = {"file": path.touch, "FIFO": lambda: os.mkfifo(path), "directory": path.mkdir}
    make[kind]()
    with (
        FirecrackerClient(path) as client,
        pytest.raises(VmmError, match=r"is not the VMM's socket"),
    ):
        client.version()


def test_a_socket_of_another_user_is_not_asked(vmm: tuple[Server, FirecrackerClient]) -> None:
    server, client = vmm
    os.chown(str(server.server_address), 12345, 12345, dir_fd=client._directory)
    with pytest.raises(VmmError, match=r"is not the VMM's socket"):
        client.start()
    assert server.asked == []


@pytest.fixture
def liar(tmp_path: Path) -> Iterator[tuple[list[bytes], FirecrackerClient]]:
    """A VMM that answers whatever it likes: what stands in the list, in parts, without an end."""
    parts: list[bytes] = []

    class Lying(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            with contextlib.suppress(OSError):
                for part in parts:
                    self.wfile.write(part)
                while True:
                    self.wfile.write(parts[-1])

    path = tmp_path / "api.sock"
    with socketserver.UnixStreamServer(str(path), Lying) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        with FirecrackerClient(path) as client:
            yield parts, client
        server.shutdown()


ENDLESS = b"x" * 65536


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10000\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: ",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n",
        b"",
    ],
)
def test_an_answer_without_an_end_is_an_error(
    liar: tuple[list[bytes], FirecrackerClient], head: bytes
) -> None:
    parts, client = liar
    parts += [head, ENDLESS]
    with pytest.raises(VmmError, match=r"does not stop answering|broke off"):
        client.version()


def test_no_answer_sends_us_elsewhere(vmm: tuple[Server, FirecrackerClient]) -> None:
    server, client = vmm
    server.answer = (302, b"")
    server.headers = {"Location": "http://127.0.0.1:1/"}
    with pytest.raises(VmmError, match="HTTP 302"):
        client.start()
    assert len(server.asked) == 1


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[1]", b"null", b"\xff"])
def test_an_answer_that_is_no_object_is_none(
    vmm: tuple[Server, FirecrackerClient], content: bytes
) -> None:
    server, client = vmm
    server.answer = (200, content)
    with pytest.raises(VmmError, match="the VMM does not say"):
        client.version()
