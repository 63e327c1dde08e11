"""The names that are written down: ids, workflows, task queues, steps, VMs.

All of them stand in Temporal's histories, in the bucket or on hosts' disks: what is here stays.
"""

from __future__ import annotations

import re
import uuid
from enum import StrEnum
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, StringConstraints


def canonical_build_id(value: str) -> str:
    """Return the canonical lower-case form of a UUID.

    Raises ValueError when `value` is not a UUID in its usual 36-character form.
    """
    try:
        parsed = uuid.UUID(value)
    except (ValueError, AttributeError) as error:
        raise ValueError("must be a UUID such as 4f2c6f0e-5d1c-4c8e-9d43-0a7c6a1b2c3d") from error
    if str(parsed) != value.lower():
        raise ValueError("must be a UUID in its 36-character form")
    return str(parsed)


UUID_PATTERN = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
LAYER_ID = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
"""A UUID of version 8. New builds have none of these: the objects of both lie side by side."""
VM_NAME = re.compile(rf"tm-(?P<build_id>{UUID_PATTERN})-(?P<number>\d+)-(?P<purpose>[a-z]+)")
BuildId = Annotated[str, AfterValidator(canonical_build_id)]
TemplateId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,63}$")]
ImageDigest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
PlainName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,127}$")]
Fingerprint = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
TENANT_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
TenantName = Annotated[str, StringConstraints(pattern=rf"^{TENANT_NAME.pattern}$")]
"""Who a build belongs to: a name, or a UUID as E2B's clients have it for a team."""
DEFAULT_TENANT = "default"
"""The one tenant of a service without tokens, and whose everything is that names no tenant."""
HostName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,62})$")]
WORKFLOW_TASK_QUEUE = "template-manager"
SHARED_HOST_TASK_QUEUE = "kvm-hosts"
SWEEP_HOST_WORKFLOW = "SweepHost"
SWEEP_BUCKET_WORKFLOW = "SweepBucket"
INSPECT_HOST_WORKFLOW = "InspectHost"
TENANT_LINE_WORKFLOW = "TenantLine"
BUILD_WORKFLOW = "template-build-"
DELETE_WORKFLOW = "template-delete-"
TENANT_LINE = "tenant-line-"
DELETE_TENANT = "tenant-delete-"


def tenant_mark(tenant: str) -> str:
    """Return what a tenant adds to names and keys: '' for the default one, whose names and keys are
    those of before there were tenants."""
    return "" if tenant == DEFAULT_TENANT else tenant


def build_workflow_id(build_id: str) -> str:
    """Name the workflow that builds `build_id`."""
    return f"{BUILD_WORKFLOW}{build_id}"


def delete_workflow_id(build_id: str) -> str:
    """Name the workflow that deletes `build_id`."""
    return f"{DELETE_WORKFLOW}{build_id}"


def tenant_line_workflow_id(tenant: str) -> str:
    """Name the workflow that gives the builds of a tenant their turns."""
    return f"{TENANT_LINE}{tenant}"


def delete_tenant_workflow_id(tenant: str) -> str:
    """Name the workflow that removes all that is a tenant's."""
    return f"{DELETE_TENANT}{tenant}"


def build_of_workflow(workflow_id: str) -> str:
    """Return the build that a workflow builds or deletes; "" when it does neither."""
    for prefix in (BUILD_WORKFLOW, DELETE_WORKFLOW):
        if workflow_id.startswith(prefix):
            return workflow_id.removeprefix(prefix)
    return ""


class Step(StrEnum):
    """The steps of a build, in order. The names are what users and operators see."""

    LEASE = "lease_host"
    PULL = "pull_image"
    ROOTFS = "build_rootfs"
    BOOT = "boot_and_snapshot"
    VERIFY = "verify"
    UPLOAD = "upload"
    RELEASE = "release_host"


class ArtifactName(StrEnum):
    """The files of a template, in the order in which they are sent."""

    ROOTFS = "rootfs.ext4"
    MEMFILE = "memfile"
    SNAPFILE = "snapfile"


def step_task_queue(host: str) -> str:
    """Name the queue on which `host` runs the steps of the builds that it holds."""
    return f"kvm-host.{host}"


def lease_task_queue(host: str) -> str:
    """Name the queue on which `host` takes up again the builds that it already holds."""
    return f"kvm-lease.{host}"


class VmPurpose(StrEnum):
    """Why a VM runs."""

    BOOT = "boot"
    VERIFY = "verify"


class VmName(NamedTuple):
    """What the name of a VM says."""

    build_id: str
    lease_number: int
    purpose: str


def parse_vm_name(name: str) -> VmName | None:
    """Read a name that `VmRef.name` has made; None for any other name."""
    found = VM_NAME.fullmatch(name)
    return VmName(found["build_id"], int(found["number"]), found["purpose"]) if found else None


LOG_TOPIC = "log"
