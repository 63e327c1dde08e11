"""What says less than it could, or asks a checker to look away, has a reason on its line."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
ROOMS = ("activities", "workflows", "api", "temporal-dev", "tests")
PRODUCT = ("activities", "workflows", "api")
GENERATED = REPOSITORY / "api/pb"
SUPPRESSION = re.compile(r"#\s*(?:type:\s*ignore|noqa|pragma:|nosec|mypy:)")
# Which checker, what it must not say, and why.
WITH_REASON = re.compile(
    r"#\s*(?:type:\s*ignore\[[\w, -]+\]|noqa: [A-Z]+\d+(?:, ?[A-Z]+\d+)*)\s+#\s*\w+"
)

# Who reads this process's environment, and what of it. Everything else is a setting.
ENVIRONMENT = {
    "activities/disk/programs.py": "PATH, for the programs that are started",
    "activities/image/docker_daemon.py": "DOCKER_HOST, which is Docker's own",
    "activities/image/registry.py": "REQUESTS_CA_BUNDLE, which is requests' own",
    "activities/process/tracing.py": "whether OpenTelemetry's own variables are there",
    "activities/store/bucket.py": "STORAGE_EMULATOR_HOST, which is Google's own",
    "api/cli/build_request.py": "what --env NAME and the registry's login name",
    "api/cli/completion.py": "the API's address, before any setting is read",
    "api/cli/development.py": "what the dev stack goes by",
    "api/cli/image_builders.py": "PATH, and all of it for the user's own builder",
    "api/cli/main.py": "how much gRPC's library says",
    "api/cli/report.py": "TEMPORAL_NAMESPACE, for the address of the Web UI",
}
READS = {"environ", "getenv", "environb", "putenv"}


def sources(rooms: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield the path and text of each module of ours."""
    for room in rooms:
        for path in sorted((REPOSITORY / room).rglob("*.py")):
            if not path.is_relative_to(GENERATED):
                yield str(path.relative_to(REPOSITORY)), path.read_text()


def comments(text: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of each comment."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def test_each_suppression_names_what_it_suppresses_and_why() -> None:
    silent = [
        f"{path}:{line}: {comment}"
        for path, text in sources(ROOMS)
        for line, comment in comments(text)
        if SUPPRESSION.search(comment) and not WITH_REASON.search(comment)
    ]
    assert silent == []


def test_each_any_of_the_product_has_its_reason() -> None:
    silent = [
        f"{path}:{node.lineno}"
        for path, text in sources(PRODUCT)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Name) and node.id == "Any"
        if "#" not in text.splitlines()[node.lineno - 1]
    ]
    assert silent == []


def test_the_environment_is_read_where_it_is_listed() -> None:
    reading = {
        path
        for path, text in sources(PRODUCT)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute)
        and node.attr in READS
        and ast.unparse(node.value) == "os"
    }
    assert reading == set(ENVIRONMENT)


def test_no_module_takes_the_environment_by_another_name() -> None:
    taking = [
        path
        for path, text in sources(PRODUCT)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.module == "os"
        if READS & {alias.name for alias in node.names}
    ]
    assert taking == []
