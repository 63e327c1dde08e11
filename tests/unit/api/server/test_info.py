from __future__ import annotations

from activities.contract.results import HostFacts, MachineFacts
from api.pb import info_service_pb2 as pb
from api.server.info import ServiceStatus, common_machine, machines_of, mean_load
from tests.support.host_facts import host_facts

EPYC = MachineFacts(
    cpu_architecture="x86_64",
    cpu_family="26",
    cpu_model="2",
    cpu_model_name="AMD EPYC",
    cpu_flags=("fpu", "avx", "avx512f"),
    cpu_count=8,
    cpu_percent=25,
)


def facts(machine: MachineFacts | None) -> HostFacts:
    return host_facts(machine=machine)


def test_machines_are_those_of_the_hosts_that_tell_one() -> None:
    assert machines_of({"a": facts(EPYC), "b": None, "old": facts(None)}) == [EPYC]


def test_a_processor_is_told_when_all_hosts_have_it() -> None:
    told = common_machine([EPYC, EPYC.model_copy(update={"cpu_percent": 90.0})])
    assert (told.cpu_family, told.cpu_model_name) == ("26", "AMD EPYC")
    assert list(told.cpu_flags) == ["avx", "avx512f", "fpu"]


def test_where_hosts_differ_nothing_is_told_that_is_not_true_of_all() -> None:
    older = EPYC.model_copy(update={"cpu_model": "1", "cpu_flags": ("fpu", "avx")})
    told = common_machine([EPYC, older])
    assert (told.cpu_architecture, told.cpu_model) == ("x86_64", "")
    assert list(told.cpu_flags) == ["avx", "fpu"]
    assert common_machine([]) == pb.MachineInfo()


def test_the_load_is_of_all_processors_together() -> None:
    small = EPYC.model_copy(update={"cpu_count": 2, "cpu_percent": 100.0})
    assert mean_load([EPYC, small]) == 40
    assert mean_load([]) == 0


def test_a_process_says_what_it_is_told_unless_it_is_worse_by_itself() -> None:
    own = pb.ServiceHealthy
    status = ServiceStatus(lambda: own)
    first = status.described()
    assert (first.service_status, status.is_told) == (pb.ServiceHealthy, False)
    status.tell(pb.ServiceStandby)
    assert status.described().service_status == pb.ServiceStandby
    assert status.is_told
    own = pb.ServiceUnhealthy
    assert status.now() == pb.ServiceUnhealthy
    own = pb.ServiceHealthy
    status.tell(pb.ServiceHealthy)
    last = status.described()
    assert last.service_status == pb.ServiceHealthy
    assert (
        last.service_status_changed_at.ToNanoseconds()
        > first.service_status_changed_at.ToNanoseconds()
    )
