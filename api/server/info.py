"""The rpcs of `InfoService`: what this service is and how it is, as E2B's control plane asks."""

from __future__ import annotations

import importlib.metadata
import socket
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping

from google.protobuf.empty_pb2 import Empty

from activities.contract.results import HostFacts, MachineFacts
from activities.process.clock import utc_now
from api.pb import info_service_pb2 as pb
from api.pb import info_service_pb2_grpc as pb_grpc
from api.server.interceptor import Context
from api.server.known_hosts import KnownHosts
from api.server.wire import timestamp


class ServiceStatus:
    """How this process is: as it is by itself, unless it was told to say something else."""

    def __init__(self, own: Callable[[], pb.ServiceInfoStatus]) -> None:
        """`own` tells how it is by itself."""
        self._own = own
        self._told: pb.ServiceInfoStatus = pb.ServiceHealthy
        self._last: pb.ServiceInfoStatus = pb.ServiceHealthy
        self._changed_at = utc_now()

    @property
    def is_told(self) -> bool:
        """Whether it was told to say another status than its own."""
        return self._told != pb.ServiceHealthy

    def tell(self, status: pb.ServiceInfoStatus) -> None:
        """Say this from now on while all is well; `ServiceHealthy` takes that back."""
        self._told = status

    def now(self) -> pb.ServiceInfoStatus:
        """Return the status. What the process is by itself goes before what it was told."""
        status = self._own() or self._told  # ServiceHealthy is 0
        if status != self._last:
            self._last, self._changed_at = status, utc_now()
        return status

    def described(self) -> pb.ServiceInfoResponse:
        """Return the part of an answer that says the status, and since when it is so."""
        status = self.now()
        return pb.ServiceInfoResponse(
            service_status=status, service_status_changed_at=timestamp(self._changed_at)
        )


class InfoService(pb_grpc.InfoServiceServicer):
    """Answers those who look for a service that builds templates."""

    def __init__(self, status: ServiceStatus, hosts: KnownHosts) -> None:
        self._status = status
        self._hosts = hosts
        self._service_id = str(uuid.uuid4())
        self._started = utc_now()

    async def ServiceInfo(self, request: Empty, context: Context) -> pb.ServiceInfoResponse:
        """Tell status and role, and what machines the hosts are."""
        machines = machines_of(await self._hosts.facts() or {})
        answer = pb.ServiceInfoResponse(
            node_id=socket.gethostname(),
            service_id=self._service_id,
            service_version=importlib.metadata.version("template-manager"),
            service_roles=[pb.TemplateBuilder],
            service_startup=timestamp(self._started),
            machine_info=common_machine(machines),
            metric_cpu_percent=mean_load(machines),
            memory_used_bytes=sum(machine.memory_used_bytes for machine in machines),
            cpu_count=sum(machine.cpu_count for machine in machines),
            memory_total_bytes=sum(machine.memory_total_bytes for machine in machines),
        )
        answer.MergeFrom(self._status.described())
        return answer

    async def ServiceStatusOverride(
        self, request: pb.ServiceStatusChangeRequest, context: Context
    ) -> Empty:
        """Say this status from now on; with Healthy, how the process is."""
        self._status.tell(request.service_status)
        return Empty()


def machines_of(facts: Mapping[str, HostFacts | None]) -> list[MachineFacts]:
    """Return the machines of the hosts that answer."""
    return [told.machine for told in facts.values() if told is not None and told.machine]


def common_machine(machines: Collection[MachineFacts]) -> pb.MachineInfo:
    """Return what all machines have in common: a sandbox resumes on each of them, or on none."""
    return pb.MachineInfo(
        cpu_architecture=_agreed(machine.cpu_architecture for machine in machines),
        cpu_family=_agreed(machine.cpu_family for machine in machines),
        cpu_model=_agreed(machine.cpu_model for machine in machines),
        cpu_model_name=_agreed(machine.cpu_model_name for machine in machines),
        cpu_flags=_flags_of_all(machines),
    )


def mean_load(machines: Collection[MachineFacts]) -> int:
    """Return how busy the machines' processors are together, in per cent."""
    count = sum(machine.cpu_count for machine in machines)
    busy = sum(machine.cpu_percent * machine.cpu_count for machine in machines)
    return round(busy / count) if count else 0


def _agreed(values: Iterable[str]) -> str:
    found = set(values)
    return found.pop() if len(found) == 1 else ""


def _flags_of_all(machines: Collection[MachineFacts]) -> list[str]:
    if not machines:
        return []
    return sorted(set.intersection(*(set(machine.cpu_flags) for machine in machines)))
