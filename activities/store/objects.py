"""The map of the bucket: the name of every object, and what a name says.

Templates lie under `<build_id>/`, layers of their disks under `<layer_id>/`, everything else beside
them; logs and files under their tenant's name, but for the default tenant's. No other module spells
a name. A layer's data and header have the names of an artifact's, with its id for a build's.
All of them stand in buckets that earlier and later versions read: what is here stays.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from enum import StrEnum
from typing import NamedTuple

from activities.contract.names import (
    DEFAULT_TENANT,
    LAYER_ID,
    TENANT_NAME,
    UUID_PATTERN,
    ArtifactName,
    tenant_mark,
)

METADATA = "metadata.json"
"""The commit mark; also the name of its copy beside a template that was pulled."""
LEASES = ".leases/"
OWNERS = ".owners/"
LOGS = "logs/"
FILES = "files/"
NAMES = "names/"
PROBES = ".doctor/"
STORED = ".stored.json"
PARTS_GLOB = "*/.parts/**"
"""All parts of all builds (`**` crosses slashes)."""
LAYERS_GLOB = "????????-????-8???-????-????????????/**"
"""All objects of all layers, and some that are none."""
USED_LAYERS_GLOB = "*/.layers/*"
METADATA_GLOB = f"*/{METADATA}"

_PARTS = ".parts/"
_LAYER_RECORD = "layer.json"
_REFERENCES = ".refs/"
_USED_LAYERS = ".layers/"
# Base64 in object names, without the characters that need escaping.
NAME_SAFE = str.maketrans("+/=", "-_.")


class ObjectKind(StrEnum):
    """What an object is; the names are what a sweep reports."""

    TEMPLATE = "template"
    PART = "part"
    LAYER = "layer"
    REFERENCE = "reference to a layer"
    USED_LAYER = "used layer"
    LEASE = "lease object"
    OWNER = "owner"
    LOG = "log"
    FILES = "files"
    NAMES = "names"
    PROBE = "probe"
    STORED = "what is stored"


class SentFiles(NamedTuple):
    """What a client calls the tar of a COPY: its SHA-256, or within a scope whatever it likes."""

    hash: str
    scope: str = ""
    """'' is none: then `hash` is the SHA-256 of the bytes, in hex."""


class ObjectName(NamedTuple):
    """What the name of an object says. `build_id` is '' for what belongs to no build."""

    kind: ObjectKind
    build_id: str
    """Of a reference to a layer: who needs it, which may be another layer."""
    layer_id: str = ""


def template_prefix(build_id: str) -> str:
    """Return what the names of all objects of a template, parts included, begin with."""
    return f"{build_id}/"


def artifact_name(build_id: str, artifact: ArtifactName) -> str:
    """Name an artifact's data."""
    return f"{template_prefix(build_id)}{artifact}"


def header_name(build_id: str, artifact: ArtifactName) -> str:
    """Name an artifact's header, see `headers`."""
    return f"{artifact_name(build_id, artifact)}.header"


def build_log_name(build_id: str) -> str:
    """Name the whole build log of a template."""
    return f"{template_prefix(build_id)}build.log"


def metadata_name(build_id: str) -> str:
    """Name a template's `metadata.json`."""
    return f"{template_prefix(build_id)}{METADATA}"


def is_metadata(name: str) -> bool:
    """Whether an object is the `metadata.json` of some template."""
    return name.endswith(f"/{METADATA}")


def parts_prefix(build_id: str, artifact: ArtifactName | None = None) -> str:
    """Return what the names of the parts of an unfinished upload begin with."""
    prefix = f"{template_prefix(build_id)}{_PARTS}"
    return f"{prefix}{artifact}/" if artifact else prefix


def layer_parts_prefix(build_id: str, layer_id: str) -> str:
    """Return what the names of the parts begin with of a layer that a build is sending."""
    return f"{parts_prefix(build_id)}{layer_id}/"


def part_name(prefix: str, number: int, crc32c: str, size_bytes: int) -> str:
    """Name a part by its position and content: an equal name is an equal part."""
    return f"{prefix}{number:06d}-{crc32c.translate(NAME_SAFE)}-{size_bytes}"


def composed_part_name(prefix: str, level: int, number: int, key: str) -> str:
    """Name what a group of parts is composed into; `key` is a hash of their names."""
    return f"{prefix}level{level}-{number:04d}-{key}"


def is_layer_id(user: str) -> bool:
    """Whether that is the id of a layer, and so of no build."""
    return LAYER_ID.fullmatch(user) is not None


def layer_record_name(layer_id: str) -> str:
    """Name the commit mark of a layer, see `layers`."""
    return f"{template_prefix(layer_id)}{_LAYER_RECORD}"


def references_prefix(layer_id: str) -> str:
    """Return what the names of all references to a layer begin with."""
    return f"{template_prefix(layer_id)}{_REFERENCES}"


def reference_name(layer_id: str, user: str) -> str:
    """Name the object by which a build, or the layer above, says that it needs a layer."""
    return f"{references_prefix(layer_id)}{user}"


def used_layers_prefix(build_id: str) -> str:
    """Return what the names of all objects begin with that say which layers a build needs."""
    return f"{template_prefix(build_id)}{_USED_LAYERS}"


def is_used_layer(name: str) -> bool:
    """Whether an object says that its build has a reference to a layer."""
    return _PATTERNS[ObjectKind.USED_LAYER].fullmatch(name) is not None


def used_layer_name(build_id: str, layer_id: str) -> str:
    """Name the object by which a build knows that it has a reference to a layer."""
    return f"{used_layers_prefix(build_id)}{layer_id}"


def lease_name(build_id: str) -> str:
    """Name the object whose generation is the build's lease number."""
    return f"{LEASES}{build_id}"


def owner_name(build_id: str) -> str:
    """Name the object that binds a build id to its tenant."""
    return f"{OWNERS}{build_id}"


def archived_log_name(build_id: str, tenant: str = DEFAULT_TENANT) -> str:
    """Name the log of a closed build."""
    return f"{_tenants(LOGS, tenant)}{build_id}.jsonl"


def files_name(sha256: str, tenant: str = DEFAULT_TENANT) -> str:
    """Name a tar of files by the SHA-256 of its bytes, in hex."""
    return f"{_tenants(FILES, tenant)}{sha256}.tar"


def sent_files_name(sent: SentFiles, tenant: str) -> str:
    """Name the object to which a client sends a tar: no text of its own stands in the name."""
    if not sent.scope:
        return files_name(sent.hash, tenant)
    key = hashlib.sha256(json.dumps(sent).encode()).hexdigest()
    return f"{_tenants(FILES, tenant)}{key}.scoped.tar"


def names_prefix(tenant: str | None) -> str:
    """Return what the objects of all templates' names of a tenant begin with; None is of all."""
    return f"{NAMES}{tenant}/" if tenant else NAMES


def names_object(tenant: str, name: str) -> str:
    """Name the object that has a template's name and tags."""
    return f"{names_prefix(tenant)}{name}.json"


def parse_names_object(name: str) -> tuple[str, str] | None:
    """Return tenant and name of such an object; None for any other."""
    found = _PATTERNS[ObjectKind.NAMES].fullmatch(name)
    return (found["tenant"], found["name"]) if found else None


def places_of_tenant(tenant: str) -> tuple[str, ...]:
    """Return what the names of all logs, files and names of a tenant begin with.

    Raises ValueError for the default tenant: its names begin as everybody's do.
    """
    if not tenant_mark(tenant):
        raise ValueError("the default tenant has no place of its own")
    return _tenants(LOGS, tenant), _tenants(FILES, tenant), names_prefix(tenant)


def _tenants(prefix: str, tenant: str) -> str:
    mark = tenant_mark(tenant)
    return f"{prefix}{mark}/" if mark else prefix


def probe_name() -> str:
    """Name an object that is written only to see whether that works."""
    return f"{PROBES}{uuid.uuid4()}"


def stored_name() -> str:
    """Name the object that says how much each tenant has stored."""
    return STORED


def parse_object_name(name: str) -> ObjectName | None:
    """Tell what an object is by its name; None for one that is not ours."""
    for kind, pattern in _PATTERNS.items():
        if found := pattern.fullmatch(name):
            said = found.groupdict()
            return ObjectName(kind, said.get("build_id", ""), said.get("layer_id", ""))
    return None


_BUILD = f"(?P<build_id>{UUID_PATTERN})"
_LAYER = f"(?P<layer_id>{LAYER_ID.pattern})"
_TENANT = f"(?:{TENANT_NAME.pattern}/)?"
_PATTERNS = {
    ObjectKind.PART: re.compile(rf"{_BUILD}/{re.escape(_PARTS)}.+"),
    ObjectKind.REFERENCE: re.compile(rf"{_LAYER}/{re.escape(_REFERENCES)}{_BUILD}"),
    ObjectKind.USED_LAYER: re.compile(rf"{_BUILD}/{re.escape(_USED_LAYERS)}{_LAYER}"),
    # Before templates, whose names are like these. Builds of before there were layers may have
    # such an id, too: what else lies there is theirs.
    ObjectKind.LAYER: re.compile(
        rf"{_LAYER}/(?:{re.escape(_LAYER_RECORD)}|{re.escape(ArtifactName.ROOTFS)}(?:\.header)?)"
    ),
    ObjectKind.TEMPLATE: re.compile(rf"{_BUILD}/[^/]+"),
    ObjectKind.LEASE: re.compile(rf"{re.escape(LEASES)}{_BUILD}"),
    ObjectKind.OWNER: re.compile(rf"{re.escape(OWNERS)}{_BUILD}"),
    ObjectKind.LOG: re.compile(rf"{LOGS}{_TENANT}{_BUILD}\.jsonl"),
    ObjectKind.FILES: re.compile(rf"{FILES}{_TENANT}[0-9a-f]{{64}}(?:\.scoped)?\.tar"),
    ObjectKind.NAMES: re.compile(
        rf"{NAMES}(?P<tenant>{TENANT_NAME.pattern})/(?P<name>[a-z0-9_-]+)\.json"
    ),
    ObjectKind.PROBE: re.compile(rf"{re.escape(PROBES)}.+"),
    ObjectKind.STORED: re.compile(re.escape(STORED)),
}
