"""The JSON bodies of Firecracker's API, checked as strictly as Firecracker checks them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import Fault

Json = dict[str, Any]


@dataclass(frozen=True)
class Field:
    """One field of a body: its JSON type, whether it must be there, and its allowed values."""

    type: type
    required: bool = False
    choices: tuple[str, ...] = ()
    maximum: int | None = None


Schema = Mapping[str, Field]

REQUIRED_TEXT = Field(str, required=True)
TEXT = Field(str)
FLAG = Field(bool)
OBJECT = Field(dict)

BOOT_SOURCE: Schema = {
    "kernel_image_path": REQUIRED_TEXT,
    "initrd_path": TEXT,
    "boot_args": TEXT,
}
DRIVE: Schema = {
    "drive_id": REQUIRED_TEXT,
    "partuuid": TEXT,
    "is_root_device": Field(bool, required=True),
    "cache_type": Field(str, choices=("Unsafe", "Writeback")),
    "is_read_only": FLAG,
    "path_on_host": TEXT,
    "rate_limiter": OBJECT,
    "io_engine": Field(str, choices=("Sync", "Async")),
    "socket": TEXT,
}
NETWORK_INTERFACE: Schema = {
    "iface_id": REQUIRED_TEXT,
    "host_dev_name": REQUIRED_TEXT,
    "guest_mac": TEXT,
    "rx_rate_limiter": OBJECT,
    "tx_rate_limiter": OBJECT,
}
_CPU_TEMPLATES = ("C3", "T2", "T2S", "T2CL", "T2A", "V1N1", "None")
MACHINE_CONFIG_UPDATE: Schema = {
    "vcpu_count": Field(int, maximum=2**8 - 1),
    "mem_size_mib": Field(int, maximum=2**64 - 1),
    "smt": FLAG,
    "cpu_template": Field(str, choices=_CPU_TEMPLATES),
    "track_dirty_pages": FLAG,
    "huge_pages": Field(str, choices=("None", "2M")),
}
MACHINE_CONFIG: Schema = {
    **MACHINE_CONFIG_UPDATE,
    "vcpu_count": Field(int, required=True, maximum=2**8 - 1),
    "mem_size_mib": Field(int, required=True, maximum=2**64 - 1),
}
ENTROPY: Schema = {"rate_limiter": OBJECT}
LOGGER: Schema = {
    "log_path": TEXT,
    "level": TEXT,
    "show_level": FLAG,
    "show_log_origin": FLAG,
    "module": TEXT,
}
METRICS: Schema = {"metrics_path": REQUIRED_TEXT}
ACTION: Schema = {
    "action_type": Field(
        str, required=True, choices=("FlushMetrics", "InstanceStart", "SendCtrlAltDel")
    )
}
VM: Schema = {"state": Field(str, required=True, choices=("Paused", "Resumed"))}
SNAPSHOT_CREATE: Schema = {
    "mem_file_path": REQUIRED_TEXT,
    "snapshot_path": REQUIRED_TEXT,
    "snapshot_type": Field(str, choices=("Full", "Diff")),
}
SNAPSHOT_LOAD: Schema = {
    "snapshot_path": REQUIRED_TEXT,
    "mem_file_path": TEXT,
    "mem_backend": OBJECT,
    "enable_diff_snapshots": FLAG,
    "track_dirty_pages": FLAG,
    "resume_vm": FLAG,
    "network_overrides": Field(list),
}
MEM_BACKEND: Schema = {
    "backend_type": Field(str, required=True, choices=("File", "Uffd")),
    "backend_path": REQUIRED_TEXT,
}
NETWORK_OVERRIDE: Schema = {"iface_id": REQUIRED_TEXT, "host_dev_name": REQUIRED_TEXT}


def parse(body: bytes, schema: Schema) -> Json:
    """The JSON object in a request's body; a `Fault` if it is not what the schema says."""
    try:
        value = json.loads(body)
    except ValueError as error:
        raise _malformed(str(error)) from None
    return check(value, schema)


def check(value: object, schema: Schema) -> Json:
    """The same for a value inside a body. Null fields are as good as absent ones."""
    if not isinstance(value, dict):
        raise _malformed(f"invalid type: {_name(value)}, expected a map")
    for name in value:
        if name not in schema:
            expected = ", ".join(f"`{known}`" for known in schema)
            raise _malformed(f"unknown field `{name}`, expected one of {expected}")
    checked = {}
    for name, field in schema.items():
        if value.get(name) is not None:
            checked[name] = _checked(name, value[name], field)
        elif field.required:
            raise _malformed(f"missing field `{name}`")
    return checked


def _checked(name: str, value: object, field: Field) -> object:
    # bool is an int in Python, not in JSON.
    if type(value) is not field.type:
        expected = _TYPE_NAMES[field.type]
        raise _malformed(f"{name}: invalid type: {_name(value)}, expected {expected}")
    if isinstance(value, str) and "\0" in value:
        raise _malformed(f"{name}: nul byte found in provided data")
    if field.choices and value not in field.choices:
        expected = ", ".join(f"`{choice}`" for choice in field.choices)
        raise _malformed(f"{name}: unknown variant `{value}`, expected one of {expected}")
    if isinstance(value, int) and field.maximum and not 0 <= value <= field.maximum:
        raise _malformed(f"{name}: invalid value: integer `{value}`")
    return value


_TYPE_NAMES = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "an integer",
    dict: "a map",
    list: "a sequence",
    type(None): "null",
}


def _name(value: object) -> str:
    return "floating point" if isinstance(value, float) else _TYPE_NAMES[type(value)]


def _malformed(detail: str) -> Fault:
    return Fault(f"An error occurred when deserializing the json body of a request: {detail}.")
