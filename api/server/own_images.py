"""The service's own images: what clients push to its registry for the builds of their tenant.

`<registry>/<template_id>:<build_id>` is the default tenant's, and
`<registry>/tenants/<tenant>/<template_id>:<build_id>` another's. Everything else in that registry
is for all to build from.
"""

from __future__ import annotations

import grpc

from activities.contract.image_reference import ImageReference
from activities.contract.names import DEFAULT_TENANT, tenant_mark
from api.errors import ApiError

TENANTS = "tenants"
USUAL_PORTS = (443, 80)
"""Of HTTPS and HTTP: which of them a registry speaks, its name does not say."""


def own_image(registry: str, tenant: str, template_id: str, build_id: str) -> str:
    """Return the name of the image that is pushed for a build."""
    mark = tenant_mark(tenant)
    place = f"{registry}/{TENANTS}/{mark}" if mark else registry
    return f"{place}/{template_id}:{build_id}"


def owner_of_image(registry: str, image: str) -> str | None:
    """Return the tenant for which an image was pushed; None when it is not one of those.

    Raises ImageReferenceError.
    """
    name = _place_of(image)
    below = _place_of(f"{registry}/x").removesuffix("x")
    if not name.startswith(below):
        return None
    parts = name.removeprefix(below).split("/")
    if parts[0] == TENANTS:
        return parts[1] if len(parts) > 1 else DEFAULT_TENANT
    return DEFAULT_TENANT if len(parts) == 1 else None


def _place_of(image: str) -> str:
    """Return where an image is, however its registry is written: in capitals, or with a port that
    needs no saying."""
    named = ImageReference.parse(image)
    host, _, port = named.registry.lower().partition(":")
    number = int(port) if port else USUAL_PORTS[0]
    place = host if number in USUAL_PORTS else f"{host}:{number}"
    return f"{place}/{named.repository}"


def require_not_anothers(registry: str, image: str, tenant: str) -> None:
    """Raise ApiError PERMISSION_DENIED for an image that was pushed for another tenant's builds."""
    if owner_of_image(registry, image) in (None, tenant):
        return
    raise ApiError(
        grpc.StatusCode.PERMISSION_DENIED,
        "IMAGE_NOT_ALLOWED",
        f"{tenant} may not build from {image}: that name is not of its images in {registry}",
        hint=f"Push it below {own_image(registry, tenant, 'NAME', 'TAG').rpartition('/')[0]}.",
    )
