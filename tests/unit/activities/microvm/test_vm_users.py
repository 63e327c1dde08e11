"""A user for each VM: nobody else's while it lives."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from activities.contract.errors import HostFaultError
from activities.microvm.vm_users import free_user

USERS = range(30_000, 30_003)


def test_two_vms_have_two_users(tmp_path: Path) -> None:
    with free_user(USERS, tmp_path) as first, free_user(USERS, tmp_path) as second:
        assert {first.uid, second.uid} == {30_000, 30_001}
    with free_user(USERS, tmp_path) as again:
        assert again.uid == 30_000


def test_it_is_taken_as_long_as_a_child_lives(tmp_path: Path) -> None:
    with free_user(USERS, tmp_path) as user:
        child = subprocess.Popen(["sleep", "100"], pass_fds=(user.lock,))
    with free_user(USERS, tmp_path) as other:
        assert other.uid != user.uid
    child.kill()  # whatever ends it
    child.wait()
    with free_user(USERS, tmp_path) as again:
        assert again.uid == user.uid


def test_when_all_are_taken_that_is_said(tmp_path: Path) -> None:
    with (
        free_user(range(5, 6), tmp_path),
        pytest.raises(HostFaultError, match="all 1 users") as error,
        free_user(range(5, 6), tmp_path),
    ):
        pass
    assert "TEMPLATE_MANAGER_VM_USERS" in error.value.hint
