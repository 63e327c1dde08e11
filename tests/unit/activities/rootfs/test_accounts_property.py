"""Whatever an image's accounts and fstab are, looking at them ends, with an answer or an error."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activities.disk.tenant_tree import TenantTree
from activities.rootfs.image_look import LARGEST_ID, LINE_BYTES, Look, LookError, look_at
from tests.support.hostile_text import hostile_bytes

FIELDS = st.sampled_from(
    [
        b"root",
        b"app",
        b"x",
        b"0",
        b"1000",
        b"4294967295",
        b"-1",
        b"1_000",
        "٣".encode(),
        b"",
        b"a,app",
    ]
)
ENTRY = st.lists(st.one_of(FIELDS, hostile_bytes), max_size=9).map(b":".join)
FILE = st.lists(ENTRY, max_size=6).map(b"\n".join)
USER = st.sampled_from(
    ["", "root", "app", "app:x", ":", "0", "1000:1000", "ghost", "٣", "-1", "a:b:c"]
)


def look(root: Path, user: str) -> Look | LookError:
    with TenantTree(root) as tree:
        try:
            return look_at(tree, user, "/")
        except LookError as error:
            return error


@given(passwd=FILE, group=FILE, fstab=FILE, user=USER)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_accounts(tmp_path: Path, passwd: bytes, group: bytes, fstab: bytes, user: str) -> None:
    (tmp_path / "etc").mkdir(exist_ok=True)
    for name, content in {"passwd": passwd, "group": group, "fstab": fstab}.items():
        (tmp_path / "etc" / name).write_bytes(content)
    found = look(tmp_path, user)
    if isinstance(found, LookError):
        return
    uid, gid, groups, *_ = found.user.split(" ")
    ids = [uid, gid, *(groups.split(",") if groups != "-" else [])]
    assert all(each.isascii() and 0 <= int(each) <= LARGEST_ID for each in ids)


@pytest.mark.parametrize(
    "line", [b"", b":", b"app:x:1:1::/:", b"x" * LINE_BYTES, b":" * LINE_BYTES, b"a," * 1000]
)
def test_a_full_file_takes_time_by_its_length(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "etc").mkdir()
    for name in ("passwd", "group"):
        size = 8_000_000 // (len(line) + 1)
        (tmp_path / "etc" / name).write_bytes((line + b"\n") * size)
    began = time.monotonic()
    look(tmp_path, "nobody")
    assert time.monotonic() - began < 60
