"""A client with E2B's own stubs, as of April 2025 or August 2026: the same names and numbers.

It does what the control plane does, field by field: looks for the service, has files sent, starts a
build with huge pages, follows its log by offset with limit and direction, and deletes it. That of
April 2025 has an image pushed before, and asks only how the build is.

It runs in a process of its own, since two descriptions of the same messages clash in one.
`python e2b_client.py WHEN ADDRESS TEMPLATE_ID BUILD_ID` prints what it sees as JSON.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import sys
import tempfile
import time
import urllib.request
import uuid
from importlib.resources import files
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty
from grpc_tools import protoc

APRIL_2025 = """
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
message HealthStatusResponse { HealthState status = 1; }
enum ServiceInfoRole { TemplateBuilder = 0; Orchestrator = 1; }
message ServiceInfoResponse {
  string node_id = 1;
  string service_id = 2;
  uint32 service_status = 51;
  repeated ServiceInfoRole service_roles = 52;
  google.protobuf.Timestamp service_startup = 53;
}
message ServiceStatusChangeRequest { uint32 service_status = 2; }
service InfoService {
  rpc ServiceInfo(google.protobuf.Empty) returns (ServiceInfoResponse);
  rpc ServiceStatusOverride(ServiceStatusChangeRequest) returns (google.protobuf.Empty);
}
service TemplateService {
  rpc TemplateCreate(TemplateCreateRequest) returns (google.protobuf.Empty);
  rpc TemplateBuildStatus(TemplateStatusRequest) returns (TemplateBuildStatusResponse);
  rpc TemplateBuildDelete(TemplateBuildDeleteRequest) returns (google.protobuf.Empty);
  rpc HealthStatus(google.protobuf.Empty) returns (HealthStatusResponse);
}
"""
AUGUST_2026 = """
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
  string fromImage = 11;
  optional bool force = 12;
  repeated TemplateStep steps = 13;
  FromTemplateConfig fromTemplate = 14;
  string teamID = 16;
}
message TemplateStep {
  string type = 1;
  repeated string args = 2;
  optional bool force = 3;
  optional string filesHash = 4;
}
message FromTemplateConfig { string alias = 1; string buildID = 2; }
message TemplateCreateRequest {
  TemplateConfig template = 1;
  optional string cacheScope = 2;
  optional string version = 3;
}
message TemplateStatusRequest {
  string templateID = 1;
  string buildID = 2;
  optional int32 offset = 3;
  optional LogLevel level = 4;
  optional uint32 limit = 5;
  optional google.protobuf.Timestamp start = 6;
  optional google.protobuf.Timestamp end = 7;
  optional LogsDirection direction = 8;
}
enum LogLevel { Debug = 0; Info = 1; Warn = 2; Error = 3; }
enum LogsDirection { Forward = 0; Backward = 1; }
message TemplateBuildDeleteRequest { string buildID = 1; string templateID = 2; }
message TemplateBuildMetadata {
  int32 rootfsSizeKey = 1;
  string envdVersionKey = 2;
  string kernelVersion = 3;
  string firecrackerVersion = 4;
}
enum TemplateBuildState { Building = 0; Failed = 1; Completed = 2; }
message TemplateBuildLogEntry {
  google.protobuf.Timestamp timestamp = 1;
  string message = 2;
  LogLevel level = 3;
  map<string, string> fields = 4;
}
message TemplateBuildStatusReason { string message = 1; optional string step = 2; }
message TemplateBuildStatusResponse {
  TemplateBuildState status = 1;
  TemplateBuildMetadata metadata = 2;
  repeated TemplateBuildLogEntry logEntries = 5;
  optional TemplateBuildStatusReason reason = 6;
}
message InitLayerFileUploadRequest {
  string templateID = 1;
  string hash = 2;
  optional string cacheScope = 3;
}
message InitLayerFileUploadResponse { bool present = 1; optional string url = 2; }
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
  rpc InitLayerFileUpload(InitLayerFileUploadRequest) returns (InitLayerFileUploadResponse);
}
"""
SCOPE = "11111111-2222-4333-8444-555555555555"
"""A team's id, as E2B's control plane has it."""
FILES_HASH = hashlib.sha256(b"COPY src /app").hexdigest()
# As E2B's Go client sets them; it pings also while it asks nothing.
KEEPALIVE = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)


def stubs(proto: str) -> tuple[Any, Any]:
    """Generate and load the stubs."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        (directory / "e2b.proto").write_text(proto)
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


def send_files(pb: Any, service: Any, template_id: str) -> list[bool]:
    """Have the files of a COPY sent, as the SDKs do; return whether they were there, twice."""
    asked = pb.InitLayerFileUploadRequest(templateID=template_id, hash=FILES_HASH, cacheScope=SCOPE)
    first = service.InitLayerFileUpload(asked)
    tar = gzip.compress(b"\0" * 10_240)
    request = urllib.request.Request(first.url, data=tar, method="PUT")
    with urllib.request.urlopen(request, timeout=30) as response:
        assert response.status == 200
    again = service.InitLayerFileUpload(asked)
    assert again.url
    return [first.present, again.present]


def read_log(pb: Any, service: Any, **asked: Any) -> dict[str, Any]:
    """Read the log by offset, page after page, and its end backwards."""
    lines: list[Any] = []
    while True:
        request = pb.TemplateStatusRequest(offset=len(lines), limit=3, level=pb.Debug, **asked)
        page = service.TemplateBuildStatus(request).logEntries
        assert len(page) <= 3
        lines.extend(page)
        if lines and not page:  # a server that is very busy tells no line at first
            break
    backward = pb.TemplateStatusRequest(limit=2, direction=pb.Backward, **asked)
    last = service.TemplateBuildStatus(backward).logEntries
    warnings = pb.TemplateStatusRequest(limit=100, level=pb.Warn, **asked)
    late = pb.TemplateStatusRequest(limit=100, start=lines[-1].timestamp, **asked)
    nothing = pb.TemplateStatusRequest(limit=0, **asked)
    return {
        "lines": len(lines) > 6,
        "steps": sorted({line.fields["step"] for line in lines if "step" in line.fields}),
        "backward": [line.message for line in last] == [x.message for x in lines[:-3:-1]],
        "warnings": {line.level for line in service.TemplateBuildStatus(warnings).logEntries}
        <= {pb.Warn, pb.Error},
        "late": service.TemplateBuildStatus(late).logEntries[-1].message == lines[-1].message,
        "nothing": len(service.TemplateBuildStatus(nothing).logEntries),
    }


def ended(pb: Any, service: Any, **asked: Any) -> Any:
    """Ask for a build until it has ended; return the answer."""
    request = pb.TemplateStatusRequest(**asked)
    while (answer := service.TemplateBuildStatus(request)).status == pb.Building:
        time.sleep(0.2)
    return answer


def delete(pb: Any, service: Any, **asked: Any) -> str:
    """Delete a build, and one that never was; return what its status is then."""
    for build_id in (asked["buildID"], asked["buildID"], str(uuid.uuid4())):
        service.TemplateBuildDelete(
            pb.TemplateBuildDeleteRequest(templateID=asked["templateID"], buildID=build_id)
        )
    try:
        service.TemplateBuildStatus(pb.TemplateStatusRequest(**asked))
    except grpc.RpcError as error:
        return str(error.code().name)
    return "there"


def of_april_2025(pb: Any, service: Any, **asked: Any) -> dict[str, Any]:
    """Create, ask until it has ended, delete."""
    config = pb.TemplateConfig(
        **asked,
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
    answer = ended(pb, service, **asked)
    return {
        "status": pb.TemplateBuildState.Name(answer.status),
        "rootfs_size": answer.metadata.rootfsSizeKey,
        "after_delete": delete(pb, service, **asked),
    }


def of_august_2026(pb: Any, service: Any, **asked: Any) -> dict[str, Any]:
    """Send files, create, ask until it has ended, read its log, delete."""
    config = pb.TemplateConfig(
        **asked,
        memoryMB=512,
        vCpuCount=2,
        teamID=SCOPE,
        force=False,
        steps=[
            pb.TemplateStep(type="RUN", args=["true", "root"]),
            pb.TemplateStep(type="COPY", args=["src", "/app", "", ""], filesHash=FILES_HASH),
        ],
        diskSizeMB=512,
        kernelVersion="vmlinux-6.1",
        firecrackerVersion="v1.13.1",
        startCommand="serve",
        hugePages=True,
        readyCommand="check",
    )
    present = send_files(pb, service, asked["templateID"])
    create = pb.TemplateCreateRequest(template=config, cacheScope=SCOPE, version="1.1.0")
    service.TemplateCreate(create)
    answer = ended(pb, service, **asked)
    return {
        "present": present,
        "status": pb.TemplateBuildState.Name(answer.status),
        "reason": [answer.reason.message, answer.reason.step],
        "rootfs_size": answer.metadata.rootfsSizeKey,
        "made_for": [answer.metadata.kernelVersion, answer.metadata.firecrackerVersion],
        "log": read_log(pb, service, **asked),
        "after_delete": delete(pb, service, **asked),
    }


CLIENTS = {"2025-04": (APRIL_2025, of_april_2025), "2026-08": (AUGUST_2026, of_august_2026)}


def main(when: str, address: str, template_id: str, build_id: str) -> None:
    """Look for the service, and have a template built by it."""
    proto, use = CLIENTS[when]
    pb, pb_grpc = stubs(proto)
    with grpc.insecure_channel(address, options=KEEPALIVE) as channel:
        service = pb_grpc.TemplateServiceStub(channel)
        seen = {
            "found": find(pb, pb_grpc.InfoServiceStub(channel)),
            "health": service.HealthStatus(Empty()).status,
            **use(pb, service, templateID=template_id, buildID=build_id),
        }
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
