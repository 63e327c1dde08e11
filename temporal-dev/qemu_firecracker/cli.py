"""Firecracker's command line and exit codes."""

from __future__ import annotations

import os
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NoReturn

from . import VERSION
from .api import Request
from .errors import Fault
from .http import Answered, ApiServer
from .log import Log, Metrics
from .machine import Machine
from .qemu import Accelerator, Qemu
from .snapfile import FORMAT_VERSION, Snapfile, SnapfileError

_OK = 0
_GENERIC_ERROR = 1
_BAD_CONFIGURATION = 152
_ARGUMENT_PARSING = 153

_DEFAULT_SOCKET = "/run/firecracker.socket"
_VALUES = (
    "api-sock",
    "id",
    "log-path",
    "level",
    "module",
    "metrics-path",
    "describe-snapshot",
    "start-time-us",
    "start-time-cpu-us",
    "parent-cpu-time-us",
)
_FLAGS = ("help", "version", "snapshot-version", "no-seccomp", "show-level", "show-log-origin")
_UNSUPPORTED_VALUES = (
    "config-file",
    "metadata",
    "seccomp-filter",
    "http-api-max-payload-size",
    "mmds-size-limit",
)
_UNSUPPORTED_FLAGS = ("no-api", "boot-timer", "enable-pci")

# A signal that comes just before the main thread waits is seen when it has waited.
_LOOK_SECONDS = 0.5

Arguments = dict[str, str]


class _ExitError(Exception):
    """The process ends with a message on standard error."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def main(arguments: list[str]) -> int:
    """Run as `firecracker` with these arguments; answer the exit code."""
    try:
        parsed = _parse(arguments)
        information = _information(parsed)
        if information is not None:
            print(information)
            return _OK
        return _run(parsed)
    except _ExitError as error:
        _complain(str(error))
        return error.code


def _complain(message: str) -> None:
    # Standard error may be the same pipe as standard output, which does not wait for its reader.
    with suppress(BlockingIOError):
        print(f"Error: {message}", file=sys.stderr, flush=True)


def _parse(arguments: list[str]) -> Arguments:
    """The arguments by name, flags with an empty value."""
    parsed: Arguments = {}
    words = iter(arguments)
    for word in words:
        if word == "--":
            break
        name = word.removeprefix("--")
        takes_value = name in _VALUES + _UNSUPPORTED_VALUES
        if name == word or not (takes_value or name in _FLAGS + _UNSUPPORTED_FLAGS):
            raise _bad_arguments(
                f"Found argument '{name}' which wasn't expected, or isn't valid in this context."
            )
        if name in parsed:
            raise _bad_arguments(f"The argument '{name}' was provided more than once.")
        parsed[name] = next(words, "") if takes_value else ""
        if takes_value and not parsed[name]:
            raise _bad_arguments(f"The argument '{name}' requires a value, but none was supplied.")
    return parsed


def _bad_arguments(message: str) -> _ExitError:
    return _ExitError(
        f"Arguments parsing error: {message} \n\nFor more information try --help.",
        _ARGUMENT_PARSING,
    )


def _information(arguments: Arguments) -> str | None:
    """What to print instead of running a VM, if anything."""
    if "help" in arguments:
        names = [f"  --{name} <{name}>" for name in _VALUES] + [f"  --{name}" for name in _FLAGS]
        return f"Firecracker v{VERSION}\n\nUSAGE:\n" + "\n".join(names)
    if "version" in arguments:
        return f"Firecracker v{VERSION}\n"
    if "snapshot-version" in arguments:
        return f"v{FORMAT_VERSION}-qemu"
    if "describe-snapshot" in arguments:
        return _describe(arguments["describe-snapshot"])
    return None


def _describe(path: str) -> str:
    try:
        Snapfile.read(Path(path))
    except (SnapfileError, OSError) as error:
        raise _ExitError(f"When printing Snapshot Data format: {error}", _GENERIC_ERROR) from None
    return f"v{FORMAT_VERSION}-qemu"


def _run(arguments: Arguments) -> int:
    """Serve the API until the VM ends; answer the exit code."""
    for name in _UNSUPPORTED_VALUES + _UNSUPPORTED_FLAGS:
        if name in arguments:
            message = f"--{name} is not supported by the QEMU stand-in for Firecracker."
            raise _ExitError(message, _BAD_CONFIGURATION)
    instance_id = arguments.get("id", "anonymous-instance")
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", instance_id):
        raise _bad_arguments(f"Invalid instance ID '{instance_id}'.")
    log, metrics = Log(instance_id), Metrics()
    try:
        log.configure(_log_settings(arguments))
        if "metrics-path" in arguments:
            metrics.configure(arguments["metrics-path"])
        accelerator = Accelerator.chosen()
    except (Fault, ValueError) as error:
        raise _ExitError(str(error), _BAD_CONFIGURATION) from None
    log.info(f"Running Firecracker v{VERSION}")
    process = _Process(log)
    machine = Machine(instance_id, accelerator, log, metrics, on_start=process.watch)
    return process.serve(machine, arguments.get("api-sock", _DEFAULT_SOCKET))


def _log_settings(arguments: Arguments) -> dict[str, object]:
    settings: dict[str, object] = {}
    for argument, setting in (("log-path", "log_path"), ("level", "level")):
        if argument in arguments:
            settings[setting] = arguments[argument]
    if "show-level" in arguments:
        settings["show_level"] = True
    return settings


class _Process:
    """The main thread: serves requests and watches QEMU, one event after the other."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._events: SimpleQueue[Request | Qemu] = SimpleQueue()

    def serve(self, machine: Machine, socket_path: str) -> int:
        """Serve the API until the VM ends; answer the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: _die_of(number, machine))
        try:
            server = ApiServer(socket_path, self._answer)
        except OSError:
            self._log.error(
                f"RunWithApiError error: Failed to open the API socket at: {socket_path}. "
                "Check that it is not already used."
            )
            message = f'RunWithApi(FailedToBindSocket("{socket_path}"))'
            raise _ExitError(message, _GENERIC_ERROR) from None
        Thread(target=server.serve_forever, daemon=True).start()
        while True:
            try:
                event = self._events.get(timeout=_LOOK_SECONDS)
            except Empty:
                continue
            if isinstance(event, Qemu):
                return self._ended(event, machine)
            self._perform(event, machine)
            if event.fatal:
                return self._exit("Firecracker exiting with error.", _GENERIC_ERROR)

    def _answer(self, method: str, path: str, body: bytes) -> Answered:
        """In a connection's thread: have the main thread perform a request."""
        request = Request(method, path, body)
        self._events.put(request)
        request.done.wait()
        return request.status, request.answer, request.sent.set

    def _perform(self, request: Request, machine: Machine) -> None:
        self._log.info(f"The API server received a {request.description}.")
        request.perform(machine)
        if request.status >= 400:
            self._log.error(f"Received Error. Status code: {request.status}: {request.answer}")
        request.done.set()
        if request.fatal:
            request.sent.wait(timeout=5)

    def watch(self, qemu: Qemu) -> None:
        """Have QEMU's end among the events."""

        def wait() -> None:
            qemu.process.wait()
            self._events.put(qemu)

        Thread(target=wait, daemon=True).start()

    def _ended(self, qemu: Qemu, machine: Machine) -> int:
        """A guest that shuts down, reboots or panics (with `reboot=k panic=1`) is a success.

        Firecracker sees the same reset of the machine in all three and cannot tell them apart.
        """
        machine.finish()
        if qemu.process.returncode == 0:
            return self._exit("Firecracker exiting successfully.", _OK)
        _complain(f"QEMU failed: {qemu.messages()}")
        return self._exit("Firecracker exiting with error.", _GENERIC_ERROR)

    def _exit(self, message: str, code: int) -> int:
        self._log.info(f"{message} exit_code={code}")
        return code


def _die_of(number: int, machine: Machine) -> NoReturn:
    """Die of the signal as Firecracker does, after QEMU has let go of TAP and disk."""
    machine.kill()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    raise SystemExit(128 + number)
