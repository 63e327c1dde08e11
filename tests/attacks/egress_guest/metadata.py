"""Runs in a guest, as root: asks the VMM's metadata service for what it should not give.

It prints what came of it as one line of JSON behind `REPORT `. Standard library only. It waits
until the host has given its VM data: who it is and, as `foreign`, a token of another VM's service.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time

SERVICE = ("169.254.169.254", 80)
SECONDS = 5.0
TTL = "X-metadata-token-ttl-seconds"
NOT_OURS = (
    "/../../etc/passwd",
    "/machine-config",
    "/vm/config",
    "/mmds",
    "/actions",
    "/latest/%00",
)
LIFETIMES = ("0", "-1", "21601", "99999999999999999999", "1e3", "", "\u0661", "1\x00")


def send(raw: bytes, seconds: float = SECONDS) -> str:
    """Send bytes, then nothing; returns what is answered, or what has gone wrong."""
    said = b""
    try:
        with socket.create_connection(SERVICE, seconds) as one:
            one.sendall(raw)
            while len(said) < 65536 and (data := one.recv(65536)):
                said += data
                if is_whole(said):
                    break
    except OSError as error:
        return said.decode(errors="replace") or f"! {error}"
    return said.decode(errors="replace") or "! closed"


def is_whole(said: bytes) -> bool:
    """Whether an answer has come to its end."""
    head, found, body = said.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return bool(found) and len(body) >= int(line.partition(b":")[2])
    return bool(found)


def ask(method: str, path: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
    """Ask; returns the status, 0 for none, and the body."""
    lines = [f"{method} {path} HTTP/1.1", "Host: x"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    answer = send("\r\n".join([*lines, "", ""]).encode())
    head, _, body = answer.partition("\r\n\r\n")
    return (int(head.split(" ")[1]) if head.startswith("HTTP/") else 0), body


def new_token() -> str:
    """Ask for a token until there is one: the link has just come up."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        status, token = ask("PUT", "/latest/api/token", {TTL: "600"})
        if status == 200:
            return token
        time.sleep(0.2)
    raise SystemExit("no token")


def mine(token: str, path: str) -> tuple[int, str]:
    """Ask for something with a token."""
    return ask("GET", path, {"X-metadata-token": token})


def attack(token: str) -> dict[str, object]:
    """Ask for what is not ours, in ways that are none."""
    foreign = mine(token, "/foreign")[1]
    return {
        "who": mine(token, "/who"),
        "all": mine(token, "/"),
        "without a token": ask("GET", "/who")[0],
        "a token of another VM": mine(foreign, "/who")[0],
        "a wrong token": mine("x" * 50, "/who")[0],
        "a token that is long": mine("x" * 60_000, "/who")[0],
        "not ours": [mine(token, path)[0] for path in NOT_OURS],
        "lifetimes": [ask("PUT", "/latest/api/token", {TTL: life})[0] for life in LIFETIMES],
        "forwarded": ask("PUT", "/latest/api/token", {TTL: "60", "X-Forwarded-For": "::1"})[0],
        "written": [
            ask(method, "/who", {"X-metadata-token": token})[0]
            for method in ("PUT", "POST", "PATCH", "DELETE")
        ],
        "afterwards": mine(token, "/who"),
    }


def nonsense(token: str) -> dict[str, object]:
    """Send what is no request, too much of one, and too many at once."""
    head = b"GET /who HTTP/1.1\r\n"
    send(head + b"X-A: " + b"a" * (1 << 20) + b"\r\n\r\n")
    send(head + b"X: y\r\n" * 100_000 + b"\r\n")
    for length in (b"-1", b"1" * 5000, b"\xff", b"9" * 18):
        send(head + b"Content-Length: " + length + b"\r\n\r\n")
    send(head + b"Transfer-Encoding: chunked\r\n\r\nffffffffffff\r\n")
    send(bytes(range(256)) * 1000)
    send(b"\r\n" * 100_000)
    open_ones = flood()
    time.sleep(5)
    for one in open_ones:
        one.close()
    return {"held": len(open_ones)}


def flood() -> list[socket.socket]:
    """Open all the connections that there are, in many threads; read of none what is answered."""
    found: list[socket.socket] = []

    def open_some() -> None:
        for _ in range(40):
            try:
                one = socket.create_connection(SERVICE, SECONDS)
                one.sendall(b"GET / HTTP/1.1\r\n\r\n" * 200)
            except OSError:
                return
            found.append(one)

    threads = [threading.Thread(target=open_some) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def main(how: str) -> None:
    """Wait for the data, then do it."""
    token = new_token()
    if how == "tell":
        print(f"REPORT {json.dumps({'token': token})}", flush=True)
        return
    while mine(token, "/foreign")[0] != 200:
        time.sleep(0.1)
    report = attack(token) if how == "attack" else nonsense(token)
    print(f"REPORT {json.dumps(report)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
