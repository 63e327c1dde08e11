"""Errors in the words of the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from activities.contract.errors import ImageStepError
from api.cli.wording import OPTIONS, in_options, option_of
from api.pb import template_manager_pb2 as pb

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize(
    ("field", "option"),
    [
        ("template.memory_mb", "--memory"),
        ("template.env['MY-NAME']", "--env MY-NAME"),
        ('template.env["it\'s"]', "--env it's"),
        ("template.steps[3]", "--dockerfile, step 4"),
        ("template.network.allowed[1]", "--network, entry 2"),
        ("template.tags[0]", "--tag, entry 1"),
        ("template.from_template.build_id", "--from-template"),
        ("template.from_image_registry.aws.aws_region", "--aws-region"),
        ("states", "--state"),
        ("started_after", "--since"),
        ("page_token", "page_token"),  # nobody can write it on the command line
    ],
)
def test_a_field_is_what_the_user_wrote(field: str, option: str) -> None:
    assert option_of(field) == option


@pytest.mark.parametrize(
    ("sentence", "told"),
    [
        (
            "Make the image or disk_size_mb smaller, or raise TEMPLATE_MANAGER_MAX_ROOTFS_MB.",
            "Make the image or --disk smaller, or raise TEMPLATE_MANAGER_MAX_ROOTFS_MB.",
        ),
        (
            "Give valid credentials in from_image_registry (CLI: --registry-user).",
            "Give valid credentials with --registry-user.",
        ),
        (
            "Make the image or disk_size_mb (CLI: --disk) smaller.",
            "Make the image or --disk smaller.",
        ),
        (
            ImageStepError.hint.partition(". ")[2],
            "A limit that it names is --disk or --memory of the template, or an operator's "
            "(docs/steps.md).",
        ),
        ("memory_mb: is 1; vcpu_count: is 3", "--memory: is 1; --vcpu: is 3"),
        ("the template is at this level", "the template is at this level"),
        (
            "Correct these fields and send the request again.",
            "Correct these options and try again.",
        ),
    ],
)
def test_a_sentence_names_options(sentence: str, told: str) -> None:
    assert in_options(sentence) == told


def test_every_field_that_the_server_can_refuse_has_an_option() -> None:
    """Or is none that the command line sends."""
    source = (ROOT / "api/server/validation.py").read_text()
    fields = set(re.findall(r'_bad\("([a-z_.]+)"', source))
    fields |= {
        f"from_image_registry.{name}" for name in re.findall(r'_require\("([a-z_.]+)"', source)
    }
    without = {field for field in fields if f"template.{field}" not in OPTIONS}
    assert without == {"team_id", "secret_env"}  # steps come over the API alone, and their secrets


def test_every_option_is_of_a_field_that_there_is() -> None:
    for field in (field for field in OPTIONS if field.startswith("template.")):
        message = pb.TemplateConfig.DESCRIPTOR
        for name in field.split(".")[1:]:
            assert name in message.fields_by_name, field
            message = message.fields_by_name[name].message_type or message
