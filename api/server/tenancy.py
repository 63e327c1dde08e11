"""Whose a build is, and whether the caller sees it: what is another tenant's is not there.

Every way to a build asks here, and whatever is hidden takes the path of what does not exist: the
same look-ups, the same answer.
"""

from __future__ import annotations

import grpc
from temporalio.client import WorkflowExecution

from activities.contract.names import DEFAULT_TENANT, TENANT_NAME
from activities.contract.search_attributes import TENANT, TENANT_MEMO
from api.errors import ApiError, Violation, invalid_argument
from api.server.access import Right, current_caller


def is_visible(tenant: str) -> bool:
    """Whether what belongs to a tenant is there for the current caller."""
    return current_caller.get().sees(tenant)


async def tenant_of(execution: WorkflowExecution) -> str:
    """Return whose a workflow is; one that was started before there were tenants is `default`'s."""
    return str(await execution.memo_value(TENANT_MEMO, DEFAULT_TENANT))


async def is_visible_workflow(execution: WorkflowExecution) -> bool:
    """Whether a build's workflow is there for the current caller."""
    return is_visible(await tenant_of(execution))


def visible_condition() -> str:
    """Return a condition of a visibility query, for what the current caller sees; "" is all."""
    caller = current_caller.get()
    return "" if caller.right is Right.OPERATOR else condition_of(caller.tenant)


def condition_of(tenant: str) -> str:
    """Return a condition of a visibility query, for what is a tenant's."""
    theirs = f"{TENANT.name}='{tenant}'"
    return f"({theirs} OR {TENANT.name} IS NULL)" if tenant == DEFAULT_TENANT else theirs


def tenant_for(team_id: str) -> str:
    """Return for whom the current caller creates: its own tenant, or an operator the one it names.

    Where nobody has to say who he is, `team_id` is a mere label. Raises ApiError PERMISSION_DENIED
    when it says another tenant than the caller's.
    """
    caller = current_caller.get()
    if not team_id or not caller.is_known or team_id == caller.tenant:
        return caller.tenant
    if caller.right is not Right.OPERATOR:
        raise ApiError(
            grpc.StatusCode.PERMISSION_DENIED,
            "TEAM_NOT_YOURS",
            f"{caller.name} builds for {caller.tenant}: team_id must be that, or be left out",
            hint="Leave team_id out, or use a token of that tenant.",
        )
    if not TENANT_NAME.fullmatch(team_id):
        raise invalid_argument(
            [Violation("template.team_id", "must be a tenant: 1 to 63 of a-z, 0-9 and -")]
        )
    return team_id
