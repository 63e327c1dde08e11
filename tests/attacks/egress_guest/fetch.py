"""Runs in a guest: fetches what an index has, as pip does, or asks hosts for a page.

`fetch.py HOST…` prints a line for each; `fetch.py HOST/PATH FILE` reads a link with a hash there.
Standard library only.
"""

from __future__ import annotations

import hashlib
import socket
import sys

SECONDS = 5.0


def get(host: str, path: str) -> bytes:
    """Return a page."""
    with socket.create_connection((host, 80), timeout=SECONDS) as one:
        one.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        with one.makefile("rb") as answer:
            return answer.read().partition(b"\r\n\r\n")[2]


def fetch(index: str, target: str) -> None:
    """Fetch the file that an index names, and check its hash."""
    host, slash, path = index.partition("/")
    link, _, sha256 = get(host, slash + path).decode().strip().partition("#sha256=")
    content = get(host, link)
    if hashlib.sha256(content).hexdigest() != sha256:
        sys.exit("another hash")
    with open(target, "wb") as file:
        file.write(content)


def ask(host: str) -> str:
    """Return a host's page, or what has gone wrong."""
    try:
        return get(host, "/").decode().strip()
    except OSError as error:
        return f"! {error}"


if __name__ == "__main__":
    if "/" in sys.argv[1]:
        fetch(sys.argv[1], sys.argv[2])
    else:
        for one in sys.argv[1:]:
            print(one, ask(one))
