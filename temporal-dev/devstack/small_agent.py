"""A small guest agent: of E2B's it has what a template needs, a version and an answer."""

from __future__ import annotations

import socket
from pathlib import Path

from activities.contract.guest_network import GUEST_ADDRESS

PORT = 49983
VERSION = "0.2.4"
SECONDS_UNTIL_IT_LISTENS = 4
ANSWER = b"HTTP/1.1 204 No Content\r\n"
# In a guest with a shell; what else it takes is ours. As E2B's agent it takes a while to listen.
AGENT = f"""\
#!SHELL
case ${{1-}} in
    -version) echo {VERSION} && exit ;;
    answer) printf 'HTTP/1.1 204 No Content\\r\\nConnection: close\\r\\n\\r\\n' && exit ;;
esac
/.template/busybox sleep {SECONDS_UNTIL_IT_LISTENS}
FIRST
exec /.template/busybox nc -ll -p {PORT} -e /.template/agent answer
"""


def write_agent(path: Path, shell: str = "/bin/sh", first: str = ":") -> Path:
    """Write the program; return where it is. Before it listens it does what `first` says."""
    path.write_text(AGENT.replace("SHELL", shell).replace("FIRST", first))
    path.chmod(0o755)
    return path


def init_agent() -> bytes:
    """Ask it once, in the guest's network, as an orchestrator does when it has resumed a snapshot.

    Returns the first line of the answer. Raises OSError when nobody listens.
    """
    with socket.create_connection((GUEST_ADDRESS, PORT), timeout=20) as connection:
        connection.sendall(b"POST /init HTTP/1.1\r\nHost: agent\r\nContent-Length: 2\r\n\r\n{}")
        with connection.makefile("rb") as answer:
            return answer.readline()
