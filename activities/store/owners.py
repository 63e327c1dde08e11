"""Whose a build id is: `.owners/<build_id>`, which nothing ever removes.

Who has a template's id trusts what is there. If a deleted build's id could be used again by another
tenant, what that tenant builds would run in its place.
"""

from __future__ import annotations

from activities.contract.errors import PreconditionFailedError
from activities.contract.model import Model
from activities.contract.names import TenantName
from activities.store.bucket import Bucket
from activities.store.objects import owner_name


class Owner(Model):
    """The content of `.owners/<build_id>`."""

    tenant: TenantName


def read_owner(bucket: Bucket, build_id: str) -> str | None:
    """Return the tenant to which a build id is bound; None while it is nobody's. Blocking.

    Raises StorageUnavailableError and StorageDeniedError.
    """
    found = bucket.read_object(owner_name(build_id))
    return Owner.model_validate_json(found[0]).tenant if found else None


def claim(bucket: Bucket, build_id: str, tenant: str) -> str:
    """Bind a build id to a tenant unless it is bound already; return to which. Blocking.

    Raises StorageUnavailableError and StorageDeniedError.
    """
    content = Owner(tenant=tenant).model_dump_json().encode()
    try:
        bucket.write_object(owner_name(build_id), content, if_generation_match=0)
    except PreconditionFailedError:
        return read_owner(bucket, build_id) or tenant
    return tenant
