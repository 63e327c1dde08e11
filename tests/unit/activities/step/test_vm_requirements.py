from __future__ import annotations

from pathlib import Path

import pytest

from activities.contract.errors import (
    AgentMissingError,
    EgressMissingError,
    HostTooSmallError,
    KernelMissingError,
)
from activities.contract.names import Step
from activities.contract.network_policy import INTERNET
from activities.contract.scope import VmShape
from activities.contract.status import LogLevel
from activities.process.settings import Settings
from activities.step.build_log import BuildLog, read_entries
from activities.step.vm_requirements import NO_HUGE_PAGES, require_host, require_parts


def shape(*, huge_pages: bool = False, memory_mb: int = 512) -> VmShape:
    return VmShape(
        memory_mb=memory_mb,
        vcpu_count=1,
        kernel_version="vmlinux-6.1",
        firecracker_version="v1.16.1",
        huge_pages=huge_pages,
    )


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = Settings(kernels_dir=tmp_path / "kernels", firecracker_dir=tmp_path / "firecrackers")
    for path in (made.kernel_path("vmlinux-6.1"), made.firecracker_path("v1.16.1")):
        path.parent.mkdir(parents=True)
        path.touch(mode=0o755)
    return made


def test_huge_pages_are_a_wish_that_the_log_answers(settings: Settings, tmp_path: Path) -> None:
    log = BuildLog(tmp_path / "b.jsonl", Step.PULL)
    require_parts(settings, shape(huge_pages=True), log)
    [line] = read_entries(tmp_path / "b.jsonl")
    assert (line.level, line.message) == (LogLevel.WARN, NO_HUGE_PAGES)


def test_nothing_is_said_of_a_host_that_has_all(settings: Settings, tmp_path: Path) -> None:
    require_parts(settings, shape(), BuildLog(tmp_path / "b.jsonl", Step.PULL))
    assert not (tmp_path / "b.jsonl").exists()


def test_what_a_host_lacks_is_named(settings: Settings, tmp_path: Path) -> None:
    log = BuildLog(tmp_path / "b.jsonl", Step.PULL)
    no_agent = settings.model_copy(update={"guest_agent_path": tmp_path / "agent"})
    with pytest.raises(AgentMissingError, match="no guest agent at"):
        require_parts(no_agent, shape(), log)
    required = settings.model_copy(update={"require_guest_agent": True})
    with pytest.raises(AgentMissingError, match="no guest agent, which is required"):
        require_parts(required, shape(), log)
    with pytest.raises(HostTooSmallError, match="MiB of memory; 1073741824 are asked for"):
        require_parts(settings, shape(memory_mb=2**30), log)
    settings.kernel_path("vmlinux-6.1").unlink()
    with pytest.raises(KernelMissingError, match=r"vmlinux-6\.1/vmlinux\.bin"):
        require_parts(settings, shape(), log)


def test_a_network_takes_programs_and_none_takes_none(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    require_host(settings, shape())
    with pytest.raises(EgressMissingError, match="no nftables and no slirp4netns"):
        require_host(settings, shape().model_copy(update={"network": INTERNET}))
