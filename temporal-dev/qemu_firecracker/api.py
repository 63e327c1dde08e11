"""Firecracker's API: from a request to an action on the machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Event
from typing import Any

from . import schema
from .errors import FatalFault, Fault, after_start, before_start, pci_is_off, unsupported
from .machine import Machine
from .schema import Json

# What the machine shall do; its answer, any JSON, is the response's body; None is no body.
Action = Callable[[Machine], Any]


class Request:
    """A request on its way to the main thread, which serves one after the other, and back."""

    def __init__(self, method: str, path: str, body: bytes) -> None:
        self.description = f"{method} request on {path!r}"
        self.status = 500
        self.answer: Any = None
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


def route(method: str, path: str, body: bytes) -> Action:
    """The action that a request asks for; a `Fault` if it is malformed."""
    first, *rest = path.lstrip("/").rstrip("/").split("/")
    if method == "GET" and body:
        raise Fault("GET request cannot have a body.")
    known = _ROUTES.get((method, first))
    hints = (method, first, rest[:1]) == ("PATCH", "balloon", ["hinting"])
    if method in ("PUT", "PATCH") and not body and not hints:
        raise Fault(f"Empty {method} request.")
    if known is None:
        raise Fault(f"Invalid request method and/or path: {method} {first}.")
    return known(rest, body)


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


def _put_serial(rest: list[str], body: bytes) -> Action:
    settings = schema.parse(body, schema.SERIAL)
    return lambda machine: machine.put_serial(settings)


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


def _delete_device(rest: list[str], body: bytes) -> Action:
    def refuse(machine: Machine) -> None:
        raise pci_is_off() if machine.is_started else before_start()

    return refuse


def _put_pmem(rest: list[str], body: bytes) -> Action:
    _parse_with_id(rest, body, schema.PMEM, "id")

    def refuse(machine: Machine) -> None:
        reason = "QEMU has it on PCI only"
        raise pci_is_off() if machine.is_started else unsupported("pmem", reason)

    return refuse


def _put_unsupported(
    rest: list[str], body: bytes, feature: str, fields: schema.Schema | None = None
) -> Action:
    """Refuse a device that Firecracker takes until the start."""
    if fields is not None:
        schema.parse(body, fields)

    def refuse(machine: Machine) -> None:
        raise after_start() if machine.is_started else unsupported(feature)

    return refuse


def _put_hotplug(rest: list[str], body: bytes) -> Action:
    if rest != ["memory"]:
        raise Fault("Invalid request method and/or path: PUT hotplug.")
    return _put_unsupported(rest, body, "hotplug/memory", schema.MEMORY_HOTPLUG)


def _without_device(rest: list[str], body: bytes, message: str) -> Action:
    """Answer a request about a device that a VM of this process never has."""

    def refuse(machine: Machine) -> None:
        machine.require_started()
        raise Fault(message)

    return refuse


def _get_balloon(rest: list[str], body: bytes) -> Action:
    if rest and rest[0] not in ("statistics", "hinting"):
        raise Fault(f"Unrecognized GET request path `{rest[0]}`.")

    def refuse(machine: Machine) -> None:
        if rest:
            machine.require_started()
        raise Fault("Balloon config error: No balloon device found.")

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
        problem, which = (
            ("missing field", "") if backend is None else ("too many fields", "exclusively ")
        )
        raise Fault(
            "An error occurred when deserializing the json body of a request: "
            f"{problem}: either `mem_backend` or `mem_file_path` {which}is required."
        )
    backend = backend or {"backend_type": "File", "backend_path": path}
    if "vsock_override" in parameters:
        schema.check(parameters["vsock_override"], schema.VSOCK_OVERRIDE)
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


def _get_mmds(rest: list[str], body: bytes) -> Action:
    return lambda machine: machine.mmds.get()


def _put_mmds(rest: list[str], body: bytes) -> Action:
    if rest == ["config"]:
        config = schema.parse(body, schema.MMDS_CONFIG)
        return lambda machine: machine.put_mmds_config(config)
    if rest:
        raise Fault(f"Unrecognized PUT request path `{rest[0]}`.")
    data = schema.parse_any(body)
    return lambda machine: machine.mmds.put(data)


def _patch_mmds(rest: list[str], body: bytes) -> Action:
    change = schema.parse_any(body)
    return lambda machine: machine.mmds.patch(change)


_NO_DEVICE = "Failed perform action on device: Device not found"
_NO_BALLOON = f"Balloon update error: {_NO_DEVICE}"
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
    ("PUT", "serial"): _put_serial,
    ("PUT", "balloon"): partial(
        _put_unsupported, feature="The balloon device", fields=schema.BALLOON
    ),
    ("GET", "balloon"): _get_balloon,
    ("PATCH", "balloon"): partial(_without_device, message=_NO_BALLOON),
    ("PUT", "pmem"): _put_pmem,
    ("PATCH", "pmem"): partial(_patch_device, feature="pmem"),
    ("PUT", "hotplug"): _put_hotplug,
    ("GET", "hotplug"): partial(_without_device, message=f"Internal VMM error: {_NO_DEVICE}"),
    ("PATCH", "hotplug"): partial(
        _without_device, message=f"Memory hotplug update error: {_NO_DEVICE}"
    ),
    ("PUT", "cpu-config"): partial(_put_unsupported, feature="cpu-config"),
    ("PUT", "vsock"): partial(_put_unsupported, feature="The vsock device"),
    ("GET", "mmds"): _get_mmds,
    ("PUT", "mmds"): _put_mmds,
    ("PATCH", "mmds"): _patch_mmds,
    ("DELETE", "drives"): _delete_device,
    ("DELETE", "network-interfaces"): _delete_device,
    ("DELETE", "pmem"): _delete_device,
    ("PUT", "logger"): _put_logger,
    ("PUT", "metrics"): _put_metrics,
    ("PUT", "actions"): _put_action,
    ("PATCH", "vm"): _patch_vm,
    ("PUT", "snapshot"): _put_snapshot,
}
