"""A VM that does one step to a disk: booted from a drive of its own, followed to its end, killed.

What its guest says are lines `@tm@ <kind> <text>`, see `activities/instructions/guest/`. They are
claims: the worst that a lie does is a wrong disk of the liar.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from activities.contract.errors import LOG_TAIL_LINES, VmmError
from activities.contract.guest_network import GUEST_MAC, TAP
from activities.contract.names import ArtifactName
from activities.contract.scope import VmShape
from activities.contract.text import readable
from activities.microvm.console import GOODBYE, PANIC, PREFIX, ConsoleReader, LineParts
from activities.microvm.egress import Egress
from activities.microvm.launching import Confinement
from activities.microvm.microvm import (
    drive_limits,
    kernel_arguments,
    kernel_files,
    launch_of,
    set_boot_source,
)
from activities.microvm.vm_process import VmProcess
from activities.process.settings import Settings
from activities.step.build_log import BuildLog

DRIVE = "step.ext4"
SECRETS = "secrets"
"""A drive of pairs `NAME=value`, each ended by a NUL; the guest copies them into its memory."""
SECTOR = 512
POLL_SECONDS = 0.05
BOOT_SECONDS = 300.0
REST_SECONDS = 120.0
MAX_FACTS = 16
RAN_OUT_OF = ("memory", "processes", "disk")


@dataclass
class StepTalk:
    """What has been heard of a step so far; logs it on the way."""

    log: BuildLog
    source: str
    """Of the lines that are the step's own."""
    started: bool = False
    exit_code: int | None = None
    ran_out_of: str = ""
    refused: str = ""
    done: bool = False
    last_words: str = ""
    """The kernel's own when it ends: a panic, or that it restarts or powers down."""
    facts: dict[str, str] = field(default_factory=dict)
    is_cut: bool = False
    """Whether output is left out from here on: its last lines may begin anywhere."""
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=LOG_TAIL_LINES))
    _parts: dict[str, LineParts] = field(
        default_factory=lambda: {"out": LineParts(), "err": LineParts()}
    )

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to come that matters."""
        return self.done or bool(self.refused) or self.exit_code not in (None, 0)

    def hear(self, line: str) -> None:
        """Take one line; one that makes no sense is left out."""
        if not line.startswith(PREFIX):
            self._hear_console(readable(line))
            return
        kind, _, text = line[len(PREFIX) :].partition(" ")
        stream, _, part = kind.partition("-")
        if stream in self._parts and part in ("", "part"):
            self._hear_output(stream, text, whole=not part)
        elif kind == "start":
            self.started = True
            self.log.debug(f"guest is up (init: {readable(text)})", source="guest")
        elif kind == "cut":
            self.is_cut = True
            self.tell_parts()
            self.log.warn("more output of the step is left out, but for its last lines")
        elif kind == "exit":
            self._hear_exit(text)
        elif kind == "refused":
            self.refused = self.log.redaction.readable(text) or "no reason"
        elif kind == "fact" and len(self.facts) < MAX_FACTS:
            name, _, value = self.log.redaction.readable(text).partition(" ")
            self.facts[name] = value
        elif kind == "done":
            self.done = True

    def tell_parts(self) -> None:
        """Log beginnings of lines whose end has not come."""
        for stream, parts in self._parts.items():
            if parts.text:
                self._hear_output(stream, "", whole=True)

    def _conceal(self, text: str, is_cut: bool) -> str:
        return self.log.redaction.apply(text, is_begun=self.is_cut, is_cut=is_cut or self.is_cut)

    def _hear_console(self, line: str) -> None:
        if not line.strip():
            return
        if not self.last_words and (PANIC in line or GOODBYE.search(line)):
            self.last_words = self.log.redaction.readable(line)
        self.log.debug(line, source="console")

    def _hear_output(self, stream: str, text: str, *, whole: bool) -> None:
        parts = self._parts[stream]
        parts.add(text)
        if whole:
            line = parts.take(self.log.limits.line_chars, self._conceal)
            self.tail.append(line)
            self.log.info(line, source=self.source, stream=f"std{stream}")

    def _hear_exit(self, text: str) -> None:
        self.tell_parts()
        code, _, why = text.strip().partition(" ")
        if code.isascii() and code.isdigit() and len(code) <= 3:
            self.exit_code = int(code)
            self.ran_out_of = why if why in RAN_OUT_OF else ""


class StepTimedOut(Exception):
    """A step has not ended in its time, or its guest has not even come up."""

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(f"{what} within {seconds:g} s")


class StepGuestEnded(Exception):
    """The guest has gone down by itself before its step had ended."""


def start_step_vm(
    vm: VmProcess,
    settings: Settings,
    firecracker: Path,
    shape: VmShape,
    check: Callable[[], None],
    *,
    egress: Egress | None = None,
) -> Confinement:
    """Boot the drive `step.ext4` beside the template's disk, both among the VM's files; and beside
    them the drive `secrets`, if it is there.

    Returns what confines the VMM. Raises VmmError, HostFaultError.
    """
    kernel = settings.kernel_path(shape.kernel_version)
    launch = launch_of(settings, firecracker, shape)
    # The first is /dev/vda, as in the template.
    drives = {"rootfs": ArtifactName.ROOTFS, "step": DRIVE}
    if (vm.files / SECRETS).exists():
        drives["secrets"] = SECRETS
    own = tuple(drives.values())
    launch = replace(launch, own=own, shared=kernel_files(kernel), egress=egress)
    confinement = vm.start(launch, check)
    with vm.client() as client:
        set_boot_source(vm, client, kernel, _kernel_arguments(settings))
        limits = drive_limits(settings)
        for name, file in drives.items():
            client.drive(name, vm.inside(file), limits)
        client.network_interface(GUEST_MAC, TAP)
        client.machine_config(shape.vcpu_count, shape.memory_mb)
        client.entropy()
        client.start()
    return confinement


def put_secrets(vm: VmProcess, variables: Mapping[str, str]) -> None:
    """Write the drive `secrets`; nobody but root and the VMM can read it."""
    pairs = "".join(f"{name}={value}\0" for name, value in variables.items()).encode()
    path = vm.files / SECRETS
    path.touch(mode=0o600)
    path.write_bytes(pairs.ljust(-(-len(pairs) // SECTOR) * SECTOR, b"\0"))


def _wipe_secrets(vm: VmProcess) -> None:
    """Overwrite them: the guest has them in its memory."""
    with contextlib.suppress(FileNotFoundError), (vm.files / SECRETS).open("rb+") as file:
        file.write(bytes(os.fstat(file.fileno()).st_size))
        file.flush()
        os.fsync(file.fileno())


def follow_step(
    vm: VmProcess, talk: StepTalk, timeout_seconds: float, check: Callable[[], None]
) -> None:
    """Hear the guest until its step is over. `timeout_seconds` is for the step, without the boot.

    Secrets are overwritten on the host's disk as soon as it says that the step begins, or is over.
    Raises StepTimedOut and StepGuestEnded; VmmError when the VMM was killed or has crashed.
    """
    console = ConsoleReader(vm.console)
    try:
        _follow(vm, console, talk, _Limit(timeout_seconds), check)
    finally:
        _wipe_secrets(vm)
        if lost := str(console.lost()):
            talk.log.warn(lost)


def _follow(
    vm: VmProcess,
    console: ConsoleReader,
    talk: StepTalk,
    limit: _Limit,
    check: Callable[[], None],
) -> None:
    while not talk.is_over:
        check()
        ended = vm.has_ended()  # before reading: what it said last is then read
        lines = console.lines()
        for line in lines:
            talk.hear(line)
            if talk.is_over:
                return
        if lines:
            if limit.heard(talk) and talk.started:
                _wipe_secrets(vm)
            continue
        if ended:
            talk.tell_parts()
            raise _ended(vm, talk)
        limit.require(talk)
        time.sleep(POLL_SECONDS)


class _Limit:
    """Three limits in turn: for the boot, for the step, and for bringing the disk to rest."""

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._phase = ("the guest was not up", BOOT_SECONDS)
        self._since = time.monotonic()

    def heard(self, talk: StepTalk) -> bool:
        """Go on to the next when the guest has; whether it has. Raises StepTimedOut."""
        phase = ("the guest was not up", BOOT_SECONDS)
        if talk.exit_code is not None:
            phase = ("its processes did not end", REST_SECONDS)
        elif talk.started:
            phase = ("did not end", self._timeout_seconds)
        is_next = phase != self._phase
        if is_next:
            self._phase, self._since = phase, time.monotonic()
        self.require(talk)
        return is_next

    def require(self, talk: StepTalk) -> None:
        """Raises StepTimedOut."""
        what, seconds = self._phase
        if time.monotonic() - self._since > seconds:
            talk.tell_parts()
            raise StepTimedOut(what, seconds)


def _ended(vm: VmProcess, talk: StepTalk) -> Exception:
    """Blame the guest only for an end that its kernel has announced."""
    if talk.last_words:
        return StepGuestEnded(talk.last_words)
    return VmmError(f"the VM of the step ended: {vm.exit_reason()}", log_tail=vm.log_tail())


def _kernel_arguments(settings: Settings) -> str:
    return f"{kernel_arguments(settings, init='/init')} root=/dev/vdb rw rootfstype=ext4"
