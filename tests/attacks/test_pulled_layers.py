"""Images whose layers are to fill the host, to hold it, or to be another tenant's: real dockerd."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from devstack.registry import Layer
from devstack.workbench import Workbench, workbench

from activities.contract.errors import (
    HostDiskFullError,
    ImageBeyondLimitError,
    ImageUnusableError,
    RegistryRefusedError,
    RegistryUnavailableError,
)
from activities.disk.room import Room
from activities.image.checked_http import USER_AGENT
from activities.image.layer_check import unpacked_layer
from activities.image.unpacking import DECODERS
from tests.support import hostile_layers as layers
from tests.support.host_resources import all_resources, assert_nothing_left
from tests.support.hostile_layers import MIB, PIB, TIB
from tests.support.served_images import ServedImages, digest_of, packed, serving_images

pytestmark = [pytest.mark.counts_host, pytest.mark.usefixtures("undisturbed")]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Workbench]:
    before = all_resources()
    limits = {"max_unpacked_image_mb": 32, "max_image_entries": 2000, "max_image_mb": 16}
    made = workbench(tmp_path / "data", **limits)
    known = {image["Id"] for image in made.client.images()}
    yield made
    made.remove_images()
    # Others make images beside this test: those of the served registry count, and nameless ones.
    left = [image for image in made.client.images() if image["Id"] not in known]
    assert not [i for i in left if not i["RepoTags"] or "/odd:" in i["RepoTags"][0]]
    assert_nothing_left(before)


@pytest.fixture
def images() -> Iterator[ServedImages]:
    with serving_images() as serving:
        yield serving


def greeting(text: bytes = b"hello\n") -> bytes:
    return Layer().directory("etc").add("etc/greeting", text).tar()


# ---- Bombs


@pytest.mark.parametrize(
    ("tar", "told"),
    [
        (layers.zeros(512, bytes), f"the limit is {32 * MIB}"),
        (layers.sparse(15 * TIB), f"{15 * TIB} bytes unpacked; the limit is {32 * MIB}"),
        (layers.old_sparse(15 * TIB), f"{15 * TIB} bytes unpacked; the limit is {32 * MIB}"),
        (layers.claim(PIB), f"{PIB} bytes unpacked; the limit is {32 * MIB}"),
        (layers.empty_files(5000), "2001 files and directories; the limit is 2000"),
    ],
    ids=["zeros", "sparse", "old sparse", "claim", "empty files"],
)
async def test_a_bomb_is_refused_with_both_numbers(
    host: Workbench, images: ServedImages, tar: bytes, told: str
) -> None:
    images.image("bomb", [tar])
    began = time.monotonic()
    with pytest.raises(ImageBeyondLimitError, match=told) as error:
        await host.pull(images.reference("bomb"))
    assert not error.value.retryable
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("way", layers.hidden_ways(b""))
async def test_a_bomb_in_what_looks_like_a_file_is_refused(
    host: Workbench, images: ServedImages, way: str
) -> None:
    """dockerd would write 4 GiB of zeros."""
    images.image("bomb", [layers.hidden_ways(layers.sparse(4096 * MIB))[way]])
    with pytest.raises((ImageBeyondLimitError, ImageUnusableError), match="unpacked"):
        await host.pull(images.reference("bomb"))


async def test_a_bomb_that_is_packed_twice_is_refused(
    host: Workbench, images: ServedImages
) -> None:
    """dockerd would unpack the second time, however much that is."""
    images.image("bomb", [layers.twice_packed(layers.zeros(64, bytes))])
    with pytest.raises(ImageUnusableError, match="packed twice"):
        await host.pull(images.reference("bomb"))


@pytest.mark.parametrize("way", layers.PACKERS)
async def test_a_bomb_is_told_however_it_is_packed(
    host: Workbench, images: ServedImages, way: str
) -> None:
    images.image("bomb", [layers.zeros(512, bytes)], pack=layers.PACKERS[way])
    with pytest.raises(ImageBeyondLimitError, match=f"unpacked; the limit is {32 * MIB}"):
        await host.pull(images.reference("bomb"))


async def test_dockerd_is_given_nothing_to_unpack(
    host: Workbench, images: ServedImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would start xz and pigz as root."""
    heads: list[bytes] = []

    def watched(*arguments: Any) -> Iterator[bytes]:
        pieces = unpacked_layer(*arguments)
        heads.append(next(pieces))
        yield heads[-1]
        yield from pieces

    monkeypatch.setattr("activities.image.layer_check.unpacked_layer", watched)
    for number, pack in enumerate(layers.PACKERS.values()):
        images.image("it", [greeting(b"%d" % number)], pack=pack)
        pulled = await host.pull(images.reference("it"))
        assert pulled.image_id == images.image_id("it")
    assert len(heads) == len(layers.PACKERS)
    assert not [head for head in heads if head.startswith(tuple(DECODERS))]


async def test_a_config_that_lies_about_its_layers_is_the_images_fault(
    host: Workbench, images: ServedImages
) -> None:
    rootfs = {"type": "layers", "diff_ids": [digest_of(b"nothing that is there")]}
    images.image("lie", [greeting(b"another")], rootfs=rootfs)
    with pytest.raises(ImageUnusableError, match="is not the one that its config names"):
        await host.pull(images.reference("lie"))


async def test_dockerd_is_shown_one_spelling_of_linux(
    host: Workbench, images: ServedImages
) -> None:
    """20.10 panics at another, and once it has kept that does not start again."""
    odd: tuple[dict[str, Any], ...] = ({"OS": "Linux"}, {"o\N{LATIN SMALL LETTER LONG S}": "Linux"})
    for said in odd:
        images.image("caps", **said)
        with pytest.raises(ImageUnusableError, match="twice, or in capitals"):
            await host.pull(images.reference("caps"))


async def test_an_image_that_docker_s_disk_has_no_room_for_is_not_fetched(
    host: Workbench, images: ServedImages
) -> None:
    small = workbench(host.settings.data_dir, min_free_disk_mb=1 << 40)
    images.image("it", [greeting(b"no room")])
    with pytest.raises(HostDiskFullError, match="MiB free") as error:
        await small.pull(images.reference("it"))
    assert "TEMPLATE_MANAGER_MIN_FREE_DISK_MB" in error.value.hint
    assert not any(images.times_fetched(digest) for digest in images.layers("it"))


async def test_a_pull_that_fills_docker_s_disk_is_given_up(
    host: Workbench, images: ServedImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills while the layer comes: others write to it as well."""
    told = iter(["", ""])
    monkeypatch.setattr(Room, "lacking", lambda *_: next(told, "the disk has 1 of 2 MiB free"))
    images.image("it", [layers.zeros(512, bytes)])
    wide = workbench(host.settings.data_dir)
    with pytest.raises(HostDiskFullError, match=r"no room to pull .*: the disk has 1 of 2"):
        await wide.pull(images.reference("it"))


async def test_too_many_bytes_are_refused_before_any_is_fetched(
    host: Workbench, images: ServedImages
) -> None:
    images.image("large", [Layer().add("noise", os.urandom(17 * MIB)).tar()])
    with pytest.raises(ImageBeyondLimitError, match=f"the limit is {16 * MIB}"):
        await host.pull(images.reference("large"))
    assert not any(images.times_fetched(digest) for digest in images.layers("large"))


async def test_a_size_that_nobody_can_read_is_the_images_fault(
    host: Workbench, images: ServedImages
) -> None:
    images.image("back", [layers.negative_size()])
    with pytest.raises(ImageUnusableError, match="cannot be unpacked"):
        await host.pull(images.reference("back"))


# ---- Who calls whom


async def test_the_registry_is_called_by_us_alone(host: Workbench, images: ServedImages) -> None:
    images.image("it", [greeting(b"1"), greeting(b"2")])
    pulled = await host.pull(images.reference("it"))
    assert {agent for _, _, agent in images.asked} == {USER_AGENT}
    assert pulled.image_id == images.image_id("it")
    [found] = host.client.images(name=f"{images.address}/odd")
    assert found["RepoTags"] == [f"{images.address}/odd:{pulled.digest.replace(':', '-')}"]
    assert not found["RepoDigests"]


async def test_dockerd_need_not_know_the_registry(
    host: Workbench, images: ServedImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that only this process can resolve."""
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda name, *rest, **more: real(
            "127.0.0.1" if name == "only-ours.example.com" else name, *rest, **more
        ),
    )
    port = images.address.rpartition(":")[2]
    registry = f"only-ours.example.com:{port}"
    ours = workbench(host.settings.data_dir, insecure_registries=(registry,))
    images.image("it", [greeting(b"ours")])
    host.pulled.append(await ours.pull(f"{registry}/odd:it"))


async def test_a_layer_that_is_elsewhere_is_not_fetched(
    host: Workbench, images: ServedImages
) -> None:
    images.image("it", [greeting(b"elsewhere")])
    [digest] = images.layers("it")
    kind, content = images.contents.pop(digest)

    with serving_images() as inner:
        inner.contents[digest] = (kind, content)
        redirecting = {digest: f"http://169.254.169.254/{digest}"}
        images.redirects.update(redirecting)
        with pytest.raises(RegistryRefusedError):
            await host.pull(images.reference("it"))
        assert not inner.asked


# ---- Layers of others


async def test_who_knows_a_digest_does_not_get_the_layer(
    host: Workbench, images: ServedImages
) -> None:
    """dockerd has a private layer; another registry names its digest, and does not have it."""
    secret = greeting(b"a secret of another tenant\n")
    images.image("private", [secret])
    await host.pull(images.reference("private"))
    with serving_images() as evil:
        evil.image("mine", [secret], config={"Env": ["MINE=1"]})
        for digest in evil.layers("mine"):
            del evil.contents[digest]
        with pytest.raises(ImageUnusableError, match="lacks a layer"):
            await host.pull(evil.reference("mine"))
        assert not host.client.images(name=f"{evil.address}/odd")


@pytest.mark.parametrize("way", ["at once", "after a true one", "beside the true one"])
async def test_who_knows_what_a_layer_unpacks_to_does_not_get_it(
    host: Workbench, images: ServedImages, way: str
) -> None:
    """dockerd knows layers by that: another registry's config says it of a layer of its own."""
    secret = greeting(b"a secret of another tenant\n")
    images.image("private", [secret])
    await host.pull(images.reference("private"))
    with serving_images() as evil:
        own = greeting(b"mine")
        if way == "after a true one":  # the registry has shown that layer already
            evil.image("true", [own])
            await host.pull(evil.reference("true"))
        beside = [digest_of(own)] if way == "beside the true one" else []
        rootfs = {"type": "layers", "diff_ids": [digest_of(secret), *beside]}
        evil.image("mine", [own] * (len(beside) + 1), rootfs=rootfs)
        with pytest.raises(ImageUnusableError, match="is not the one that its config names"):
            await host.pull(evil.reference("mine"))
        host.remove_images()
        assert not host.client.images(name=f"{evil.address}/odd")


async def test_a_shared_layer_is_fetched_once_from_each_registry(
    host: Workbench, images: ServedImages
) -> None:
    base = greeting(b"base")
    images.image("one", [base, greeting(b"one")])
    images.image("two", [base, greeting(b"two")])
    [shared, _] = images.layers("one")
    await host.pull(images.reference("one"))
    await host.pull(images.reference("two"))
    assert images.times_fetched(shared) == 1
    assert ("HEAD", shared, USER_AGENT) in images.asked
    with serving_images() as other:
        other.image("three", [base, greeting(b"three")])
        await host.pull(other.reference("three"))
        assert other.times_fetched(shared) == 1
        host.remove_images()


async def test_a_layer_that_another_s_registry_spoils_is_pulled_again(
    host: Workbench, images: ServedImages
) -> None:
    """Whoever wants a layer while dockerd has it from another's registry gets what that sends."""
    base = greeting(b"everybody's base")
    images.image("it", [base])
    with serving_images() as evil:
        rootfs = {"type": "layers", "diff_ids": [digest_of(base)]}
        evil.image("lie", [greeting(b"something else")], rootfs=rootfs)
        [lie] = evil.layers("lie")
        evil.held[lie] = threading.Event()
        first = asyncio.create_task(host.pull(evil.reference("lie")))
        await until(lambda: evil.times_fetched(lie) > 0)
        second = asyncio.create_task(host.pull(images.reference("it")))
        await asyncio.sleep(3)  # it is dockerd that makes it wait
        evil.held[lie].set()
        with pytest.raises(ImageUnusableError, match="is not the one that its config names"):
            await first
        [spoilt] = await asyncio.gather(second, return_exceptions=True)
        assert isinstance(spoilt, RegistryUnavailableError)
        assert spoilt.retryable
        assert not images.times_fetched(images.layers("it")[0])  # it was that way, indeed
    assert (await host.pull(images.reference("it"))).image_id == images.image_id("it")


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not is_so():
            await asyncio.sleep(0.05)


# ---- No end, and broken ends


async def test_a_layer_that_drips_is_given_up_at_the_limit(
    host: Workbench, images: ServedImages
) -> None:
    images.image("slow", [greeting(b"slow")])
    images.dripping.update(images.layers("slow"))
    began = time.monotonic()
    with pytest.raises(RegistryUnavailableError):
        await host.pull(images.reference("slow"), timeout_seconds=4)
    assert time.monotonic() - began < 20


async def test_a_pull_of_a_layer_that_drips_is_cancelled_at_once(
    host: Workbench, images: ServedImages
) -> None:
    images.image("slow", [greeting(b"slow")])
    images.dripping.update(images.layers("slow"))
    pull = asyncio.ensure_future(host.pull(images.reference("slow")))
    await asyncio.sleep(2)
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(pull, 5)


async def test_a_layer_that_breaks_off_is_taken_up_where_it_broke(
    host: Workbench, images: ServedImages
) -> None:
    images.image("breaks", [Layer().add("noise", os.urandom(3 * MIB)).tar()], pack=packed)
    [digest] = images.layers("breaks")
    images.breaks[digest] = 2
    pulled = await host.pull(images.reference("breaks"))
    assert pulled.layer_count == 1
    assert images.times_fetched(digest) == 3
    assert images.ranges[digest] == ["", f"bytes={MIB}-", f"bytes={2 * MIB}-"]


async def test_a_layer_that_always_breaks_off_is_given_up(
    host: Workbench, images: ServedImages
) -> None:
    images.image("breaks", [Layer().add("noise", os.urandom(9 * MIB)).tar()])
    [digest] = images.layers("breaks")
    images.breaks[digest] = 100
    with pytest.raises(RegistryUnavailableError, match="broke off in layer") as error:
        await host.pull(images.reference("breaks"))
    assert error.value.retryable
