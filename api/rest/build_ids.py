"""Ids of builds that say how large their VM is to be.

The SDK says it when it asks for an id, and everything else in a second request, which may come to
another process. The id is all that both have in common.
"""

from __future__ import annotations

import secrets
import uuid
from dataclasses import dataclass

VERSION = 8
"""Of RFC 9562: what the bits mean is the maker's business."""
VARIANT = 0b10
# From the highest bit on: 48 of ours, version, 12 of ours, variant, 62 at random.
CPU_BITS, MEMORY_BITS, DISK_BITS, RANDOM_BITS = 12, 24, 24, 62


@dataclass(frozen=True)
class VmSize:
    """How large a VM is to be. Whether it may be is decided when the build starts."""

    vcpu_count: int
    memory_mb: int
    free_disk_mb: int

    @property
    def is_tellable(self) -> bool:
        """Whether an id has room for it: far more than any VM may have."""
        return (
            0 <= self.vcpu_count < 1 << CPU_BITS
            and 0 <= self.memory_mb < 1 << MEMORY_BITS
            and 0 <= self.free_disk_mb < 1 << DISK_BITS
        )


def new_build_id(size: VmSize) -> str:
    """Return an id that nobody else has for a build with a VM of this size, which is tellable."""
    assert size.is_tellable
    told = (size.vcpu_count << MEMORY_BITS | size.memory_mb) << DISK_BITS | size.free_disk_mb
    high, low = divmod(told, 1 << 12)
    bits = ((high << 4 | VERSION) << 12 | low) << 2 | VARIANT
    return str(uuid.UUID(int=bits << RANDOM_BITS | secrets.randbits(RANDOM_BITS)))


def size_in(build_id: str) -> VmSize | None:
    """Return what `new_build_id` was told; None of an id that it has not made."""
    try:
        parsed = uuid.UUID(build_id)
    except ValueError:
        return None
    if str(parsed) != build_id or parsed.version != VERSION:
        return None
    bits = parsed.int >> RANDOM_BITS >> 2
    told = bits >> 16 << 12 | bits & 0xFFF
    rest, free_disk_mb = divmod(told, 1 << DISK_BITS)
    vcpu_count, memory_mb = divmod(rest, 1 << MEMORY_BITS)
    return VmSize(vcpu_count, memory_mb, free_disk_mb)
