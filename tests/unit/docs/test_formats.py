"""docs/formats.md names the objects, host paths and Temporal names that the code makes."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

from temporalio import workflow

from activities.contract import interface, names
from activities.contract.search_attributes import SEARCH_ATTRIBUTES
from activities.store.download import ARTIFACTS
from activities.store.files import files_name
from activities.store.lease_numbers import lease_name
from activities.store.log_archive import archived_log_name
from activities.store.metadata import TemplateMetadata, metadata_name
from activities.template.artifacts import WITHOUT_HEADER, parts_prefix
from tests.support.pages import DOCS, ROOT, code_in, table_under, tables
from workflows.worker import WORKFLOWS

FORMATS = DOCS / "formats.md"
CODE = ("activities", "api", "workflows")


def first_column(heading: str) -> list[str]:
    """Return the names in the first column of the one table under a heading."""
    return [name for row in table_under(FORMATS, heading).rows for name in code_in(row[0])]


def column_of(head: str) -> list[str]:
    """Return the names in the column with that head."""
    [table] = [table for table in tables(FORMATS) if head in table.head]
    return [code_in(cell)[0] for cell in table.column(head)]


def test_each_object_is_told() -> None:
    build = "<build_id>"
    headers = [f"{build}/{name}.header" for name in ARTIFACTS if name != WITHOUT_HEADER]
    assert sorted(first_column("Bucket")) == sorted(
        [
            *(f"{build}/{name}" for name in ARTIFACTS),
            *headers,
            f"{build}/build.log",
            metadata_name(build),
            f"{parts_prefix(build, '<artifact>')}<part>",
            lease_name(build),
            archived_log_name(build),
            files_name("<sha256>"),
            ".doctor/<uuid>",  # of the doctor alone, which has no function for it
        ]
    )


def test_each_field_of_the_metadata_is_told() -> None:
    assert sorted(first_column("metadata.json")) == sorted(TemplateMetadata.model_fields)


def test_each_path_of_a_host_is_told() -> None:
    told = {name.removeprefix("<data>/").split("/")[0] for name in first_column("Host")}
    assert told == set(names_in_data_directory())


def names_in_data_directory() -> Iterator[str]:
    """Yield what the code puts into the data directory: each `… data_dir / name`."""
    trees = [ast.parse(path.read_text()) for folder in CODE for path in python_files(folder)]
    constants = {name: value for tree in trees for name, value in string_constants(tree)}
    for tree in trees:
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.BinOp)
                and isinstance(node.op, ast.Div)
                and is_data_dir(node.left)
            ):
                yield value_of(node.right, constants)


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def string_constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            for target in node.targets:
                if isinstance(target, ast.Name) and isinstance(node.value.value, str):
                    yield target.id, node.value.value


def is_data_dir(node: ast.expr) -> bool:
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return name == "data_dir"


def value_of(node: ast.expr, constants: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return constants[node.id]
    assert isinstance(node, ast.Constant)
    return str(node.value)


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
