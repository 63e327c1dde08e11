"""What is to be done to a disk, in order, and the keys by which what each leaves is found again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from activities.contract.checkpoints import DiskKey
from activities.contract.errors import ImageStepError
from activities.contract.image_steps import Add, Copy, ImageStep, Meaning, Run, User, Workdir
from activities.contract.inputs import RunStepsInput
from activities.contract.names import Step, tenant_mark
from activities.contract.requests import IMAGE_COMMAND
from activities.contract.results import MAX_IMAGE_CONFIG_BYTES
from activities.contract.step_context import (
    E2B_USER,
    StepContext,
    TooLongError,
    config_after,
)
from activities.image.containers import DEFAULT_PATH
from activities.process.settings import Settings
from activities.rootfs.guest_files import (
    guest_environment,
    guest_files_sha256,
    image_command,
)
from activities.rootfs.image_look import command_words
from activities.step.checkpoints import fingerprint

# As an image's command these ask for the image's init, not for a program beside it.
INITS = frozenset(
    {"/sbin/init", "/usr/sbin/init", "/lib/systemd/systemd", "/usr/lib/systemd/systemd"}
)
# Raise it when the same step gives another disk than before.
STEPS_VERSION = 2
NOT_OF_A_STEP = {"entrypoint", "cmd", "healthcheck"}


@dataclass(frozen=True)
class MadeUser:
    """A user that is made if the image lacks it."""

    name: str
    is_made: bool
    """Else it must be there."""
    has_sudo: bool
    """Whether `sudo`, where it is, asks it for no password."""


@dataclass(frozen=True)
class MadeDirectory:
    """A directory that is made if it is not there, with those above it."""

    path: str
    owner: str
    """As USER tells one."""


Made = MadeUser | MadeDirectory


@dataclass(frozen=True)
class Work:
    """One piece of work on the disk: a step of the request, or the end of them all."""

    key: str
    """Of the checkpoint that it leaves."""
    name: str
    """As users read it."""
    number: int | None
    """The step's in the request, from 1 on."""
    step: Run | Copy | Add | None
    """With what its variables stand for; None is the end: the template's own files are put on the
    disk."""
    context: StepContext
    """What holds before it."""
    made: tuple[Made, ...] = ()
    """What steps before it, or E2B's defaults, ask for, and is not on the disk yet."""


def plan(settings: Settings, build: RunStepsInput) -> list[Work]:
    """Return what is to be done to the disk, in order.

    Raises ImageStepError when variables become too long, AgentMissingError when the configured
    agent is not on the host, and StartCommandError when the image's own command is asked for and it
    has none.
    """
    context = StepContext.of_image(build.image, build.meaning)
    made = _of_e2b(build, context)
    key, forced, todo = build.disk.fingerprint, build.force, list[Work]()
    for number, step in enumerate(build.steps, 1):
        forced = forced or step.force
        key = _key_after(build, key, step, forced)
        try:
            if isinstance(step, Run | Copy | Add):
                made = (*made, *_users_of(build, step, context))
                done = context.resolved(step)
                todo.append(Work(key, f"step {number}: {step}", number, done, context, made))
                made = ()
            made = (*made, *_made_by(build, step, context))
            context = context.after(step)
        except TooLongError as error:
            raise ImageStepError(f"step {number}: {error}", step_number=number) from None
    values = _template_values(build, context)
    key = fingerprint(
        Step.ROOTFS,
        **_private(build),
        **_meaning(build),
        version=STEPS_VERSION,
        finishes=key,
        values=values,
        disk_size_mb=build.disk_size_mb,
        guest_files=guest_files_sha256(settings),
    )
    if build.meaning is Meaning.E2B and context.user == E2B_USER:
        made = (*made, _e2b_user())  # once more: a step may have brought sudo
    made = (*made, MadeDirectory(context.working_dir, ""))  # root's, as when a container starts
    return [*todo, Work(key, "the template's own files", None, None, context, made)]


def chain_of(build: RunStepsInput, todo: Sequence[Work]) -> tuple[DiskKey, ...]:
    """Return the disks that such work leaves, on top of those that it begins with.

    () when the host that made the first of them has not told which they are.
    """
    own = (disk_key(build, work) for work in todo)
    return (*build.disk.chain, *own) if build.disk.chain else ()


def disk_key(build: RunStepsInput, work: Work) -> DiskKey:
    """Name the disk that work leaves: what a tenant's code has touched is that tenant's alone."""
    return DiskKey(owner=build.vm.scope.tenant, fingerprint=work.key)


def _of_e2b(build: RunStepsInput, context: StepContext) -> tuple[Made, ...]:
    """Return what E2B's steps find in any image."""
    if build.meaning is not Meaning.E2B or build.image.base is not None:
        return ()
    return _e2b_user(), MadeDirectory(context.working_dir, context.user)


def _e2b_user() -> MadeUser:
    return MadeUser(E2B_USER, is_made=True, has_sudo=True)


def _users_of(
    build: RunStepsInput, step: Run | Copy | Add, context: StepContext
) -> Iterator[MadeUser]:
    """Yield E2B's user where a step names it, in a template that may lack it."""
    named = step.user if isinstance(step, Run) else step.owner
    if build.meaning is Meaning.E2B and named == E2B_USER != context.user:
        yield _e2b_user()


def _made_by(build: RunStepsInput, step: ImageStep, context: StepContext) -> Iterator[Made]:
    match step:
        case Workdir():
            yield MadeDirectory(context.path(step.path), context.user)
        case User() if build.meaning is Meaning.E2B or step.sudo == "true":
            name = context.expanded(step.name)
            has_sudo = step.sudo == "true" or name == E2B_USER
            yield MadeUser(name, is_made=build.meaning is Meaning.E2B, has_sudo=has_sudo)


def _key_after(build: RunStepsInput, key: str, step: ImageStep, forced: bool) -> str:
    own = {"forced_by": build.vm.scope.build_id} if forced else {}
    told = step.persisted()
    return fingerprint(
        Step.ROOTFS,
        **own,
        **_private(build),
        **_meaning(build),
        version=STEPS_VERSION,
        after=key,
        kind=told.kind,
        args=told.args,
        files=told.files_sha256,
        # What of the image's config the first steps see is not on the disk.
        config=build.image.config.model_dump(mode="json", exclude=NOT_OF_A_STEP),
        disk_size_mb=build.disk_size_mb,
        kernel=build.shape.kernel_version,
        **_network(build, step),
        # Their names alone: a value that is renewed changes nothing, and must not be guessed.
        **({"secret_env": sorted(build.secret_env)} if build.secret_env else {}),
    )


def _network(build: RunStepsInput, step: ImageStep) -> dict[str, object]:
    """What a command could reach may be in what it has left."""
    network = build.shape.network
    if not isinstance(step, Run) or not network.leads_out:
        return {}
    return {"network": network.model_dump(mode="json")}


def _private(build: RunStepsInput) -> dict[str, str]:
    """What a tenant's code has touched is that tenant's alone."""
    mark = tenant_mark(build.vm.scope.tenant)
    return {"tenant": mark} if mark else {}


def _meaning(build: RunStepsInput) -> dict[str, str]:
    return {} if build.meaning is Meaning.DOCKER else {"meaning": build.meaning}


def values_of(build: RunStepsInput, work: Work) -> dict[str, str]:
    """Return the files that the guest finds in its `/.template` for a piece of work, by name."""
    if work.step:
        values = {"image.user": work.context.user, "workdir": work.context.working_dir}
        if isinstance(work.step, Run):
            values |= _run_values(build, work.step, work.context)
        else:
            values |= _copy_values(build, work.step, work.context.user)
    else:
        values = _template_values(build, work.context)
    for number, made in enumerate(work.made, 1):
        values |= {f"make.{number}.{name}": value for name, value in _values_of_made(made).items()}
    return values


def _values_of_made(made: Made) -> dict[str, str]:
    if isinstance(made, MadeDirectory):
        return {"directory": made.path, "owner": made.owner}
    marks = {"may-be-made": made.is_made, "has-sudo": made.has_sudo}
    return {"user": made.name} | {name: "" for name, is_so in marks.items() if is_so}


def _run_values(build: RunStepsInput, step: Run, context: StepContext) -> dict[str, str]:
    values = {"start.command": step.command, **_shell("start", build.meaning)}
    if step.user:
        values["image.user"] = step.user
    values["env"] = _as_environment({"PATH": DEFAULT_PATH, **context.variables})
    if "HOME" in context.variables:
        values["home-is-given"] = ""
    return values


def _copy_values(build: RunStepsInput, step: Copy | Add, user: str) -> dict[str, str]:
    values = {
        "copy.source": step.source,
        "copy.destination": step.destination,
        "copy.owner": step.owner or "",
        "copy.mode": step.mode or "",
    }
    if build.meaning is Meaning.E2B:
        return {**values, "copy.by-e2b": "", "copy.owner": step.owner or user}
    return {**values, "copy.unpacks": ""} if isinstance(step, Add) else values


def _shell(command: str, meaning: Meaning) -> dict[str, str]:
    return {f"{command}.login-shell": ""} if meaning is Meaning.E2B else {}


def _template_values(build: RunStepsInput, context: StepContext) -> dict[str, str]:
    config = config_after(build.image, build.steps, build.meaning)
    if config.kept_bytes > MAX_IMAGE_CONFIG_BYTES:
        raise ImageStepError(
            f"the steps leave variables of {config.kept_bytes} bytes, as they are kept; the limit "
            f"is {MAX_IMAGE_CONFIG_BYTES}",
            step_number=len(build.steps),
        )
    variables = guest_environment(config, build.env, "")
    values = {"image.user": context.user, "workdir": context.working_dir}
    values |= _shell("start", build.start_meaning or build.meaning)
    values |= _shell("ready", build.ready_meaning or build.meaning)
    values["ready.command"] = build.ready_command
    if variables["HOME"]:
        values["home-is-given"] = ""
    else:
        del variables["HOME"]
    values["env"] = _as_environment(variables)
    if build.start_command != IMAGE_COMMAND:
        return {**values, "start.command": build.start_command}
    words = image_command(config)
    # Whether the image has one at all, its guest finds out.
    inits = [number for number, word in enumerate(command_words(words)) if word in INITS]
    if inits:
        values["start.wraps-init" if inits[0] else "start.is-init"] = ""
    return {**values, "start.argv": "".join(f"{word}\0" for word in words)}


def _as_environment(variables: dict[str, str]) -> str:
    return "".join(f"{name}={value}\0" for name, value in variables.items())
