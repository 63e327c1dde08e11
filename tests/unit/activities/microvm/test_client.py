from __future__ import annotations

import http.server
import json
import os
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from activities.contract.errors import VmmError
from activities.microvm.client import FirecrackerClient, can_set_clock


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """A VMM that remembers what it is asked for and answers as it is told to."""

    daemon_threads = True
    asked: list[tuple[str, str, Any]]
    answer: tuple[int, bytes]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def _take(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.command, self.path, json.loads(body or b"null")))
        status, content = self.server.answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
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
    server.asked, server.answer = [], (204, b"")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with FirecrackerClient(directory / "api.sock") as client:
        yield server, client
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("version", "machine", "can"),
    [
        ("1.13.1", "x86_64", False),
        ("1.15.9", "x86_64", False),
        ("1.16.0", "x86_64", True),
        ("v1.16.1", "x86_64", True),
        ("2.0.0-dev", "x86_64", True),
        ("1.16.0", "aarch64", False),
        ("unknown", "x86_64", False),
    ],
)
def test_the_clock_is_set_only_where_firecracker_can(version: str, machine: str, can: bool) -> None:
    assert can_set_clock(version, machine) is can


@pytest.mark.parametrize("set_clock", [False, True])
def test_loading_a_snapshot(vmm: tuple[Server, FirecrackerClient], set_clock: bool) -> None:
    server, client = vmm
    client.load("snapfile", "memfile", set_clock=set_clock)
    body = {
        "snapshot_path": "snapfile",
        "mem_backend": {"backend_type": "File", "backend_path": "memfile"},
        "resume_vm": True,
    } | ({"clock_realtime": True} if set_clock else {})
    assert server.asked == [("PUT", "/snapshot/load", body)]


def test_what_firecracker_refuses_is_in_the_error(vmm: tuple[Server, FirecrackerClient]) -> None:
    server, client = vmm
    server.answer = (400, b'{"fault_message": "The kernel file cannot be opened"}')
    with pytest.raises(VmmError, match="The kernel file cannot be opened"):
        client.boot_source("kernel", "quiet")


def test_a_vmm_that_is_gone_is_an_error_of_ours(tmp_path: Path) -> None:
    with FirecrackerClient(tmp_path / "api.sock") as client, pytest.raises(VmmError):
        client.version()
