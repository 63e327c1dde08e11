"""Starting and stopping a stack: this machine's, or a test's own.

Every service is a detached process that outlives the one that started it. Its pid, log and data are
under the state directory (`TEMPLATE_MANAGER_DEV_DIR`, default /var/lib/template-manager-dev).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from activities.contract.results import SweepReport
from activities.disk.data_dir import DataDir
from activities.host.orphans import remove_all
from activities.microvm.network import leftover_networks
from activities.microvm.vm_process import leftover_supervisors, leftover_vms
from devstack import processes
from devstack.environment import APP_PREFIXES, REPOSITORY, StackEnvironment, environment, state_dir
from devstack.ports import StackPorts, port_variable
from devstack.processes import ServiceError
from devstack.services import (
    ALL_PARTS,
    SERVICES,
    TASKS,
    Progress,
    Service,
    app_service,
    print_progress,
)

PORT_SECONDS = 3.0
APPS = ("api", "worker", "host")
"""What builds need."""
ALL_APPS = (*APPS, "rest")


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
    stack: StackEnvironment, progress: Progress = print_progress, apps: Sequence[str] = ALL_APPS
) -> None:
    """Start the product's processes, side by side: none waits for another to be there."""
    start(stack, [app_service(kind) for kind in apps], progress)


def stop_all(stack: StackEnvironment, progress: Progress = print_progress) -> None:
    """Stop what this stack started: the product first, then what it stands on. Data stays.

    The VMs of builds that were at work end too, which else outlive their host: such a build begins
    that step anew when the stack is up again.
    """
    with _locked(stack):
        for name in reversed(_known_names(stack)):
            service = _service(name)
            if processes.stop(stack.files(name), service.stop_seconds):
                progress(f"{name}: stopped")
        for place in stack.state_dir.glob("data*"):
            for item in _end_vms(DataDir(place)).items:
                progress(f"{item.kind} {item.name}: {item.error or 'removed'}")


def _end_vms(data_dir: DataDir) -> SweepReport:
    vms = [*leftover_vms(data_dir), *leftover_supervisors(data_dir), *leftover_networks(data_dir)]
    return remove_all(vms, dry_run=False)


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
    names = [service.name for service in SERVICES] + list(ALL_APPS)
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

    def start_app(
        self, kind: str, name: str | None = None, *, program: Sequence[str] = (), **env: str
    ) -> None:
        """Start one of the product's processes, in the place of one that runs otherwise.

        Under another name it is a further host, with a name and a data directory of its own.
        `program` runs it, if it is not this environment's `template-manager`.
        """
        if kind == "host" and name:
            data = self.environment.state_dir / f"data-{name}"
            own = {"TEMPLATE_MANAGER_HOST": name, "TEMPLATE_MANAGER_DATA_DIR": str(data)}
            env = own | env
        service = app_service(kind, name, env, program)
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
