"""All rpcs of the API, from the descriptors: a new one cannot be forgotten."""

from __future__ import annotations

from google.protobuf.descriptor import MethodDescriptor

from api.pb import info_service_pb2, template_manager_pb2


def all_rpcs() -> list[MethodDescriptor]:
    """Return the rpcs of all our services, in the order of the proto files."""
    files = (template_manager_pb2.DESCRIPTOR, info_service_pb2.DESCRIPTOR)
    services = [service for file in files for service in file.services_by_name.values()]
    return [method for service in services for method in service.methods]
