"""What we rely on in Firecracker, tried on whatever binary stands for it.

By default that is the QEMU stand-in in temporal-dev/. `FIRECRACKER_BINARY` names another one,
`GUEST_KERNEL_DIR` the directory with its `vmlinux.bin`, `GUEST_VCPUS` how many that has drivers for
(2 if it is not given). Needs root (network namespaces). What is expected holds for the stand-in and
for every version of Firecracker since 1.13; where they differ, the test says by which version.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import pytest
import requests
import requests_unixsocket
from devstack.environment import REPOSITORY

FIRECRACKER = os.environ.get("FIRECRACKER_BINARY", str(REPOSITORY / "temporal-dev/firecracker"))
KERNELS = Path("/var/lib/template-manager-dev/fc-kernels")
NETNS_PREFIX = f"fc-api-{os.getpid()}-"
GUEST_IP, HOST_IP = "169.254.0.21", "169.254.0.22"
MEMORY_MIB = 128
# A guest kernel of one CPU needs 1.
VCPUS = int(os.environ.get("GUEST_VCPUS", "2"))
# Real Firecracker on a machine that emulates the guest's kernel boots in up to 80 s.
SLOW_SECONDS = 300.0 if "FIRECRACKER_BINARY" in os.environ else 60.0
BOOT_ARGS = (
    "console=ttyS0 reboot=k panic=1 pci=off quiet loglevel=1 clocksource=kvm-clock "
    f"ip={GUEST_IP}::{HOST_IP}:255.255.255.252:instance:eth0:off:8.8.8.8"
)
GUEST_INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox stty -echo
TTL=X-metadata-token-ttl-seconds TOKEN=X-metadata-token
ask() {  # METHOD PATH [HEADER:VALUE]…
  { printf '%s HTTP/1.1\\r\\n' "$1 $2"; shift 2; printf '%s\\r\\n' "$@" ''; } |
    nc 169.254.169.254 80
}
echo READY
while read -r line; do eval "$line"; done
"""
NOT_BEFORE_START = "The requested operation is not supported before starting the microVM."
NOT_AFTER_START = "The requested operation is not supported after starting the microVM."
NOT_BY_STAND_IN = "is not supported by the QEMU stand-in for Firecracker"

Json = dict[str, Any]

pytestmark = [
    pytest.mark.counts_nothing,
    pytest.mark.comes_first,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]


def wait_until(condition: Callable[[], bool], what: str, seconds: float = SLOW_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(0.02)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_sparse(source: Path, target: Path) -> None:
    subprocess.run(["cp", "--sparse=always", source, target], check=True)


class Network:
    """A network namespace with a TAP for one VM."""

    def __init__(self, number: int, tap: str = "tap0") -> None:
        self.name = f"{NETNS_PREFIX}{number}"
        self.ip("netns", "add", self.name)
        # The stand-in's QEMU leads the guest to the metadata service by way of it.
        self.ip("-n", self.name, "link", "set", "lo", "up")
        self.ip("-n", self.name, "tuntap", "add", tap, "mode", "tap")
        self.ip("-n", self.name, "address", "add", f"{HOST_IP}/30", "dev", tap)
        self.ip("-n", self.name, "link", "set", tap, "up")

    @staticmethod
    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    def wait_for_ping(self) -> None:
        wait_until(self._guest_answers_ping, "the guest's answer to a ping")

    def _guest_answers_ping(self) -> bool:
        ping = ["busybox", "ping", "-c", "1", "-W", "5", GUEST_IP]
        command = ["ip", "netns", "exec", self.name, *ping]
        return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0

    def remove(self) -> None:
        self.ip("netns", "delete", self.name)


class Vm:
    """A Firecracker process with its own directory, its API, and its serial console."""

    def __init__(
        self,
        directory: Path,
        network: Network | None = None,
        *more: str,
        output: IO[bytes] | None = None,
    ) -> None:
        self.directory = directory
        self.serial = directory / "serial.log"
        enter = ["ip", "netns", "exec", network.name] if network else []
        with self.serial.open("wb") as serial:
            self.process = subprocess.Popen(
                [*enter, FIRECRACKER, "--api-sock", "fc.sock", *more],
                cwd=directory,
                stdin=subprocess.PIPE,
                stdout=output or serial,
                stderr=subprocess.STDOUT,
            )
        self._commands = 0
        wait_until(self._answers, "the API socket")

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.serial.read_text()
        try:
            return self.request("GET", "/").status_code == 200
        except requests.ConnectionError:
            return False

    def request(self, method: str, path: str, body: Json | str | None = None) -> requests.Response:
        url = f"http+unix://{quote(str(self.directory / 'fc.sock'), safe='')}{path}"
        text = {"data": body} if isinstance(body, str) else {"json": body}
        # A session keeps a connection per path, and Firecracker takes ten at a time.
        with requests_unixsocket.Session() as session:
            response: requests.Response = session.request(method, url, timeout=SLOW_SECONDS, **text)
        return response

    def get(self, path: str) -> Json:
        response = self.request("GET", path)
        assert response.status_code == 200, response.text
        answer: Json = response.json()
        return answer

    def put(self, path: str, **body: object) -> None:
        self._change("PUT", path, body)

    def patch(self, path: str, **body: object) -> None:
        self._change("PATCH", path, body)

    def _change(self, method: str, path: str, body: Json) -> None:
        response = self.request(method, path, body)
        assert (response.status_code, response.text) == (204, "")

    def connect(self) -> socket.socket:
        """A bare connection to the API."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(SLOW_SECONDS)
        connection.connect(str(self.directory / "fc.sock"))
        return connection

    def refuses(self, method: str, path: str, body: Json | str | None = None) -> str:
        response = self.request(method, path, body)
        assert response.status_code == 400, response.text
        assert list(response.json()) == ["fault_message"]
        message: str = response.json()["fault_message"]
        return message

    @property
    def version(self) -> tuple[int, int]:
        """Major and minor: what differs by version is expected by version."""
        major, minor, *_ = self.get("/version")["firecracker_version"].split(".")
        return int(major), int(minor)

    @property
    def state(self) -> str:
        state: str = self.get("/")["state"]
        return state

    def run(self, command: str) -> str:
        """Run a shell command in the guest; answer its output."""
        self._commands += 1
        begin, end = f"BEGIN-{self._commands}", f"END-{self._commands}"
        assert self.process.stdin is not None
        line = f"echo {begin}; {command}; echo {end}\n"
        self.process.stdin.write(line.encode())
        self.process.stdin.flush()
        pattern = re.compile(rf"^{begin}\r?\n(.*?)^{end}\r?$", re.DOTALL | re.MULTILINE)
        wait_until(lambda: pattern.search(self._console()) is not None, command)
        found = pattern.search(self._console())
        assert found is not None
        return found.group(1).replace("\r", "").strip()

    def send(self, command: str) -> None:
        """Run a command in the guest that has no end."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n".encode())
        self.process.stdin.flush()

    def _console(self) -> str:
        """The console without Firecracker's own log lines, which go to the same output."""
        text = self.serial.read_text(errors="replace")
        return re.sub(r"^\d{4}-\d\d-\d\dT\S+ \[[^]]*\] .*\n", "", text, flags=re.MULTILINE)

    def wait_for_ready(self) -> None:
        wait_until(lambda: "READY" in self._console(), "the guest's READY")

    def ends_with(self) -> int:
        return self.process.wait(timeout=SLOW_SECONDS)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()


@dataclass(frozen=True)
class Snapshot:
    """The files of a snapshot, in a directory of their own."""

    directory: Path

    def copy_to(self, directory: Path) -> None:
        for name in ("rootfs.ext4", "data.img", "memfile", "snapfile"):
            copy_sparse(self.directory / name, directory / name)


LOAD = {
    "snapshot_path": "snapfile",
    "mem_backend": {"backend_type": "File", "backend_path": "memfile"},
    "resume_vm": True,
}


class World:
    """Makes VMs and networks, and clears them away."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._vms: list[Vm] = []
        self._networks: list[Network] = []

    def network(self, tap: str = "tap0") -> Network:
        self._networks.append(Network(time.monotonic_ns() % 10**9, tap))
        return self._networks[-1]

    def vm(
        self,
        network: Network | None = None,
        *more: str,
        snapshot: Snapshot | None = None,
        output: IO[bytes] | None = None,
    ) -> Vm:
        directory = self.directory / f"vm{len(self._vms)}"
        directory.mkdir(parents=True)
        if snapshot is not None:
            snapshot.copy_to(directory)
        self._vms.append(Vm(directory, network, *more, output=output))
        return self._vms[-1]

    def resumed(self, snapshot: Snapshot) -> tuple[Vm, Network]:
        network = self.network()
        vm = self.vm(network, snapshot=snapshot)
        vm.put("/snapshot/load", **LOAD)
        return vm, network

    def clear(self) -> None:
        for vm in self._vms:
            vm.kill()
        for network in self._networks:
            network.remove()


def living_processes(below: Path) -> list[str]:
    """The processes that work in a directory, QEMU's included; zombies do not count."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink().is_relative_to(below):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # gone, or a zombie
    return found


def own_namespaces() -> list[str]:
    return [path.name for path in Path("/run/netns").glob(f"{NETNS_PREFIX}*")]


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """A directory with a short name: socket paths are limited to 108 bytes."""
    directory = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    yield directory
    wait_until(lambda: not living_processes(directory), "no process is left", seconds=5)
    assert own_namespaces() == []
    shutil.rmtree(directory)


@pytest.fixture
def world(scratch: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    """Things of one test. Afterwards as many are left as were there before."""
    directory = scratch / str(abs(hash(request.node.name)))
    before = own_namespaces()
    world = World(directory)
    yield world
    world.clear()
    wait_until(lambda: not living_processes(directory), "no process is left", seconds=5)
    assert own_namespaces() == before


@pytest.fixture(scope="module")
def shared_world(scratch: Path) -> Iterator[World]:
    """Things that several tests look at without changing them."""
    world = World(scratch / "shared")
    yield world
    world.clear()


@pytest.fixture(scope="module")
def kernel() -> Path:
    """The kernel image, made from Debian's package where nobody names one."""
    directory = os.environ.get("GUEST_KERNEL_DIR")
    if directory:
        return Path(directory) / "vmlinux.bin"
    maker = [sys.executable, str(REPOSITORY / "temporal-dev/guest_kernel.py"), str(KERNELS)]
    version = subprocess.check_output(maker, text=True).strip()
    return KERNELS / version / "vmlinux.bin"


@pytest.fixture(scope="module")
def rootfs(scratch: Path) -> Path:
    """A root file system of one static busybox and an init that runs what the console says."""
    tree = scratch / "tree"
    for name in ("bin", "dev", "proc", "sys", "sbin", "tmp"):
        (tree / name).mkdir(parents=True)
    shutil.copy("/usr/bin/busybox", tree / "bin/busybox")
    (tree / "sbin/init").write_text(GUEST_INIT)
    (tree / "sbin/init").chmod(0o755)
    image = scratch / "rootfs.ext4"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, image, "16M"], check=True)
    return image


def configure(vm: Vm, kernel: Path, rootfs: Path) -> None:
    """Everything up to InstanceStart, in the order and with the relative paths that we use."""
    (vm.directory / "vmlinux.bin").symlink_to(kernel)
    copy_sparse(rootfs, vm.directory / "rootfs.ext4")
    (vm.directory / "data.img").write_bytes(bytes(1024 * 1024))
    vm.put("/boot-source", kernel_image_path="vmlinux.bin", boot_args=BOOT_ARGS)
    data = {"drive_id": "data", "path_on_host": "data.img", "is_root_device": False}
    vm.put("/drives/data", **data, is_read_only=True)
    root = {"drive_id": "rootfs", "path_on_host": "rootfs.ext4", "is_root_device": True}
    vm.put("/drives/rootfs", **root, is_read_only=False, io_engine="Sync")
    interface = {"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "02:FC:00:00:00:05"}
    vm.put("/network-interfaces/eth0", **interface)
    vm.put("/mmds/config", version="V2", network_interfaces=["eth0"])
    vm.put("/machine-config", vcpu_count=VCPUS, mem_size_mib=MEMORY_MIB)
    vm.put("/entropy")


@pytest.fixture(scope="module")
def booted(shared_world: World, kernel: Path, rootfs: Path) -> Vm:
    """A VM that booted from a kernel and is left paused, with a snapshot of it taken."""
    network = shared_world.network()
    vm = shared_world.vm(network)
    configure(vm, kernel, rootfs)
    vm.put("/actions", action_type="InstanceStart")
    vm.wait_for_ready()
    network.wait_for_ping()
    vm.run("remembered=first; echo kept > /file; sync")
    return vm


@pytest.fixture(scope="module")
def snapshot(booted: Vm, scratch: Path) -> Snapshot:
    """A full snapshot of the booted VM. The VM goes on afterwards."""
    directory = scratch / "snapshot"
    directory.mkdir()
    booted.patch("/vm", state="Paused")
    create = {"snapshot_path": "snapfile", "mem_file_path": "memfile"}
    booted.put("/snapshot/create", **create, snapshot_type="Full")
    Snapshot(booted.directory).copy_to(directory)
    booted.patch("/vm", state="Resumed")
    return Snapshot(directory)


@pytest.fixture(scope="module")
def idle(shared_world: World) -> Vm:
    """A process in which nothing has been configured."""
    vm = shared_world.vm()
    (vm.directory / "disk").write_bytes(bytes(4096))
    return vm


def is_stand_in(vm: Vm) -> bool:
    return "qemu" in vm.get("/version")["firecracker_version"]


# The command line


def firecracker(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [FIRECRACKER, *arguments]
    return subprocess.run(command, cwd=cwd, text=True, capture_output=True, timeout=30, check=False)


def test_the_version_is_on_the_first_line_of_its_output() -> None:
    first_line = firecracker("--version").stdout.splitlines()[0]
    assert re.match(r"Firecracker v\d+\.\d+\.\d+", first_line)


@pytest.mark.parametrize("arguments", [("--unknown",), ("positional",), ("--api-sock",)])
def test_a_wrong_argument_ends_the_process_with_code_153(arguments: tuple[str, ...]) -> None:
    result = firecracker(*arguments)
    assert result.returncode == 153
    assert "Arguments parsing error" in result.stdout + result.stderr


def test_a_second_process_on_the_same_socket_fails_at_once(idle: Vm) -> None:
    start = time.monotonic()
    result = firecracker("--api-sock", "fc.sock", cwd=idle.directory)
    assert result.returncode == 1
    assert "Failed to open the API socket at: fc.sock" in result.stdout
    assert time.monotonic() - start < 5
    assert idle.state == "Not started"


def test_a_socket_file_that_was_left_behind_is_not_taken_over(world: World) -> None:
    vm = world.vm()
    vm.kill()
    assert (vm.directory / "fc.sock").exists()
    assert firecracker("--api-sock", "fc.sock", cwd=vm.directory).returncode == 1


# Before the start


def test_a_fresh_process_describes_itself(world: World) -> None:
    vm = world.vm(None, "--id", "some-id")
    description = vm.get("/")
    version = vm.get("/version")["firecracker_version"]
    assert description == {
        "id": "some-id",
        "state": "Not started",
        "vmm_version": version,
        "app_name": "Firecracker",
    }


def test_machine_settings_have_defaults_and_are_replaced_or_patched(world: World) -> None:
    vm = world.vm()
    config = vm.get("/machine-config")
    assert (config["vcpu_count"], config["mem_size_mib"]) == (1, 128)

    vm.put("/machine-config", vcpu_count=2, mem_size_mib=256)
    vm.patch("/machine-config", mem_size_mib=512)

    config = vm.get("/machine-config")
    assert (config["vcpu_count"], config["mem_size_mib"]) == (2, 512)
    assert vm.get("/vm/config")["machine-config"] == config


def test_logger_and_metrics_write_to_their_files(world: World) -> None:
    vm = world.vm()
    for name in ("vm.log", "metrics.json"):
        (vm.directory / name).touch()
    vm.put("/logger", log_path="vm.log", level="Info", show_level=True)
    vm.put("/metrics", metrics_path="metrics.json")
    assert "Metrics" in vm.refuses("PUT", "/metrics", {"metrics_path": "other.json"})
    vm.get("/version")
    assert (vm.directory / "vm.log").read_text()


@pytest.mark.parametrize(("path", "field"), [("/logger", "log_path"), ("/metrics", "metrics_path")])
def test_a_missing_log_is_made_since_1_14(world: World, path: str, field: str) -> None:
    vm = world.vm()
    if vm.version >= (1, 14):
        vm.put(path, **{field: "new"})
        assert (vm.directory / "new").exists()
    else:
        assert "No such file" in vm.refuses("PUT", path, {field: "new"})


def test_nothing_configured_is_shown_as_empty(idle: Vm) -> None:
    config = idle.get("/vm/config")
    empty = {"kernel_image_path": "", "initrd_path": None, "boot_args": None}
    assert config.pop("boot-source") == empty
    machine = config.pop("machine-config")
    assert (machine["vcpu_count"], machine["mem_size_mib"]) == (1, 128)
    since_1_16: Json = {"pmem": [], "memory-hotplug": None} if idle.version >= (1, 16) else {}
    nothing = ("balloon", "cpu-config", "entropy", "logger", "metrics", "mmds-config", "vsock")
    lists: Json = {"drives": [], "network-interfaces": [], **since_1_16}
    assert config == {**dict.fromkeys(nothing), **lists}


def test_a_drive_is_writable_unless_it_is_read_only(world: World) -> None:
    vm = world.vm()
    (vm.directory / "disk").write_bytes(bytes(4096))
    vm.put("/drives/a", drive_id="a", path_on_host="disk", is_root_device=True)
    assert vm.get("/vm/config")["drives"] == [
        {
            "drive_id": "a",
            "partuuid": None,
            "is_root_device": True,
            "cache_type": "Unsafe",
            "is_read_only": False,
            "path_on_host": "disk",
            "rate_limiter": None,
            "io_engine": "Sync",
            "socket": None,
        }
    ]


def test_settings_may_be_an_array_in_their_order(world: World) -> None:
    vm = world.vm()
    assert vm.request("PUT", "/machine-config", "[2, 256]").status_code == 204
    assert vm.request("PATCH", "/machine-config", "[1]").status_code == 204
    config = vm.get("/machine-config")
    assert (config["vcpu_count"], config["mem_size_mib"]) == (1, 256)
    assert "invalid length 1" in vm.refuses("PUT", "/machine-config", "[1]")
    assert "invalid length 2" in vm.refuses("PUT", "/boot-source", '["a", "b"]')
    assert "trailing" in vm.refuses("PUT", "/machine-config", '[1,1,false,null,false,"None",1]')


# HTTP

DROPPED: dict[str, tuple[str, str, str]] = {
    "a POST": ("POST", "{}", "Invalid HTTP Method: Unsupported HTTP method."),
    "a HEAD": ("HEAD", "", "Invalid HTTP Method: Unsupported HTTP method."),
    "a body of more than 51200 bytes": (
        "PUT", "{" + " " * 51199 + "}", "Request payload with size 51201 is larger than the limit",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DROPPED)
def test_the_server_itself_refuses(idle: Vm, case: str) -> None:
    """Not as the API does: the key is another one, and it is no JSON to the letter."""
    method, body, reason = DROPPED[case]
    with idle.connect() as connection:
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        connection.sendall(f"{method} /machine-config HTTP/1.1\r\n{length}\r\n{body}".encode())
        answer = ""
        while reason not in answer and (more := connection.recv(65536)):
            answer += more.decode()  # head and body may come one by one
    assert answer.startswith("HTTP/1.1 400")
    assert f'\r\n\r\n{{ "error": "{reason}' in answer
    assert idle.state == "Not started"


def test_a_body_of_51200_bytes_is_read(idle: Vm) -> None:
    assert "vcpu_count" in idle.refuses("PUT", "/machine-config", "{" + " " * 51198 + "}")


def test_a_delete_is_known_since_1_16(idle: Vm) -> None:
    answer = idle.request("DELETE", "/nothing")
    assert answer.status_code == 400
    expected = "fault_message" if idle.version >= (1, 16) else "Unsupported HTTP method"
    assert expected in answer.text


def test_an_eleventh_connection_is_turned_away(world: World) -> None:
    vm = world.vm()
    connections = [vm.connect() for _ in range(10)]
    with vm.connect() as eleventh:
        answer = eleventh.recv(65536).decode()
        assert eleventh.recv(1) == b""  # and closed
    assert answer.startswith("HTTP/1.1 503")
    assert answer.endswith('\r\n\r\n{ "error": "Too many open connections" }')

    for connection in connections:  # the ten go on, one after the other
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    connections.pop().close()
    wait_until(lambda: vm.request("GET", "/").status_code == 200, "the place that is free again")
    for connection in connections:
        connection.close()


DRIVE = {"drive_id": "a", "path_on_host": "disk", "is_root_device": True, "is_read_only": False}
INTERFACE = {"iface_id": "eth0", "host_dev_name": "no-such-tap"}
MACHINE = {"vcpu_count": 1, "mem_size_mib": 128}
CREATE = {"snapshot_path": "a", "mem_file_path": "b"}
MALFORMED = "An error occurred when deserializing the json body of a request"

REFUSED_BEFORE_START: dict[str, tuple[str, str, Json | str | None, str]] = {
    "an unknown path": ("GET", "/nothing", None, "Invalid request method and/or path: GET nothing"),
    "an unknown method": ("PUT", "/vm", {"state": "Paused"}, "Invalid request method and/or path"),
    "an unknown operation": ("PUT", "/snapshot/x", CREATE, "Invalid request method and/or path"),
    "a PUT without a body": ("PUT", "/machine-config", None, "Empty PUT request."),
    "a PATCH without a body": ("PATCH", "/vm", None, "Empty PATCH request."),
    "a GET with a body": ("GET", "/version", {"a": 1}, "GET request cannot have a body."),
    "a body that is not JSON": ("PUT", "/machine-config", "{", MALFORMED),
    "a body that is not an object": ("PUT", "/machine-config", "[]", MALFORMED),
    "a field twice": (
        "PUT", "/machine-config", '{"vcpu_count":1,"vcpu_count":1,"mem_size_mib":128}',
        "duplicate field `vcpu_count`",
    ),
    "a flag that is null": ("PUT", "/machine-config", {**MACHINE, "smt": None}, MALFORMED),
    "a number that JSON has not": (
        "PUT", "/machine-config", '{"vcpu_count":1,"mem_size_mib":NaN}', MALFORMED,
    ),
    "an unknown log level": ("PUT", "/logger", {"level": "Loud"}, "Invalid LevelFilter"),
    "a flag of another type": ("PUT", "/snapshot/load", {**LOAD, "resume_vm": 1}, MALFORMED),
    "a changed balloon": ("PATCH", "/balloon", {"amount_mib": 1}, NOT_BEFORE_START),
    "a balloon without a size": ("PUT", "/balloon", {}, "missing field `amount_mib`"),
    "an unknown field": ("PUT", "/machine-config", {**MACHINE, "cpus": 1}, "unknown field `cpus`"),
    "a missing vCPU count": (
        "PUT", "/machine-config", {"mem_size_mib": 1}, "missing field `vcpu_count`",
    ),
    "a missing kernel path": ("PUT", "/boot-source", {}, "missing field `kernel_image_path`"),
    "a missing TAP name": (
        "PUT", "/network-interfaces/a", {"iface_id": "a"}, "missing field `host_dev_name`",
    ),
    "a missing root flag": ("PUT", "/drives/a", {"drive_id": "a"}, "field `is_root_device`"),
    "a drive without a path": (
        "PUT", "/drives/a", {"drive_id": "a", "is_root_device": True}, "",
    ),
    "text for a number": ("PUT", "/machine-config", {**MACHINE, "vcpu_count": "2"}, MALFORMED),
    "a flag for a number": ("PUT", "/machine-config", {**MACHINE, "vcpu_count": True}, MALFORMED),
    "zero vCPUs": ("PUT", "/machine-config", {**MACHINE, "vcpu_count": 0}, "vCPU"),
    "33 vCPUs": ("PUT", "/machine-config", {**MACHINE, "vcpu_count": 33}, "vCPU"),
    "a negative vCPU count": ("PUT", "/machine-config", {**MACHINE, "vcpu_count": -1}, MALFORMED),
    "an odd vCPU count with SMT": (
        "PUT", "/machine-config", {**MACHINE, "vcpu_count": 3, "smt": True}, "vCPU",
    ),
    "no memory": ("PUT", "/machine-config", {**MACHINE, "mem_size_mib": 0}, "memory size"),
    "no memory in a patch": ("PATCH", "/machine-config", {"mem_size_mib": 0}, "memory size"),
    "an unknown page size": ("PUT", "/machine-config", {**MACHINE, "huge_pages": "1G"}, MALFORMED),
    "a missing kernel": (
        "PUT", "/boot-source", {"kernel_image_path": "none"}, "kernel file cannot be opened",
    ),
    "a missing disk": ("PUT", "/drives/a", {**DRIVE, "path_on_host": "none"}, "No such file"),
    "a NUL byte in a path": ("PUT", "/drives/a", {**DRIVE, "path_on_host": "a\0b"}, ""),
    "another id in the path": ("PUT", "/drives/b", DRIVE, "The id from the path does not match"),
    "a bad id": ("PUT", "/drives/a-b", {**DRIVE, "drive_id": "a-b"}, "API Resource IDs"),
    "an unknown cache type": ("PUT", "/drives/a", {**DRIVE, "cache_type": "x"}, MALFORMED),
    "a bad MAC address": (
        "PUT", "/network-interfaces/eth0", {**INTERFACE, "guest_mac": "02:FC"}, MALFORMED,
    ),
    "an unknown action": ("PUT", "/actions", {"action_type": "Explode"}, MALFORMED),
    "an unknown state": ("PATCH", "/vm", {"state": "Stopped"}, MALFORMED),
    "a start without a kernel": ("PUT", "/actions", {"action_type": "InstanceStart"}, "kernel"),
    "a pause": ("PATCH", "/vm", {"state": "Paused"}, NOT_BEFORE_START),
    "a resume": ("PATCH", "/vm", {"state": "Resumed"}, NOT_BEFORE_START),
    "a snapshot": ("PUT", "/snapshot/create", CREATE, NOT_BEFORE_START),
    "Ctrl+Alt+Del": ("PUT", "/actions", {"action_type": "SendCtrlAltDel"}, NOT_BEFORE_START),
    "a flush of metrics": ("PUT", "/actions", {"action_type": "FlushMetrics"}, NOT_BEFORE_START),
    "a changed drive": ("PATCH", "/drives/a", {"drive_id": "a"}, NOT_BEFORE_START),
    "a load without memory": ("PUT", "/snapshot/load", {"snapshot_path": "a"}, "missing field"),
    "a load with memory twice": (
        "PUT", "/snapshot/load", {**LOAD, "mem_file_path": "memfile"}, "too many fields",
    ),
    "a load without a path": ("PUT", "/snapshot/load", {"mem_file_path": "b"}, "snapshot_path"),
    "a load from an unknown backend": (
        "PUT",
        "/snapshot/load",
        {**LOAD, "mem_backend": {"backend_type": "Tape", "backend_path": "b"}},
        MALFORMED,
    ),
}  # fmt: skip


SINCE_1_16: dict[str, tuple[str, str, Json | None, str]] = {
    "an unknown field of the console": ("PUT", "/serial", {"x": 1}, "unknown field `x`"),
    "a pmem without an id": ("PUT", "/pmem/p", {}, "missing field `id`"),
    "another pmem's id": (
        "PUT", "/pmem/p", {"id": "q", "path_on_host": "disk"}, "The id from the path does not",
    ),
    "hotplug without a size": ("PUT", "/hotplug/memory", {}, "missing field `total_size_mib`"),
    "another hotplug": ("PUT", "/hotplug/x", {}, "Invalid request method and/or path: PUT hotplug"),
    "the state of hotplug": ("GET", "/hotplug/memory", None, NOT_BEFORE_START),
    "changed hotplug": ("PATCH", "/hotplug/memory", {"requested_size_mib": 1}, NOT_BEFORE_START),
    "a vsock without a path": (
        "PUT", "/snapshot/load", {**LOAD, "vsock_override": {}}, "missing field `uds_path`",
    ),
    "a clock that is no flag": ("PUT", "/snapshot/load", {**LOAD, "clock_realtime": 1}, MALFORMED),
}  # fmt: skip


@pytest.mark.parametrize("case", SINCE_1_16)
def test_what_came_with_1_16_is_checked(idle: Vm, case: str) -> None:
    method, path, body, reason = SINCE_1_16[case]
    if idle.version < (1, 16):
        known = path == "/snapshot/load"
        reason = "unknown field" if known else f"Invalid request method and/or path: {method}"
    assert reason in idle.refuses(method, path, body)
    assert idle.state == "Not started"


@pytest.mark.parametrize("case", REFUSED_BEFORE_START)
def test_refused_before_the_start(idle: Vm, case: str) -> None:
    method, path, body, reason = REFUSED_BEFORE_START[case]
    before = idle.get("/vm/config")
    assert reason in idle.refuses(method, path, body)
    assert idle.get("/vm/config") == before
    assert idle.state == "Not started"


MMDS_CONFIG: Json = {"version": "V2", "network_interfaces": ["eth0"]}
MMDS_REFUSED: dict[str, Json] = {
    "at least one ID that does not correspond": {**MMDS_CONFIG, "network_interfaces": ["eth1"]},
    "interface IDs that allow forwarding MMDS requests is empty": {"network_interfaces": []},
    "missing field `network_interfaces`": {"version": "V2"},
    "expected a string": {**MMDS_CONFIG, "network_interfaces": [{}]},
    "unknown variant `V3`": {**MMDS_CONFIG, "version": "V3"},
    "unknown field `other`": {**MMDS_CONFIG, "other": 1},
    "The MMDS IPv4 address is not link local": {**MMDS_CONFIG, "ipv4_address": "10.0.0.1"},
    "invalid IPv4 address syntax": {**MMDS_CONFIG, "ipv4_address": "here"},
}


def test_the_metadata_service_is_configured_for_interfaces_that_there_are(world: World) -> None:
    vm = world.vm(world.network())
    interface = {"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "02:FC:00:00:00:05"}
    vm.put("/network-interfaces/eth0", **interface)
    for reason, body in MMDS_REFUSED.items():
        assert reason in vm.refuses("PUT", "/mmds/config", body)
        assert vm.get("/vm/config")["mmds-config"] is None
    if is_stand_in(vm):
        for more in ({"version": "V1"}, {"imds_compat": True}):
            assert NOT_BY_STAND_IN in vm.refuses("PUT", "/mmds/config", {**MMDS_CONFIG, **more})
    vm.put("/mmds/config", **MMDS_CONFIG)
    default = {"ipv4_address": "169.254.169.254", "imds_compat": False}
    assert vm.get("/vm/config")["mmds-config"] == {**MMDS_CONFIG, **default}
    message = vm.refuses("PUT", "/snapshot/load", LOAD)
    assert "not allowed after configuring boot-specific resources" in message


def test_metadata_is_any_json_at_any_time_and_merged(world: World) -> None:
    vm = world.vm()
    assert vm.get("/mmds") == {}
    assert "is not initialized" in vm.refuses("PATCH", "/mmds", {"a": 1})
    assert "Unrecognized PUT request path `other`" in vm.refuses("PUT", "/mmds/other", {"a": 1})
    assert "deserializing" in vm.refuses("PUT", "/mmds", "no json")
    assert vm.request("PUT", "/mmds", '"text"').status_code == 204
    assert vm.request("GET", "/mmds").json() == "text"
    vm.put("/mmds", a=1, b={"c": "d"})
    vm.patch("/mmds", a=None, b={"e": 2})
    assert vm.get("/mmds") == {"b": {"c": "d", "e": 2}}
    vm.put("/mmds", a="x" * 51000)
    answer = vm.request("PATCH", "/mmds", {"b": "x" * 51000})
    assert answer.status_code == 413
    assert "The MMDS patch request doesn't fit" in answer.json()["fault_message"]
    assert list(vm.get("/mmds")) == ["a"]


UNSUPPORTED: dict[str, tuple[str, str, Json]] = {
    "huge_pages": ("PUT", "/machine-config", {**MACHINE, "huge_pages": "2M"}),
    "track_dirty_pages": ("PUT", "/machine-config", {**MACHINE, "track_dirty_pages": True}),
    "cpu_template": ("PUT", "/machine-config", {**MACHINE, "cpu_template": "T2"}),
    "cpu-config": ("PUT", "/cpu-config", {}),
    "vsock": ("PUT", "/vsock", {"guest_cid": 3, "uds_path": "v"}),
    "balloon": ("PUT", "/balloon", {"amount_mib": 1, "deflate_on_oom": True}),
    "pmem": ("PUT", "/pmem/p", {"id": "p", "path_on_host": "disk"}),
    "hotplug/memory": ("PUT", "/hotplug/memory", {"total_size_mib": 1024}),
    "io_engine Async": ("PUT", "/drives/a", {**DRIVE, "io_engine": "Async"}),
    "rate_limiter": ("PUT", "/drives/a", {**DRIVE, "rate_limiter": {}}),
    "partuuid": ("PUT", "/drives/a", {**DRIVE, "partuuid": "1-2"}),
    "socket": ("PUT", "/drives/a", {**DRIVE, "socket": "s"}),
    "rx_rate_limiter": ("PUT", "/network-interfaces/eth0", {**INTERFACE, "rx_rate_limiter": {}}),
    "Uffd": (
        "PUT", "/snapshot/load",
        {**LOAD, "mem_backend": {"backend_type": "Uffd", "backend_path": "b"}},
    ),
    "enable_diff_snapshots": ("PUT", "/snapshot/load", {**LOAD, "enable_diff_snapshots": True}),
}  # fmt: skip


# What Firecracker says of these requests where it does not take them: they name what is not there.
FIRECRACKERS_OWN = {
    "socket": "Invalid block config",
    "Uffd": "Failed to open snapshot file",
    "enable_diff_snapshots": "Failed to open snapshot file",
}
UNKNOWN_BEFORE_1_16 = ("pmem", "hotplug/memory")


@pytest.mark.parametrize("feature", UNSUPPORTED)
def test_firecracker_takes_what_the_stand_in_refuses_by_its_name(
    world: World, feature: str
) -> None:
    vm = world.vm(world.network())
    (vm.directory / "disk").write_bytes(bytes(4096))
    method, path, body = UNSUPPORTED[feature]
    if is_stand_in(vm):
        message = vm.refuses(method, path, body)
        assert feature in message
        assert NOT_BY_STAND_IN in message
    elif vm.version < (1, 16) and feature in UNKNOWN_BEFORE_1_16:
        assert "Invalid request method and/or path" in vm.refuses(method, path, body)
    elif feature in FIRECRACKERS_OWN:
        assert FIRECRACKERS_OWN[feature] in vm.refuses(method, path, body)
    elif method == "PUT":
        vm.put(path, **body)


def test_an_initrd_is_optional_and_must_be_there(world: World, kernel: Path) -> None:
    vm = world.vm()
    (vm.directory / "vmlinux.bin").symlink_to(kernel)
    (vm.directory / "initrd").write_bytes(b"070701")
    source = {"kernel_image_path": "vmlinux.bin", "boot_args": "quiet"}
    message = vm.refuses("PUT", "/boot-source", {**source, "initrd_path": "none"})
    assert "The initrd file cannot be opened" in message
    assert "No such file" in message
    vm.put("/boot-source", **source, initrd_path="initrd")
    assert vm.get("/vm/config")["boot-source"] == {**source, "initrd_path": "initrd"}


def test_the_stand_in_wants_an_initrd_and_firecracker_vmlinux_alone(world: World) -> None:
    vm = world.vm()
    (vm.directory / "vmlinux.bin").touch()
    body = {"kernel_image_path": "vmlinux.bin"}
    if is_stand_in(vm):
        assert "initrd.img" in vm.refuses("PUT", "/boot-source", body)
    else:
        vm.put("/boot-source", **body)


def test_a_missing_tap_is_made_by_firecracker_and_refused_by_the_stand_in(world: World) -> None:
    """As root Firecracker makes one, which nobody has set up."""
    vm = world.vm(world.network())
    if is_stand_in(vm):
        message = vm.refuses("PUT", "/network-interfaces/eth0", INTERFACE)
        assert "Open tap device failed" in message
        assert "no-such-tap" in message
    else:
        vm.put("/network-interfaces/eth0", **INTERFACE)


def test_a_tap_that_another_process_holds_is_refused(world: World) -> None:
    network = world.network()
    interface = {"iface_id": "eth0", "host_dev_name": "tap0"}
    world.vm(network).put("/network-interfaces/eth0", **interface)
    other = world.vm(network)
    assert "busy" in other.refuses("PUT", "/network-interfaces/eth0", interface)


def test_a_second_root_device_is_refused(world: World) -> None:
    vm = world.vm()
    (vm.directory / "disk").write_bytes(bytes(4096))
    vm.put("/drives/a", **DRIVE)
    vm.put("/drives/a", **DRIVE)
    message = vm.refuses("PUT", "/drives/b", {**DRIVE, "drive_id": "b"})
    assert "root block device already exists" in message


# A running VM


def test_the_guest_has_what_was_configured(booted: Vm) -> None:
    assert booted.run("nproc") == str(VCPUS)
    assert booted.run("hostname") == "instance"
    assert booted.run("cat /sys/class/net/eth0/address") == "02:fc:00:00:00:05"
    assert "rw" in booted.run("cat /proc/cmdline").split()
    kib = int(booted.run("awk '/MemTotal/ {print $2}' /proc/meminfo"))
    assert MEMORY_MIB * 1024 * 0.7 < kib <= MEMORY_MIB * 1024


def test_the_root_device_is_the_first_disk_whatever_the_order(booted: Vm) -> None:
    assert booted.run("cat /sys/block/vda/size") == str(16 * 2048)
    assert booted.run("cat /sys/block/vdb/size /sys/block/vdb/ro").split() == ["2048", "1"]


def test_the_guest_has_a_random_number_device(booted: Vm) -> None:
    read = "dd if=/dev/hwrng bs=16 count=1 2>/dev/null | hexdump -C | head -1"
    assert booted.run(read) != booted.run(read)


def test_a_disk_with_a_limit_is_as_slow_as_that_until_it_is_lifted(booted: Vm) -> None:
    """The stand-in, which has no limits, says so, and leaves the disk as it was."""
    two_a_second = {"ops": {"size": 2, "refill_time": 1000}}
    if is_stand_in(booted):
        limited = {"drive_id": "data", "rate_limiter": two_a_second}
        assert NOT_BY_STAND_IN in booted.refuses("PATCH", "/drives/data", limited)
        drives = booted.get("/vm/config")["drives"]
        assert [drive["rate_limiter"] for drive in drives] == [None, None]
        return
    booted.patch("/drives/data", drive_id="data", rate_limiter=two_a_second)
    began = time.monotonic()
    booted.run("/bin/busybox dd if=/dev/vdb of=/dev/null bs=4096 count=20 iflag=direct 2>/dev/null")
    assert time.monotonic() - began > 8
    none = {"size": 0, "refill_time": 0}
    booted.patch("/drives/data", drive_id="data", rate_limiter={"bandwidth": none, "ops": none})
    drives = booted.get("/vm/config")["drives"]
    assert [drive["rate_limiter"] for drive in drives] == [None, None]


REFUSED_AFTER_START: dict[str, tuple[str, str, Json]] = {
    "a kernel": ("PUT", "/boot-source", {"kernel_image_path": "vmlinux.bin"}),
    "machine settings": ("PUT", "/machine-config", MACHINE),
    "patched machine settings": ("PATCH", "/machine-config", {"vcpu_count": 1}),
    "an entropy device": ("PUT", "/entropy", {}),
    "a logger": ("PUT", "/logger", {"log_path": "x.log"}),
    "metrics": ("PUT", "/metrics", {"metrics_path": "x.json"}),
    "a balloon": ("PUT", "/balloon", {"amount_mib": 1, "deflate_on_oom": True}),
    "a vsock": ("PUT", "/vsock", {"guest_cid": 3, "uds_path": "v"}),
    "a start": ("PUT", "/actions", {"action_type": "InstanceStart"}),
    "a load": ("PUT", "/snapshot/load", LOAD),
}


@pytest.mark.parametrize("case", REFUSED_AFTER_START)
def test_refused_after_the_start(booted: Vm, case: str) -> None:
    assert booted.refuses(*REFUSED_AFTER_START[case]) == NOT_AFTER_START
    assert booted.state == "Running"


PLUGGED_AFTER_START: dict[str, tuple[str, str, Json | None]] = {
    "a pmem": ("PUT", "/pmem/p", {"id": "p", "path_on_host": "disk"}),
    "a removed drive": ("DELETE", "/drives/data", None),
    "a drive": ("PUT", "/drives/a", DRIVE),
    "a network interface": ("PUT", "/network-interfaces/eth0", INTERFACE),
}


@pytest.mark.parametrize("case", PLUGGED_AFTER_START)
def test_without_pci_nothing_is_plugged_in_after_the_start(booted: Vm, case: str) -> None:
    method, path, body = PLUGGED_AFTER_START[case]
    response = booted.request(method, path, body)
    assert response.status_code == 400
    if booted.version >= (1, 16):
        assert response.json() == {"fault_message": "PCI is not enabled"}
    elif case in ("a drive", "a network interface"):
        assert response.json() == {"fault_message": NOT_AFTER_START}
    assert booted.state == "Running"


def test_the_console_and_hotplug_come_before_the_start(booted: Vm) -> None:
    reason = NOT_AFTER_START if booted.version >= (1, 16) else "Invalid request method and/or path"
    assert reason in booted.refuses("PUT", "/serial", {"serial_out_path": "x"})
    assert reason in booted.refuses("PUT", "/hotplug/memory", {"total_size_mib": 1024})


def test_a_snapshot_of_a_running_vm_is_refused(booted: Vm) -> None:
    assert "Create snapshot error" in booted.refuses("PUT", "/snapshot/create", CREATE)
    assert not (booted.directory / "a").exists()


def test_a_paused_vm_stands_still_and_goes_on(booted: Vm) -> None:
    booted.patch("/vm", state="Paused")
    booted.patch("/vm", state="Paused")
    assert booted.state == "Paused"
    booted.patch("/vm", state="Resumed")
    booted.patch("/vm", state="Resumed")
    assert booted.state == "Running"
    assert booted.run("echo $remembered") == "first"


# Snapshots


def test_the_memory_file_has_exactly_the_size_of_the_memory(snapshot: Snapshot) -> None:
    assert (snapshot.directory / "memfile").stat().st_size == MEMORY_MIB * 1024 * 1024


def test_the_memory_file_is_dense(booted: Vm, snapshot: Snapshot) -> None:
    """Every page is written, also those that are zero. (The copies in the tests are sparse.)"""
    assert (booted.directory / "memfile").stat().st_blocks * 512 >= MEMORY_MIB * 1024 * 1024


def test_a_resumed_vm_goes_on_in_another_directory(world: World, snapshot: Snapshot) -> None:
    vm, network = world.resumed(snapshot)
    memory_before = sha256(vm.directory / "memfile")

    assert vm.state == "Running"
    assert vm.run("echo $remembered; cat /file").split() == ["first", "kept"]
    vm.run("echo new > /other; sync; echo 3 > /proc/sys/vm/drop_caches")
    assert vm.run("cat /other") == "new"
    network.wait_for_ping()
    assert vm.run(f"ping -c 1 -W 5 {HOST_IP} > /dev/null && echo answered") == "answered"
    random = "dd if=/dev/hwrng bs=16 count=1 2>/dev/null | hexdump -C | head -1"
    assert vm.run(random) != vm.run(random)

    assert sha256(vm.directory / "memfile") == memory_before
    assert sha256(snapshot.directory / "rootfs.ext4") != sha256(vm.directory / "rootfs.ext4")


def test_two_vms_run_from_one_memory_file(world: World, snapshot: Snapshot) -> None:
    first, _ = world.resumed(snapshot)
    network = world.network()
    second = world.vm(network, snapshot=snapshot)
    memory = first.directory / "memfile"
    (second.directory / "memfile").unlink()
    backend = {"backend_type": "File", "backend_path": str(memory)}
    second.put("/snapshot/load", **{**LOAD, "mem_backend": backend})

    first.run("remembered=one; echo one > /file; sync")
    second.run("echo two > /file; sync")

    assert first.run("echo $remembered; cat /file").split() == ["one", "one"]
    assert second.run("echo $remembered; cat /file").split() == ["first", "two"]
    network.wait_for_ping()


def test_a_vm_that_goes_on_does_not_change_its_snapshot(booted: Vm, snapshot: Snapshot) -> None:
    booted.run("dd if=/dev/zero of=/tmp/noise bs=1M count=4 2>/dev/null; sync")
    assert sha256(booted.directory / "memfile") == sha256(snapshot.directory / "memfile")


def test_a_resumed_vm_can_be_snapshot_again(world: World, snapshot: Snapshot) -> None:
    vm, _ = world.resumed(snapshot)
    vm.run("remembered=second; echo again > /file; sync")
    vm.patch("/vm", state="Paused")
    # Over the very file that the VM reads its memory from.
    vm.put("/snapshot/create", snapshot_path="snapfile", mem_file_path="memfile")
    vm.kill()

    third, network = world.resumed(Snapshot(vm.directory))

    assert third.run("echo $remembered; cat /file").split() == ["second", "again"]
    network.wait_for_ping()


def test_firecracker_takes_a_diff_snapshot_and_the_stand_in_refuses_it(
    world: World, snapshot: Snapshot
) -> None:
    vm, _ = world.resumed(snapshot)
    vm.patch("/vm", state="Paused")
    diff = {**CREATE, "snapshot_type": "Diff"}
    if is_stand_in(vm):
        assert f"Diff {NOT_BY_STAND_IN}" in vm.refuses("PUT", "/snapshot/create", diff)
        assert not (vm.directory / "a").exists()
    else:
        vm.put("/snapshot/create", **diff)
        assert (vm.directory / "b").stat().st_size == MEMORY_MIB << 20


def test_a_vm_under_heavy_disk_io_resumes_with_working_disks(
    world: World, snapshot: Snapshot
) -> None:
    vm, _ = world.resumed(snapshot)
    write = "dd if=/dev/zero of=/noise bs=64k count=32 conv=fsync 2>/dev/null"
    vm.run(f"while :; do {write}; done & :")
    for _ in range(3):
        vm.patch("/vm", state="Paused")
        vm.put("/snapshot/create", snapshot_path="snapfile", mem_file_path="memfile")
        resumed, _ = world.resumed(Snapshot(vm.directory))
        assert resumed.run("echo works > /proof; sync; cat /proof") == "works"
        resumed.kill()
        vm.patch("/vm", state="Resumed")


def test_a_loaded_vm_waits_until_it_is_resumed(world: World, snapshot: Snapshot) -> None:
    vm = world.vm(world.network(), snapshot=snapshot)
    vm.put("/logger", level="Warning")
    vm.put("/snapshot/load", snapshot_path="snapfile", mem_file_path="memfile")
    assert vm.state == "Paused"
    assert vm.get("/machine-config")["vcpu_count"] == VCPUS
    drives = {drive["drive_id"]: drive for drive in vm.get("/vm/config")["drives"]}
    assert drives["rootfs"]["path_on_host"] == "rootfs.ext4"
    vm.patch("/vm", state="Resumed")
    assert vm.run("echo $remembered") == "first"


def test_a_loaded_vm_may_have_another_tap(world: World, snapshot: Snapshot) -> None:
    network = world.network(tap="other0")
    vm = world.vm(network, snapshot=snapshot)
    override = {"iface_id": "eth0", "host_dev_name": "other0"}
    vm.put("/snapshot/load", **LOAD, network_overrides=[override])
    network.wait_for_ping()


@dataclass(frozen=True)
class Behind:
    """How far a guest's clock is behind, in seconds: on a busy machine it is long in answering."""

    least: float
    most: float

    @classmethod
    def of(cls, vm: Vm) -> Behind:
        asked = time.time()
        told = int(vm.run("date +%s"))
        return cls(asked - told - 1, time.time() - told)

    def may_be(self, other: Behind) -> bool:
        """Whether both may be the same, give or take five seconds."""
        return self.least - 5 < other.most and other.least - 5 < self.most


def test_a_load_sets_the_clock_since_1_16(world: World, booted: Vm, snapshot: Snapshot) -> None:
    """Counted from the snapshot: how wrong the clock was then, it still is."""
    before = Behind.of(booted)
    vm = world.vm(world.network(), snapshot=snapshot)
    load = {**LOAD, "clock_realtime": True}
    if vm.version < (1, 16):
        assert "unknown field `clock_realtime`" in vm.refuses("PUT", "/snapshot/load", load)
        return
    taken = (snapshot.directory / "snapfile").stat().st_mtime
    wait_until(lambda: time.time() - taken > 10, "ten seconds")
    vm.put("/snapshot/load", **load)
    assert Behind.of(vm).may_be(before)


def test_without_the_flag_the_clock_goes_on_from_the_snapshot_since_1_16(
    world: World, booted: Vm, snapshot: Snapshot
) -> None:
    """Before, it was moved on without being asked to."""
    before = Behind.of(booted)
    taken = (snapshot.directory / "snapfile").stat().st_mtime
    wait_until(lambda: time.time() - taken > 15, "fifteen seconds")
    stood = time.time() - taken
    vm, _ = world.resumed(snapshot)
    behind = Behind.of(vm)
    if vm.version < (1, 16):
        assert behind.may_be(before)
    else:
        assert behind.most > before.least + stood - 5


def test_a_load_with_a_vsock_that_the_snapshot_has_not_fails(
    world: World, snapshot: Snapshot
) -> None:
    vm = world.vm(world.network(), snapshot=snapshot)
    known = vm.version >= (1, 16)
    load = {**LOAD, "vsock_override": {"uds_path": "v"}}
    message = vm.refuses("PUT", "/snapshot/load", load)
    if not known:
        assert "unknown field `vsock_override`" in message
        return
    assert "Unknown Vsock Device" in message
    assert vm.ends_with() == 1


def test_a_load_after_a_configuration_is_refused(world: World, snapshot: Snapshot) -> None:
    vm = world.vm(world.network(), snapshot=snapshot)
    vm.put("/machine-config", **MACHINE)
    assert "not allowed after configuring" in vm.refuses("PUT", "/snapshot/load", LOAD)
    assert vm.state == "Not started"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


SPOILED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a missing snapshot file": ("snapfile", Path.unlink),
    "a truncated snapshot file": ("snapfile", truncate),
    "a damaged snapshot file": ("snapfile", flip_a_byte),
    "a foreign snapshot file": ("snapfile", lambda path: path.write_bytes(b"x" * 5000)),
    "an empty snapshot file": ("snapfile", lambda path: path.write_bytes(b"")),
    "a missing memory file": ("memfile", Path.unlink),
    "a truncated memory file": ("memfile", truncate),
    "a missing disk": ("rootfs.ext4", Path.unlink),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_load_fails_and_ends_the_process_with(
    world: World, snapshot: Snapshot, case: str
) -> None:
    name, spoil = SPOILED[case]
    vm = world.vm(world.network(), snapshot=snapshot)
    spoil(vm.directory / name)
    assert "Load snapshot error" in vm.refuses("PUT", "/snapshot/load", LOAD)
    assert vm.ends_with() == 1


def test_a_load_without_its_tap_fails_on_the_stand_in(world: World, snapshot: Snapshot) -> None:
    """As root Firecracker makes one, which nobody has set up."""
    vm = world.vm(world.network(tap="other0"), snapshot=snapshot)
    if is_stand_in(vm):
        assert "tap" in vm.refuses("PUT", "/snapshot/load", LOAD)
        assert vm.ends_with() == 1
    else:
        vm.put("/snapshot/load", **LOAD)
        assert vm.run("echo $remembered") == "first"


# The console


def test_a_guest_does_not_wait_for_who_reads_its_console(world: World, snapshot: Snapshot) -> None:
    """What the pipe does not take is lost, and the log says so."""
    ours, theirs = os.pipe()
    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)
    with open(ours, "rb") as console, open(theirs, "wb") as output:
        vm = world.vm(world.network(), "--level", "Error", snapshot=snapshot, output=output)
        output.close()
        (vm.directory / "vm.log").touch()
        vm.put("/logger", log_path="vm.log", level="Error")
        vm.put("/snapshot/load", **LOAD)
        vm.send("busybox seq 10000 13000; reboot -f")
        assert vm.ends_with() == 0
        said = console.read()
    assert b"10000" in said
    assert b"13000" not in said
    assert "Failed the write to serial" in (vm.directory / "vm.log").read_text()


def test_the_console_may_have_a_file_since_1_16(world: World, snapshot: Snapshot) -> None:
    vm, _ = world.resumed(snapshot)
    if vm.version < (1, 16):
        assert "PUT serial" in world.vm().refuses("PUT", "/serial", {"serial_out_path": "x"})
        return
    vm.send("(while :; do echo tick; sleep 1; done) &")
    wait_until(lambda: "tick" in vm.serial.read_text(), "a tick")
    vm.patch("/vm", state="Paused")
    vm.put("/snapshot/create", snapshot_path="snapfile", mem_file_path="memfile")
    vm.kill()

    heir = world.vm(world.network(), snapshot=Snapshot(vm.directory))
    file = heir.directory / "console"
    file.write_text("x" * 1000)
    heir.put("/serial", serial_out_path="console")
    heir.put("/snapshot/load", **LOAD)
    heir.send("echo unheard > /dev/ttyS0")  # for who has a file has no input
    wait_until(lambda: file.read_text().count("tick") > 3, "ticks in the file")
    assert file.read_text().endswith("x")  # written over, not cut off
    assert "unheard" not in file.read_text()
    assert "tick" not in heir.serial.read_text()


def test_a_console_that_cannot_be_opened_ends_the_load(world: World, snapshot: Snapshot) -> None:
    vm = world.vm(world.network(), snapshot=snapshot)
    console = {"serial_out_path": "missing/console"}
    if vm.version < (1, 16):
        assert "PUT serial" in vm.refuses("PUT", "/serial", console)
        return
    vm.put("/serial", **console)
    assert "No such file or directory" in vm.refuses("PUT", "/snapshot/load", LOAD)
    assert vm.ends_with() == 1


# The end

ENDS = {
    "reboots": "reboot -f",
    "panics": "echo c > /proc/sysrq-trigger",
    "loses its init": "exit 1",
}


@pytest.mark.parametrize("end", ENDS)
def test_the_process_ends_with_code_0_when_the_guest(
    world: World, snapshot: Snapshot, end: str
) -> None:
    vm, _ = world.resumed(snapshot)
    vm.send(ENDS[end])
    assert vm.ends_with() == 0


def test_ctrl_alt_del_reaches_the_guest(world: World, snapshot: Snapshot) -> None:
    vm, _ = world.resumed(snapshot)
    vm.put("/actions", action_type="SendCtrlAltDel")
    assert vm.ends_with() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_process_that_is_killed(
    world: World, snapshot: Snapshot, number: signal.Signals
) -> None:
    vm, network = world.resumed(snapshot)
    assert living_processes(vm.directory)
    vm.process.send_signal(number)
    assert vm.ends_with() == -number
    wait_until(lambda: not living_processes(vm.directory), "QEMU is gone", seconds=5)
    # The TAP is free for the next one.
    heir = world.vm(network, snapshot=snapshot)
    heir.put("/snapshot/load", **LOAD)
    network.wait_for_ping()


# The guest's metadata. Lines to the guest are short: a console takes 64 bytes at a time.


def asked(vm: Vm, method: str, path: str, *headers: str) -> tuple[int, str]:
    """What the guest is told by the metadata service: status and body."""
    deadline = time.monotonic() + SLOW_SECONDS
    # A link that has just come up loses the first answers.
    while "can't connect" in (told := vm.run(f"ask {method} {path} {' '.join(headers)}; echo")):
        assert time.monotonic() < deadline, told
    # A terminal ends a line by CR LF, which has a CR of HTTP's before it: two ends when read.
    head, _, body = told.partition("\n\n\n\n")
    return int(head.split()[1]), body


def take_token(vm: Vm) -> None:
    """Have the guest ask for a token and keep it as `$token`."""
    vm.run("token=$(ask PUT /latest/api/token $TTL:900 | tail -n 1)")


def test_a_guest_reads_its_metadata_with_a_token(booted: Vm) -> None:
    booted.put("/mmds", instance={"name": "first", "size": 2})
    assert "not supported after" in booted.refuses("PUT", "/mmds/config", MMDS_CONFIG)
    assert asked(booted, "GET", "/instance/name")[0] == 401
    assert asked(booted, "PUT", "/latest/api/token")[0] == 400
    take_token(booted)
    assert asked(booted, "GET", "/instance/name", "$TOKEN:$token") == (200, "first")
    assert asked(booted, "GET", "/instance", "$TOKEN:$token") == (200, "name\nsize")
    wanted = ("$TOKEN:$token", "Accept:application/json")
    assert asked(booted, "GET", "/instance", *wanted) == (200, '{"name":"first","size":2}')
    assert asked(booted, "GET", "/instance/size", "$TOKEN:$token")[0] == 501
    assert asked(booted, "GET", "/none", "$TOKEN:$token")[0] == 404


def test_a_resumed_guest_reads_what_it_is_given_anew(world: World, snapshot: Snapshot) -> None:
    """Neither the data nor the tokens of before are in a snapshot; the way to them is."""
    vm, _ = world.resumed(snapshot)
    assert vm.get("/mmds") == {}
    default = {"ipv4_address": "169.254.169.254", "imds_compat": False}
    assert vm.get("/vm/config")["mmds-config"] == {**MMDS_CONFIG, **default}
    vm.put("/mmds", instance={"name": "second"})
    assert asked(vm, "GET", "/instance/name", "$TOKEN:$token")[0] == 401
    take_token(vm)
    assert asked(vm, "GET", "/instance/name", "$TOKEN:$token") == (200, "second")
