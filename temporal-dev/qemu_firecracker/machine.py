"""One VM: what may be done with it when."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import VERSION, clock
from .clock import ClockError
from .config import VmConfig, check_drive_file
from .errors import FatalFault, Fault, after_start, before_start, pci_is_off, unsupported
from .log import Log, Metrics
from .memory import MIB, GuestMemory
from .mmds import Mmds, Service
from .qemu import QEMU, Accelerator, Qemu, boot_arguments, machine_arguments
from .qmp import QmpError
from .schema import Json
from .serial import SerialConsole
from .snapfile import HostTraits, Snapfile, SnapfileError
from .tap import open_tap


class Machine:
    """The life of one VM: not started, then running or paused until its QEMU ends."""

    def __init__(
        self,
        instance_id: str,
        accelerator: Accelerator,
        log: Log,
        metrics: Metrics,
        on_start: Callable[[Qemu], None],
    ) -> None:
        self.state = "Not started"
        self._instance_id = instance_id
        self.qemu: Qemu | None = None
        self._log = log
        self._metrics = metrics
        self._on_start = on_start
        self._config = VmConfig()
        self.mmds = Mmds()
        self._configured = False
        self._taps: dict[str, tuple[str, int]] = {}
        self._accelerator = accelerator
        self._host: HostTraits | None = None
        self._memory: GuestMemory | None = None
        self._serial_path: str | None = None
        self._serial: SerialConsole | None = None
        self._paused_at: float | None = None
        self._tsc_khz: int | None = None

    # Before the start

    def put_boot_source(self, source: Json) -> None:
        """PUT /boot-source"""
        self._configure().set_boot_source(source)

    def update_machine(self, update: Json) -> None:
        """PUT and PATCH /machine-config"""
        self._configure().update_machine(update)

    def put_drive(self, drive: Json) -> None:
        """PUT /drives/{drive_id}"""
        self._require_not_pluggable()
        self._configure().put_drive(drive)

    def put_interface(self, interface: Json) -> None:
        """PUT /network-interfaces/{iface_id}"""
        self._require_not_pluggable()
        config = self._configure()
        config.check_interface(interface)
        self._open_tap(interface)
        config.put_interface(interface)

    def put_entropy(self, entropy: Json) -> None:
        """PUT /entropy"""
        self._configure().set_entropy(entropy)

    def put_mmds_config(self, config: Json) -> None:
        """PUT /mmds/config"""
        self._configure().set_mmds(config)

    def put_serial(self, settings: Json) -> None:
        """PUT /serial"""
        self._require_not_started()
        if "rate_limiter" in settings:
            raise unsupported("rate_limiter")
        self._serial_path = settings.get("serial_out_path")

    def put_logger(self, settings: Json) -> None:
        """PUT /logger"""
        self._require_not_started()
        self._log.configure(settings)

    def put_metrics(self, settings: Json) -> None:
        """PUT /metrics"""
        self._require_not_started()
        self._metrics.configure(settings["metrics_path"])

    def start(self) -> None:
        """PUT /actions InstanceStart"""
        self._require_not_started()
        if self._config.boot_source is None:
            raise Fault("Start microvm error: Cannot start microvm without kernel configuration.")
        if self._accelerator.name == "tcg":
            self._tsc_khz = clock.host_tsc_khz()
        more_arguments = boot_arguments(self._config, self._accelerator, self._tsc_khz)
        memory = GuestMemory.create(self._config.machine["mem_size_mib"] * MIB)
        try:
            qemu = self._launch(memory, more_arguments)
        except (QmpError, OSError) as error:
            memory.close()
            raise Fault(f"Start microvm error: {_reason(error)}") from None
        self._started(qemu, memory)
        clock.wait_for_early_second()
        self._go_on(qemu)

    def load_snapshot(self, parameters: Json) -> None:
        """PUT /snapshot/load. A process in which it fails is of no use any more."""
        self._require_not_started()
        if self._configured:
            raise Fault(
                "Load snapshot error: Loading a microVM snapshot not allowed after configuring "
                "boot-specific resources."
            )
        try:
            with self._metrics.measuring("load_snapshot"):
                self._restore(parameters)
        except (Fault, QmpError, SnapfileError, ClockError, OSError) as error:
            raise FatalFault(
                f"Load snapshot error: Failed to restore from snapshot: {_reason(error)}"
            ) from None
        if parameters.get("resume_vm"):
            self.resume()

    # After the start

    def pause(self) -> None:
        """PATCH /vm Paused"""
        qemu = self.require_started()
        with self._metrics.measuring("pause_vm"):
            self._command(qemu, "stop")
        if self.state == "Running":
            # Not now: the clock stopped before the disk was flushed, which QEMU's answer waits for.
            self._paused_at = qemu.qmp.happened_at("STOP") or time.time()
        self.state = "Paused"

    def resume(self) -> None:
        """PATCH /vm Resumed"""
        qemu = self.require_started()
        with self._metrics.measuring("resume_vm"):
            self._go_on(qemu)

    def create_snapshot(self, parameters: Json) -> None:
        """PUT /snapshot/create"""
        qemu = self.require_started()
        if self.state != "Paused":
            raise Fault(
                "Create snapshot error: Cannot save the microVM state: Operation not allowed: "
                "save/restore unavailable while running"
            )
        try:
            with self._metrics.measuring("full_create_snapshot"):
                self._save(qemu, parameters)
        except (QmpError, OSError) as error:
            raise Fault(f"Create snapshot error: {error}") from None

    def send_ctrl_alt_del(self) -> None:
        """PUT /actions SendCtrlAltDel"""
        keys = [{"type": "qcode", "data": key} for key in ("ctrl", "alt", "delete")]
        self._command(self.require_started(), "send-key", keys=keys)

    def flush_metrics(self) -> None:
        """PUT /actions FlushMetrics"""
        self.require_started()
        self._metrics.flush()

    # At any time

    def describe(self) -> Json:
        """GET /"""
        return {
            "id": self._instance_id,
            "state": self.state,
            "vmm_version": VERSION,
            "app_name": "Firecracker",
        }

    def version(self) -> Json:
        """GET /version"""
        return {"firecracker_version": VERSION}

    def machine_config(self) -> Json:
        """GET /machine-config"""
        return self._config.machine

    def config(self) -> Json:
        """GET /vm/config"""
        return self._config.to_json()

    def kill(self) -> None:
        """End the VM with this process."""
        if self.qemu is not None:
            self.qemu.kill()

    def finish(self) -> None:
        """After the guest's end: wait for its last words."""
        if self._serial is not None:
            self._serial.finish()

    # How

    def require_started(self) -> Qemu:
        """Refuse what needs a started VM."""
        if self.qemu is None:
            raise before_start()
        return self.qemu

    @property
    def is_started(self) -> bool:
        """Whether there is a guest, running or paused."""
        return self.qemu is not None

    def _require_not_started(self) -> None:
        if self.qemu is not None:
            raise after_start()

    def _require_not_pluggable(self) -> None:
        if self.is_started:
            raise pci_is_off()

    def _configure(self) -> VmConfig:
        """The configuration, to be changed: from now on a snapshot cannot be loaded."""
        self._require_not_started()
        self._configured = True
        return self._config

    def _open_tap(self, interface: Json) -> None:
        """Hold an interface's TAP until QEMU does; an interface that is replaced may keep its."""
        interface_id, name = interface["iface_id"], interface["host_dev_name"]
        old_name, old_fd = self._taps.get(interface_id, ("", -1))
        if name == old_name:
            return
        self._taps[interface_id] = (name, open_tap(name))
        if old_name:
            os.close(old_fd)

    def _launch(self, memory: GuestMemory, more_arguments: list[str]) -> Qemu:
        """Start QEMU with the VM stopped."""
        taps = {interface_id: fd for interface_id, (_, fd) in self._taps.items()}
        serial = self._open_serial()
        serial_fd = serial.qemu_end.fileno()
        metadata = self._serve_metadata()
        arguments = machine_arguments(
            self._config, self._accelerator, memory, taps, serial_fd, metadata
        )
        wires = metadata.wires if metadata else []
        fds = (memory.fd, serial_fd, *taps.values(), *(fd for wire in wires for fd in wire.fds))
        qemu = Qemu(arguments + more_arguments, fds)
        for wire in wires:
            wire.close()
        serial.start()
        try:
            self._host = self._accelerator.traits(qemu.qmp.negotiate())
        except QmpError as error:
            qemu.kill()
            raise QmpError(f"{error}: {qemu.messages()}") from None
        return qemu

    def _serve_metadata(self) -> Service | None:
        """Have the guest's metadata service, if there is to be one."""
        if self._config.mmds is None:
            return None
        service = Service(self.mmds)
        service.start()
        return service

    def _open_serial(self) -> SerialConsole:
        self._serial = SerialConsole(self._serial_path, self._log.error)
        return self._serial

    def _started(self, qemu: Qemu, memory: GuestMemory) -> None:
        # QEMU has its own copies: a TAP is free again as soon as QEMU is gone.
        for _, fd in self._taps.values():
            os.close(fd)
        self.qemu = qemu
        self.state = "Paused"
        self._memory = memory
        self._on_start(qemu)

    def _go_on(self, qemu: Qemu) -> None:
        self._command(qemu, "cont")
        self.state = "Running"

    def _save(self, qemu: Qemu, parameters: Json) -> None:
        assert self._memory is not None and self._host is not None
        device_state = qemu.save_device_state()
        self._memory.copy_to(Path(parameters["mem_file_path"]))
        times = (self._paused_at, self._tsc_khz)
        snapfile = Snapfile(self._host, self._config.to_json(), device_state, *times)
        snapfile.write(Path(parameters["snapshot_path"]))

    def _restore(self, parameters: Json) -> None:
        snapfile = Snapfile.read(Path(parameters["snapshot_path"]))
        self._config = VmConfig.from_json(snapfile.config)
        self._apply_overrides(parameters["network_overrides"])
        if "vsock_override" in parameters:  # no snapshot of this process has one
            raise Fault("Failed to get snapshot state from file: Unknown Vsock Device.")
        memory = GuestMemory.open(Path(parameters["mem_backend"]["backend_path"]))
        _check_memory(memory, self._config.machine["mem_size_mib"])
        for drive in self._config.drives:
            check_drive_file(drive)
        for interface in self._config.interfaces:
            self._open_tap(interface)
        qemu = self._launch(memory, ["-incoming", "defer"])
        try:
            _check_host(snapfile.host, self._host)
            qemu.load_device_state(self._state_to_load(snapfile, parameters))
        except (Fault, QmpError, SnapfileError, ClockError) as error:
            qemu.kill()
            raise QmpError(f"{error} {qemu.messages()}") from None
        self._started(qemu, memory)

    def _state_to_load(self, snapfile: Snapfile, parameters: Json) -> bytes:
        self._paused_at, self._tsc_khz = snapfile.paused_at, snapfile.tsc_khz
        if not parameters.get("clock_realtime"):
            return snapfile.device_state
        if self._paused_at is None or self._tsc_khz is None:
            raise unsupported("clock_realtime", "a snapshot made with KVM, or by an older one")
        before, self._paused_at = self._paused_at, time.time()
        return clock.moved_on(snapfile.device_state, self._paused_at - before, self._tsc_khz)

    def _apply_overrides(self, overrides: list[Json]) -> None:
        interfaces = {each["iface_id"]: each for each in self._config.interfaces}
        for override in overrides:
            if override["iface_id"] not in interfaces:
                raise Fault(f"Unknown Network Device: {override['iface_id']}")
            interfaces[override["iface_id"]]["host_dev_name"] = override["host_dev_name"]

    def _command(self, qemu: Qemu, command: str, **arguments: Any) -> None:
        try:
            qemu.qmp.execute(command, **arguments)
        except QmpError as error:
            raise Fault(f"Internal VMM error: {error}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and error.filename == QEMU:
        return f"{QEMU} is missing; run: apt-get install qemu-system-x86"
    return str(error)


def _check_memory(memory: GuestMemory, size_mib: int) -> None:
    if memory.size != size_mib * MIB:
        raise SnapfileError(
            f"the memory file has {memory.size} bytes, but the snapshot's VM has {size_mib} MiB"
        )


def _check_host(snapshot: HostTraits, here: HostTraits | None) -> None:
    if snapshot != here:
        raise SnapfileError(f"the snapshot was made on {snapshot}, here is {here}")
