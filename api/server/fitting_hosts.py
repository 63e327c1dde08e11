"""Which hosts can run a build, by what they tell of themselves: for builds that one has refused.

It runs in the workers' process, and asks the hosts as the API does.
"""

from __future__ import annotations

from collections.abc import Mapping

from temporalio import activity
from temporalio.client import Client

from activities.contract.inputs import FindHostInput
from activities.contract.interface import HostFindingActivities
from activities.contract.results import FoundHost, HostFacts
from activities.contract.scope import VmShape
from activities.contract.units import MIB
from api.server.hosts import all_hosts


class FittingHosts(HostFindingActivities):
    """Finds hosts by their facts. See `interface` for the contract."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @activity.defn(name="find_host")
    async def find_host(self, find: FindHostInput, /) -> FoundHost:
        """Ask all hosts for their facts, and choose one that can run such a VM."""
        facts = await all_hosts(self._client)
        return choose(find, {name: facts[name] for name in facts if name not in find.refused})


def choose(find: FindHostInput, facts: Mapping[str, HostFacts | None]) -> FoundHost:
    """Choose by what hosts have told; None is one that does not answer."""
    fit = [told for told in facts.values() if told is not None and is_fit(told, find.shape)]
    taking = [told for told in fit if not told.draining]
    best = max(taking, key=lambda told: told.slots - len(told.builds), default=None)
    return FoundHost(
        host=best.host if best else None,
        is_drained=len(taking) < len(fit),
        may_come=None in facts.values(),
    )


def is_fit(told: HostFacts, shape: VmShape) -> bool:
    """Whether a host can run such a VM: kernel, Firecracker, memory and network."""
    return (
        shape.kernel_version in told.kernel_versions
        and shape.firecracker_version in told.firecracker_versions
        and (told.leads_out or not shape.network.leads_out)
        and (told.machine is None or shape.memory_mb <= told.machine.memory_total_bytes // MIB)
    )
