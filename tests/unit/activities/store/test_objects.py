"""The names of objects: persisted data, spelled in one module."""

from __future__ import annotations

import hashlib

import pytest

from activities.contract.names import ArtifactName
from activities.store.objects import (
    ObjectKind,
    ObjectName,
    SentFiles,
    archived_log_name,
    artifact_name,
    build_log_name,
    composed_part_name,
    files_name,
    header_name,
    is_layer_id,
    is_metadata,
    layer_record_name,
    lease_name,
    metadata_name,
    owner_name,
    parse_object_name,
    part_name,
    parts_prefix,
    probe_name,
    reference_name,
    references_prefix,
    sent_files_name,
    stored_name,
    template_prefix,
    used_layer_name,
    used_layers_prefix,
)
from tests.support.source_strings import spelled

BUILD = "11111111-2222-4333-8444-555555555555"
LAYER = "11111111-2222-8333-8444-555555555555"
SHA256 = "ab" * 32


def test_the_names_are_those_of_every_version_before() -> None:
    assert template_prefix(BUILD) == f"{BUILD}/"
    assert [artifact_name(BUILD, artifact) for artifact in ArtifactName] == [
        f"{BUILD}/rootfs.ext4",
        f"{BUILD}/memfile",
        f"{BUILD}/snapfile",
    ]
    assert header_name(BUILD, ArtifactName.MEMFILE) == f"{BUILD}/memfile.header"
    assert build_log_name(BUILD) == f"{BUILD}/build.log"
    assert metadata_name(BUILD) == f"{BUILD}/metadata.json"
    assert parts_prefix(BUILD) == f"{BUILD}/.parts/"
    assert parts_prefix(BUILD, ArtifactName.ROOTFS) == f"{BUILD}/.parts/rootfs.ext4/"
    assert part_name("p/", 9, "+/==", 1) == "p/000009--_..-1"
    assert composed_part_name("p/", 1, 2, "abcd") == "p/level1-0002-abcd"
    assert lease_name(BUILD) == f".leases/{BUILD}"
    assert archived_log_name(BUILD) == f"logs/{BUILD}.jsonl"
    assert files_name(SHA256) == f"files/{SHA256}.tar"
    assert archived_log_name(BUILD, "acme") == f"logs/acme/{BUILD}.jsonl"
    assert files_name(SHA256, "acme") == f"files/acme/{SHA256}.tar"
    assert sent_files_name(SentFiles(SHA256), "acme") == files_name(SHA256, "acme")
    key = hashlib.sha256(b'["src/..", "team"]').hexdigest()
    assert sent_files_name(SentFiles("src/..", "team"), "acme") == f"files/acme/{key}.scoped.tar"
    assert owner_name(BUILD) == f".owners/{BUILD}"
    assert probe_name().startswith(".doctor/")
    assert stored_name() == ".stored.json"
    assert layer_record_name(LAYER) == f"{LAYER}/layer.json"
    assert reference_name(LAYER, BUILD) == f"{LAYER}/.refs/{BUILD}"
    assert used_layer_name(BUILD, LAYER) == f"{BUILD}/.layers/{LAYER}"


@pytest.mark.parametrize(
    ("name", "kind", "build_id"),
    [
        (artifact_name(BUILD, ArtifactName.ROOTFS), ObjectKind.TEMPLATE, BUILD),
        (header_name(BUILD, ArtifactName.ROOTFS), ObjectKind.TEMPLATE, BUILD),
        (build_log_name(BUILD), ObjectKind.TEMPLATE, BUILD),
        (metadata_name(BUILD), ObjectKind.TEMPLATE, BUILD),
        (
            part_name(parts_prefix(BUILD, ArtifactName.MEMFILE), 1, "AAAAAA==", 7),
            ObjectKind.PART,
            BUILD,
        ),
        (composed_part_name(parts_prefix(BUILD), 0, 1, "abcd"), ObjectKind.PART, BUILD),
        (lease_name(BUILD), ObjectKind.LEASE, BUILD),
        (archived_log_name(BUILD), ObjectKind.LOG, BUILD),
        (files_name(SHA256), ObjectKind.FILES, ""),
        (archived_log_name(BUILD, "acme"), ObjectKind.LOG, BUILD),
        (files_name(SHA256, "acme"), ObjectKind.FILES, ""),
        (sent_files_name(SentFiles("a", "b"), "acme"), ObjectKind.FILES, ""),
        (sent_files_name(SentFiles("a", "b"), "default"), ObjectKind.FILES, ""),
        (owner_name(BUILD), ObjectKind.OWNER, BUILD),
        (probe_name(), ObjectKind.PROBE, ""),
        (stored_name(), ObjectKind.STORED, ""),
    ],
)
def test_a_name_says_what_the_object_is(name: str, kind: ObjectKind, build_id: str) -> None:
    assert parse_object_name(name) == ObjectName(kind, build_id)


def test_a_layer_is_not_taken_for_a_template() -> None:
    of_layer = ObjectName(ObjectKind.LAYER, "", LAYER)
    assert parse_object_name(artifact_name(LAYER, ArtifactName.ROOTFS)) == of_layer
    assert parse_object_name(header_name(LAYER, ArtifactName.ROOTFS)) == of_layer
    assert parse_object_name(layer_record_name(LAYER)) == of_layer
    reference = reference_name(LAYER, BUILD)
    assert reference.startswith(references_prefix(LAYER))
    assert parse_object_name(reference) == ObjectName(ObjectKind.REFERENCE, BUILD, LAYER)
    use = used_layer_name(BUILD, LAYER)
    assert use.startswith(used_layers_prefix(BUILD))
    assert parse_object_name(use) == ObjectName(ObjectKind.USED_LAYER, BUILD, LAYER)
    assert is_layer_id(LAYER)
    assert not is_layer_id(BUILD)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "readme.txt",
        "web/metadata.json",
        ".leases/web",
        f"logs/a/b/{BUILD}.jsonl",
        f"files/A/{SHA256}.tar",
        f"{BUILD}/",
        f"{BUILD}/a/b",
    ],
)
def test_what_is_not_ours_is_not_taken_for_it(name: str) -> None:
    assert parse_object_name(name) is None


def test_only_the_commit_mark_is_one() -> None:
    assert is_metadata(metadata_name(BUILD))
    assert not is_metadata(build_log_name(BUILD))


def test_no_other_module_spells_the_name_of_an_object() -> None:
    names = (
        r"\.(parts|leases|owners|refs)\b|\.doctor/|(metadata|layer)\.json|build\.log|\.header$"
        r"|^logs/|^files/"
    )
    assert spelled(names, but_in="activities/store/objects.py") == []


def test_no_other_module_spells_the_name_of_an_artifact() -> None:
    names = r"rootfs\.ext4|memfile|snapfile"
    assert spelled(names, but_in="activities/contract/names.py") == []
