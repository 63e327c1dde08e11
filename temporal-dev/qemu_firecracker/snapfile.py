"""The snapshot file: what `/snapshot/load` needs to know besides the guest's memory.

Layout, little-endian:

    8 bytes   magic
    u32       length of the header
    header    JSON: format version, host (see `HostTraits`), configuration of the VM, when paused
    u64       length of the device state
    state     QEMU's migration stream without guest memory
    32 bytes  SHA-256 of all before it

The paths in the configuration are those that the client gave. Relative ones therefore resume in
any directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

from . import files
from .schema import Json

FORMAT_VERSION = "1.0.0"
_MAGIC = b"QFCSNAP\x01"
_DIGEST_BYTES = 32


class SnapfileError(Exception):
    """The file is no snapshot that this process can load."""


@dataclass(frozen=True)
class HostTraits:
    """What must be the same where a snapshot is made and where it is loaded."""

    qemu_version: str
    accelerator: str
    cpu: str


@dataclass(frozen=True)
class Snapfile:
    """The content of a snapshot file."""

    host: HostTraits
    config: Json
    device_state: bytes
    paused_at: float | None = None
    """Wall clock in seconds when the guest's clock stopped; files of before 1.16 have none."""
    tsc_khz: int | None = None
    """What the guest's TSC counts at; none where that is KVM's affair."""

    def write(self, path: Path) -> None:
        """Write the file whole or not at all, durably."""
        told = {"format": FORMAT_VERSION, "host": asdict(self.host), "config": self.config}
        times = {"paused_at": self.paused_at, "tsc_khz": self.tsc_khz}
        header = json.dumps({**told, **times}).encode()
        content = b"".join(
            (
                _MAGIC,
                struct.pack("<I", len(header)),
                header,
                struct.pack("<Q", len(self.device_state)),
                self.device_state,
            )
        )
        with files.replacing(path) as out:
            os.write(out, content + hashlib.sha256(content).digest())

    @classmethod
    def read(cls, path: Path) -> Snapfile:
        """Read a file; refuse a foreign, truncated or damaged one."""
        data = path.read_bytes()
        if data[: len(_MAGIC)] != _MAGIC:
            raise SnapfileError("not a snapshot of the QEMU stand-in for Firecracker")
        content, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != digest:
            raise SnapfileError("the file is truncated or damaged: wrong checksum")
        return cls._parse(content)

    @classmethod
    def _parse(cls, content: bytes) -> Snapfile:
        (header_length,) = struct.unpack_from("<I", content, len(_MAGIC))
        start = len(_MAGIC) + 4
        header = json.loads(content[start : start + header_length])
        if header["format"] != FORMAT_VERSION:
            raise SnapfileError(f"format {header['format']} instead of {FORMAT_VERSION}")
        state = content[start + header_length + 8 :]
        host = HostTraits(**header["host"])
        times = (header.get("paused_at"), header.get("tsc_khz"))
        return cls(host, header["config"], state, *times)
