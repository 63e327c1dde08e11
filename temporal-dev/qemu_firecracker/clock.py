"""The guest's clock at a resume: moved on in the state that QEMU loads.

Under TCG the guest counts time with the TSC. QEMU's `timer` section has where it stood when the VM
was stopped; a guest that is loaded with more ticks finds that so much time has gone by, as with
kvm-clock moved on by Firecracker.
"""

from __future__ import annotations

import struct

# What `qemu` tells the guest its TSC counts at.
TSC_KHZ = 2_500_000

# In QEMU's stream: length and name, instance, version; then the ticks.
_TIMER_SECTION = b"\x05timer" + struct.pack(">II", 0, 2)
_TICKS = struct.Struct(">q")


class ClockError(Exception):
    """There is no such section: another QEMU than those that we know."""


def moved_on(device_state: bytes, seconds: float) -> bytes:
    """The same state of a guest whose clock is so many seconds later."""
    before, section, after = device_state.partition(_TIMER_SECTION)
    if not section or _TIMER_SECTION in after:
        raise ClockError("clock_realtime: this QEMU's state has no timer of a kind that is known")
    (ticks,) = _TICKS.unpack_from(after)
    later = _TICKS.pack(ticks + round(seconds * TSC_KHZ * 1000))
    return before + section + later + after[_TICKS.size :]
