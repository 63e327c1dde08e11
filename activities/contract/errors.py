"""Everything a build can fail with.

One class per cause. Each knows whether trying again can help and what the user can do next.
Activities raise these; `activities.process.temporal.ErrorInterceptor` gives them their wire form, a
Temporal `ApplicationError` whose `type` is the class name and whose one detail is a
`BuildFailure`. Nobody branches on message text.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from temporalio.exceptions import ActivityError, ApplicationError, ApplicationErrorCategory
from temporalio.exceptions import TimeoutError as TemporalTimeoutError

from activities.contract.names import Step
from activities.contract.status import BuildFailure
from activities.contract.text import one_line, readable

LOG_TAIL_LINES = 20
LOG_TAIL_LINE_CHARS = 400


class TemplateManagerError(Exception):
    """Base of all our errors.

    `retryable` says whether the same activity can succeed when it is tried again; `users_fault`
    marks what is expected in daily use and should alarm nobody; `hint` is what to do next.
    """

    retryable = False
    users_fault = True
    hint = ""

    def __init__(
        self,
        message: str,
        *,
        step: Step | None = None,
        step_number: int | None = None,
        log_tail: Sequence[str] = (),
        hint: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        # A registry, a guest or a tool may have written any of it.
        self.message = one_line(message)
        super().__init__(self.message)
        self.step = step
        self.step_number = step_number
        self.log_tail = log_tail
        self.hint = type(self).hint if hint is None else one_line(hint)
        self.retry_after_seconds = retry_after_seconds

    @property
    def log_tail(self) -> tuple[str, ...]:
        """The last lines of whatever failed."""
        return self._log_tail

    @log_tail.setter
    def log_tail(self, lines: Sequence[str]) -> None:
        last = lines[-LOG_TAIL_LINES:]
        self._log_tail = tuple(readable(line)[:LOG_TAIL_LINE_CHARS] for line in last)

    def failure(self) -> BuildFailure:
        """Return what users are told."""
        return BuildFailure(
            error_type=type(self).__name__,
            message=self.message,
            step=self.step,
            step_number=self.step_number,
            hint=self.hint,
            log_tail=self.log_tail,
        )

    def to_application_error(self) -> ApplicationError:
        """Return the form in which this travels through Temporal."""
        retry_after = self.retry_after_seconds
        return ApplicationError(
            self.message,
            self.failure().model_dump(mode="json"),
            type=type(self).__name__,
            non_retryable=not self.retryable,
            next_retry_delay=timedelta(seconds=retry_after) if retry_after else None,
            category=(
                ApplicationErrorCategory.BENIGN
                if self.users_fault
                else ApplicationErrorCategory.UNSPECIFIED
            ),
        )


class HostFaultError(TemplateManagerError):
    """Something on our side failed that may work the next time."""

    retryable = True
    users_fault = False


# ---- Image


class ImageNotFoundError(TemplateManagerError):
    """The registry does not have the image, or does not show it to us."""

    hint = "Check the image name and tag; for a private image give the registry's credentials."


class RegistryAuthError(TemplateManagerError):
    """The registry refused our credentials."""

    hint = (
        "Give valid credentials in from_image_registry (CLI: --registry-user and "
        "--registry-password-stdin)."
    )


class RegistryRefusedError(TemplateManagerError):
    """The registry, or where it sends us, is not one that hosts may call."""

    hint = (
        "Give a registry with a public address, that sends clients to such ones by https alone. An "
        "operator allows one of the inside with TEMPLATE_MANAGER_INTERNAL_REGISTRIES."
    )


class RegistryUnavailableError(HostFaultError):
    """The registry cannot be reached or asks us to come back later."""

    users_fault = True
    hint = "Check that the registry is up and reachable from the KVM host, then retry the build."


class NotAnImageError(TemplateManagerError):
    """What the reference names is not a container image."""

    hint = "Give the reference of a container image: charts, plugins and signatures do not boot."


class WrongArchitectureError(TemplateManagerError):
    """The image, or all that its index holds, is for another platform than the host's."""

    hint = "Build the image for the host's architecture (docker buildx build --platform …)."


class ImageFormatUnsupportedError(TemplateManagerError):
    """The image is in a form that the host's Docker does not read."""

    hint = (
        "Push it in another form: docker buildx build --output "
        "type=image,push=true,compression=gzip,force-compression=true …"
    )


class ImageUnusableError(TemplateManagerError):
    """The image contradicts itself, or Docker cannot unpack it."""

    hint = "Build and push the image anew; docker pull of it fails as well."


class TooManyLayersError(TemplateManagerError):
    """The image, with the steps on top of it, would have more layers than Docker takes."""

    hint = (
        "Join RUN and COPY instructions, or flatten the image: docker export a container of it, "
        "docker import and docker push what comes out."
    )


class ImageDamagedError(HostFaultError):
    """What dockerd has is not what the registry named."""

    hint = "Remove the image on the KVM host (docker image rm) and retry the build."


class DockerUnavailableError(HostFaultError):
    """The Docker daemon cannot be reached, or failed."""

    hint = "Check that dockerd runs on the KVM host, then retry the build."


class DockerRefusedError(HostFaultError):
    """The Docker daemon refused a call, and would refuse it again."""

    retryable = False
    hint = "Read Docker's words: the image, a step or the host's Docker needs another setting."


class StorageDriverError(HostFaultError):
    """Docker keeps its images in a way that we cannot read."""

    retryable = False
    hint = "Run dockerd with the storage driver overlay2 (not the containerd image store)."


class ImageStepError(TemplateManagerError):
    """A step of the request failed."""

    hint = (
        "Read the step's last lines; run the same instruction in a container of the image. A limit "
        "that it names is disk_size_mb (CLI: --disk) or memory_mb (CLI: --memory) of the template, "
        "or an operator's (docs/steps.md)."
    )


class EarlierWorkerError(TemplateManagerError):
    """A worker of an earlier version has asked this host for what is done otherwise since."""

    hint = "When all workers are of this version, retry the build: template-manager retry BUILD_ID."


class FilesMissingError(TemplateManagerError):
    """The files that a COPY takes are not in the bucket."""

    hint = "Send them again (InitLayerFileUpload), and start the build again."


class FilesTooLargeError(TemplateManagerError):
    """The files that a COPY takes are more than the service takes."""

    hint = (
        "Leave files out (.dockerignore), or let an operator raise TEMPLATE_MANAGER_MAX_FILES_MB."
    )


class InputTooLargeError(TemplateManagerError):
    """What a step would be given is more than Temporal takes."""

    hint = "Use fewer and shorter steps and variables: COPY a script instead of long commands."


# ---- Root file system


class RootfsTooLargeError(TemplateManagerError):
    """The file system would be larger than the limit."""

    hint = (
        "Make the image or disk_size_mb (CLI: --disk) smaller, or let an operator raise "
        "TEMPLATE_MANAGER_MAX_ROOTFS_MB."
    )


class ImageBeyondLimitError(TemplateManagerError):
    """The image has more in it, or longer paths, than the host takes."""

    hint = "Make the image smaller, or let an operator raise the setting that the message names."


class HostDiskFullError(HostFaultError):
    """The host's disk has no room for the build."""

    retryable = False
    hint = (
        "Free space on the host (template-manager sweep) or let TEMPLATE_MANAGER_DATA_DIR be on a "
        "larger disk."
    )


class ProvisioningError(TemplateManagerError):
    """The image cannot be made a guest of: its USER, accounts or WORKDIR do not fit its files."""

    hint = "Read what the message names; docker run of the image says more of its own USER."


class FilesystemDamagedError(HostFaultError):
    """e2fsck found errors in a file system that we made."""

    hint = "Check the host's disk (dmesg, smartctl), then retry the build."


class FilesystemToolError(HostFaultError):
    """A tool that makes or fills a file system (mke2fs, resize2fs, cp) failed."""

    hint = "Read the tool's message in the build log; template-manager doctor checks the tools."


# ---- Boot


class KernelMissingError(TemplateManagerError):
    """The requested kernel version is not on the host."""

    hint = (
        "Install the kernel on the host at that path, or ask for a version that template-manager "
        "hosts shows."
    )


class FirecrackerMissingError(TemplateManagerError):
    """The requested Firecracker version is not on the host."""

    hint = (
        "Install that Firecracker on the host at that path, or ask for a version that "
        "template-manager hosts shows."
    )


class HostTooSmallError(TemplateManagerError):
    """The host's memory is smaller than the VM's."""

    hint = "Ask for less memory (template-manager hosts --json tells what hosts have)."


class EgressMissingError(TemplateManagerError):
    """The build wants a network, and the host has not what leads its guests out."""

    hint = (
        "On the host: apt-get install slirp4netns nftables; or build with --network none, which is "
        "every request's default with TEMPLATE_MANAGER_DEFAULT_NETWORK=none."
    )


class NetworkNameError(TemplateManagerError):
    """A host name of the build's network has no IPv4 address."""

    hint = "Correct the name, or give a network instead (203.0.113.0/24)."


class AgentMissingError(TemplateManagerError):
    """The configured guest agent is not on the host, or does not run there."""

    hint = (
        "Put the agent at TEMPLATE_MANAGER_GUEST_AGENT_PATH of each host, or unset that and "
        "TEMPLATE_MANAGER_REQUIRE_GUEST_AGENT."
    )


class JailUnusableError(HostFaultError):
    """The file system on which Firecracker's jailer makes a jail keeps it from working."""

    retryable = False
    hint = (
        "Mount it without these options (mount -o remount,dev,exec), or let "
        "TEMPLATE_MANAGER_DATA_DIR, or TMPDIR of run and doctor, be on another; without a jailer "
        "(TEMPLATE_MANAGER_USE_JAILER=false) they do not matter."
    )


class VmmError(HostFaultError):
    """Firecracker refused a call or ended where it should not."""

    hint = "Read Firecracker's message; check its version and the host's memory, then retry."


class VmmEndedError(VmmError):
    """Firecracker ended by itself, or was killed, while its guest was running."""

    retryable = False  # the VM is gone: nothing that follows it can go on
    hint = (
        "Read Firecracker's last lines and the host's (dmesg: out of memory, KVM), then retry the "
        "build."
    )


class GuestDiedError(TemplateManagerError):
    """The guest shut down or panicked before it was ready."""

    hint = (
        "Read the guest's last lines; a kernel panic or out-of-memory needs another image or size."
    )


class StartCommandError(TemplateManagerError):
    """The start command ended before the guest was ready."""

    hint = (
        "Run the command in a container of the image; check its path, its #! line and what that "
        "names, arguments and USER. If it says that the disk is full or memory is short, raise "
        "disk_size_mb (CLI: --disk) or memory_mb (CLI: --memory)."
    )


class ReadyTimeoutError(TemplateManagerError):
    """The ready command did not succeed in time."""

    hint = (
        "Check the ready command and the start command's output, or raise ready_timeout_seconds "
        "(CLI: --ready-timeout)."
    )


class SnapshotNotResumableError(TemplateManagerError):
    """The snapshot did not resume, or the resumed guest does not answer."""

    users_fault = False
    hint = (
        "Retry the build (template-manager retry); if it happens again, the guest does not "
        "survive a snapshot."
    )


# ---- Storage


class StorageUnavailableError(HostFaultError):
    """The bucket cannot be reached, or answered with something that may pass."""

    hint = "Check the bucket and the network between the host and it; the build can be retried."


class StorageDeniedError(TemplateManagerError):
    """The bucket does not exist, or we may not write to it, or its quota is used up."""

    hint = "Check the bucket's name, the Google credentials here, permissions and quota; try again."


class PreconditionFailedError(HostFaultError):
    """An object of the bucket is not as it was last seen: another process was quicker.

    Whoever can tell what that means catches it. Else the activity is tried again, and looks anew.
    """

    hint = "Retry the build; if it happens again, look for what else writes to the bucket."


class StorageCorruptionError(HostFaultError):
    """What is in the bucket is not what was sent."""

    hint = "Retry the build; if it happens again, check the host's memory and network."


class TemplateAlreadyPublishedError(TemplateManagerError):
    """The template has been published and can no longer be undone by cancelling."""

    hint = "Delete the template instead."


class TemplateNotFoundError(TemplateManagerError):
    """There is no such template or build."""

    hint = "Check the build id; template-manager list shows the builds."


class NameTakenError(TemplateManagerError):
    """A name is another template's, or a template has a name already."""

    hint = "Use another name, or build under the template id that the name has."


class NamesBeyondLimitError(TemplateManagerError):
    """A tenant has as many names, or a name as many tags, as there may be."""

    hint = "Take some away: template-manager tag --remove name:tag."


class TemplateDamagedError(TemplateManagerError):
    """A published template's objects are not what its metadata says."""

    users_fault = False
    hint = "Build the template again under a new build id."


# ---- A template on this machine


class TargetUnusableError(TemplateManagerError):
    """Files cannot be written where they were asked for."""

    hint = "Name a directory that can be written to."


class MachineUnfitError(TemplateManagerError):
    """This machine lacks what resuming the template takes."""

    hint = "Run it as root on a machine where template-manager doctor finds nothing wrong."


class UnsafeToolsError(TemplateManagerError):
    """A tool of this host has a known hole by which a tenant gets out of what holds it."""

    users_fault = False
    hint = (
        "Upgrade it (apt-get update && apt-get upgrade, then restart dockerd), or accept the named "
        "CVEs: TEMPLATE_MANAGER_ACCEPTED_CVES."
    )


# ---- Durability


class CheckpointLostError(TemplateManagerError):
    """What an earlier step left is no longer there (or damaged); that step must run again.

    `step` names the step to go back to.
    """

    users_fault = False


class LeaseLostError(TemplateManagerError):
    """The host no longer has the right to work on this build."""

    retryable = True  # the workflow may be about to renew it, or to go to another host
    users_fault = False


class HostRestartingError(TemplateManagerError):
    """The host's worker is being restarted; its lease can be taken up again by it."""

    users_fault = False


class HostDrainingError(TemplateManagerError):
    """A build came to a host that had just begun to drain, or was full; another host takes it."""

    users_fault = False


class TemporalUnavailableError(HostFaultError):
    """Temporal cannot be reached, or does not answer."""

    hint = "Check that Temporal runs and TEMPORAL_ADDRESS leads to it."


class AddressTakenError(HostFaultError):
    """The process cannot listen where its settings say."""

    retryable = False
    hint = (
        "Correct TEMPLATE_MANAGER_METRICS_ADDRESS or TEMPLATE_MANAGER_HEALTH_ADDRESS, or stop what "
        "listens there."
    )


class HostAwayError(HostFaultError):
    """A host does not answer."""

    hint = "Check its name (template-manager hosts) and that template-manager host runs there."


class NoHostError(TemplateManagerError):
    """No host took the build, or too many of them were lost with it."""

    users_fault = False
    hint = "Check that KVM hosts run (template-manager host) and have free slots, then retry."


class NoTurnError(TemplateManagerError):
    """Other builds of the same tenant, which may run only so many at once, left it no turn."""

    hint = (
        "Retry it when fewer of your builds wait (template-manager list --state building); an "
        "operator sets the limit in the tenants' file."
    )


class BuildTooLongError(TemplateManagerError):
    """The build took longer than its tenant's builds may."""

    hint = "Let it do less, or ask an operator for a longer build_seconds in the tenants' file."


class TemplateTooLargeError(TemplateManagerError):
    """The template's disk and memory are larger than its tenant's may be."""

    hint = (
        "Use a smaller image, less memory or less free disk, or ask an operator for a larger "
        "template_mb in the tenants' file."
    )


class TenantRemovalError(HostFaultError):
    """A build of a tenant that is being removed could not be deleted."""

    hint = "Read why in its delete's workflow; then run template-manager tenants delete again."


class SealedSecretError(TemplateManagerError):
    """A sealed secret cannot be opened here."""

    users_fault = False
    hint = "Give API and hosts the same TEMPLATE_MANAGER_SECRET_KEYS."


class StepTimeoutError(HostFaultError):
    """A time limit has passed: the step took too long, or its host or worker was not there."""

    hint = (
        "Check the host's load (template-manager hosts) and retry the build; an operator raises "
        "limits with TEMPLATE_MANAGER_BUILD."
    )


class InternalFaultError(HostFaultError):
    """Something failed that nobody has foreseen: a fault of this program."""

    hint = (
        "Tell the operators: the failed activity in the Temporal Web UI says where it happened. "
        "The build can be retried."
    )


class BuildCancelledError(TemplateManagerError):
    """The user cancelled the build."""

    hint = "Create the build again when you want it."


def failure_of(error: BaseException, step: Step | None = None) -> BuildFailure:
    """Tell what users should know of `error`, as a workflow or a client sees it.

    Finds our own error inside Temporal's wrappers; for a timeout it says which limit passed.
    """
    cause: BaseException = error
    while not isinstance(cause, ApplicationError) and cause.__cause__ is not None:
        if isinstance(cause, ActivityError) and isinstance(cause.cause, TemporalTimeoutError):
            return _timeout_failure(cause, step)
        cause = cause.__cause__
    if isinstance(cause, ApplicationError) and cause.details:
        known = BuildFailure.model_validate(cause.details[0])
        return known.model_copy(update={"step": known.step or step})
    if isinstance(cause, TemplateManagerError):
        failure = cause.failure()
        return failure.model_copy(update={"step": failure.step or step})
    kind = cause.type if isinstance(cause, ApplicationError) else None
    fault = fault_of(cause).failure()
    return fault.model_copy(update={"error_type": kind or type(cause).__name__, "step": step})


def fault_of(error: BaseException) -> InternalFaultError:
    """Return the error that says honestly that `error` is none of the typed ones."""
    kind, told = type(error).__name__, str(error)
    if told and not isinstance(error, ApplicationError):  # which tells its type itself
        told = f"{kind}: {told}"
    return InternalFaultError(f"a fault of ours: {(told or kind)[:LOG_TAIL_LINE_CHARS]}")


def error_type_of(error: BaseException) -> str:
    """Return the type string of the error that an activity failed with, or ''."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ApplicationError):
            return cause.type or ""
        cause = cause.__cause__
    return ""


_WORKERS_HINT = (
    "Check that template-manager host and worker run and reach Temporal (template-manager hosts), "
    "then retry the build."
)
# What passed which of Temporal's limits, and another hint than that of the type.
_TIMEOUTS: dict[str, tuple[str, str | None]] = {
    "START_TO_CLOSE": ("did not end within its limit", None),
    "SCHEDULE_TO_CLOSE": ("did not come through within the limit for all its tries", None),
    "SCHEDULE_TO_START": ("was taken by no worker", _WORKERS_HINT),
    "HEARTBEAT": ("fell silent, and with it the process that ran it", _WORKERS_HINT),
}


def _timeout_failure(error: ActivityError, step: Step | None) -> BuildFailure:
    kind = getattr(getattr(error.cause, "type", None), "name", "START_TO_CLOSE")
    what, hint = _TIMEOUTS.get(kind, ("did not finish in time", None))
    message = f"{error.activity_type} {what} ({kind.lower()})"
    return StepTimeoutError(message, step=step, hint=hint).failure()
