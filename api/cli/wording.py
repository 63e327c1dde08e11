"""The API's fields in the words of the command line: what the user wrote, and can correct."""

from __future__ import annotations

import re

# What a field of a request is called on the command line.
OPTIONS = {
    "template.template_id": "--template-id",
    "template.build_id": "--build-id",
    "template.from_image": "--image",
    "template.from_template": "--from-template",
    "template.from_template.build_id": "--from-template",
    "template.memory_mb": "--memory",
    "template.vcpu_count": "--vcpu",
    "template.disk_size_mb": "--disk",
    "template.kernel_version": "--kernel",
    "template.firecracker_version": "--firecracker",
    "template.start_command": "--start-command",
    "template.ready_command": "--ready-command",
    "template.priority": "--batch",
    "template.name": "--name",
    "template.tags": "--tag",
    "template.network.access": "--network",
    "template.network.allowed": "--network",
    "template.ready_timeout_seconds": "--ready-timeout",
    "template.env": "--env",
    "template.steps": "--dockerfile",
    "template.from_image_registry": "--registry-user",
    "template.from_image_registry.general.username": "--registry-user",
    "template.from_image_registry.general.password": "--registry-password-stdin",
    "template.from_image_registry.gcp.service_account_json": "--google-key-file",
    "template.from_image_registry.aws.aws_access_key_id": "AWS_ACCESS_KEY_ID",
    "template.from_image_registry.aws.aws_secret_access_key": "AWS_SECRET_ACCESS_KEY",
    "template.from_image_registry.aws.aws_region": "--aws-region",
    "build_id": "BUILD_ID",
    "cursor": "--cursor",
    "level": "--level",
    "page_size": "--limit",
    "run_id": "--run-id",
    "started_after": "--since",
    "started_before": "--until",
    "states": "--state",
    "template_id": "--template-id",
}
_ENTRY = re.compile(r"template\.env\[(['\"])(?P<name>.*)\1\]")
_STEP = re.compile(r"template\.steps\[(?P<number>\d+)\]")
_OF_A_LIST = re.compile(r"(?P<field>template\.(?:network\.allowed|tags))\[(?P<number>\d+)\]")
# In sentences only names that are no words of plain English.
_WORDS = {
    name.rpartition(".")[2]: option
    for name, option in OPTIONS.items()
    if "_" in name.split(".")[-1]
} | {"build_id": "the build's id", "template_id": "--template-id"}
_WORD = re.compile(rf"\b(?:template\.)?({'|'.join(sorted(_WORDS, key=len, reverse=True))})\b")
_ASIDE = re.compile(r"(?P<within>in )?\b[a-z_]+ \(CLI: (?P<options>[^)]*)\)")
_CORRECT_FIELDS = "Correct these fields and send the request again."
_CORRECT_OPTIONS = "Correct these options and try again."


def option_of(field: str) -> str:
    """Return what the user wrote for a field of a request; a field without an option stays."""
    if entry := _ENTRY.fullmatch(field):
        return f"--env {entry['name']}"
    if step := _STEP.fullmatch(field):
        return f"--dockerfile, step {int(step['number']) + 1}"
    if one := _OF_A_LIST.fullmatch(field):
        return f"{OPTIONS[one['field']]}, entry {int(one['number']) + 1}"
    return OPTIONS.get(field, field)


def in_options(sentence: str) -> str:
    """Return a sentence of the API's with options where it names fields."""
    if sentence == _CORRECT_FIELDS:
        return _CORRECT_OPTIONS
    spoken = _ASIDE.sub(_options_of_aside, sentence)
    return _WORD.sub(lambda word: _WORDS[word[1]], spoken)


def _options_of_aside(aside: re.Match[str]) -> str:
    return f"with {aside['options']}" if aside["within"] else aside["options"]
