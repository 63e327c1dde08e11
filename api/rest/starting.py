"""From what the SDK asks for to a request to the gRPC API."""

from __future__ import annotations

from api.pb import template_manager_pb2 as pb
from api.rest.build_ids import VmSize, size_in
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


def size_of(asked: NewBuild) -> VmSize:
    """Return how large a VM is asked for. Raises RestError."""
    size = VmSize(
        DEFAULT_CPU_COUNT if asked.cpu_count is None else asked.cpu_count,
        DEFAULT_MEMORY_MB if asked.memory_mb is None else asked.memory_mb,
        DEFAULT_FREE_DISK_MB if asked.min_free_disk_mb is None else asked.min_free_disk_mb,
    )
    if not size.is_tellable:
        told = "cpuCount, memoryMB, minFreeDiskMB: more than any VM may have"
        raise RestError(400, "INVALID_REQUEST", told)
    return size


def create_request(template_id: str, build_id: str, start: BuildStart) -> pb.TemplateCreateRequest:
    """Return the request for a build that was asked for before. Raises RestError."""
    size = size_in(build_id)
    if size is None:
        told = f"build {build_id} was not asked for: POST /v3/templates gives an id"
        raise RestError(404, "BUILD_NOT_FOUND", told)
    if bool(start.from_image) == bool(start.from_template):
        raise RestError(400, "INVALID_REQUEST", "give one of fromImage and fromTemplate")
    template = pb.TemplateConfig(
        template_id=template_id,
        build_id=build_id,
        vcpu_count=size.vcpu_count,
        memory_mb=size.memory_mb,
        disk_size_mb=size.free_disk_mb,
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
