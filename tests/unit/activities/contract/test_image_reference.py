from __future__ import annotations

import pytest

from activities.contract.image_reference import ImageReference, ImageReferenceError

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "reference", "told"),
    [
        (
            "debian",
            ImageReference("docker.io", "library/debian"),
            "docker.io/library/debian:latest",
        ),
        (
            "debian:12",
            ImageReference("docker.io", "library/debian", "12"),
            "docker.io/library/debian:12",
        ),
        ("me/web", ImageReference("docker.io", "me/web"), "docker.io/me/web:latest"),
        (
            "docker.io/debian",
            ImageReference("docker.io", "library/debian"),
            "docker.io/library/debian:latest",
        ),
        (
            "index.docker.io/me/web:1",
            ImageReference("docker.io", "me/web", "1"),
            "docker.io/me/web:1",
        ),
        (
            "registry-1.docker.io/debian",
            ImageReference("docker.io", "library/debian"),
            "docker.io/library/debian:latest",
        ),
        ("localhost/web", ImageReference("localhost", "web"), "localhost/web:latest"),
        (
            "127.0.0.1:5000/demo/web:v1.2_3",
            ImageReference("127.0.0.1:5000", "demo/web", "v1.2_3"),
            "127.0.0.1:5000/demo/web:v1.2_3",
        ),
        (
            f"Registry.Test/a__b/c--d@{DIGEST}",
            ImageReference("Registry.Test", "a__b/c--d", None, DIGEST),
            f"Registry.Test/a__b/c--d@{DIGEST}",
        ),
        (
            f"registry.test/web:1@{DIGEST}",
            ImageReference("registry.test", "web", "1", DIGEST),
            f"registry.test/web@{DIGEST}",
        ),
    ],
)
def test_a_name_is_read_as_docker_reads_it(text: str, reference: ImageReference, told: str) -> None:
    assert ImageReference.parse(text) == reference
    assert str(reference) == told
    assert str(ImageReference.parse(told)) == told


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Debian",
        "debian:",
        "debian:12\n",
        "debian:é",
        "-web",
        "registry.test/-web:1",
        "registry.test/web/",
        "/web",
        "https://registry.test/web",
        "debian@sha256:short",
        f"debian@{DIGEST.upper()}",
        "a b",
    ],
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ImageReferenceError):
        ImageReference.parse(text)


def test_a_digest_wins_over_a_tag() -> None:
    reference = ImageReference.parse(f"registry.test/web:1@{DIGEST}")
    assert reference.version == DIGEST
    assert reference.at("sha256:b") == "registry.test/web@sha256:b"


def test_the_short_name_is_the_last_part() -> None:
    assert ImageReference.parse("registry.test/demo/web:1").short_name == "web"
    assert ImageReference.parse("debian").short_name == "debian"
