import datetime

from google.protobuf import empty_pb2 as _empty_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TemplateBuildState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    Building: _ClassVar[TemplateBuildState]
    Failed: _ClassVar[TemplateBuildState]
    Completed: _ClassVar[TemplateBuildState]

class WaitReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NotKnown: _ClassVar[WaitReason]
    NoWorker: _ClassVar[WaitReason]
    NoHosts: _ClassVar[WaitReason]
    AllDraining: _ClassVar[WaitReason]
    AllBusy: _ClassVar[WaitReason]
    SlotIsFree: _ClassVar[WaitReason]
    TenantLimit: _ClassVar[WaitReason]
    NoRoom: _ClassVar[WaitReason]

class BuildPriority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    Interactive: _ClassVar[BuildPriority]
    Batch: _ClassVar[BuildPriority]

class NetworkAccess(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ServerDefault: _ClassVar[NetworkAccess]
    NoNetwork: _ClassVar[NetworkAccess]
    Internet: _ClassVar[NetworkAccess]
    AllowedOnly: _ClassVar[NetworkAccess]

class HealthState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    Healthy: _ClassVar[HealthState]
    Draining: _ClassVar[HealthState]

class LogLevel(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    Debug: _ClassVar[LogLevel]
    Info: _ClassVar[LogLevel]
    Warn: _ClassVar[LogLevel]
    Error: _ClassVar[LogLevel]

class LogsDirection(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    Forward: _ClassVar[LogsDirection]
    Backward: _ClassVar[LogsDirection]
Building: TemplateBuildState
Failed: TemplateBuildState
Completed: TemplateBuildState
NotKnown: WaitReason
NoWorker: WaitReason
NoHosts: WaitReason
AllDraining: WaitReason
AllBusy: WaitReason
SlotIsFree: WaitReason
TenantLimit: WaitReason
NoRoom: WaitReason
Interactive: BuildPriority
Batch: BuildPriority
ServerDefault: NetworkAccess
NoNetwork: NetworkAccess
Internet: NetworkAccess
AllowedOnly: NetworkAccess
Healthy: HealthState
Draining: HealthState
Debug: LogLevel
Info: LogLevel
Warn: LogLevel
Error: LogLevel
Forward: LogsDirection
Backward: LogsDirection

class TemplateConfig(_message.Message):
    __slots__ = ("template_id", "build_id", "memory_mb", "vcpu_count", "disk_size_mb", "kernel_version", "firecracker_version", "start_command", "huge_pages", "ready_command", "force", "steps", "from_image", "from_template", "from_image_registry", "team_id", "env", "ready_timeout_seconds", "secret_env", "priority", "name", "tags", "keep_failed", "network")
    class EnvEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class SecretEnvEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TEMPLATE_ID_FIELD_NUMBER: _ClassVar[int]
    BUILD_ID_FIELD_NUMBER: _ClassVar[int]
    MEMORY_MB_FIELD_NUMBER: _ClassVar[int]
    VCPU_COUNT_FIELD_NUMBER: _ClassVar[int]
    DISK_SIZE_MB_FIELD_NUMBER: _ClassVar[int]
    KERNEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    FIRECRACKER_VERSION_FIELD_NUMBER: _ClassVar[int]
    START_COMMAND_FIELD_NUMBER: _ClassVar[int]
    HUGE_PAGES_FIELD_NUMBER: _ClassVar[int]
    READY_COMMAND_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    FROM_IMAGE_FIELD_NUMBER: _ClassVar[int]
    FROM_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    FROM_IMAGE_REGISTRY_FIELD_NUMBER: _ClassVar[int]
    TEAM_ID_FIELD_NUMBER: _ClassVar[int]
    ENV_FIELD_NUMBER: _ClassVar[int]
    READY_TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SECRET_ENV_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FAILED_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    template_id: str
    build_id: str
    memory_mb: int
    vcpu_count: int
    disk_size_mb: int
    kernel_version: str
    firecracker_version: str
    start_command: str
    huge_pages: bool
    ready_command: str
    force: bool
    steps: _containers.RepeatedCompositeFieldContainer[TemplateStep]
    from_image: str
    from_template: FromTemplateConfig
    from_image_registry: FromImageRegistry
    team_id: str
    env: _containers.ScalarMap[str, str]
    ready_timeout_seconds: int
    secret_env: _containers.ScalarMap[str, str]
    priority: BuildPriority
    name: str
    tags: _containers.RepeatedScalarFieldContainer[str]
    keep_failed: bool
    network: TemplateNetwork
    def __init__(self, template_id: _Optional[str] = ..., build_id: _Optional[str] = ..., memory_mb: _Optional[int] = ..., vcpu_count: _Optional[int] = ..., disk_size_mb: _Optional[int] = ..., kernel_version: _Optional[str] = ..., firecracker_version: _Optional[str] = ..., start_command: _Optional[str] = ..., huge_pages: _Optional[bool] = ..., ready_command: _Optional[str] = ..., force: _Optional[bool] = ..., steps: _Optional[_Iterable[_Union[TemplateStep, _Mapping]]] = ..., from_image: _Optional[str] = ..., from_template: _Optional[_Union[FromTemplateConfig, _Mapping]] = ..., from_image_registry: _Optional[_Union[FromImageRegistry, _Mapping]] = ..., team_id: _Optional[str] = ..., env: _Optional[_Mapping[str, str]] = ..., ready_timeout_seconds: _Optional[int] = ..., secret_env: _Optional[_Mapping[str, str]] = ..., priority: _Optional[_Union[BuildPriority, str]] = ..., name: _Optional[str] = ..., tags: _Optional[_Iterable[str]] = ..., keep_failed: _Optional[bool] = ..., network: _Optional[_Union[TemplateNetwork, _Mapping]] = ...) -> None: ...

class TemplateNetwork(_message.Message):
    __slots__ = ("access", "allowed")
    ACCESS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    access: NetworkAccess
    allowed: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, access: _Optional[_Union[NetworkAccess, str]] = ..., allowed: _Optional[_Iterable[str]] = ...) -> None: ...

class TemplateStep(_message.Message):
    __slots__ = ("type", "args", "force", "files_hash")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    ARGS_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    FILES_HASH_FIELD_NUMBER: _ClassVar[int]
    type: str
    args: _containers.RepeatedScalarFieldContainer[str]
    force: bool
    files_hash: str
    def __init__(self, type: _Optional[str] = ..., args: _Optional[_Iterable[str]] = ..., force: _Optional[bool] = ..., files_hash: _Optional[str] = ...) -> None: ...

class FromTemplateConfig(_message.Message):
    __slots__ = ("alias", "build_id")
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    BUILD_ID_FIELD_NUMBER: _ClassVar[int]
    alias: str
    build_id: str
    def __init__(self, alias: _Optional[str] = ..., build_id: _Optional[str] = ...) -> None: ...

class FromImageRegistry(_message.Message):
    __slots__ = ("aws", "gcp", "general")
    AWS_FIELD_NUMBER: _ClassVar[int]
    GCP_FIELD_NUMBER: _ClassVar[int]
    GENERAL_FIELD_NUMBER: _ClassVar[int]
    aws: AwsRegistry
    gcp: GcpRegistry
    general: GeneralRegistry
    def __init__(self, aws: _Optional[_Union[AwsRegistry, _Mapping]] = ..., gcp: _Optional[_Union[GcpRegistry, _Mapping]] = ..., general: _Optional[_Union[GeneralRegistry, _Mapping]] = ...) -> None: ...

class AwsRegistry(_message.Message):
    __slots__ = ("aws_access_key_id", "aws_secret_access_key", "aws_region")
    AWS_ACCESS_KEY_ID_FIELD_NUMBER: _ClassVar[int]
    AWS_SECRET_ACCESS_KEY_FIELD_NUMBER: _ClassVar[int]
    AWS_REGION_FIELD_NUMBER: _ClassVar[int]
    aws_access_key_id: str
    aws_secret_access_key: str
    aws_region: str
    def __init__(self, aws_access_key_id: _Optional[str] = ..., aws_secret_access_key: _Optional[str] = ..., aws_region: _Optional[str] = ...) -> None: ...

class GcpRegistry(_message.Message):
    __slots__ = ("service_account_json",)
    SERVICE_ACCOUNT_JSON_FIELD_NUMBER: _ClassVar[int]
    service_account_json: str
    def __init__(self, service_account_json: _Optional[str] = ...) -> None: ...

class GeneralRegistry(_message.Message):
    __slots__ = ("username", "password")
    USERNAME_FIELD_NUMBER: _ClassVar[int]
    PASSWORD_FIELD_NUMBER: _ClassVar[int]
    username: str
    password: str
    def __init__(self, username: _Optional[str] = ..., password: _Optional[str] = ...) -> None: ...

class TemplateCreateRequest(_message.Message):
    __slots__ = ("template", "cache_scope", "version")
    TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    CACHE_SCOPE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    template: TemplateConfig
    cache_scope: str
    version: str
    def __init__(self, template: _Optional[_Union[TemplateConfig, _Mapping]] = ..., cache_scope: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class TemplateBuildImageResponse(_message.Message):
    __slots__ = ("image",)
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    image: str
    def __init__(self, image: _Optional[str] = ...) -> None: ...

class TemplateStatusRequest(_message.Message):
    __slots__ = ("template_id", "build_id", "offset", "level", "limit", "start", "end", "direction")
    TEMPLATE_ID_FIELD_NUMBER: _ClassVar[int]
    BUILD_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    template_id: str
    build_id: str
    offset: int
    level: LogLevel
    limit: int
    start: _timestamp_pb2.Timestamp
    end: _timestamp_pb2.Timestamp
    direction: LogsDirection
    def __init__(self, template_id: _Optional[str] = ..., build_id: _Optional[str] = ..., offset: _Optional[int] = ..., level: _Optional[_Union[LogLevel, str]] = ..., limit: _Optional[int] = ..., start: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., end: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., direction: _Optional[_Union[LogsDirection, str]] = ...) -> None: ...

class TemplateBuildStatusResponse(_message.Message):
    __slots__ = ("status", "metadata", "log_entries", "reason", "state", "step", "progress", "host", "timeline", "image_digest", "artifacts", "workflow_id", "run_id", "bucket", "template_id", "image", "waiting", "known_until", "build_id")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    LOG_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ARTIFACTS_FIELD_NUMBER: _ClassVar[int]
    WORKFLOW_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KNOWN_UNTIL_FIELD_NUMBER: _ClassVar[int]
    BUILD_ID_FIELD_NUMBER: _ClassVar[int]
    status: TemplateBuildState
    metadata: TemplateBuildMetadata
    log_entries: _containers.RepeatedCompositeFieldContainer[TemplateBuildLogEntry]
    reason: TemplateBuildStatusReason
    state: str
    step: str
    progress: BuildProgress
    host: str
    timeline: _containers.RepeatedCompositeFieldContainer[StepTimeline]
    image_digest: str
    artifacts: _containers.RepeatedCompositeFieldContainer[Artifact]
    workflow_id: str
    run_id: str
    bucket: str
    template_id: str
    image: str
    waiting: WaitingForHost
    known_until: _timestamp_pb2.Timestamp
    build_id: str
    def __init__(self, status: _Optional[_Union[TemplateBuildState, str]] = ..., metadata: _Optional[_Union[TemplateBuildMetadata, _Mapping]] = ..., log_entries: _Optional[_Iterable[_Union[TemplateBuildLogEntry, _Mapping]]] = ..., reason: _Optional[_Union[TemplateBuildStatusReason, _Mapping]] = ..., state: _Optional[str] = ..., step: _Optional[str] = ..., progress: _Optional[_Union[BuildProgress, _Mapping]] = ..., host: _Optional[str] = ..., timeline: _Optional[_Iterable[_Union[StepTimeline, _Mapping]]] = ..., image_digest: _Optional[str] = ..., artifacts: _Optional[_Iterable[_Union[Artifact, _Mapping]]] = ..., workflow_id: _Optional[str] = ..., run_id: _Optional[str] = ..., bucket: _Optional[str] = ..., template_id: _Optional[str] = ..., image: _Optional[str] = ..., waiting: _Optional[_Union[WaitingForHost, _Mapping]] = ..., known_until: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., build_id: _Optional[str] = ...) -> None: ...

class TemplateBuildMetadata(_message.Message):
    __slots__ = ("rootfs_size_mb", "agent_version", "kernel_version", "firecracker_version")
    ROOTFS_SIZE_MB_FIELD_NUMBER: _ClassVar[int]
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    KERNEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    FIRECRACKER_VERSION_FIELD_NUMBER: _ClassVar[int]
    rootfs_size_mb: int
    agent_version: str
    kernel_version: str
    firecracker_version: str
    def __init__(self, rootfs_size_mb: _Optional[int] = ..., agent_version: _Optional[str] = ..., kernel_version: _Optional[str] = ..., firecracker_version: _Optional[str] = ...) -> None: ...

class TemplateBuildLogEntry(_message.Message):
    __slots__ = ("timestamp", "message", "level", "fields")
    class FieldsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    timestamp: _timestamp_pb2.Timestamp
    message: str
    level: LogLevel
    fields: _containers.ScalarMap[str, str]
    def __init__(self, timestamp: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., message: _Optional[str] = ..., level: _Optional[_Union[LogLevel, str]] = ..., fields: _Optional[_Mapping[str, str]] = ...) -> None: ...

class TemplateBuildStatusReason(_message.Message):
    __slots__ = ("message", "step", "error_type", "hint", "log_tail", "pipeline_step")
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ERROR_TYPE_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    LOG_TAIL_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_STEP_FIELD_NUMBER: _ClassVar[int]
    message: str
    step: str
    error_type: str
    hint: str
    log_tail: _containers.RepeatedScalarFieldContainer[str]
    pipeline_step: str
    def __init__(self, message: _Optional[str] = ..., step: _Optional[str] = ..., error_type: _Optional[str] = ..., hint: _Optional[str] = ..., log_tail: _Optional[_Iterable[str]] = ..., pipeline_step: _Optional[str] = ...) -> None: ...

class WaitingForHost(_message.Message):
    __slots__ = ("why", "message", "builds_before", "hosts")
    WHY_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    BUILDS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    why: WaitReason
    message: str
    builds_before: int
    hosts: HostSlots
    def __init__(self, why: _Optional[_Union[WaitReason, str]] = ..., message: _Optional[str] = ..., builds_before: _Optional[int] = ..., hosts: _Optional[_Union[HostSlots, _Mapping]] = ...) -> None: ...

class HostSlots(_message.Message):
    __slots__ = ("hosts", "slots", "free_slots", "draining", "away")
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    FREE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    AWAY_FIELD_NUMBER: _ClassVar[int]
    hosts: int
    slots: int
    free_slots: int
    draining: int
    away: int
    def __init__(self, hosts: _Optional[int] = ..., slots: _Optional[int] = ..., free_slots: _Optional[int] = ..., draining: _Optional[int] = ..., away: _Optional[int] = ...) -> None: ...

class BuildProgress(_message.Message):
    __slots__ = ("what", "done", "total", "unit", "attempt", "last_failure", "per_second")
    WHAT_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    LAST_FAILURE_FIELD_NUMBER: _ClassVar[int]
    PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    what: str
    done: int
    total: int
    unit: str
    attempt: int
    last_failure: str
    per_second: float
    def __init__(self, what: _Optional[str] = ..., done: _Optional[int] = ..., total: _Optional[int] = ..., unit: _Optional[str] = ..., attempt: _Optional[int] = ..., last_failure: _Optional[str] = ..., per_second: _Optional[float] = ...) -> None: ...

class StepTimeline(_message.Message):
    __slots__ = ("step", "started", "ended", "reused", "outcome", "host")
    STEP_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    REUSED_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    step: str
    started: _timestamp_pb2.Timestamp
    ended: _timestamp_pb2.Timestamp
    reused: bool
    outcome: str
    host: str
    def __init__(self, step: _Optional[str] = ..., started: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., ended: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., reused: _Optional[bool] = ..., outcome: _Optional[str] = ..., host: _Optional[str] = ...) -> None: ...

class Artifact(_message.Message):
    __slots__ = ("name", "size_bytes", "sent_bytes", "sha256", "object")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    name: str
    size_bytes: int
    sent_bytes: int
    sha256: str
    object: str
    def __init__(self, name: _Optional[str] = ..., size_bytes: _Optional[int] = ..., sent_bytes: _Optional[int] = ..., sha256: _Optional[str] = ..., object: _Optional[str] = ...) -> None: ...

class TemplateBuildInspectRequest(_message.Message):
    __slots__ = ("build_id", "template_id")
    BUILD_ID_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_ID_FIELD_NUMBER: _ClassVar[int]
    build_id: str
    template_id: str
    def __init__(self, build_id: _Optional[str] = ..., template_id: _Optional[str] = ...) -> None: ...

class TemplateBuildInspectResponse(_message.Message):
    __slots__ = ("build_id", "template_id", "own_bytes", "freed_bytes", "layers")
    BUILD_ID_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_ID_FIELD_NUMBER: _ClassVar[int]
    OWN_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    build_id: str
    template_id: str
    own_bytes: int
    freed_bytes: int
    layers: _containers.RepeatedCompositeFieldContainer[Layer]
    def __init__(self, build_id: _Optional[str] = ..., template_id: _Optional[str] = ..., own_bytes: _Optional[int] = ..., freed_bytes: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[Layer, _Mapping]]] = ...) -> None: ...

class Layer(_message.Message):
    __slots__ = ("layer_id", "stored_bytes", "is_public", "build_ids", "has_more", "is_freed")
    LAYER_ID_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    IS_PUBLIC_FIELD_NUMBER: _ClassVar[int]
    BUILD_IDS_FIELD_NUMBER: _ClassVar[int]
    HAS_MORE_FIELD_NUMBER: _ClassVar[int]
    IS_FREED_FIELD_NUMBER: _ClassVar[int]
    layer_id: str
    stored_bytes: int
    is_public: bool
    build_ids: _containers.RepeatedScalarFieldContainer[str]
    has_more: bool
    is_freed: bool
    def __init__(self, layer_id: _Optional[str] = ..., stored_bytes: _Optional[int] = ..., is_public: _Optional[bool] = ..., build_ids: _Optional[_Iterable[str]] = ..., has_more: _Optional[bool] = ..., is_freed: _Optional[bool] = ...) -> None: ...

class TemplateBuildDeleteRequest(_message.Message):
    __slots__ = ("build_id", "template_id")
    BUILD_ID_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_ID_FIELD_NUMBER: _ClassVar[int]
    build_id: str
    template_id: str
    def __init__(self, build_id: _Optional[str] = ..., template_id: _Optional[str] = ...) -> None: ...

class TemplateBuildCancelRequest(_message.Message):
    __slots__ = ("build_id", "template_id")
    BUILD_ID_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_ID_FIELD_NUMBER: _ClassVar[int]
    build_id: str
    template_id: str
    def __init__(self, build_id: _Optional[str] = ..., template_id: _Optional[str] = ...) -> None: ...

class TemplateBuildLogsRequest(_message.Message):
    __slots__ = ("template_id", "build_id", "cursor", "follow", "level", "run_id")
    TEMPLATE_ID_FIELD_NUMBER: _ClassVar[int]
    BUILD_ID_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    template_id: str
    build_id: str
    cursor: int
    follow: bool
    level: LogLevel
    run_id: str
    def __init__(self, template_id: _Optional[str] = ..., build_id: _Optional[str] = ..., cursor: _Optional[int] = ..., follow: _Optional[bool] = ..., level: _Optional[_Union[LogLevel, str]] = ..., run_id: _Optional[str] = ...) -> None: ...

class TemplateBuildLogsResponse(_message.Message):
    __slots__ = ("entry", "next_cursor", "run_id")
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    NEXT_CURSOR_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    entry: TemplateBuildLogEntry
    next_cursor: int
    run_id: str
    def __init__(self, entry: _Optional[_Union[TemplateBuildLogEntry, _Mapping]] = ..., next_cursor: _Optional[int] = ..., run_id: _Optional[str] = ...) -> None: ...

class TemplateBuildRetryRequest(_message.Message):
    __slots__ = ("build_id", "template_id")
    BUILD_ID_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_ID_FIELD_NUMBER: _ClassVar[int]
    build_id: str
    template_id: str
    def __init__(self, build_id: _Optional[str] = ..., template_id: _Optional[str] = ...) -> None: ...

class TemplateBuildListRequest(_message.Message):
    __slots__ = ("template_id", "states", "started_after", "started_before", "page_size", "page_token", "tenant")
    TEMPLATE_ID_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    STARTED_AFTER_FIELD_NUMBER: _ClassVar[int]
    STARTED_BEFORE_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    template_id: str
    states: _containers.RepeatedScalarFieldContainer[str]
    started_after: _timestamp_pb2.Timestamp
    started_before: _timestamp_pb2.Timestamp
    page_size: int
    page_token: str
    tenant: str
    def __init__(self, template_id: _Optional[str] = ..., states: _Optional[_Iterable[str]] = ..., started_after: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., started_before: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

class TemplateBuildListResponse(_message.Message):
    __slots__ = ("builds", "next_page_token")
    BUILDS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    builds: _containers.RepeatedCompositeFieldContainer[TemplateBuildSummary]
    next_page_token: str
    def __init__(self, builds: _Optional[_Iterable[_Union[TemplateBuildSummary, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class TemplateBuildSummary(_message.Message):
    __slots__ = ("build_id", "template_id", "state", "step", "host", "image", "started", "ended", "workflow_id", "run_id", "builds_before", "tenant", "names", "vcpu_count", "memory_mb", "disk_size_mb")
    BUILD_ID_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    WORKFLOW_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    BUILDS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    VCPU_COUNT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_MB_FIELD_NUMBER: _ClassVar[int]
    DISK_SIZE_MB_FIELD_NUMBER: _ClassVar[int]
    build_id: str
    template_id: str
    state: str
    step: str
    host: str
    image: str
    started: _timestamp_pb2.Timestamp
    ended: _timestamp_pb2.Timestamp
    workflow_id: str
    run_id: str
    builds_before: int
    tenant: str
    names: _containers.RepeatedScalarFieldContainer[str]
    vcpu_count: int
    memory_mb: int
    disk_size_mb: int
    def __init__(self, build_id: _Optional[str] = ..., template_id: _Optional[str] = ..., state: _Optional[str] = ..., step: _Optional[str] = ..., host: _Optional[str] = ..., image: _Optional[str] = ..., started: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., ended: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., workflow_id: _Optional[str] = ..., run_id: _Optional[str] = ..., builds_before: _Optional[int] = ..., tenant: _Optional[str] = ..., names: _Optional[_Iterable[str]] = ..., vcpu_count: _Optional[int] = ..., memory_mb: _Optional[int] = ..., disk_size_mb: _Optional[int] = ...) -> None: ...

class InitLayerFileUploadRequest(_message.Message):
    __slots__ = ("template_id", "hash", "cache_scope")
    TEMPLATE_ID_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    CACHE_SCOPE_FIELD_NUMBER: _ClassVar[int]
    template_id: str
    hash: str
    cache_scope: str
    def __init__(self, template_id: _Optional[str] = ..., hash: _Optional[str] = ..., cache_scope: _Optional[str] = ...) -> None: ...

class InitLayerFileUploadResponse(_message.Message):
    __slots__ = ("present", "url")
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    present: bool
    url: str
    def __init__(self, present: _Optional[bool] = ..., url: _Optional[str] = ...) -> None: ...

class TemplateNameReserveRequest(_message.Message):
    __slots__ = ("name", "tags", "template_id", "memory_mb", "vcpu_count", "disk_size_mb")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_ID_FIELD_NUMBER: _ClassVar[int]
    MEMORY_MB_FIELD_NUMBER: _ClassVar[int]
    VCPU_COUNT_FIELD_NUMBER: _ClassVar[int]
    DISK_SIZE_MB_FIELD_NUMBER: _ClassVar[int]
    name: str
    tags: _containers.RepeatedScalarFieldContainer[str]
    template_id: str
    memory_mb: int
    vcpu_count: int
    disk_size_mb: int
    def __init__(self, name: _Optional[str] = ..., tags: _Optional[_Iterable[str]] = ..., template_id: _Optional[str] = ..., memory_mb: _Optional[int] = ..., vcpu_count: _Optional[int] = ..., disk_size_mb: _Optional[int] = ...) -> None: ...

class TemplateNameReserveResponse(_message.Message):
    __slots__ = ("name", "template_id", "build_id", "tags")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_ID_FIELD_NUMBER: _ClassVar[int]
    BUILD_ID_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    name: str
    template_id: str
    build_id: str
    tags: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., template_id: _Optional[str] = ..., build_id: _Optional[str] = ..., tags: _Optional[_Iterable[str]] = ...) -> None: ...

class TemplateNameGetRequest(_message.Message):
    __slots__ = ("name", "template_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    template_id: str
    def __init__(self, name: _Optional[str] = ..., template_id: _Optional[str] = ...) -> None: ...

class TemplateNameListRequest(_message.Message):
    __slots__ = ("tenant", "page_size", "page_token")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    page_size: int
    page_token: str
    def __init__(self, tenant: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class TemplateNameListResponse(_message.Message):
    __slots__ = ("names", "next_page_token")
    NAMES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedCompositeFieldContainer[TemplateName]
    next_page_token: str
    def __init__(self, names: _Optional[_Iterable[_Union[TemplateName, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class TemplateTagsAssignRequest(_message.Message):
    __slots__ = ("name", "tags", "build_id", "roll_back")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    BUILD_ID_FIELD_NUMBER: _ClassVar[int]
    ROLL_BACK_FIELD_NUMBER: _ClassVar[int]
    name: str
    tags: _containers.RepeatedScalarFieldContainer[str]
    build_id: str
    roll_back: bool
    def __init__(self, name: _Optional[str] = ..., tags: _Optional[_Iterable[str]] = ..., build_id: _Optional[str] = ..., roll_back: _Optional[bool] = ...) -> None: ...

class TemplateTagsRemoveRequest(_message.Message):
    __slots__ = ("name", "tags")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    name: str
    tags: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., tags: _Optional[_Iterable[str]] = ...) -> None: ...

class TemplateName(_message.Message):
    __slots__ = ("name", "template_id", "tenant", "created", "tags", "awaited")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    AWAITED_FIELD_NUMBER: _ClassVar[int]
    name: str
    template_id: str
    tenant: str
    created: _timestamp_pb2.Timestamp
    tags: _containers.RepeatedCompositeFieldContainer[TemplateTag]
    awaited: _containers.RepeatedCompositeFieldContainer[AwaitedBuild]
    def __init__(self, name: _Optional[str] = ..., template_id: _Optional[str] = ..., tenant: _Optional[str] = ..., created: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., tags: _Optional[_Iterable[_Union[TemplateTag, _Mapping]]] = ..., awaited: _Optional[_Iterable[_Union[AwaitedBuild, _Mapping]]] = ...) -> None: ...

class TemplateTag(_message.Message):
    __slots__ = ("tag", "build_id", "asked", "previous")
    TAG_FIELD_NUMBER: _ClassVar[int]
    BUILD_ID_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    tag: str
    build_id: str
    asked: _timestamp_pb2.Timestamp
    previous: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, tag: _Optional[str] = ..., build_id: _Optional[str] = ..., asked: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., previous: _Optional[_Iterable[str]] = ...) -> None: ...

class AwaitedBuild(_message.Message):
    __slots__ = ("build_id", "tags", "asked", "memory_mb", "vcpu_count", "disk_size_mb")
    BUILD_ID_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    MEMORY_MB_FIELD_NUMBER: _ClassVar[int]
    VCPU_COUNT_FIELD_NUMBER: _ClassVar[int]
    DISK_SIZE_MB_FIELD_NUMBER: _ClassVar[int]
    build_id: str
    tags: _containers.RepeatedScalarFieldContainer[str]
    asked: _timestamp_pb2.Timestamp
    memory_mb: int
    vcpu_count: int
    disk_size_mb: int
    def __init__(self, build_id: _Optional[str] = ..., tags: _Optional[_Iterable[str]] = ..., asked: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., memory_mb: _Optional[int] = ..., vcpu_count: _Optional[int] = ..., disk_size_mb: _Optional[int] = ...) -> None: ...

class HealthStatusResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: HealthState
    def __init__(self, status: _Optional[_Union[HealthState, str]] = ...) -> None: ...
