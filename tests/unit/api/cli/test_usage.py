"""What the command line takes: help, version, and usage errors in the user's own words."""

from __future__ import annotations

import importlib.metadata
import re

import pytest
import typer
from typer.testing import CliRunner

from api.cli.console import require_address
from api.cli.main import app

runner = CliRunner()
GROUP = typer.main.get_command(app)
COMMANDS = sorted(GROUP.commands)  # type: ignore[attr-defined] # it is a group


def test_the_version_is_that_of_the_package() -> None:
    result = runner.invoke(app, ["--version"])
    version = importlib.metadata.version("template-manager")
    assert (result.exit_code, result.output) == (0, f"template-manager {version}\n")


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_each_option_once_and_whole(command: str, columns: int) -> None:
    help_text = runner.invoke(app, [command, "--help"], env={"COLUMNS": str(columns)}).output
    options = re.findall(r"^  (--[\w-]+)", help_text.partition("Example:")[0], re.MULTILINE)
    assert len(set(options)) == len(options) > 0
    assert "…" not in help_text
    assert help_text.isascii()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_values_in_words_and_none_for_flags(command: str) -> None:
    help_text = runner.invoke(app, [command, "--help"]).output
    assert re.findall(r"^  --.*<.*$", help_text, re.MULTILINE) == []


def test_help_lists_each_command_with_a_whole_sentence() -> None:
    help_text = " ".join(runner.invoke(app, ["--help"], env={"COLUMNS": "40"}).output.split())
    assert "Operations: doctor Check what a KVM host needs: KVM, Docker, tools, kernel" in help_text
    assert "..." not in help_text.replace("[ARGS]...", "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--image, --dockerfile, --from-template and --own-image"),
        (["--image", ""], "Give one of --image"),  # an unset variable of a script
        (["--image", "a", "--from-template", "b"], "give --image and --from-template apart"),
        (["--own-image", "--image", "a"], "give --image and --own-image apart"),
        (["--own-image", "--template-id", "web"], "--own-image needs --template-id and --build-id"),
    ],
)
def test_a_build_says_what_to_build_from(arguments: list[str], told: str) -> None:
    result = runner.invoke(app, ["build", *arguments])
    assert result.exit_code == 2
    assert told in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["build", "--memory", "1G"], "Invalid value for '--memory': must be a whole number"),
        (["build", "--memory", "1"], "Give one of --image"),
        (["list", "--since", "yesterday"], "must be a time such as 2026-11-01 or"),
        (["build", "--builder", "kaniko"], "'--builder': 'kaniko' is not one of 'docker'"),
        (["list", "--api-address", "127.0.0.1:99999"], "must be HOST:PORT, such as"),
        (["list", "--api-address", "http://127.0.0.1:5008"], "must be HOST:PORT"),
        (["list", "--api-address", ""], "must be HOST:PORT"),
        (["health", "nope"], "'nope': must be HOST:PORT"),
    ],
)
def test_a_wrong_value_is_told_in_plain_words(arguments: list[str], told: str) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert told in " ".join(result.output.split())


@pytest.mark.parametrize("address", ["127.0.0.1:5008", "[::1]:1", "unix:/run/api", "dns:///a:1"])
def test_an_address_may_be_all_that_grpc_takes(address: str) -> None:
    assert require_address(address) == address


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["pull", "a", ""], "DIR"),
        (["run", ""], r"DIR\|BUILD_ID"),
        (["build", "--dockerfile", ""], "--dockerfile"),
        (["build", "--file", "", "."], "--file"),
        (["build", "--file", "Dockerfile", ""], "DIR"),
        (["build", "--image", "a", "--google-key-file", ""], "--google-key-file"),
        (["build", "--image", "a", "--registry-password-file", ""], "--registry-password-file"),
        (["api", "--tokens-file", ""], "--tokens-file"),
        (["api", "--tls-client-ca", ""], "--tls-client-ca"),
    ],
)
def test_an_empty_path_is_not_the_current_directory(command: list[str], name: str) -> None:
    """It is an unset variable of a script."""
    result = runner.invoke(app, command)
    assert result.exit_code == 2
    assert re.search(rf"'{name}'.*: must not be empty", " ".join(result.output.split()))
