"""TAP devices of the network namespace that this process runs in."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

from .errors import Fault

_TUNSETIFF = 0x400454CA
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_NAME_BYTES_MAX = 15


def open_tap(name: str) -> int:
    """Attach to a TAP that exists and is free; answer its file descriptor.

    The kernel would make a missing one, so look first: a guest on a TAP that nobody has set up has
    no network and no one is told.
    """
    try:
        if not 0 < len(name.encode()) <= _NAME_BYTES_MAX:
            raise OSError("Invalid TUN/TAP device name")
        socket.if_nametoindex(name)
        return _attach(name)
    except OSError as error:
        raise Fault(
            "Network config error: Could not create the network device: "
            f"Open tap device failed: {error} ({name})"
        ) from None


def _attach(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except OSError:
        os.close(fd)
        raise
    return fd
