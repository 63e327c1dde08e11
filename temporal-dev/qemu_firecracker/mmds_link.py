"""One connection of a guest to the metadata service: from QEMU, which starts this, to the stand-in.

Usage: `mmds_link.py NAME`, with the connection as standard input and output; NAME is that of the
service's abstract socket. Standard library alone: it starts for each connection.
"""

import os
import select
import socket
import sys

READ_BYTES = 1 << 16


def relay(name: str) -> None:
    """Carry bytes both ways until the service hangs up, or the guest is gone."""
    service = socket.socket(socket.AF_UNIX)
    service.connect(f"\0{name}")
    poll = select.poll()
    poll.register(0, select.POLLIN)
    poll.register(service, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == 0:
                data = os.read(0, READ_BYTES)
                service.sendall(data)
                if not data:
                    service.shutdown(socket.SHUT_WR)
                    poll.unregister(0)
            else:
                data = service.recv(READ_BYTES)
                if not data:
                    return
                while data:
                    data = data[os.write(1, data) :]


if __name__ == "__main__":
    relay(sys.argv[1])
