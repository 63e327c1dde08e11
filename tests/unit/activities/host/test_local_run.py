from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from activities.host.local_run import stop_signal


@pytest.fixture(autouse=True)
def hangup_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_closed_ends_it_so_that_it_cleans_up() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with stop_signal() as stopped:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stopped.wait(10)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_under_nohup_it_goes_on() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_signal() as stopped:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stopped.wait(0.1)
