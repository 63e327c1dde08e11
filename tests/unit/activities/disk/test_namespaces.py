"""Threads that namespaces belong to."""

from __future__ import annotations

import threading

import pytest

from activities.disk.namespaces import in_own_thread


def test_a_function_runs_in_a_thread_that_ends_with_it() -> None:
    thread = in_own_thread(threading.current_thread, "its-name")
    assert thread is not threading.current_thread()
    assert thread.name == "its-name"
    assert not thread.is_alive()


def test_what_it_raises_is_raised_here() -> None:
    def stop() -> None:
        raise KeyboardInterrupt("stop")

    with pytest.raises(KeyboardInterrupt, match="stop"):
        in_own_thread(stop, "failing")
