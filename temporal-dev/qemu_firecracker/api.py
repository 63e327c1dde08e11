"""Firecracker's HTTP API: from a request to an action on the machine."""

from __future__ import annotations

import json
import socket
import socketserver
import sys
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler
from queue import SimpleQueue
from threading import Event
from typing import Any

from . import schema
from .errors import FatalFault, Fault, unsupported
from .machine import Machine
from .schema import Json

_BODY_BYTES_MAX = 51200

# What the machine shall do; its answer is the response's body.
Action = Callable[[Machine], Json | None]


class Request:
    """A request on its way to the main thread, which serves one after the other, and back."""

    def __init__(self, method: str, path: str, body: bytes) -> None:
        self.description = f"{method} request on {path!r}"
        self.status = 500
        self.answer: Json | None = None
        self.fatal = False
        self.done = Event()
        self.sent = Event()
        self._parse = partial(route, method, path, body)

    def perform(self, machine: Machine) -> None:
        """Do what is asked and note the answer. Nothing escapes: a bug is an answer, too."""
        try:
            self.answer = self._parse()(machine)
            self.status = 204 if self.answer is None else 200
        except Fault as fault:
            self.status, self.answer = fault.status, {"fault_message": str(fault)}
            self.fatal = isinstance(fault, FatalFault)
        except Exception as error:  # the client must get an answer
            self.status, self.answer = 500, {"fault_message": f"Internal error: {error!r}"}


class ApiServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Accepts connections and hands their requests on."""

    daemon_threads = True

    def __init__(self, path: str, requests: SimpleQueue[Any]) -> None:
        self.requests = requests
        super().__init__(path, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up early is no news; anything else is."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ApiServer
    request: socket.socket

    def handle_method(self) -> None:
        """Answer one request."""
        stated_length = self.headers.get("Content-Length") or "0"
        if not stated_length.isdecimal():
            self.close_connection = True
            self._respond(400, {"fault_message": "Invalid header: Content-Length."})
            return
        length = int(stated_length)
        if length > _BODY_BYTES_MAX:
            self.close_connection = True
            message = f"Request payload with size {length} is larger than {_BODY_BYTES_MAX}."
            self._respond(413, {"fault_message": message})
            return
        body = self.rfile.read(length)
        request = Request(self.command, self.path, body)
        self.server.requests.put(request)
        request.done.wait()
        self._respond(request.status, request.answer)
        request.sent.set()

    do_GET = do_PUT = do_PATCH = do_POST = do_DELETE = do_HEAD = handle_method

    def _respond(self, status: int, answer: Json | None) -> None:
        self.send_response(status)
        if answer is not None:
            body = json.dumps(answer).encode()
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if answer is not None:
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is not HTTP in the form of all other errors."""
        self.close_connection = True
        self.request_version = self.protocol_version
        self._respond(code, {"fault_message": f"Invalid request: {message}"})

    def version_string(self) -> str:
        """The Server header."""
        return "Firecracker API"

    def address_string(self) -> str:
        """There is no address on a unix socket."""
        return "unix"

    def log_message(self, format: str, *args: object) -> None:
        """The main thread logs."""


def route(method: str, path: str, body: bytes) -> Action:
    """The action that a request asks for; a `Fault` if it is malformed."""
    first, *rest = path.lstrip("/").rstrip("/").split("/")
    if method == "GET" and body:
        raise Fault("GET request cannot have a body.")
    if first in _UNSUPPORTED:
        raise unsupported(_UNSUPPORTED[first])
    known = _ROUTES.get((method, first))
    if method in ("PUT", "PATCH") and not body:
        raise Fault(f"Empty {method} request.")
    if known is None:
        raise Fault(f"Invalid request method and/or path: {method} {first}.")
    return known(rest, body)


_UNSUPPORTED = {
    "balloon": "The balloon device",
    "cpu-config": "cpu-config",
    "mmds": "MMDS",
    "vsock": "The vsock device",
}


def _get_instance(rest: list[str], body: bytes) -> Action:
    return Machine.describe


def _get_version(rest: list[str], body: bytes) -> Action:
    return Machine.version


def _get_machine_config(rest: list[str], body: bytes) -> Action:
    return Machine.machine_config


def _get_vm_config(rest: list[str], body: bytes) -> Action:
    if rest[:1] != ["config"]:
        raise Fault("Invalid request method and/or path: GET vm.")
    return Machine.config


def _put_boot_source(rest: list[str], body: bytes) -> Action:
    source = schema.parse(body, schema.BOOT_SOURCE)
    return lambda machine: machine.put_boot_source(source)


def _put_machine_config(rest: list[str], body: bytes) -> Action:
    config = schema.parse(body, schema.MACHINE_CONFIG)
    defaults = {"smt": False, "track_dirty_pages": False, "huge_pages": "None"}
    return lambda machine: machine.update_machine({**defaults, **config})


def _patch_machine_config(rest: list[str], body: bytes) -> Action:
    update = schema.parse(body, schema.MACHINE_CONFIG_UPDATE)
    if not update:
        raise Fault("Empty PATCH request.")
    return lambda machine: machine.update_machine(update)


def _put_drive(rest: list[str], body: bytes) -> Action:
    drive = _parse_with_id(rest, body, schema.DRIVE, "drive_id")
    return lambda machine: machine.put_drive(drive)


def _put_interface(rest: list[str], body: bytes) -> Action:
    interface = _parse_with_id(rest, body, schema.NETWORK_INTERFACE, "iface_id")
    return lambda machine: machine.put_interface(interface)


def _put_entropy(rest: list[str], body: bytes) -> Action:
    entropy = schema.parse(body, schema.ENTROPY)
    return lambda machine: machine.put_entropy(entropy)


def _put_logger(rest: list[str], body: bytes) -> Action:
    settings = schema.parse(body, schema.LOGGER)
    return lambda machine: machine.put_logger(settings)


def _put_metrics(rest: list[str], body: bytes) -> Action:
    settings = schema.parse(body, schema.METRICS)
    return lambda machine: machine.put_metrics(settings)


def _put_action(rest: list[str], body: bytes) -> Action:
    actions: dict[str, Action] = {
        "InstanceStart": Machine.start,
        "SendCtrlAltDel": Machine.send_ctrl_alt_del,
        "FlushMetrics": Machine.flush_metrics,
    }
    return actions[schema.parse(body, schema.ACTION)["action_type"]]


def _patch_vm(rest: list[str], body: bytes) -> Action:
    state = schema.parse(body, schema.VM)["state"]
    return Machine.pause if state == "Paused" else Machine.resume


def _patch_device(rest: list[str], body: bytes, feature: str) -> Action:
    def refuse(machine: Machine) -> None:
        machine.require_started()
        raise unsupported(feature)

    return refuse


def _put_snapshot(rest: list[str], body: bytes) -> Action:
    operation = rest[0] if rest else ""
    if operation == "create":
        return _create_snapshot(body)
    if operation == "load":
        return _load_snapshot(body)
    if not operation:
        raise Fault("Missing snapshot operation type.")
    raise Fault(f"Invalid request method and/or path: PUT /snapshot/{operation}.")


def _create_snapshot(body: bytes) -> Action:
    parameters = schema.parse(body, schema.SNAPSHOT_CREATE)

    def create(machine: Machine) -> None:
        if parameters.get("snapshot_type") == "Diff":
            machine.require_started()
            raise unsupported("snapshot_type Diff")
        machine.create_snapshot(parameters)

    return create


def _load_snapshot(body: bytes) -> Action:
    parameters = schema.parse(body, schema.SNAPSHOT_LOAD)
    backend, path = parameters.pop("mem_backend", None), parameters.pop("mem_file_path", None)
    if (backend is None) == (path is None):
        problem = "missing field" if backend is None else "too many fields"
        raise Fault(
            "An error occurred when deserializing the json body of a request: "
            f"{problem}: either `mem_backend` or `mem_file_path` is required."
        )
    backend = backend or {"backend_type": "File", "backend_path": path}
    parameters["mem_backend"] = schema.check(backend, schema.MEM_BACKEND)
    parameters["network_overrides"] = [
        schema.check(override, schema.NETWORK_OVERRIDE)
        for override in parameters.get("network_overrides", [])
    ]
    _refuse_load_features(parameters)
    return lambda machine: machine.load_snapshot(parameters)


def _refuse_load_features(parameters: Json) -> None:
    if parameters["mem_backend"]["backend_type"] == "Uffd":
        raise unsupported("backend_type Uffd")
    for feature in ("enable_diff_snapshots", "track_dirty_pages"):
        if parameters.get(feature):
            raise unsupported(feature, "it makes full snapshots only")


def _parse_with_id(rest: list[str], body: bytes, fields: schema.Schema, key: str) -> Json:
    device_id = rest[0] if rest else ""
    if not device_id:
        raise Fault("The ID cannot be empty.")
    if not all(character == "_" or character.isalnum() for character in device_id):
        raise Fault("API Resource IDs can only contain alphanumeric characters and underscores.")
    device = schema.parse(body, fields)
    if device[key] != device_id:
        raise Fault("The id from the path does not match the id from the body!")
    return device


_ROUTES: dict[tuple[str, str], Callable[[list[str], bytes], Action]] = {
    ("GET", ""): _get_instance,
    ("GET", "version"): _get_version,
    ("GET", "machine-config"): _get_machine_config,
    ("GET", "vm"): _get_vm_config,
    ("PUT", "boot-source"): _put_boot_source,
    ("PUT", "machine-config"): _put_machine_config,
    ("PATCH", "machine-config"): _patch_machine_config,
    ("PUT", "drives"): _put_drive,
    ("PATCH", "drives"): partial(_patch_device, feature="PATCH /drives"),
    ("PUT", "network-interfaces"): _put_interface,
    ("PATCH", "network-interfaces"): partial(_patch_device, feature="PATCH /network-interfaces"),
    ("PUT", "entropy"): _put_entropy,
    ("PUT", "logger"): _put_logger,
    ("PUT", "metrics"): _put_metrics,
    ("PUT", "actions"): _put_action,
    ("PATCH", "vm"): _patch_vm,
    ("PUT", "snapshot"): _put_snapshot,
}
