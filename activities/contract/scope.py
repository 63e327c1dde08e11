"""Whose work it is and by which right, and the VM that it is about."""

from __future__ import annotations

from pydantic import Field

from activities.contract.model import Model
from activities.contract.names import (
    DEFAULT_TENANT,
    BuildId,
    HostName,
    PlainName,
    TemplateId,
    TenantName,
    VmPurpose,
    lease_task_queue,
    step_task_queue,
)
from activities.contract.network_policy import NO_NETWORK, NetworkPolicy


class HostLease(Model):
    """A build's right to a slot of one host.

    `number` is the generation of the object `.leases/<build_id>` in the bucket: a later lease has
    a higher number, and whoever carries a lower one may not change anything any more.
    """

    host: HostName
    number: int
    whole_steps: bool = Field(default=False, exclude_if=lambda whole: not whole)
    """Of a grant: whether the host can; in a scope: whether the workflow has it that a step does
    all that belongs to it. It makes its VM's network, and removes both when it has succeeded; it
    answers with the last lines of its log (`Told`); all artifacts are sent by one activity."""
    sends_ahead: bool = Field(default=False, exclude_if=lambda sends: not sends)
    """Of a grant: whether the host serves `send_layers`; in a scope: whether the workflow asks."""

    @property
    def step_queue(self) -> str:
        """The task queue on which this host runs steps."""
        return step_task_queue(self.host)

    @property
    def lease_queue(self) -> str:
        """The task queue on which this host takes up a lease again."""
        return lease_task_queue(self.host)


class BuildScope(Model):
    """Whose work it is and by which right: part of the input of every activity on a host."""

    build_id: BuildId
    template_id: TemplateId
    lease: HostLease
    tenant: TenantName = Field(
        default=DEFAULT_TENANT, exclude_if=lambda tenant: tenant == DEFAULT_TENANT
    )


class VmRef(Model):
    """Names one VM, its netns, its directory and its processes on a host."""

    scope: BuildScope
    purpose: VmPurpose

    @property
    def name(self) -> str:
        """`tm-<build id>-<lease number>-<purpose>`; also the name of its netns."""
        return f"tm-{self.scope.build_id}-{self.scope.lease.number}-{self.purpose}"


class VmShape(Model):
    """What a VM is made of, besides its disk."""

    memory_mb: int
    vcpu_count: int
    kernel_version: PlainName
    firecracker_version: PlainName
    huge_pages: bool = False
    network: NetworkPolicy = Field(
        default=NO_NETWORK, exclude_if=lambda network: network == NO_NETWORK
    )
    """What it may reach while steps run and its start command starts; a resumed one: nothing."""
