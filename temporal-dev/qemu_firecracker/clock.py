"""The guest's clock at a resume: moved on in the state that QEMU loads.

Under TCG the guest counts time with the TSC. QEMU's `timer` section has where it stood when the VM
was stopped; a guest that is loaded with more ticks finds that so much time has gone by, as with
kvm-clock moved on by Firecracker.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import time

_MEASURED_SECONDS = 0.05
_EARLY = 0.25
# rdtsc; shl rdx, 32; or rax, rdx; ret
_READ_TSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")

# In QEMU's stream: length and name, instance, version; then the ticks.
_TIMER_SECTION = b"\x05timer" + struct.pack(">II", 0, 2)
_TICKS = struct.Struct(">q")


class ClockError(Exception):
    """There is no such section: another QEMU than those that we know."""


def host_tsc_khz() -> int:
    """What the TSC counts at, which the guest must be told: under TCG it sees the host's."""
    with mmap.mmap(
        -1, len(_READ_TSC), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    ) as code:
        code.write(_READ_TSC)
        place = ctypes.c_char.from_buffer(code)
        read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(place))
        first, began = int(read()), time.monotonic_ns()
        time.sleep(_MEASURED_SECONDS)
        ticks, took = int(read()) - first, time.monotonic_ns() - began
        del place  # or the mapping cannot be closed
    return round(ticks * 1_000_000 / took)


def wait_for_early_second() -> None:
    """Wait until a second has just begun, for three quarters of a second at most.

    The guest gets its time from a clock chip that tells whole seconds, so it would be up to one
    behind; Firecracker's guests are not.
    """
    fraction = time.time() % 1
    if fraction > _EARLY:
        time.sleep(1 - fraction)


def moved_on(device_state: bytes, seconds: float, tsc_khz: int) -> bytes:
    """The same state of a guest whose clock is so many seconds later."""
    before, section, after = device_state.partition(_TIMER_SECTION)
    if not section or _TIMER_SECTION in after:
        raise ClockError("clock_realtime: this QEMU's state has no timer of a kind that is known")
    ticks: int = _TICKS.unpack_from(after)[0]
    later = _TICKS.pack(ticks + round(seconds * tsc_khz * 1000))
    return before + section + later + after[_TICKS.size :]
