"""What of the command line says which Dockerfile is built, with what around it."""

from __future__ import annotations

from pathlib import Path

import pytest

from api.cli.build_request import OptionError
from api.cli.dockerfile import DockerfileOptions, DockerfileRecipe
from api.cli.image_builders import BuilderName, ImageBuild


@pytest.fixture
def context(tmp_path: Path) -> Path:
    directory = tmp_path / "My App_2"
    directory.mkdir()
    (directory / "Dockerfile").write_text("FROM scratch\n")
    return directory


def recipe_of(options: DockerfileOptions) -> DockerfileRecipe:
    recipe = options.recipe()
    assert recipe is not None
    return recipe


def refused(options: DockerfileOptions) -> str:
    with pytest.raises(OptionError) as caught:
        options.recipe()
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            DockerfileOptions(dockerfile=Path("https://git.test/a")),
            "--dockerfile: a URL is not",
        ),
        (
            DockerfileOptions(file=Path("Dockerfile"), directory=Path("git@git.test:a")),
            "DIR: a URL",
        ),
        (DockerfileOptions(file=Path("-"), directory=Path()), "--file -: standard input is not"),
        (
            DockerfileOptions(dockerfile=Path(), passed_on=("--iidfile=/x",)),
            "-- --iidfile: is ours",
        ),
        (DockerfileOptions(dockerfile=Path(), passed_on=("-o", "x")), "-- -o: the image is pushed"),
        (DockerfileOptions(dockerfile=Path(), passed_on=("--help",)), "-- --help: ask the builder"),
        (
            DockerfileOptions(dockerfile=Path(), registry="http://r:1"),
            "--registry http://r:1: write",
        ),
        (DockerfileOptions(dockerfile=Path(), registry="r:1/x/"), "--registry r:1/x/: write"),
        (DockerfileOptions(file=Path("/dev/null"), directory=Path()), "/dev/null is no plain file"),
    ],
)
def test_what_a_builder_takes_and_we_do_not_is_refused_by_name(
    options: DockerfileOptions, told: str
) -> None:
    assert told in refused(options)


def test_a_directory_has_its_dockerfile_and_is_its_context(context: Path) -> None:
    recipe = recipe_of(DockerfileOptions(dockerfile=context))
    assert (recipe.context, recipe.path) == (context, context / "Dockerfile")
    assert recipe.template_id == "my-app-2"


def test_a_file_is_a_dockerfile_whose_directory_is_the_context(context: Path) -> None:
    (context / "small.Dockerfile").touch()
    recipe = recipe_of(DockerfileOptions(dockerfile=context / "small.Dockerfile"))
    assert (recipe.context, recipe.path) == (context, context / "small.Dockerfile")


def test_a_file_may_lie_elsewhere(context: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.touch()
    for options in (
        DockerfileOptions(file=other, directory=context),
        DockerfileOptions(file=other, dockerfile=context),
    ):
        recipe = recipe_of(options)
        assert (recipe.context, recipe.path) == (context, other)


def test_podman_s_name_of_a_dockerfile_is_known(tmp_path: Path) -> None:
    (tmp_path / "Containerfile").touch()
    assert recipe_of(DockerfileOptions(dockerfile=tmp_path)).path.name == "Containerfile"


def test_a_context_without_a_name_gives_a_template_id(tmp_path: Path) -> None:
    assert DockerfileRecipe(Path("/"), tmp_path, DockerfileOptions()).template_id == "template"
    accents = DockerfileRecipe(Path("/Ünï códe"), tmp_path, DockerfileOptions())
    assert accents.template_id == "uni-code"
    long = DockerfileRecipe(Path("/", "a" * 100), tmp_path, DockerfileOptions())
    assert long.template_id == "a" * 63


def test_what_is_not_there_is_named(context: Path, tmp_path: Path) -> None:
    assert f"cannot read {tmp_path}/Dockerfile" in refused(DockerfileOptions(dockerfile=tmp_path))
    nowhere = DockerfileOptions(file=tmp_path / "nowhere", directory=context)
    assert f"cannot read {tmp_path}/nowhere" in refused(nowhere)
    no_context = DockerfileOptions(file=context / "Dockerfile", directory=tmp_path / "nowhere")
    assert f"{tmp_path}/nowhere is not a directory" in refused(no_context)


def test_a_context_is_said_once_and_not_left_out(context: Path) -> None:
    assert "-f FILE" in refused(DockerfileOptions(dockerfile=context, directory=context))
    assert "-f FILE DIR" in refused(DockerfileOptions(file=context / "Dockerfile"))
    assert "--dockerfile" in refused(DockerfileOptions(directory=context))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (DockerfileOptions(builder=BuilderName.PODMAN), "--builder"),
        (DockerfileOptions(build_args=("A=1",)), "--build-arg"),
        (DockerfileOptions(registry="127.0.0.1:5000"), "--registry"),
        (DockerfileOptions(passed_on=("--secret", "id=x")), "-- --secret id=x"),
    ],
)
def test_what_is_for_a_builder_needs_a_dockerfile(options: DockerfileOptions, named: str) -> None:
    assert named in refused(options)
    assert DockerfileOptions().recipe() is None


@pytest.mark.parametrize(
    ("registry", "is_local"),
    [
        ("127.0.0.1:5000", True),
        ("127.9.9.9:1", True),
        ("localhost:5000", True),
        ("registry.test", False),
        ("10.0.0.1:5000", False),
        ("127.0.0.1.evil.test", False),
    ],
)
def test_only_a_registry_of_this_machine_may_do_without_tls(registry: str, is_local: bool) -> None:
    image = f"{registry}/web:1"
    assert ImageBuild(Path(), Path("Dockerfile"), image).is_local is is_local


def test_the_user_s_options_come_after_ours() -> None:
    build = ImageBuild(Path("here"), Path("f"), "r.test/web:1", ("A=1", "B"), ("--tag", "mine"))
    assert build.arguments() == [
        "--tag=r.test/web:1",
        "--file=f",
        "--build-arg=A=1",
        "--build-arg=B",
        "--tag",
        "mine",
        "here",
    ]


def test_a_context_is_never_an_option_of_the_builder() -> None:
    build = ImageBuild(Path("--network=host"), Path("Dockerfile"), "r:1/web:x")
    assert build.arguments()[-1] == "./--network=host"


@pytest.mark.parametrize("registry", ["r.test", "127.0.0.1:5000", "r.test/team/x", "[::1]:5000"])
def test_a_registry_may_have_a_port_and_a_path(context: Path, registry: str) -> None:
    assert recipe_of(DockerfileOptions(dockerfile=context, registry=registry))
