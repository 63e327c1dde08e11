from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import pytest

from api.cli.build_request import OptionError
from api.cli.dockerfile import Translated, translate


class Context:
    """A directory with a Dockerfile, and the tars that were kept of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tars: dict[str, list[str]] = {}

    def write(self, name: str, content: str = "x") -> None:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    def translate(self, text: str, **arguments: str) -> Translated:
        self.write("Dockerfile", text)
        tars = self.directory.parent / "tars"
        tars.mkdir(exist_ok=True)
        done = translate(self.directory, arguments, tars)
        for sha256, tar in done.files.items():
            assert hashlib.sha256(tar.read_bytes()).hexdigest() == sha256
            with tarfile.open(tar) as opened:
                self.tars[sha256] = opened.getnames()
        return done

    def steps(self, text: str, **arguments: str) -> list[tuple[str, ...]]:
        done = self.translate(f"FROM base\n{text}\n", **arguments)
        return [(step.type, *step.args) for step in done.steps]


@pytest.fixture
def context(tmp_path: Path) -> Context:
    directory = tmp_path / "context"
    directory.mkdir()
    return Context(directory)


def test_the_base_with_an_argument(context: Context) -> None:
    text = "ARG TAG=12\nFROM registry/debian:$TAG\nRUN true\n"
    assert context.translate(text).image == "registry/debian:12"
    assert context.translate(text, TAG="13").image == "registry/debian:13"


def test_runs(context: Context) -> None:
    text = 'RUN apt-get update && \\\n  apt-get install -y curl\nRUN ["/bin/x", "a b", "$HOME"]'
    assert context.steps(text) == [
        ("RUN", "apt-get update &&   apt-get install -y curl"),
        ("RUN", "exec /bin/x 'a b' '$HOME'"),
    ]


def test_environment_and_arguments(context: Context) -> None:
    text = "ARG V=1\nENV A=$V B=\"two words\" C='$V'\nENV OLD style value\nWORKDIR /srv/$A"
    assert context.steps(text, V="7") == [
        ("ARG", "V", "7"),
        ("ENV", "A", "7", "B", "two words", "C", "$V"),
        ("ENV", "OLD", "style value"),
        ("WORKDIR", "/srv/7"),
    ]


def test_copies(context: Context) -> None:
    context.write("src/main.py")
    context.write("src/sub/more.py")
    context.write("requirements.txt")
    context.write("secret.env")
    context.write(".dockerignore", "# comment\n*.env\n.dockerignore\n")
    done = context.steps("COPY --chown=web:web --chmod=0644 src requirements.txt /app/\nCOPY . .")
    assert done == [
        ("COPY", "src", "/app/", "web:web", "0644"),
        ("COPY", "requirements.txt", "/app/", "web:web", "0644"),
        ("COPY", ".", ".", "", ""),
    ]
    source, requirements, everything = context.tars.values()
    assert source == ["src", "src/main.py", "src/sub", "src/sub/more.py"]
    assert requirements == ["requirements.txt"]
    assert "secret.env" not in everything
    assert {"src/main.py", "requirements.txt", "Dockerfile"} <= set(everything)


def test_the_same_files_have_the_same_name(context: Context, tmp_path: Path) -> None:
    context.write("a", "1")
    context.steps("COPY a /a")
    [first] = context.tars
    context.steps("COPY a /b")
    assert list(context.tars) == [first]
    context.write("a", "2")
    context.steps("COPY a /a")
    assert len(context.tars) == 2


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ('CMD ["/bin/serve", "--port", "80"]', "exec /bin/serve --port 80"),
        ("CMD serve --port $PORT", "serve --port $PORT"),
        ('ENTRYPOINT ["/bin/tini", "--"]\nCMD ["a b"]', "exec /bin/tini -- 'a b'"),
        ("ENTRYPOINT serve", "serve"),
        ('CMD ["x"]\nENTRYPOINT ["y"]', "exec y"),
        ("RUN true", ""),
    ],
)
def test_the_start_command(context: Context, text: str, command: str) -> None:
    assert context.translate(f"FROM base\n{text}\n").start_command == command


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("FROM base\nADD a b", "line 2: ADD is not supported"),
        ("FROM base\n\n# x\nHEALTHCHECK CMD true", "line 4: HEALTHCHECK"),
        ("FROM base\nVOLUME /data", "line 2: VOLUME"),
        ("FROM a AS x\nFROM b", "line 2: FROM is there twice"),
        ("FROM --platform=linux/arm64 a", "line 1: FROM --platform"),
        ("FROM scratch\nCOPY a /a", "line 1: FROM must name an image"),
        ("RUN true", "line 1: RUN must come after FROM"),
        ("FROM a\nCOPY --from=x a b", "line 2: COPY --from"),
        ("FROM a\nRUN --mount=type=cache,target=/x true", "line 2: RUN --mount"),
        ("FROM a\nCOPY nothing /x", "line 2: COPY nothing: there is no such file"),
        ("FROM a\nCOPY ../x /x", "outside of the context"),
        ("FROM a\nCOPY one", "line 2: COPY needs a source and a destination"),
        ("# nothing", "has no FROM"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name_and_line(
    context: Context, text: str, told: str
) -> None:
    with pytest.raises(OptionError) as error:
        context.translate(text)
    assert told in str(error.value)


def test_a_missing_dockerfile_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"cannot read .*Dockerfile"):
        translate(tmp_path, {}, tmp_path)
