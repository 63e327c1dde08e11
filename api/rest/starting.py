"""From what the SDK asks for to requests to the gRPC API."""

from __future__ import annotations

from api.pb import template_manager_pb2 as pb
from api.rest.errors import RestError
from api.rest.requests import AwsLogin, BuildStart, GeneralLogin, GoogleLogin, NewBuild, Step

# What the SDK itself asked for until it began to leave that to the service.
DEFAULT_CPU_COUNT = 2
DEFAULT_MEMORY_MB = 1024
DEFAULT_FREE_DISK_MB = 512
CACHE_SCOPE = "e2b"
"""Within its tenant: all that come this way share the files of their COPY steps."""
STEPS_VERSION = "v2"
"""Tells the gRPC API that the steps mean what E2B's do."""


def reserve_request(asked: NewBuild) -> pb.TemplateNameReserveRequest:
    """Return the request for a build's id. Raises RestError."""
    name, _, tag = (asked.name or asked.alias or "").partition(":")
    if not name:
        raise RestError(400, "INVALID_REQUEST", "name: must be given")
    return pb.TemplateNameReserveRequest(
        name=name.lower(),
        tags=dict.fromkeys([*([tag] if tag else []), *asked.tags]),
        vcpu_count=DEFAULT_CPU_COUNT if asked.cpu_count is None else asked.cpu_count,
        memory_mb=DEFAULT_MEMORY_MB if asked.memory_mb is None else asked.memory_mb,
        disk_size_mb=DEFAULT_FREE_DISK_MB
        if asked.min_free_disk_mb is None
        else asked.min_free_disk_mb,
    )


def create_request(
    name: pb.TemplateName, build_id: str, start: BuildStart
) -> pb.TemplateCreateRequest:
    """Return the request for a build that this name waits for. Raises RestError."""
    awaited = next((each for each in name.awaited if each.build_id == build_id), None)
    if awaited is None:
        told = (
            f"template {name.name} waits for no build {build_id}: POST /v3/templates asks for one"
        )
        raise RestError(404, "BUILD_NOT_FOUND", told)
    if bool(start.from_image) == bool(start.from_template):
        raise RestError(400, "INVALID_REQUEST", "give one of fromImage and fromTemplate")
    template = pb.TemplateConfig(
        name=name.name,
        tags=awaited.tags,
        template_id=name.template_id,
        build_id=build_id,
        vcpu_count=awaited.vcpu_count,
        memory_mb=awaited.memory_mb,
        disk_size_mb=awaited.disk_size_mb,
        start_command=start.start_cmd,
        ready_command=start.ready_cmd,
        force=bool(start.force),
        steps=[_step(step) for step in start.steps],
    )
    if start.from_image:
        template.from_image = start.from_image
    if start.from_image_registry is not None:
        template.from_image_registry.CopyFrom(_login(start.from_image_registry))
    return pb.TemplateCreateRequest(
        template=template, cache_scope=CACHE_SCOPE, version=STEPS_VERSION
    )


def _step(step: Step) -> pb.TemplateStep:
    return pb.TemplateStep(
        type=step.type, args=step.args, force=bool(step.force), files_hash=step.files_hash
    )


def _login(login: GeneralLogin | AwsLogin | GoogleLogin) -> pb.FromImageRegistry:
    match login:
        case GeneralLogin():
            general = pb.GeneralRegistry(username=login.username, password=login.password)
            return pb.FromImageRegistry(general=general)
        case AwsLogin():
            aws = pb.AwsRegistry(
                aws_access_key_id=login.aws_access_key_id,
                aws_secret_access_key=login.aws_secret_access_key,
                aws_region=login.aws_region,
            )
            return pb.FromImageRegistry(aws=aws)
        case GoogleLogin():
            gcp = pb.GcpRegistry(service_account_json=login.service_account_json)
            return pb.FromImageRegistry(gcp=gcp)
