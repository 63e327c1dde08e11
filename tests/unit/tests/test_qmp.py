"""What the stand-in hears of its QEMU."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest
from qemu_firecracker.qmp import Qmp

STOPPED_AT = 1_795_609_418.25
STOP: dict[str, object] = {
    "event": "STOP",
    "timestamp": {"seconds": 1_795_609_418, "microseconds": 250_000},
}
ANSWER: dict[str, object] = {"return": {}}


@pytest.fixture
def pair() -> Iterator[tuple[Qmp, socket.socket]]:
    ours, qemu = socket.socketpair()
    with ours, qemu:
        yield Qmp(ours), qemu


def says(qemu: socket.socket, *messages: dict[str, object]) -> None:
    qemu.sendall("".join(json.dumps(message) + "\n" for message in messages).encode())


def test_a_guest_has_stopped_when_qemu_says_and_not_when_its_answer_is_read(
    pair: tuple[Qmp, socket.socket],
) -> None:
    qmp, qemu = pair
    says(qemu, STOP, ANSWER)
    qmp.execute("stop")
    assert qmp.happened_at("STOP") == STOPPED_AT


def test_the_latest_of_several_is_told_and_none_of_another_kind(
    pair: tuple[Qmp, socket.socket],
) -> None:
    qmp, qemu = pair
    later = {"seconds": 1_795_609_500, "microseconds": 0}
    says(qemu, STOP, {**STOP, "event": "RESUME"}, {**STOP, "timestamp": later}, ANSWER)
    qmp.execute("stop")
    assert qmp.happened_at("STOP") == 1_795_609_500
    assert qmp.happened_at("RESUME") == STOPPED_AT
    assert qmp.happened_at("SHUTDOWN") is None
