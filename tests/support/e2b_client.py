"""A client with E2B's own stubs, as of April 2025 (discovery: of August 2026): the same numbers.

It runs in a process of its own, since two descriptions of the same messages clash in one.
`python e2b_client.py ADDRESS TEMPLATE_ID BUILD_ID` prints what it sees as JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
import uuid
from importlib.resources import files
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty
from grpc_tools import protoc

PROTO = """
syntax = "proto3";
import "google/protobuf/empty.proto";
import "google/protobuf/timestamp.proto";

message TemplateConfig {
  string templateID = 1;
  string buildID = 2;
  int32 memoryMB = 3;
  int32 vCpuCount = 4;
  int32 diskSizeMB = 5;
  string kernelVersion = 6;
  string firecrackerVersion = 7;
  string startCommand = 8;
  bool hugePages = 9;
  string readyCommand = 10;
}
message TemplateCreateRequest { TemplateConfig template = 1; }
message TemplateStatusRequest { string templateID = 1; string buildID = 2; }
message TemplateBuildDeleteRequest { string buildID = 1; string templateID = 2; }
message TemplateBuildMetadata { int32 rootfsSizeKey = 1; string envdVersionKey = 2; }
enum TemplateBuildState { Building = 0; Failed = 1; Completed = 2; }
message TemplateBuildStatusResponse {
  TemplateBuildState status = 1;
  TemplateBuildMetadata metadata = 2;
}
enum HealthState { Healthy = 0; Draining = 1; }
enum ServiceInfoRole { TemplateBuilder = 0; Orchestrator = 1; }
message MachineInfo { string cpu_architecture = 1; repeated string cpu_flags = 5; }
message ServiceInfoResponse {
  string node_id = 1;
  string service_id = 2;
  uint32 service_status = 51;
  repeated ServiceInfoRole service_roles = 52;
  google.protobuf.Timestamp service_startup = 53;
  MachineInfo machine_info = 54;
}
message ServiceStatusChangeRequest { uint32 service_status = 2; }
service InfoService {
  rpc ServiceInfo(google.protobuf.Empty) returns (ServiceInfoResponse);
  rpc ServiceStatusOverride(ServiceStatusChangeRequest) returns (google.protobuf.Empty);
}
message HealthStatusResponse { HealthState status = 1; }

service TemplateService {
  rpc TemplateCreate(TemplateCreateRequest) returns (google.protobuf.Empty);
  rpc TemplateBuildStatus(TemplateStatusRequest) returns (TemplateBuildStatusResponse);
  rpc TemplateBuildDelete(TemplateBuildDeleteRequest) returns (google.protobuf.Empty);
  rpc HealthStatus(google.protobuf.Empty) returns (HealthStatusResponse);
}
"""


def stubs() -> tuple[Any, Any]:
    """Generate and load the stubs."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        (directory / "e2b.proto").write_text(PROTO)
        well_known = str(files("grpc_tools") / "_proto")
        arguments = ["protoc", f"-I{directory}", f"-I{well_known}", f"--python_out={directory}"]
        assert protoc.main([*arguments, f"--grpc_python_out={directory}", "e2b.proto"]) == 0
        sys.path.insert(0, str(directory))
        return importlib.import_module("e2b_pb2"), importlib.import_module("e2b_pb2_grpc")


def find(pb: Any, info: Any) -> dict[str, Any]:
    """Look for a service that builds templates, let it drain, and take that back."""
    found = info.ServiceInfo(Empty())
    statuses = []
    for status in (1, 0):
        info.ServiceStatusOverride(pb.ServiceStatusChangeRequest(service_status=status))
        statuses.append(info.ServiceInfo(Empty()).service_status)
    return {
        "roles": [pb.ServiceInfoRole.Name(role) for role in found.service_roles],
        "status": found.service_status,
        "named": bool(found.node_id and found.service_id and found.service_startup.seconds),
        "statuses": statuses,
    }


def main(address: str, template_id: str, build_id: str) -> None:
    """Create, ask until it is completed, delete."""
    pb, pb_grpc = stubs()
    seen: dict[str, Any] = {}
    with grpc.insecure_channel(address) as channel:
        service = pb_grpc.TemplateServiceStub(channel)
        seen["found"] = find(pb, pb_grpc.InfoServiceStub(channel))
        seen["health"] = service.HealthStatus(Empty()).status
        config = pb.TemplateConfig(
            templateID=template_id,
            buildID=build_id,
            memoryMB=512,
            vCpuCount=2,
            diskSizeMB=512,
            kernelVersion="vmlinux-6.1",
            firecrackerVersion="v1.13.1",
            startCommand="serve",
            hugePages=True,  # both control planes set it for every Firecracker since 1.7
            readyCommand="check",
        )
        service.TemplateCreate(pb.TemplateCreateRequest(template=config))
        request = pb.TemplateStatusRequest(templateID=template_id, buildID=build_id)
        while (answer := service.TemplateBuildStatus(request)).status == pb.Building:
            time.sleep(0.2)
        seen["status"] = pb.TemplateBuildState.Name(answer.status)
        seen["rootfs_size"] = answer.metadata.rootfsSizeKey
        delete = pb.TemplateBuildDeleteRequest(templateID=template_id, buildID=build_id)
        for _ in range(2):  # an unknown build is deleted, too
            service.TemplateBuildDelete(delete)
        unknown = pb.TemplateBuildDeleteRequest(templateID=template_id, buildID=str(uuid.uuid4()))
        service.TemplateBuildDelete(unknown)
        try:
            service.TemplateBuildStatus(request)
        except grpc.RpcError as error:
            seen["after_delete"] = error.code().name
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
