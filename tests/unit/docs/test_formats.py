"""docs/formats.md names the objects, host paths and Temporal names that the code makes."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from temporalio import workflow

from activities.contract import interface, names
from activities.contract.names import ArtifactName, Step
from activities.contract.search_attributes import SEARCH_ATTRIBUTES
from activities.disk.data_dir import DataDir
from activities.store import objects
from activities.store.e2b_metadata import E2bKeys
from activities.store.metadata import TemplateMetadata
from activities.template.artifacts import LEFT_OUT
from activities.template.upload import LeftOut
from tests.support.pages import DOCS, code_in, table_under, tables
from workflows.worker import WORKFLOWS

FORMATS = DOCS / "formats.md"
BUILD = "<build_id>"
LAYER = "<layer_id>"
PART = f"{objects.parts_prefix(BUILD)}<artifact>/<part>"
TENANTS = (names.DEFAULT_TENANT, "<tenant>")
OBJECTS = {
    "artifact_name": [objects.artifact_name(BUILD, artifact) for artifact in ArtifactName],
    "header_name": [
        objects.header_name(BUILD, artifact)
        for artifact in ArtifactName
        if LEFT_OUT[artifact] is not LeftOut.NOTHING
    ],
    "build_log_name": [objects.build_log_name(BUILD)],
    "metadata_name": [objects.metadata_name(BUILD)],
    "layer_record_name": [
        objects.artifact_name(LAYER, ArtifactName.ROOTFS),
        objects.header_name(LAYER, ArtifactName.ROOTFS),
        objects.layer_record_name(LAYER),
    ],
    "reference_name": [objects.reference_name(LAYER, "<user>")],
    "used_layer_name": [objects.used_layer_name(BUILD, LAYER)],
    "part_name": [PART],
    "composed_part_name": [],  # a part like the others
    "lease_name": [objects.lease_name(BUILD)],
    "owner_name": [objects.owner_name(BUILD)],
    "archived_log_name": [objects.archived_log_name(BUILD, tenant) for tenant in TENANTS],
    "files_name": [objects.files_name("<sha256>", tenant) for tenant in TENANTS],
    "sent_files_name": [
        re.sub(
            "[0-9a-f]{64}", "<key>", objects.sent_files_name(objects.SentFiles("a", "b"), tenant)
        )
        for tenant in TENANTS
    ],
    "names_object": [objects.names_object("<tenant>", "<name>")],
    "probe_name": [f"{objects.PROBES}<uuid>"],
    "stored_name": [objects.stored_name()],
}


PREFIXES = {
    "template_prefix": objects.template_prefix(BUILD),
    "parts_prefix": objects.parts_prefix(BUILD),
    "layer_parts_prefix": objects.parts_prefix(BUILD),
    "references_prefix": objects.references_prefix(LAYER),
    "used_layers_prefix": objects.used_layers_prefix(BUILD),
    "names_prefix": objects.names_prefix("<tenant>"),
}
DATA = DataDir(Path("<data>"))
FINGERPRINT = "<fingerprint>"
# What the methods of DataDir make, as the page writes it; None is told with another.
HOST_PATHS: dict[str, Path | None] = {
    "lease": DATA.lease(BUILD),
    "checkpoint": DATA.checkpoint(Step.ROOTFS, FINGERPRINT),
    "unfinished_checkpoint": None,
    "failed_step": None,  # the name is a hash
    "unfinished_failed_step": None,
    "vm": DATA.vm("tm-<build_id>-<lease>-<purpose>"),
    "network_mark": DATA.network_mark("<name>"),
    "work_of": DATA.work_of(BUILD),
    "log": DATA.log(BUILD),
    "lock": DATA.lock("<name>"),
    "probes": None,  # temporary files in <data> itself, which the doctor removes at once
    "contains": None,  # a question
}


def first_column(heading: str) -> list[str]:
    """Return the names in the first column of the one table under a heading."""
    return [name for row in table_under(FORMATS, heading).rows for name in code_in(row[0])]


def column_of(head: str) -> list[str]:
    """Return the names in the column with that head."""
    [table] = [table for table in tables(FORMATS) if head in table.head]
    return [code_in(cell)[0] for cell in table.column(head)]


def test_each_object_is_told() -> None:
    functions = {name for name, _ in inspect.getmembers(objects, inspect.isfunction)}
    assert {name for name in functions if name.endswith(("_name", "_object"))} == {
        *OBJECTS,
        "parse_object_name",
        "parse_names_object",
    }
    assert sorted(first_column("Bucket")) == sorted(
        name for named in OBJECTS.values() for name in named
    )


def test_each_field_of_the_metadata_is_told() -> None:
    fields = [*TemplateMetadata.model_fields, *E2bKeys.model_fields]
    assert sorted(first_column("metadata.json")) == sorted(fields)


def test_each_path_of_a_host_is_told() -> None:
    data = DataDir(Path("<data>"))
    places = [name for name, value in vars(DataDir).items() if isinstance(value, property)]
    told = {"/".join(name.split("/")[:2]) for name in first_column("Host")}
    assert told == {str(getattr(data, name)) for name in places}


def test_each_prefix_is_one_of_objects_that_are_told() -> None:
    functions = {name for name, _ in inspect.getmembers(objects, inspect.isfunction)}
    assert {name for name in functions if name.endswith("_prefix")} == {*PREFIXES}
    told = first_column("Bucket")
    assert all(any(name.startswith(prefix) for name in told) for prefix in PREFIXES.values())


def test_each_path_that_the_data_directory_makes_is_told() -> None:
    methods = {
        name
        for name, _ in inspect.getmembers(DataDir, inspect.isfunction)
        if not name.startswith("_")
    }
    assert methods == {*HOST_PATHS}
    told = [name.replace("<step>", Step.ROOTFS).rstrip("/") for name in first_column("Host")]
    for path in filter(None, HOST_PATHS.values()):
        assert any(name == str(path) or name.startswith(f"{path}/") for name in told), path


def test_each_workflow_is_told() -> None:
    # The SDK has no public way to ask for the name under which a workflow is registered.
    registered = [workflow._Definition.must_from_class(each).name for each in WORKFLOWS]
    assert column_of("workflow") == registered


def test_each_task_queue_is_told_with_its_activities() -> None:
    [table] = [table for table in tables(FORMATS) if "task queue" in table.head]
    activities = table.column("activities that come by it")
    told = {
        queue: sorted(code_in(cell))
        for queue, cell in zip(column_of("task queue"), activities, strict=True)
    }
    assert told == activities_by_queue()


def activities_by_queue() -> dict[str, list[str]]:
    """Return what the classes of the contract say: their methods, and queues in their docstring."""
    queues: dict[str, list[str]] = {
        names.WORKFLOW_TASK_QUEUE: [],
        names.SHARED_HOST_TASK_QUEUE: [],
        names.lease_task_queue("<host>"): [],
        names.step_task_queue("<host>"): [],
    }
    for contract in vars(interface).values():
        for queue in code_in(getattr(contract, "__doc__", None) or ""):
            if queue in queues and inspect.isabstract(contract):
                queues[queue] += contract.__abstractmethods__
    return {queue: sorted(activities) for queue, activities in queues.items()}


def test_each_search_attribute_is_told() -> None:
    assert column_of("search attribute") == [key.name for key in SEARCH_ATTRIBUTES]
