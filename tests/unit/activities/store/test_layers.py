"""The ids of layers and the form of `layer.json`: persisted data that every host must agree on."""

from __future__ import annotations

import json
import uuid

from hypothesis import given
from hypothesis import strategies as st

from activities.contract.names import Step
from activities.store.layers import EVERYBODY, LayerRecord, layer_id, layer_metadata
from activities.store.objects import is_layer_id

SHA256 = "ab" * 32
RECORD = {
    "format_version": 1,
    "layer_id": "11111111-2222-8333-8444-555555555555",
    "owner": "acme",
    "step": "build_rootfs",
    "fingerprint": SHA256,
    "created": "2026-11-26T12:00:00Z",
    "size_bytes": 4096,
    "sha256": SHA256,
    "stored_bytes": 4096,
    "objects": {"data": {"name": "d", "generation": 1, "size_bytes": 4, "crc32c": "AAAAAA=="}},
    "below": [{"layer_id": "11111111-2222-8333-8444-555555555556", "objects": {}}],
    "facts": {"size_mb": 1},
    "of a later version": 1,
}


def test_the_id_is_the_same_in_every_version() -> None:
    assert layer_id("acme", Step.ROOTFS, SHA256) == "81b1574f-5250-8ce4-9598-32c8b0b989aa"
    assert layer_id(EVERYBODY, Step.ROOTFS, SHA256) == "7bf4f2f3-0947-8b8b-8d81-a79f4d5c0214"


@given(st.text(max_size=9), st.sampled_from(Step), st.text(max_size=70))
def test_an_id_is_a_uuid_and_that_of_no_build(owner: str, step: Step, fingerprint: str) -> None:
    made = layer_id(owner, step, fingerprint)
    assert is_layer_id(made)
    assert uuid.UUID(made).version == 8
    assert uuid.UUID(made).variant == uuid.RFC_4122
    assert made != layer_id(f"{owner}{step}", step, fingerprint)


def test_no_tenant_shares_the_layers_that_are_everybodys() -> None:
    ids = {layer_id(o, Step.ROOTFS, SHA256) for o in (EVERYBODY, "default", "public", "acme")}
    assert len(ids) == 4
    assert layer_metadata(EVERYBODY) == {}
    assert layer_metadata("default") == {"tenant": "default"}


def test_a_record_of_any_version_is_read() -> None:
    record = LayerRecord.model_validate_json(json.dumps(RECORD))
    assert not record.dying
    assert record.reference.objects["data"].generation == 1
    assert LayerRecord.model_validate_json(record.model_dump_json()) == record
    assert "dying" not in record.model_dump()
