"""Namespaces of one thread: mounts or a network of its own.

A namespace belongs to a thread, so each function runs in a fresh one: a pooled thread would keep it
for whoever comes next. Nothing forks, which would break gRPC and Temporal's client.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from enum import IntEnum
from pathlib import Path
from typing import TypeVar

from activities.disk.mounts import MS_REC, MS_SLAVE, mount

T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)


class Namespace(IntEnum):
    """Kinds of namespaces, by their flags (linux/sched.h)."""

    MOUNT = 0x00020000
    NETWORK = 0x40000000


def in_own_thread(function: Callable[[], T], name: str) -> T:
    """Run `function` in a thread that ends with it. Blocking; returns and raises what it does."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, name=name)
    thread.start()
    thread.join()
    return result.result()


def unshare(kind: Namespace) -> None:
    """unshare(2): give the calling thread a namespace of that kind. Raises OSError."""
    if _libc.unshare(kind) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"unshare the {kind.name.lower()} namespace: {os.strerror(code)}")


def in_mount_namespace(function: Callable[[], T]) -> T:
    """Run `function` in a thread of its own whose mounts and working directory are its own.

    Whatever ends the thread or its process, the kernel takes the mounts away with it. Blocking;
    returns and raises what `function` does.
    """

    def run() -> T:
        unshare(Namespace.MOUNT)
        # Ours must not show on the host; unmounts there must still reach us, or we would keep
        # other containers' file systems busy.
        mount("none", Path("/"), "", MS_REC | MS_SLAVE)
        return function()

    return in_own_thread(run, "mount-namespace")
