"""The JSON bodies of Firecracker's API, checked as strictly as Firecracker checks them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import Fault

Json = dict[str, Any]


@dataclass(frozen=True)
class Field:
    """One field of a body: its JSON type, whether it must be there, and its allowed values.

    A body may be an array of its fields, too; one that is `trailing` may be missing at its end.
    """

    type: type
    required: bool = False
    choices: tuple[str, ...] = ()
    maximum: int | None = None
    nullable: bool = True
    trailing: bool = False


Schema = Mapping[str, Field]

REQUIRED_TEXT = Field(str, required=True)
TEXT = Field(str)
FLAG = Field(bool)
# A flag that is false if absent, but not if null.
PLAIN_FLAG = Field(bool, nullable=False, trailing=True)
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
    "cache_type": Field(str, choices=("Unsafe", "Writeback"), nullable=False, trailing=True),
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
_VCPUS_REPRESENTABLE = 2**8 - 1
_MIB_REPRESENTABLE = 2**64 - 1
_PAGES = ("None", "2M")
MACHINE_CONFIG_UPDATE: Schema = {
    "vcpu_count": Field(int, maximum=_VCPUS_REPRESENTABLE, trailing=True),
    "mem_size_mib": Field(int, maximum=_MIB_REPRESENTABLE, trailing=True),
    "smt": Field(bool, trailing=True),
    "cpu_template": Field(str, choices=_CPU_TEMPLATES, trailing=True),
    "track_dirty_pages": Field(bool, trailing=True),
    "huge_pages": Field(str, choices=_PAGES, trailing=True),
}
MACHINE_CONFIG: Schema = {
    "vcpu_count": Field(int, required=True, maximum=_VCPUS_REPRESENTABLE),
    "mem_size_mib": Field(int, required=True, maximum=_MIB_REPRESENTABLE),
    "smt": PLAIN_FLAG,
    "cpu_template": Field(str, choices=_CPU_TEMPLATES, trailing=True),
    "track_dirty_pages": PLAIN_FLAG,
    "huge_pages": Field(str, choices=_PAGES, nullable=False, trailing=True),
}
MMDS_CONFIG: Schema = {
    "version": Field(str, choices=("V1", "V2"), nullable=False),
    "network_interfaces": Field(list, required=True),
    "ipv4_address": TEXT,
    "imds_compat": Field(bool, nullable=False),
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
    "enable_diff_snapshots": PLAIN_FLAG,
    "track_dirty_pages": PLAIN_FLAG,
    "resume_vm": PLAIN_FLAG,
    "network_overrides": Field(list, nullable=False, trailing=True),
    "vsock_override": OBJECT,
    "clock_realtime": PLAIN_FLAG,
}
MEM_BACKEND: Schema = {
    "backend_type": Field(str, required=True, choices=("File", "Uffd")),
    "backend_path": REQUIRED_TEXT,
}
VSOCK_OVERRIDE: Schema = {"uds_path": REQUIRED_TEXT}
SERIAL: Schema = {"serial_out_path": TEXT, "rate_limiter": OBJECT}
BALLOON: Schema = {
    "amount_mib": Field(int, required=True, maximum=2**32 - 1),
    "deflate_on_oom": Field(bool, required=True),
    "stats_polling_interval_s": Field(int, maximum=2**16 - 1, nullable=False, trailing=True),
    "free_page_hinting": PLAIN_FLAG,
    "free_page_reporting": PLAIN_FLAG,
}
PMEM: Schema = {
    "id": REQUIRED_TEXT,
    "path_on_host": REQUIRED_TEXT,
    "root_device": PLAIN_FLAG,
    "read_only": PLAIN_FLAG,
    "rate_limiter": OBJECT,
}
MEMORY_HOTPLUG: Schema = {
    "total_size_mib": Field(int, required=True),
    "block_size_mib": Field(int, nullable=False, trailing=True),
    "slot_size_mib": Field(int, nullable=False, trailing=True),
}
NETWORK_OVERRIDE: Schema = {"iface_id": REQUIRED_TEXT, "host_dev_name": REQUIRED_TEXT}


def parse(body: bytes, schema: Schema) -> Json:
    """The JSON in a request's body by field; a `Fault` if it is not what the schema says."""
    return check(_loaded(body, _unambiguous), schema)


def parse_any(body: bytes) -> Any:
    """Any JSON in a request's body; of a key that is there twice the last value counts."""
    return _loaded(body, dict)


def _loaded(body: bytes, take_pairs: Callable[[list[tuple[str, object]]], Json]) -> Any:
    try:
        return json.loads(
            body.decode(), object_pairs_hook=take_pairs, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise malformed(str(error)) from None


def _unambiguous(pairs: list[tuple[str, object]]) -> Json:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"duplicate field `{name}`")
    return dict(pairs)


def _refuse_constant(name: str) -> object:
    # NaN and Infinity are Python's, not JSON's.
    raise ValueError(f"expected value, not {name}")


def check(value: object, schema: Schema) -> Json:
    """The same for a value inside a body, an object or an array of its fields in their order."""
    fields = _by_name(value, schema) if isinstance(value, list) else value
    if not isinstance(fields, dict):
        raise malformed(f"invalid type: {_name(value)}, expected a map")
    for name in fields:
        if name not in schema:
            raise malformed(f"unknown field `{name}`, expected {_one_of(tuple(schema))}")
    checked = {}
    for name, field in schema.items():
        if fields.get(name) is not None or (name in fields and not field.nullable):
            checked[name] = _checked(name, fields[name], field)
        elif field.required:
            raise malformed(f"missing field `{name}`")
    return checked


def _by_name(values: list[object], schema: Schema) -> Json:
    if len(values) > len(schema):
        raise malformed("trailing characters")
    if not all(field.trailing for field in [*schema.values()][len(values) :]):
        raise malformed(f"invalid length {len(values)}, expected {len(schema)} elements")
    return dict(zip(schema, values, strict=False))


def _one_of(names: tuple[str, ...]) -> str:
    quoted = [f"`{name}`" for name in names]
    return " or ".join(quoted) if len(quoted) <= 2 else f"one of {', '.join(quoted)}"


def _checked(name: str, value: object, field: Field) -> object:
    # bool is an int in Python, not in JSON.
    if type(value) is not field.type:
        expected = _TYPE_NAMES[field.type]
        raise malformed(f"{name}: invalid type: {_name(value)}, expected {expected}")
    if isinstance(value, str) and "\0" in value:
        raise malformed(f"{name}: nul byte found in provided data")
    if field.choices and value not in field.choices:
        expected = _one_of(field.choices)
        raise malformed(f"{name}: unknown variant `{value}`, expected {expected}")
    if isinstance(value, int) and field.maximum and not 0 <= value <= field.maximum:
        raise malformed(f"{name}: invalid value: integer `{value}`")
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


def malformed(detail: str) -> Fault:
    """The answer to a body that is not what it should be."""
    return Fault(f"An error occurred when deserializing the json body of a request: {detail}.")
