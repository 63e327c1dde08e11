"""Steps on top of a base image, run by this host's dockerd. Each is kept as an image of its own.

What a step leaves is the image `template-manager/step:<key>`; the key is a SHA-256 over the key of
its parent and all that goes into it. So it is a checkpoint: found again by later builds, made again
when it is gone. Environment, user and working directory are ours to keep, not Docker's.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import posixpath
import subprocess
import tarfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import assert_never

import docker
import docker.errors
from docker.types import LogConfig
from temporalio import activity

from activities.contract.errors import (
    LOG_TAIL_LINES,
    CheckpointLostError,
    DockerUnavailableError,
    FilesystemToolError,
    ImageStepError,
    TemplateNotFoundError,
    UnsafeStepsError,
)
from activities.contract.image_steps import (
    Arg,
    ChangesFiles,
    Copy,
    Env,
    ImageStep,
    Run,
    User,
    Workdir,
    added_layers,
)
from activities.contract.inputs import BuildImageInput, ImportTemplateInput
from activities.contract.interface import ImageStepActivities
from activities.contract.names import ArtifactName, Step, tenant_mark
from activities.contract.results import ImageConfig, PulledImage
from activities.contract.scope import BuildScope
from activities.contract.units import MIB
from activities.disk import mounts
from activities.disk.archives import TAR
from activities.disk.data_dir import DataDir
from activities.disk.leftovers import Leftover
from activities.disk.locks import locked
from activities.disk.namespaces import in_mount_namespace
from activities.disk.programs import child_environment
from activities.image.container_files import lines_of_file
from activities.image.containers import DEFAULT_PATH, labels_of, remove_container, wait_for_exit
from activities.image.copy_layout import CopyInstruction, lay_out
from activities.image.docker_daemon import (
    InspectedImage,
    docker_errors,
    find_image,
    require_room_for_layers,
)
from activities.image.output_lines import lines_in
from activities.process.settings import Settings
from activities.step.ledger import LeaseLedger
from activities.step.running_step import RunningStep, running_step
from activities.step.vm_requirements import require_parts
from activities.step.work_directories import working_in
from activities.store.bucket import Bucket
from activities.store.download import pull_rootfs
from activities.store.files import fetch_files
from activities.store.metadata import TemplateMetadata, read_metadata

STEP_REPOSITORY = "template-manager/step"
TEMPLATE_REPOSITORY = "template-manager/template"
STEP_VERSION = 1
MAX_OUTPUT_LINES = 5000
PIDS_LIMIT = 4096
NOT_OF_THE_IMAGE = ("./.template", "./lost+found")


@dataclass(frozen=True)
class ImageState:
    """What the steps so far have made."""

    image_id: str
    key: str
    environment: dict[str, str]
    user: str
    working_dir: str
    arguments: dict[str, str] = field(default_factory=dict)
    forced: bool = False

    def next_key(self, step: ImageStep, scope: BuildScope) -> str:
        """Return the key of what `step` makes of this: its tenant's, or its build's if forced."""
        told = step.persisted()
        parts: list[object] = [STEP_VERSION, self.key, told.kind, told.args, told.files_sha256]
        if mark := tenant_mark(scope.tenant):
            parts.append({"tenant": mark})
        if self.forced or step.force:
            parts.append(scope.build_id)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def variables(self) -> list[str]:
        """Return the environment of a RUN."""
        found = {"PATH": DEFAULT_PATH, **self.arguments, **self.environment}
        return [f"{name}={value}" for name, value in found.items()]


class DockerImageStepActivities(ImageStepActivities):
    """Runs steps with this host's dockerd. See `interface` for the contract."""

    def __init__(
        self,
        settings: Settings,
        ledger: LeaseLedger,
        bucket: Bucket,
        docker_client: docker.APIClient,
    ) -> None:
        self._settings = settings
        self._data_dir = DataDir(settings.data_dir)
        self._ledger = ledger
        self._bucket = bucket
        self._docker = docker_client

    @activity.defn(name="build_image")
    async def build_image(self, build: BuildImageInput, /) -> PulledImage:
        """Run the steps on top of the base; what an earlier build has left is used again."""
        async with self._running(build.scope) as step:
            if added_layers(build.steps):
                self._require_allowed("a container of this host would run the steps of a request")
            return await step.in_thread(self._build, step, build)

    @activity.defn(name="import_template")
    async def import_template(self, take: ImportTemplateInput, /) -> PulledImage:
        """Make an image of a published template's root file system."""
        async with self._running(take.scope) as step:
            self._require_allowed("this host would mount a disk that a guest has written")
            return await step.in_thread(self._import, step, take)

    def _require_allowed(self, what: str) -> None:
        if not self._settings.unsafe_steps_in_containers:
            raise UnsafeStepsError(f"{what}, and that is turned off")

    def _running(self, scope: BuildScope) -> contextlib.AbstractAsyncContextManager[RunningStep]:
        return running_step(self._data_dir, self._ledger, scope, Step.PULL)

    # ---- Steps

    def _build(self, running: RunningStep, build: BuildImageInput) -> PulledImage:
        base = build.base
        require_room_for_layers(base.reference, base.layer_count, added_layers(build.steps))
        state = ImageState(
            image_id=base.image_id,
            key=base.digest,
            environment=dict(v.split("=", 1) for v in base.config.env if "=" in v),
            user=base.config.user,
            working_dir=base.config.working_dir or "/",
            forced=build.force,
        )
        with docker_errors():
            self._require_image(base)
            for number, step in enumerate(build.steps, 1):
                running.check()
                running.progress(f"{number} of {len(build.steps)}: {step}", number, 0)
                state = self._apply(running, build, state, step, number)
            made = _described(self._require(state.image_id), base, state)
            return made.model_copy(update={"tenant": build.scope.tenant})

    def _apply(
        self,
        running: RunningStep,
        build: BuildImageInput,
        state: ImageState,
        step: ImageStep,
        number: int,
    ) -> ImageState:
        key = state.next_key(step, build.scope)
        after = replace(_configured(state, step), key=key, forced=state.forced or step.force)
        if not isinstance(step, ChangesFiles):
            return after
        name = f"{STEP_REPOSITORY}:{key}"
        with locked(self._data_dir.lock(f"image.{key}"), running.check):
            kept = find_image(self._docker, name)
            if kept is not None:
                running.log.info(f"step {number}, {step}: an earlier build's is used again")
                return replace(after, image_id=kept.image_id)
            running.log.info(f"step {number}: {step}")
            image_id = self._make(running, build, state, step, name)
        return replace(after, image_id=image_id)

    def _make(
        self,
        running: RunningStep,
        build: BuildImageInput,
        state: ImageState,
        step: ChangesFiles,
        name: str,
    ) -> str:
        with self._container(build.scope, state, step) as container:
            match step:
                case Run():
                    self._run(running, container, step, build.timeout_seconds)
                case Copy():
                    self._copy(running, build.scope, container, state, step)
                case Workdir():
                    self._make_directory(container, _absolute(state, step.path))
                case _:
                    assert_never(step)
            running.check()
            repository, _, tag = name.partition(":")
            committed = self._docker.commit(container, repository=repository, tag=tag)
            return str(committed["Id"])

    @contextmanager
    def _container(self, scope: BuildScope, state: ImageState, step: ChangesFiles) -> Iterator[str]:
        memory = self._settings.image_step_memory_mb * MIB
        command, user = (step.command, step.user) if isinstance(step, Run) else (":", None)
        created = self._docker.create_container(
            state.image_id,
            entrypoint=["/bin/sh", "-c"],
            command=[command],
            user=user or state.user or "0:0",
            working_dir=state.working_dir,
            environment=state.variables,
            healthcheck={"test": ["NONE"]},
            labels=labels_of(scope, self._data_dir),
            host_config=self._docker.create_host_config(
                mem_limit=memory,
                memswap_limit=memory,
                pids_limit=PIDS_LIMIT,
                network_mode=self._settings.image_step_network,
                log_config=LogConfig(type=LogConfig.types.NONE),
            ),
        )
        try:
            yield str(created["Id"])
        finally:
            remove_container(self._docker, str(created["Id"]))

    def _run(self, running: RunningStep, container: str, step: Run, timeout_seconds: float) -> None:
        output = self._docker.attach(container, stream=True, stdout=True, stderr=True)
        reader = threading.Thread(target=_relay, args=(output, running, step.kind), daemon=True)
        reader.start()
        try:
            self._docker.start(container)
        except docker.errors.APIError as error:
            raise ImageStepError(
                f"{step}: it cannot be started: {error.explanation}",
                hint="A RUN needs /bin/sh in the image.",
            ) from None
        deadline = time.monotonic() + timeout_seconds
        code = wait_for_exit(self._docker, container, reader, running.check, deadline=deadline)
        if code is None:
            raise ImageStepError(
                f"{step}: did not end within {timeout_seconds:g} s", log_tail=running.log.tail()
            )
        if code != 0:
            state = self._docker.inspect_container(container)["State"]
            why = "ran out of memory" if state.get("OOMKilled") else f"ended with exit code {code}"
            raise ImageStepError(f"{step}: {why}", log_tail=running.log.tail())

    # ---- Files

    def _copy(
        self,
        running: RunningStep,
        scope: BuildScope,
        container: str,
        state: ImageState,
        step: Copy,
    ) -> None:
        uid, gid = self._owner(container, step.owner or "")
        destination = _absolute(state, step.destination)
        copy = CopyInstruction(step.source, destination, uid, gid, step.mode or "")
        which = step.files_sha256[:12]
        with working_in(self._data_dir, scope, "files", which) as place:
            tar, most_bytes = place / "files.tar", self._settings.max_files_mb * MIB
            fetch_files(
                self._bucket,
                step.files_sha256,
                tar,
                running.check,
                tenant=scope.tenant,
                most_bytes=most_bytes,
            )
            laid_out = place / "laid-out.tar"
            lay_out(
                place / "files.tar",
                copy,
                laid_out,
                lambda path: self._is_directory(container, path),
                running.check,
            )
            with laid_out.open("rb") as content:
                self._docker.put_archive(container, "/", content)

    def _owner(self, container: str, owner: str) -> tuple[int, int]:
        """Return uid and gid of `user[:group]`, by the image's own accounts."""
        user, _, group = owner.partition(":")
        uid, gid = 0, 0
        if user.isdigit():
            uid = gid = int(user)
        elif user:
            fields = self._account(container, "/etc/passwd", user, owner)
            uid, gid = int(fields[2]), int(fields[3])
        if group.isdigit():
            gid = int(group)
        elif group:
            gid = int(self._account(container, "/etc/group", group, owner)[2])
        return uid, gid

    def _account(self, container: str, file: str, name: str, owner: str) -> list[str]:
        with contextlib.closing(lines_of_file(self._docker, container, file)) as lines:
            for line in lines:
                fields = line.split(":")
                if fields[0] == name and len(fields) > 3 - (file == "/etc/group"):
                    return fields
        raise ImageStepError(f"COPY as {owner}: {file} of the image has no {name}")

    def _is_directory(self, container: str, path: str) -> bool:
        try:
            stream, found = self._docker.get_archive(container, path)
        except docker.errors.NotFound:
            return False
        stream.close()
        return bool(found["mode"] & 1 << 31)  # os.ModeDir of Go

    def _make_directory(self, container: str, path: str) -> None:
        if self._is_directory(container, path):
            return
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            entry = tarfile.TarInfo(path.strip("/"))
            entry.type, entry.mode, entry.mtime = tarfile.DIRTYPE, 0o755, int(time.time())
            archive.addfile(entry)
        self._docker.put_archive(container, "/", buffer.getvalue())

    # ---- Templates as bases

    def _import(self, running: RunningStep, take: ImportTemplateInput) -> PulledImage:
        if take.shape is not None:
            require_parts(self._settings, take.shape, running.log)
        metadata = read_metadata(self._bucket, take.build_id)
        if metadata is None or metadata.config.tenant != take.scope.tenant:
            raise TemplateNotFoundError(f"there is no template {take.build_id} to start from")
        digest = f"sha256:{metadata.artifacts[ArtifactName.ROOTFS].sha256}"
        name = f"{TEMPLATE_REPOSITORY}:{take.build_id}"
        with (
            docker_errors(),
            locked(self._data_dir.lock(f"template.{take.build_id}"), running.check),
        ):
            if find_image(self._docker, name) is None:
                self._import_as(running, take, metadata, name)
            inspected = self._require(name)
        return PulledImage(
            reference=f"{TEMPLATE_REPOSITORY}@{digest}",
            digest=digest,
            image_id=inspected.image_id,
            architecture=metadata.image.architecture,
            size_bytes=inspected.size_bytes,
            layer_count=1,
            config=metadata.image.config,
            tenant=take.scope.tenant,
        )

    def _import_as(
        self,
        running: RunningStep,
        take: ImportTemplateInput,
        metadata: TemplateMetadata,
        name: str,
    ) -> None:
        running.log.info(f"taking the root file system of template {take.build_id}")

        def tell(artifact: str, done: int, total: int) -> None:
            running.check()
            running.progress(f"downloading {artifact}", done, total, "bytes")

        with working_in(self._data_dir, take.scope, "base", "1") as place:
            pull_rootfs(self._bucket, metadata, place / ArtifactName.ROOTFS, tell)
            (place / "root").mkdir(exist_ok=True)
            draft = f"{name}.draft"
            in_mount_namespace(lambda: self._stream_into_docker(running, place, draft))
            # Only now: an archive that ended too early would be an image too.
            repository, _, tag = name.partition(":")
            self._docker.tag(draft, repository, tag)
            self._docker.remove_image(draft)

    def _stream_into_docker(self, running: RunningStep, place: Path, name: str) -> None:
        repository, _, tag = name.partition(":")
        with mounts.mounted_image(place / ArtifactName.ROOTFS, place / "root", "ro"):
            command = [*TAR, "--create", "--format=posix"]
            command += [f"--exclude={path}" for path in NOT_OF_THE_IMAGE]
            archive = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command, "-C", str(place / "root"), "."],
                stdout=subprocess.PIPE,
                env=child_environment(),
            )
            try:
                running.progress("importing the root file system")
                self._docker.import_image_from_stream(
                    archive.stdout, repository=repository, tag=tag
                )
            except BaseException:
                archive.kill()
                raise
            finally:
                code = archive.wait()
            if code != 0:
                raise FilesystemToolError(f"tar failed with exit code {code}")

    # ---- Images

    def _require_image(self, base: PulledImage) -> None:
        if find_image(self._docker, base.image_id) is None:
            raise CheckpointLostError(f"image {base.reference} is no longer here", step=Step.PULL)

    def _require(self, name: str) -> InspectedImage:
        found = find_image(self._docker, name)
        if found is None:
            raise DockerUnavailableError(f"Docker has lost {name}, which was made just now")
        return found


def _configured(state: ImageState, step: ImageStep) -> ImageState:
    match step:
        case Env():
            return replace(state, environment={**state.environment, **dict(step.variables)})
        case Arg():
            return replace(state, arguments={**state.arguments, **dict(step.variables)})
        case User():
            return replace(state, user=step.name)
        case Workdir():
            return replace(state, working_dir=_absolute(state, step.path))
        case Run() | Copy():
            return state
        case _:
            assert_never(step)


def _absolute(state: ImageState, path: str) -> str:
    whole = posixpath.normpath(posixpath.join("/", state.working_dir, path))
    return f"{whole}/" if path.endswith(("/", "/.")) or path == "." else whole


def _described(inspected: InspectedImage, base: PulledImage, state: ImageState) -> PulledImage:
    return PulledImage(
        reference=f"{STEP_REPOSITORY}@sha256:{_hex(state.key)}",
        digest=f"sha256:{_hex(state.key)}",
        image_id=inspected.image_id,
        architecture=base.architecture,
        size_bytes=inspected.size_bytes,
        layer_count=inspected.layer_count,
        config=ImageConfig(
            env=tuple(f"{name}={value}" for name, value in state.environment.items()),
            user=state.user,
            working_dir=state.working_dir,
            entrypoint=base.config.entrypoint,
            cmd=base.config.cmd,
            healthcheck=base.config.healthcheck,
        ),
        base_reference=base.reference_to_pull,
    )


def _hex(key: str) -> str:
    return key.removeprefix("sha256:")


def _relay(output: Iterable[bytes], running: RunningStep, source: str) -> None:
    """Log what a step says: its first lines, and the last, which say why it failed."""
    last: deque[str] = deque(maxlen=LOG_TAIL_LINES)
    number = 0
    for number, line in enumerate(lines_in(output), 1):
        if number <= MAX_OUTPUT_LINES:
            running.log.info(line, source=source)
        else:
            last.append(line)
    left_out = number - MAX_OUTPUT_LINES - len(last)
    if left_out > 0:
        running.log.warn(f"{left_out} more lines of output are left out")
    for line in last:
        running.log.info(line, source=source)


def old_step_images(client: docker.APIClient, made_before: float) -> Iterator[Leftover]:
    """Yield the images of steps and templates from before then: who misses one makes it again.

    Raises DockerUnavailableError.
    """
    with docker_errors():
        repositories = (STEP_REPOSITORY, TEMPLATE_REPOSITORY)
        listed = [image for name in repositories for image in client.images(name=name)]
    for image in listed:
        if image["Created"] < made_before:
            names = image["RepoTags"]
            yield Leftover("image", names[0], partial(_untag, client, names), bytes=image["Size"])


def _untag(client: docker.APIClient, names: list[str]) -> None:
    # A tag alone: Docker keeps what a container or another image needs.
    with docker_errors(), contextlib.suppress(docker.errors.NotFound):
        for name in names:
            client.remove_image(name)
