"""What is refused, and how the caller hears of it."""

from __future__ import annotations


class Fault(Exception):
    """A refused request: Firecracker's `fault_message` and HTTP status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class FatalFault(Fault):
    """A refused request after which Firecracker ends its process."""


def unsupported(what: str, reason: str = "") -> Fault:
    """The answer to what Firecracker can do and this stand-in cannot."""
    because = f": {reason}" if reason else ""
    return Fault(f"{what} is not supported by the QEMU stand-in for Firecracker{because}.")


def after_start() -> Fault:
    """The answer to a configuration request to a started VM."""
    return Fault("The requested operation is not supported after starting the microVM.")


def before_start() -> Fault:
    """The answer to a run-time request to a VM that was not started."""
    return Fault("The requested operation is not supported before starting the microVM.")


def pci_is_off() -> Fault:
    """The answer to a device for a started VM: without PCI nothing can be plugged in."""
    return Fault("PCI is not enabled")
