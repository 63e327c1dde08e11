"""`build --dockerfile`: from what the command line says to an image in its registry."""

from __future__ import annotations

import re
import tempfile
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from api.cli.build_request import MAX_TEMPLATE_ID, OptionError
from api.cli.image_builders import BuilderName, ImageBuild, ImageBuilder, PushedImage, find_builder
from api.client.client import CallError, TemplateClient
from api.pb import template_manager_pb2 as pb

# In a directory; the builders that know the second one know it as another name of the first.
NAMES = ("Dockerfile", "Containerfile")
_WRITTEN = "is ours to give: the image's id is read from it"
_PUSHED = "the image is pushed to the registry, and nowhere else"
_HELP = "ask the builder itself: docker build --help"
# The builders' options that are refused, and why.
OURS = {
    **dict.fromkeys(("--iidfile", "--metadata-file", "--digestfile"), _WRITTEN),
    **dict.fromkeys(("--output", "-o", "--push", "--load"), _PUSHED),
    **dict.fromkeys(("--help", "-h"), _HELP),
}
_REGISTRY = re.compile(
    r"[A-Za-z0-9.-]+(:[0-9]{1,5})?(/[a-z0-9._-]+)*|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?"
)
# As a path has it, which takes the second slash away.
_URL = re.compile(r"[a-z][a-z0-9+.-]*:/|git@")


@dataclass(frozen=True)
class DockerfileOptions:
    """The options that concern a Dockerfile."""

    dockerfile: Path | None = None
    """A Dockerfile or its directory."""
    file: Path | None = None
    directory: Path | None = None
    builder: BuilderName | None = None
    registry: str = ""
    build_args: tuple[str, ...] = ()
    passed_on: tuple[str, ...] = ()

    def recipe(self) -> DockerfileRecipe | None:
        """Return what is to be built, or None when that is no Dockerfile. Raises OptionError."""
        if self.dockerfile is None and self.file is None and self.directory is None:
            self._require_none()
            return None
        self._require_registry()
        self._require_not_ours()
        self._require_files()
        context, path = self._context_and_path()
        if not context.is_dir():
            raise OptionError(f"{context} is not a directory: it is what COPY takes files from")
        if not path.exists():
            raise OptionError(f"cannot read {path}: there is no such file")
        if not path.is_file():
            raise OptionError(f"{path} is no plain file: save the Dockerfile, and name that")
        return DockerfileRecipe(context, path, self)

    def _require_registry(self) -> None:
        if self.registry and not _REGISTRY.fullmatch(self.registry):
            raise OptionError(
                f"--registry {self.registry}: write HOST:PORT or HOST/PATH, without a scheme"
            )

    def _require_not_ours(self) -> None:
        """Refuse what would keep the image from where it is looked for."""
        for word in self.passed_on:
            option = word.partition("=")[0]
            if option in OURS:
                raise OptionError(f"-- {option}: {OURS[option]}")

    def _require_files(self) -> None:
        """Refuse what `docker build` takes besides files of this machine, by its name."""
        given = {"--dockerfile": self.dockerfile, "--file": self.file, "DIR": self.directory}
        for option, path in given.items():
            if path == Path("-"):
                raise OptionError(f"{option} -: standard input is not taken: save it to a file")
            if path is not None and _URL.match(str(path)):
                raise OptionError(f"{option}: a URL is not taken: clone it, and name its directory")

    def _context_and_path(self) -> tuple[Path, Path]:
        if self.dockerfile is not None and self.directory is not None:
            raise OptionError(f"say --dockerfile {self.dockerfile} or -f FILE {self.directory}")
        context = self.directory or self.dockerfile
        if context is None:
            raise OptionError(f"--file {self.file} needs the directory of its context: -f FILE DIR")
        if self.file is not None:
            return context, self.file
        if self.directory is not None:
            raise OptionError(f"write --dockerfile {context}, or -f FILE {context}")
        if context.is_dir():
            return context, _dockerfile_in(context)
        return context.parent, context

    def _require_none(self) -> None:
        given = {
            "--builder": self.builder,
            "--build-arg": self.build_args,
            "--registry": self.registry,
            f"-- {' '.join(self.passed_on)}": self.passed_on,
        }
        for option, value in given.items():
            if value:
                raise OptionError(f"{option} is for an image builder: give --dockerfile, too")


@dataclass(frozen=True)
class DockerfileRecipe:
    """A Dockerfile, its context, and how it is to be built."""

    context: Path
    path: Path
    options: DockerfileOptions

    @property
    def template_id(self) -> str:
        """A template id made of the context's name."""
        plain = unicodedata.normalize("NFKD", self.context.resolve().name)  # é is e and an accent
        ascii_only = plain.encode("ascii", "ignore").decode().lower()
        name = re.sub(r"[^a-z0-9]+", "-", ascii_only).strip("-")
        return name[:MAX_TEMPLATE_ID] or "template"

    async def build(
        self, api_address: str, template: pb.TemplateConfig, tell: Callable[[str], None]
    ) -> PushedImage:
        """Have the image built and pushed to where the server, or the user, says.

        `tell` hears by which builder. Nothing is built of a request that the server would refuse.
        Raises CallError, BuilderError.
        """
        builder = await find_builder(self.options.builder, tell)
        tell(f"built by {builder.name} ({builder.path})")
        image = await self._image(api_address, template)
        with tempfile.TemporaryDirectory(prefix="template-manager-") as place:
            return await self._built_by(builder, image, Path(place))

    async def _built_by(self, builder: ImageBuilder, image: str, place: Path) -> PushedImage:
        build = ImageBuild(
            self.context, self.path, image, self.options.build_args, self.options.passed_on
        )
        return await builder.build_and_push(build, place)

    async def _image(self, api_address: str, template: pb.TemplateConfig) -> str:
        asked = pb.TemplateConfig()
        asked.CopyFrom(template)
        if self.options.registry:
            asked.from_image = f"{self.options.registry}/{template.template_id}:{template.build_id}"
        try:
            async with TemplateClient(api_address) as client:
                return await client.image_of(asked)
        except CallError as error:
            if error.code is not grpc.StatusCode.UNIMPLEMENTED:
                raise
        if not asked.from_image:  # it is of an earlier version
            raise CallError(
                grpc.StatusCode.UNIMPLEMENTED,
                "this API does not say where the images of its templates belong",
                hint="Say it with --registry.",
            )
        return asked.from_image


def _dockerfile_in(directory: Path) -> Path:
    found = [path for name in NAMES if (path := directory / name).is_file()]
    return found[0] if found else directory / NAMES[0]
