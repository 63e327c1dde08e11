"""All workflows, and the sandbox that they run in."""

from __future__ import annotations

from collections.abc import Sequence

from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions

from workflows.build_template import BuildTemplate
from workflows.delete_template import DeleteTemplate
from workflows.delete_tenant import DeleteTenant
from workflows.inspect_host import InspectHost
from workflows.sweep import SweepBucket, SweepHost
from workflows.tenant_line import TenantLine

WORKFLOWS: Sequence[type] = (
    BuildTemplate,
    DeleteTemplate,
    SweepHost,
    SweepBucket,
    InspectHost,
    TenantLine,
    DeleteTenant,
)


def sandbox() -> SandboxedWorkflowRunner:
    """Return the workflow sandbox. Of ours only the contract is passed through: pure data."""
    return SandboxedWorkflowRunner(
        restrictions=SandboxRestrictions.default.with_passthrough_modules("activities.contract")
    )
