"""The layout of a host's data directory: persisted data, spelled in one module."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from activities.contract.names import Step
from activities.contract.scope import BuildScope, HostLease
from activities.disk.data_dir import DataDir, is_made_by, make_closed, maker_of
from tests.support.source_strings import REPOSITORY, sources, spelled

BUILD = "11111111-2222-4333-8444-555555555555"
SCOPE = BuildScope(build_id=BUILD, template_id="web", lease=HostLease(host="h1", number=1795609418))
KEY = "ab" * 32
MAP = "activities/disk/data_dir.py"


def test_the_layout_is_that_of_every_version_before() -> None:
    data = DataDir(Path("/data"))
    unfinished = data.unfinished_checkpoint(Step.ROOTFS, KEY, SCOPE, 2)
    places = [
        (data.leases, "/data/leases"),
        (data.lease(BUILD), f"/data/leases/{BUILD}"),
        (data.steps, "/data/steps"),
        (data.checkpoint(Step.BOOT, KEY), f"/data/steps/boot_and_snapshot/{KEY}"),
        (unfinished, f"/data/steps/build_rootfs/{KEY}.tmp.{BUILD}.1795609418.2"),
        (data.vms, "/data/vms"),
        (data.vm("tm-x"), "/data/vms/tm-x"),
        (data.networks, "/data/networks"),
        (data.network_mark("tm-x"), "/data/networks/tm-x"),
        (data.work, "/data/work"),
        (data.work_of(BUILD), f"/data/work/{BUILD}"),
        (data.logs, "/data/logs"),
        (data.log(BUILD), f"/data/logs/{BUILD}.jsonl"),
        (data.images, "/data/images"),
        (data.locks, "/data/locks"),
        (data.lock("upload.x"), "/data/locks/upload.x"),
        (data.draining_mark, "/data/draining"),
    ]
    assert [str(path) for path, _ in places] == [expected for _, expected in places]


def test_an_unfinished_checkpoint_says_who_makes_it() -> None:
    made = DataDir(Path("/data")).unfinished_checkpoint(Step.ROOTFS, KEY, SCOPE, 2)
    for path in (made.name, f"{made}/rootfs.ext4 (deleted)", f"{made}.old"):
        assert maker_of(path) == (BUILD, 1795609418)
        assert is_made_by(BUILD, path)
    assert maker_of(KEY) is None
    assert not is_made_by(BUILD.replace("1", "2"), str(made))


@pytest.mark.parametrize(
    ("path", "is_in_it"),
    [("{}/vms/x", True), ("{}/vms/x (deleted)", True), ("{}", True), ("{}-2/vms/x", False)],
)
def test_only_what_is_in_the_directory_is_this_hosts(
    tmp_path: Path, path: str, is_in_it: bool
) -> None:
    assert DataDir(tmp_path).contains(path.format(tmp_path)) is is_in_it


def test_a_directory_behind_a_symlink_contains_what_the_kernel_finds_there(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    assert DataDir(tmp_path / "data").contains(f"{tmp_path}/disk/vms/x")


def test_no_other_module_spells_the_name_of_a_place() -> None:
    names = r"^(leases|steps|vms|networks|work|logs|images|locks|draining)$|\.tmp\."
    assert spelled(names, but_in=MAP, within=("activities",)) == []


def test_no_other_module_joins_a_name_to_the_data_directory() -> None:
    joined = re.compile(r"data_dir\)?(\.root)? */ |data_dir\)?(\.root)?\.joinpath")
    programs = ("activities", "workflows", "api", "temporal-dev")
    assert [path for path in sources(programs) if joined.search(_text(path))] == []


def _text(path: str) -> str:
    return (REPOSITORY / path).read_text()


def test_what_tenants_own_is_closed_to_others(tmp_path: Path) -> None:
    root = tmp_path / "lib" / "data"
    make_closed(root)
    assert root.stat().st_mode & 0o777 == 0o700
    root.chmod(0o755)  # as an earlier version has made it
    make_closed(root)
    assert root.stat().st_mode & 0o777 == 0o700
