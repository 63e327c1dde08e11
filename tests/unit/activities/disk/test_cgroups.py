"""Where cgroups are and what is written there, for both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from activities.disk.cgroups import (
    Limits,
    Tree,
    make_cgroups,
    missing_controllers,
    remove_cgroup,
    trees,
)

LIMITS = Limits(memory_mb=768, cpus=3, processes=102)
VERSION_1 = """\
24 1 0:21 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
25 24 0:22 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:5 - cgroup cgroup rw,cpu,cpuacct
26 24 0:23 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory
27 24 0:24 / /sys/fs/cgroup/freezer rw,nosuid - cgroup cgroup rw,freezer
28 24 0:25 /docker/abc /sys/fs/cgroup/pids rw,nosuid - cgroup cgroup rw,pids
29 24 0:26 / /other/memory rw,nosuid - cgroup cgroup rw,memory
"""
OWN_1 = """\
4:cpu,cpuacct:/
3:memory:/system.slice/template-manager-host.service
2:pids:/docker/abc
1:name=systemd:/system.slice/x:y
0::/
"""


def test_version_1_has_a_tree_for_each_controller_below_our_own_group() -> None:
    assert trees(VERSION_1, OWN_1) == [
        Tree(1, Path("/sys/fs/cgroup/cpu,cpuacct"), ("cpu",)),
        Tree(
            1, Path("/sys/fs/cgroup/memory/system.slice/template-manager-host.service"), ("memory",)
        ),
        Tree(1, Path("/sys/fs/cgroup/pids"), ("pids",)),
    ]


def version_2(tmp_path: Path, controllers: str) -> str:
    (tmp_path / "cgroup.controllers").write_text(controllers)
    (tmp_path / "cgroup.subtree_control").touch()
    return f"30 1 0:27 / {tmp_path} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


def test_version_2_is_one_tree(tmp_path: Path) -> None:
    found = trees(version_2(tmp_path, "cpuset cpu io memory pids\n"), "0::/user.slice\n")
    assert found == [Tree(2, tmp_path, ("cpu", "memory", "pids"))]


def test_what_version_1_has_version_2_has_not(tmp_path: Path) -> None:
    both = VERSION_1 + version_2(tmp_path, "")
    assert trees(both, OWN_1) == trees(VERSION_1, OWN_1)


def test_a_machine_without_any_has_none() -> None:
    assert trees("24 1 0:21 / /sys rw - sysfs sysfs rw\n", "") == []


def written(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir() if path.is_file()}


def test_the_limits_of_version_1(tmp_path: Path) -> None:
    found = [Tree(1, tmp_path / name, (name,)) for name in ("cpu", "memory", "pids")]
    cpu, memory, pids = make_cgroups("vm", LIMITS, found)
    assert cpu == tmp_path / "cpu" / "template-manager" / "vm"
    assert written(cpu) == {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "300000"}
    assert written(memory) == {"memory.limit_in_bytes": str(768 << 20)}
    assert written(pids) == {"pids.max": "102"}


def test_the_limits_of_version_2(tmp_path: Path) -> None:
    [tree] = trees(version_2(tmp_path, "cpu memory pids"), "0::/\n")
    [made] = make_cgroups("vm", LIMITS, [tree])
    assert made == tmp_path / "template-manager" / "vm"
    assert written(made) == {
        "cpu.max": "300000 100000",
        "memory.max": str(768 << 20),
        "pids.max": "102",
    }
    enabled = "+cpu +memory +pids"
    assert (tmp_path / "cgroup.subtree_control").read_text() == enabled
    assert written(tmp_path / "template-manager") == {"cgroup.subtree_control": enabled}


@pytest.mark.parametrize(
    ("version", "file", "limit"),
    [(1, "memory.memsw.limit_in_bytes", str(768 << 20)), (2, "memory.swap.max", "0")],
)
def test_what_is_swapped_out_is_no_more_memory(
    tmp_path: Path, version: int, file: str, limit: str
) -> None:
    """Where the kernel counts swap: it has the file then."""
    counted = tmp_path / "template-manager" / "vm" / file
    counted.parent.mkdir(parents=True)
    counted.touch()
    make_cgroups("vm", LIMITS, [Tree(version, tmp_path, ("memory",))])
    assert counted.read_text() == limit


def test_a_controller_without_a_limit_gets_no_cgroup(tmp_path: Path) -> None:
    limits = Limits(memory_mb=1, processes=2)
    names = ("cpu", "memory", "pids")
    made = make_cgroups("child", limits, [Tree(1, tmp_path / name, (name,)) for name in names])
    assert made == [tmp_path / name / "template-manager" / "child" for name in names[1:]]
    [tree] = trees(version_2(tmp_path, "cpu memory pids"), "0::/\n")
    [whole] = make_cgroups("child", limits, [tree])
    assert written(whole) == {"memory.max": str(1 << 20), "pids.max": "2"}


def test_what_a_machine_lacks_is_told(tmp_path: Path) -> None:
    assert missing_controllers([]) == "this machine has no cgroups for cpu, memory, pids"
    assert not missing_controllers([Tree(2, tmp_path, ("cpu", "memory", "pids"))])


def test_what_cannot_be_made_whole_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory").write_text("no directory\n")
    monkeypatch.setattr(Path, "write_text", lambda *_: 0)  # no file is made, as in a cgroup
    found = [Tree(1, tmp_path / "pids", ("pids",)), Tree(1, tmp_path / "memory", ("memory",))]
    with pytest.raises(OSError, match="memory"):
        make_cgroups("vm", LIMITS, found)
    assert not (tmp_path / "pids" / "template-manager" / "vm").exists()


def test_removing_one_that_is_not_there_is_no_error(tmp_path: Path) -> None:
    remove_cgroup(tmp_path / "none")
