"""What Temporal can find builds by, and what it keeps beside them. Persisted: names here stay."""

from __future__ import annotations

from temporalio.common import SearchAttributeKey

TEMPLATE_ID = SearchAttributeKey.for_keyword("TemplateId")
BUILD_ID = SearchAttributeKey.for_keyword("BuildId")
BUILD_STATE = SearchAttributeKey.for_keyword("BuildState")
BUILD_STEP = SearchAttributeKey.for_keyword("BuildStep")
KVM_HOST = SearchAttributeKey.for_keyword("KvmHost")
IMAGE = SearchAttributeKey.for_keyword("TemplateImage")
TENANT = SearchAttributeKey.for_keyword("Tenant")
"""Only for lists: who may see a build is decided by `TENANT_MEMO`."""
SEARCH_ATTRIBUTES = (TEMPLATE_ID, BUILD_ID, IMAGE, BUILD_STATE, BUILD_STEP, KVM_HOST, TENANT)
BUILDS = "WorkflowType='BuildTemplate'"
"""The query for all builds, of which each run is one."""
RUNNING_BUILDS = f"{BUILDS} AND ExecutionStatus='Running'"
CONFIG_SHA256_MEMO = "config_sha256"
IMAGE_MEMO = "image"
SIZE_MEMO = "size"
"""vCPUs, memory and free disk space (MiB) that were asked for, as a list."""
TENANT_MEMO = "tenant"
"""Builds that have none are of `DEFAULT_TENANT`."""
