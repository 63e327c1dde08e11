"""The one VMM client: Firecracker's API over its unix socket.

The calls and their bodies are those of Firecracker's OpenAPI description, v1.13; what a later one
has besides is asked for, and done without where it is not known. Blocking.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple
from urllib.parse import quote

import requests
from requests_unixsocket.adapters import UnixAdapter
from urllib3.exceptions import HTTPError

from activities.contract.errors import VmmError
from activities.contract.text import one_line

CONNECT_SECONDS = 10.0
# Firecracker gives its vCPUs 30 s to answer, and then says what went wrong: that is waited for.
CALL_SECONDS = 90.0
SNAPSHOT_SECONDS = 600.0
POLL_SECONDS = 0.01
CLOCK_FIELD = "clock_realtime"
MAX_ANSWER_BYTES = 1 << 20
DONE = (200, 204)
ROOT_DRIVE = "rootfs"
SECOND_MS = 1000


class DriveLimits(NamedTuple):
    """How fast a guest may use a disk; 0 is no limit."""

    bytes_per_second: int = 0
    operations_per_second: int = 0

    def buckets(self) -> dict[str, dict[str, int]]:
        """Return Firecracker's token buckets, each with what a second may take."""
        sizes = {"bandwidth": self.bytes_per_second, "ops": self.operations_per_second}
        return {
            name: {"size": size, "refill_time": SECOND_MS if size else 0}
            for name, size in sizes.items()
        }


NO_LIMITS = DriveLimits()


class _Answer(NamedTuple):
    status: int
    content: bytes


class FirecrackerClient:
    """The API of one VMM, of which nothing is believed: a guest may have taken it over.

    Each call has a connection of its own, since Firecracker refuses an 11th open one. A socket's
    path may have 107 bytes at most (unix(7)), and a VM's directory is longer than that easily; so
    the socket is opened, and reached by its descriptor. It is in a directory in which the VMM
    could do what it liked when it made it: a link that stands there leads nowhere.
    """

    def __init__(self, socket: Path) -> None:
        self._directory = os.open(socket.parent, os.O_RDONLY | os.O_DIRECTORY)
        self._socket = socket

    def __enter__(self) -> FirecrackerClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the VMM's directory."""
        os.close(self._directory)

    def wait_until_up(self, check: Callable[[], None]) -> None:
        """Wait until the VMM answers; `check` ends the wait by raising. Raises VmmError."""
        deadline = time.monotonic() + CONNECT_SECONDS
        while True:
            check()
            try:
                self._request("GET", "/", None, CALL_SECONDS)
            except OSError as error:
                if time.monotonic() > deadline:
                    raise VmmError(f"the VMM does not answer on {self._socket}") from error
                time.sleep(POLL_SECONDS)
            else:
                return

    def version(self) -> str:
        """Return the VMM's version, without a leading v."""
        return self._told("/version", "firecracker_version")

    def state(self) -> str:
        """Return `Not started`, `Running` or `Paused`."""
        return self._told("/", "state")

    def boot_source(self, kernel: str, boot_args: str, initrd: str | None = None) -> None:
        """Set the kernel (a path as the VMM sees it), its arguments and, if any, its initrd."""
        body = {"kernel_image_path": kernel, "boot_args": boot_args}
        if initrd is not None:
            body["initrd_path"] = initrd
        self._call("PUT", "/boot-source", body)

    def root_drive(self, path: str, limits: DriveLimits = NO_LIMITS) -> None:
        """Set the root disk. The path is frozen into snapshots, so it should be relative."""
        self._drive(ROOT_DRIVE, path, limits, is_root=True)

    def drive(self, name: str, path: str, limits: DriveLimits = NO_LIMITS) -> None:
        """Add a disk; the first becomes /dev/vda. The kernel's arguments say which is the root."""
        self._drive(name, path, limits, is_root=False)

    def _drive(self, name: str, path: str, limits: DriveLimits, *, is_root: bool) -> None:
        body: dict[str, object] = {
            "drive_id": name,
            "path_on_host": path,
            "is_root_device": is_root,
            "is_read_only": False,
            # Asynchronous I/O that is pending at a snapshot can freeze the resumed guest.
            "io_engine": "Sync",
        }
        if limits != NO_LIMITS:
            body["rate_limiter"] = {
                name: bucket for name, bucket in limits.buckets().items() if bucket["size"]
            }
        self._call("PUT", f"/drives/{name}", body)

    def lift_root_drives_limits(self) -> None:
        """Have the root disk without limits, also in snapshots."""
        body = {"drive_id": ROOT_DRIVE, "rate_limiter": NO_LIMITS.buckets()}
        self._call("PATCH", f"/drives/{ROOT_DRIVE}", body)

    def network_interface(self, guest_mac: str, tap: str) -> None:
        """Connect `eth0` to a TAP of the VMM's netns."""
        body = {"iface_id": "eth0", "guest_mac": guest_mac, "host_dev_name": tap}
        self._call("PUT", "/network-interfaces/eth0", body)

    def metadata_service(self) -> None:
        """Let the guest reach Firecracker's metadata service, version 2, by `eth0`.

        What is said now is frozen into snapshots, and a loaded VM cannot be given it; the data are
        of each VM, and come with whoever resumes it.
        """
        body = {"version": "V2", "network_interfaces": ["eth0"]}
        self._call("PUT", "/mmds/config", body)

    def machine_config(self, vcpu_count: int, memory_mb: int) -> None:
        """Set the number of vCPUs and the memory in MiB."""
        body = {"vcpu_count": vcpu_count, "mem_size_mib": memory_mb, "smt": False}
        self._call("PUT", "/machine-config", body)

    def entropy(self) -> None:
        """Give the guest a source of randomness."""
        self._call("PUT", "/entropy", {})

    def start(self) -> None:
        """Boot."""
        self._call("PUT", "/actions", {"action_type": "InstanceStart"})

    def pause(self) -> None:
        """Stop the vCPUs."""
        self._call("PATCH", "/vm", {"state": "Paused"})

    def snapshot(self, snapfile: str, memfile: str) -> None:
        """Write a full snapshot of the paused VM."""
        body = {"snapshot_type": "Full", "snapshot_path": snapfile, "mem_file_path": memfile}
        self._call("PUT", "/snapshot/create", body, SNAPSHOT_SECONDS)

    def load(self, snapfile: str, memfile: str, *, set_clock: bool = True) -> bool:
        """Load a snapshot and resume it; must be the first configuring call to a fresh VMM.

        `set_clock` moves the guest's kvm-clock on by the time since the snapshot, where the VMM
        can do that: returns whether it was told to. It is asked, since which version has the field
        is no rule: it was added to older ones, too. A request with a field that is not known is
        refused before anything of it is done.
        """
        body: dict[str, object] = {
            "snapshot_path": snapfile,
            "mem_backend": {"backend_type": "File", "backend_path": memfile},
            "resume_vm": True,
        }
        if set_clock:
            try:
                self._call("PUT", "/snapshot/load", body | {CLOCK_FIELD: True}, SNAPSHOT_SECONDS)
            except VmmError as error:
                if f"unknown field `{CLOCK_FIELD}`" not in error.message:
                    raise
            else:
                return True
        self._call("PUT", "/snapshot/load", body, SNAPSHOT_SECONDS)
        return False

    def _call(
        self, method: str, path: str, body: object = None, seconds: float = CALL_SECONDS
    ) -> dict[str, object]:
        try:
            answer = self._request(method, path, body, seconds)
        except OSError as error:
            raise VmmError(f"{method} {path}: the VMM broke off: {type(error).__name__}") from error
        if answer.status not in DONE:
            raise VmmError(f"{method} {path}: {_fault(answer)}")
        return _json(answer)

    def _request(self, method: str, path: str, body: object, seconds: float) -> _Answer:
        """Ask once. By the adapter alone: a session goes where proxies and redirects say.

        Raises OSError, of which those of requests are, and VmmError.
        """
        with self._own_socket() as socket, closing(UnixAdapter()) as adapter:
            url = f"http+unix://{quote(socket, safe='')}{path}"
            request = requests.Request(method, url, json=body).prepare()
            with adapter.send(request, stream=True, timeout=seconds) as response:
                try:
                    content = response.raw.read(MAX_ANSWER_BYTES + 1, decode_content=False)
                except HTTPError as error:
                    raise ConnectionError(str(error)) from error
        if len(content) > MAX_ANSWER_BYTES:
            raise VmmError(f"{method} {path}: the VMM does not stop answering")
        return _Answer(response.status_code, content)

    def _told(self, path: str, name: str) -> str:
        told = self._call("GET", path)
        if not isinstance(text := told.get(name), str):
            raise VmmError(f"GET {path}: the VMM does not say its {name}")
        return one_line(text)

    @contextmanager
    def _own_socket(self) -> Iterator[str]:
        """Have a path to the VMM's own socket. Raises OSError, VmmError."""
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        socket = os.open(self._socket.name, flags, dir_fd=self._directory)
        try:
            found = os.fstat(socket)
            owner = os.fstat(self._directory).st_uid
            if not stat.S_ISSOCK(found.st_mode) or found.st_uid != owner:
                raise VmmError(f"{self._socket} is not the VMM's socket")
            yield f"/proc/self/fd/{socket}"
        finally:
            os.close(socket)


def _fault(answer: _Answer) -> str:
    told = _json(answer)  # what the HTTP server itself refuses has the key `error`
    text = told.get("fault_message") or told.get("error") or answer.content.decode(errors="replace")
    return f"HTTP {answer.status}: {one_line(str(text))}"


def _json(answer: _Answer) -> dict[str, object]:
    try:
        parsed = json.loads(answer.content)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}
