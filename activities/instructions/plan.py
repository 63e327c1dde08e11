"""What is to be done to a disk, in order, and the keys by which what each leaves is found again."""

from __future__ import annotations

from dataclasses import dataclass

from activities.contract.image_steps import Copy, ImageStep, Run, Workdir
from activities.contract.inputs import RunStepsInput
from activities.contract.names import Step, tenant_mark
from activities.contract.requests import IMAGE_COMMAND
from activities.contract.step_context import StepContext, config_after
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
STEPS_VERSION = 1
NOT_OF_A_STEP = {"entrypoint", "cmd", "healthcheck"}


@dataclass(frozen=True)
class Work:
    """One piece of work on the disk: a step of the request, or the end of them all."""

    key: str
    """Of the checkpoint that it leaves."""
    name: str
    """As users read it."""
    number: int | None
    """The step's in the request, from 1 on."""
    step: Run | Copy | None
    """None is the end: the template's own files are put on the disk."""
    context: StepContext
    """What holds before it."""
    directories: tuple[str, ...] = ()
    """Working directories of steps before it that have not been made yet."""


def plan(settings: Settings, build: RunStepsInput) -> list[Work]:
    """Return what is to be done to the disk, in order.

    Raises AgentMissingError when the configured agent is not on the host, and StartCommandError
    when the image's own command is asked for and it has none.
    """
    context = StepContext.of_image(build.image.config)
    key, forced, todo = build.disk.fingerprint, build.force, list[Work]()
    directories: tuple[str, ...] = ()
    for number, step in enumerate(build.steps, 1):
        forced = forced or step.force
        key = _key_after(build, key, step, forced)
        if isinstance(step, Run | Copy):
            todo.append(Work(key, f"step {number}: {step}", number, step, context, directories))
            directories = ()
        context = context.after(step)
        if isinstance(step, Workdir):
            directories = (*directories, context.working_dir)
    values = _template_values(build, context)
    key = fingerprint(
        Step.ROOTFS,
        **_private(build),
        version=STEPS_VERSION,
        finishes=key,
        values=values,
        disk_size_mb=build.disk_size_mb,
        guest_files=guest_files_sha256(settings),
    )
    directories = (*directories, context.working_dir)
    return [*todo, Work(key, "the template's own files", None, None, context, directories)]


def _key_after(build: RunStepsInput, key: str, step: ImageStep, forced: bool) -> str:
    own = {"forced_by": build.vm.scope.build_id} if forced else {}
    told = step.persisted()
    return fingerprint(
        Step.ROOTFS,
        **own,
        **_private(build),
        version=STEPS_VERSION,
        after=key,
        kind=told.kind,
        args=told.args,
        files=told.files_sha256,
        # What of the image's config the first steps see is not on the disk.
        config=build.image.config.model_dump(mode="json", exclude=NOT_OF_A_STEP),
        disk_size_mb=build.disk_size_mb,
        kernel=build.shape.kernel_version,
        # Their names alone: a value that is renewed changes nothing, and must not be guessed.
        **({"secret_env": sorted(build.secret_env)} if build.secret_env else {}),
    )


def _private(build: RunStepsInput) -> dict[str, str]:
    """What a tenant's code has touched is that tenant's alone."""
    mark = tenant_mark(build.vm.scope.tenant)
    return {"tenant": mark} if mark else {}


def values_of(build: RunStepsInput, work: Work) -> dict[str, str]:
    """Return the files that the guest finds in its `/.template` for a piece of work, by name."""
    if work.step:
        values = _step_values(work.step, work.context)
    else:
        values = _template_values(build, work.context)
    made = {f"workdir.{number}": path for number, path in enumerate(work.directories, 1)}
    return values | made


def _step_values(step: Run | Copy, context: StepContext) -> dict[str, str]:
    values = {"image.user": context.user, "workdir": context.working_dir}
    match step:
        case Run():
            if step.user:
                values["image.user"] = step.user
            values["start.command"] = step.command
            values["env"] = _as_environment({"PATH": DEFAULT_PATH, **context.variables})
            if "HOME" in context.variables:
                values["home-is-given"] = ""
        case Copy():
            values["copy.source"] = step.source
            values["copy.destination"] = context.path(step.destination)
            values["copy.owner"] = step.owner or ""
            values["copy.mode"] = step.mode or ""
    return values


def _template_values(build: RunStepsInput, context: StepContext) -> dict[str, str]:
    config = config_after(build.image.config, build.steps)
    variables = guest_environment(config, build.env, "")
    values = {"image.user": context.user, "workdir": context.working_dir}
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
