from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from activities.disk import mounts
from activities.disk.mounts import MountError, mount, mounts_under, unmount
from activities.disk.namespaces import in_mount_namespace


def test_a_mount_that_is_busy_for_a_moment_is_unmounted(tmp_path: Path) -> None:
    def body() -> list[Path]:
        mount("none", tmp_path / "there", "tmpfs", 0)
        descriptor = os.open(tmp_path / "there", os.O_RDONLY)
        threading.Timer(0.3, os.close, [descriptor]).start()
        unmount(tmp_path / "there")
        return mounts_under(tmp_path)

    (tmp_path / "there").mkdir()
    assert in_mount_namespace(body) == []


def test_one_that_stays_busy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "BUSY_SECONDS", 0.2)

    def body() -> None:
        mount("none", tmp_path / "there", "tmpfs", 0)
        descriptor = os.open(tmp_path / "there", os.O_RDONLY)
        try:
            unmount(tmp_path / "there")
        finally:
            os.close(descriptor)

    (tmp_path / "there").mkdir()
    with pytest.raises(MountError) as error:
        in_mount_namespace(body)
    assert error.value.errno == errno.EBUSY


def test_what_could_not_be_written_out_meanwhile_is_told_after_the_body(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def fail(path: Path) -> None:
        begun.set()
        goes_on.wait(60)
        raise MountError(errno.ENOSPC, f"cannot sync {path}")

    monkeypatch.setattr(mounts, "sync_filesystem", fail)
    with pytest.raises(MountError) as error, mounts.writing_out(tmp_path):
        assert begun.wait(60)  # while the body runs
        goes_on.set()
    assert error.value.errno == errno.ENOSPC
