from __future__ import annotations

import pytest

from activities.contract.image_reference import ImageReference
from api.server.image_patterns import ImagePattern

ONE, OTHER = (f"sha256:{digit * 64}" for digit in "ab")


@pytest.mark.parametrize(
    ("pattern", "image"),
    [
        ("*", "any.example/thing:1"),
        ("registry.example/ci/*", "registry.example/ci/web:1"),
        ("registry.example/ci/*", "registry.example/ci/deep/web"),
        ("registry.example/ci/*", f"registry.example/ci/web@{ONE}"),
        ("REGISTRY.example/*", "registry.EXAMPLE/web"),
        ("*.example/ci/*", "eu.example/ci/web"),
        ("*/ci/*", "registry.example/ci/web"),
        ("127.0.0.1:5000/*", "127.0.0.1:5000/web:1"),
        ("localhost/*", "localhost/web"),
        ("debian", "docker.io/library/debian:12"),
        ("docker.io/library/debian", "debian:12"),
        ("index.docker.io/debian", "debian"),
        ("library/*", "debian"),
        ("deb*", "debian:12"),
        ("docker.io/*", "me/web"),
        ("debian:12", "docker.io/library/debian:12"),
        ("debian:1*", "debian:12"),
        ("debian:latest", "debian"),
        (f"debian@{ONE}", f"debian:12@{ONE}"),
        (f"debian:11@{ONE}", f"debian:12@{ONE}"),
    ],
)
def test_a_pattern_matches(pattern: str, image: str) -> None:
    assert ImagePattern.parse(pattern).matches(ImageReference.parse(image))


@pytest.mark.parametrize(
    ("pattern", "image"),
    [
        # One of a registry is none of a repository, nor the other way round.
        ("*.example/ci/*", "evil.com/x.example/ci/web"),
        ("*/ci/*", "evil.com/x/ci/web"),
        ("registry.example/*", "evil.com/registry.example/web"),
        ("reg*/web", "registry.example/ci/web"),
        ("library/*", "library.example/web"),
        ("library/*", "registry.example/library/debian"),
        ("deb*", "debian.example/web"),
        ("deb*", "debian/web"),
        ("debian", "registry.example/library/debian"),
        ("registry.example/ci/*", "registry.example:5000/ci/web"),
        ("registry.example/ci/*", "registry.example/ci"),
        ("registry.example/ci/*", "registry.example/cicada/web"),
        ("registry.example/CI/*", "registry.example/ci/web"),
        # Versions.
        ("debian:12", "debian:11"),
        ("debian:12", "debian"),
        ("debian:12", f"debian:12@{ONE}"),
        ("debian:*", f"debian@{ONE}"),
        (f"debian@{ONE}", "debian:12"),
        (f"debian@{ONE}", f"debian@{OTHER}"),
    ],
)
def test_a_pattern_does_not_match(pattern: str, image: str) -> None:
    assert not ImagePattern.parse(pattern).matches(ImageReference.parse(image))


@pytest.mark.parametrize("pattern", ["", "/web", "registry.example/", ":1", "@sha256:x"])
def test_what_names_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="no pattern of images"):
        ImagePattern.parse(pattern)
