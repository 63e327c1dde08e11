"""Layers of disks in a real emulator: who races with whom, and who dies after which write."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest
from devstack.stack import Stack

from activities.contract.errors import TemplateManagerError
from activities.contract.scope import BuildScope
from activities.store.bucket import Bucket
from activities.store.layer_leftovers import leftover_layers, leftover_uses
from activities.store.layers import LayerClaim, LayerObjects, LayerRecord
from activities.store.objects import layer_record_name, reference_name, used_layers_prefix
from tests.support.layered_bucket import (
    InterruptedBucket,
    id_of,
    is_there,
    make_chain,
    make_layer,
    release,
    scope_of,
    write_layer,
)

pytestmark = pytest.mark.counts_nothing

BASE = id_of("base")
MOST_REQUESTS = 60


@pytest.fixture
def layers(empty_bucket: Bucket) -> LayerObjects:
    return LayerObjects(empty_bucket)


def claimed(layers: LayerObjects, scope: BuildScope, layer_id: str = BASE) -> LayerClaim:
    claim = layers.claim(layer_id, scope)
    assert claim is not None
    return claim


def names_of(bucket: Bucket) -> list[str]:
    return [stored.name for stored in bucket.list_objects("")]


# ---- Using and making


def test_a_layer_that_is_made_is_found(layers: LayerObjects, empty_bucket: Bucket) -> None:
    assert layers.refer(BASE, scope_of()) is None
    made = make_layer(empty_bucket, scope_of(), "base")
    found = layers.refer(BASE, scope_of())
    assert found == made
    assert layers.read(BASE) == made
    assert is_there(empty_bucket, made)


def test_a_layer_is_not_found_before_it_is_whole(
    layers: LayerObjects, empty_bucket: Bucket
) -> None:
    claim = claimed(layers, scope_of())
    write_layer(empty_bucket, claim, "base")
    assert layers.refer(BASE, scope_of()) is None


def test_only_one_build_makes_a_layer(layers: LayerObjects, empty_bucket: Bucket) -> None:
    first, second = scope_of(), scope_of()
    claim = claimed(layers, first)
    assert layers.claim(BASE, second) is None
    made = layers.commit(write_layer(empty_bucket, claim, "base"), claim)
    assert layers.claim(BASE, second) is None
    assert layers.refer(BASE, second) == made


def test_another_attempt_of_a_build_begins_anew(layers: LayerObjects, empty_bucket: Bucket) -> None:
    """Also where the first is only slow: what it has written counts for nobody."""
    scope = scope_of()
    slow = claimed(layers, scope)
    outdated = write_layer(empty_bucket, slow, "base", content=b"slow")
    claim = claimed(layers, scope)
    assert layers.commit(outdated, slow) is None
    made = layers.commit(write_layer(empty_bucket, claim, "base"), claim)
    assert made is not None
    assert layers.commit(outdated, slow) is None
    layers.abandon(slow)
    assert layers.read(BASE) == made
    assert is_there(empty_bucket, made)


def test_who_comes_too_late_gets_the_winners(layers: LayerObjects, empty_bucket: Bucket) -> None:
    scope = scope_of()
    slow = claimed(layers, scope)
    claim = claimed(layers, scope)
    record = write_layer(empty_bucket, claim, "base")
    made = layers.commit(record, claim)
    assert layers.commit(record, slow) == made


def test_an_object_that_is_not_what_was_written_makes_no_layer(
    layers: LayerObjects, empty_bucket: Bucket
) -> None:
    claim = claimed(layers, scope_of())
    record = write_layer(empty_bucket, claim, "base")
    empty_bucket.write_object(record.objects["data"].name, b"another's")
    assert layers.commit(record, claim) is None
    assert layers.read(BASE) is None


def test_what_a_template_names_is_compared_with_what_is_there(
    layers: LayerObjects, empty_bucket: Bucket
) -> None:
    chain = make_chain(empty_bucket, scope_of(), "base", "step")
    scope = scope_of()
    references = [record.reference for record in chain]
    assert layers.refer_all(references, scope) == []
    data = chain[1].objects["data"].model_copy(update={"generation": 1})
    another = references[1].model_copy(update={"objects": {**references[1].objects, "data": data}})
    assert layers.refer_all([references[0], another], scope) == [chain[1].layer_id]


@pytest.mark.parametrize(("name", "owner"), [("other", "acme"), ("base", "beta")])
def test_a_record_of_another_disk_is_not_relied_on(
    layers: LayerObjects, empty_bucket: Bucket, name: str, owner: str
) -> None:
    other = make_layer(empty_bucket, scope_of(), name, owner=owner)
    for lies in (other, other.model_copy(update={"layer_id": BASE})):
        empty_bucket.write_object(layer_record_name(BASE), lies.model_dump_json().encode())
        assert layers.refer(BASE, scope_of()) is None
    assert not layers.collect(BASE)
    assert is_whole(empty_bucket, other)


# ---- Removing


def test_a_layer_stays_while_a_build_needs_it(layers: LayerObjects, empty_bucket: Bucket) -> None:
    maker, user = scope_of(), scope_of()
    made = make_layer(empty_bucket, maker, "base")
    assert layers.refer(BASE, user) == made
    assert release(layers, maker.build_id, collect=True) == [BASE]
    assert not layers.collect(BASE)
    assert layers.read(BASE) == made
    release(layers, user.build_id, collect=True)
    assert names_of(empty_bucket) == []


def test_what_a_failed_build_has_made_stays_as_a_cache(
    layers: LayerObjects, empty_bucket: Bucket
) -> None:
    scope = scope_of()
    made = make_layer(empty_bucket, scope, "base")
    claimed(layers, scope, id_of("unfinished"))
    release(layers, scope.build_id)
    assert layers.read(BASE) == made
    assert len(names_of(empty_bucket)) == 3  # data, header, record
    assert layers.collect(BASE)
    assert names_of(empty_bucket) == []


def test_a_chain_goes_from_above(layers: LayerObjects, empty_bucket: Bucket) -> None:
    scope, user = scope_of(), scope_of()
    base, step, last = make_chain(empty_bucket, scope, "base", "step", "last")
    release(layers, scope.build_id)
    assert not layers.collect(base.layer_id)
    assert not layers.collect(step.layer_id)
    layers.refer(base.layer_id, user)
    assert layers.collect(last.layer_id)
    assert layers.read(step.layer_id) is None
    assert layers.read(base.layer_id) == base
    release(layers, user.build_id, collect=True)
    assert names_of(empty_bucket) == []


def test_a_build_lets_go_of_what_it_does_not_need(
    layers: LayerObjects, empty_bucket: Bucket
) -> None:
    scope = scope_of()
    build_id = scope.build_id
    kept, let_go = (make_layer(empty_bucket, scope, name) for name in ("kept", "let go"))
    uses = layers.uses(build_id)
    assert layers.release(build_id, uses, keep=[kept.layer_id]) == [let_go.layer_id]
    assert layers.collect(let_go.layer_id)
    assert not layers.collect(kept.layer_id)


def test_what_has_no_record_is_cleared(layers: LayerObjects, empty_bucket: Bucket) -> None:
    claim = claimed(layers, scope_of())
    record = write_layer(empty_bucket, claim, "base")
    layers.abandon(claim)
    for stored in record.objects.values():  # a frozen host wakes up
        empty_bucket.write_object(stored.name, b"late")
    assert layers.clear(BASE)
    assert {name for name in names_of(empty_bucket) if name.startswith(BASE)} == {
        reference_name(BASE, claim.build_id)
    }
    made = make_layer(empty_bucket, scope_of(), "base")
    assert not layers.clear(BASE)
    assert layers.read(BASE) == made


# ---- Races: each request of the one is held up while the other does all that it does


@pytest.fixture
def stride(pytestconfig: pytest.Config) -> int:
    """How far it is from one moment that is tried to the next; the whole form tries each."""
    return 1 if pytestconfig.getoption("--whole") else 7


def every_moment(
    bucket: Bucket, stride: int, meanwhile: Callable[[], object]
) -> Iterator[LayerObjects]:
    """Yield layers whose first, second, … request waits until something else is done.

    Each time the bucket is empty. It ends when all that is done with them ends before.
    """
    for number in range(0, MOST_REQUESTS, stride):
        bucket.delete_objects(bucket.list_objects(""))
        interrupted = InterruptedBucket(bucket.name, number, meanwhile)
        yield LayerObjects(interrupted)
        if not interrupted.was_interrupted:
            return
    raise AssertionError("it never ends")


def is_whole(bucket: Bucket, record: LayerRecord) -> bool:
    return LayerObjects(bucket).read(record.layer_id) == record and is_there(bucket, record)


@pytest.mark.parametrize("held_up", ["refer", "release"])
def test_a_layer_is_never_taken_from_who_has_found_it(
    layers: LayerObjects, empty_bucket: Bucket, held_up: str, stride: int
) -> None:
    owner, user = scope_of(), scope_of()
    found: list[LayerRecord | None] = []
    outcomes = set()

    def refer(by: LayerObjects) -> None:
        found.append(by.refer(BASE, user))

    def delete(by: LayerObjects) -> None:
        release(by, owner.build_id, collect=True)

    first, second = (refer, delete) if held_up == "refer" else (delete, refer)
    stride = 1 if held_up == "refer" else stride  # it has few requests
    for held in every_moment(empty_bucket, stride, lambda: second(layers)):
        make_layer(empty_bucket, owner, "base")
        first(held)
        last = found.pop() if found else None
        outcomes.add(last is not None)
        assert last is None or is_whole(empty_bucket, last)
        release(layers, owner.build_id, collect=True)
        release(layers, user.build_id, collect=True)
        assert names_of(empty_bucket) == []
    assert outcomes == {True, False}


def test_two_collectors_and_a_build_that_comes_between(
    layers: LayerObjects, empty_bucket: Bucket, stride: int
) -> None:
    """The second collector finds the reference of who came too late for the first."""
    owner, user = scope_of(), scope_of()
    found: list[LayerRecord | None] = []

    def meanwhile() -> None:
        before = layers.refer(BASE, user)
        layers.collect(BASE)
        found.append(before or layers.refer(BASE, user))

    for held in every_moment(empty_bucket, stride, meanwhile):
        make_layer(empty_bucket, owner, "base")
        release(layers, owner.build_id)
        held.collect(BASE)
        last = found.pop() if found else None
        assert last is None or is_whole(empty_bucket, last)
        release(layers, user.build_id, collect=True)
        assert names_of(empty_bucket) == []


def test_of_two_builds_that_make_a_layer_at_once_both_are_right(
    layers: LayerObjects, empty_bucket: Bucket, stride: int
) -> None:
    one, two = scope_of(), scope_of()
    made: list[LayerRecord | None] = []

    def make(by: LayerObjects, scope: BuildScope) -> None:
        claim = by.claim(BASE, scope)
        if claim is None:
            made.append(by.refer(BASE, scope))
        else:
            record = write_layer(empty_bucket, claim, "base", content=scope.build_id.encode())
            made.append(by.commit(record, claim))

    for held in every_moment(empty_bucket, stride, lambda: make(layers, two)):
        make(held, one)
        last = layers.read(BASE)
        assert last is not None
        assert is_there(empty_bucket, last)
        assert all(record in (None, last) for record in made)
        made.clear()


def test_a_retry_of_a_build_keeps_what_it_names_while_its_delete_goes_on(
    layers: LayerObjects, empty_bucket: Bucket, stride: int
) -> None:
    scope = scope_of()
    found: list[LayerRecord | None] = []
    for held in every_moment(empty_bucket, stride, lambda: found.append(layers.refer(BASE, scope))):
        make_layer(empty_bucket, scope, "base")
        uses = empty_bucket.list_objects(used_layers_prefix(scope.build_id))
        held.release(scope.build_id, uses, collect=True)
        if found and (last := found.pop()) is not None:
            assert not layers.collect(BASE)
            assert is_whole(empty_bucket, last)


def test_without_preconditions_these_races_are_lost(
    empty_bucket: Bucket, storage: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulator alone has none at a delete: so the tests here need the proxy, and have it."""
    claim = claimed(LayerObjects(empty_bucket), scope_of())
    data = write_layer(empty_bucket, claim, "base").objects["data"]
    assert not empty_bucket.delete_object(data.name, data.generation - 1)
    assert empty_bucket.stat_object(data.name) == data
    emulator = f"http://127.0.0.1:{storage.environment.ports.gcs_emulator}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator)
    unguarded = Bucket(empty_bucket.name)
    assert unguarded.delete_object(data.name, data.generation - 1)
    assert unguarded.stat_object(data.name) is None


# ---- Death after each write

WRITES = "upload|resumable-start|delete|compose"


def sweep(bucket: Bucket) -> None:
    """Remove what is left over of layers, as if no build lived and all were old."""
    for leftover in (*leftover_uses(bucket), *leftover_layers(bucket, time.time() + 60)):
        leftover.remove()


@pytest.mark.parametrize("kind", ["status", pytest.param("lost_response", marks=pytest.mark.whole)])
@pytest.mark.parametrize("what", ["make", "release"])
def test_a_death_after_any_write_is_made_good(
    layers: LayerObjects, empty_bucket: Bucket, storage: Stack, kind: str, what: str, stride: int
) -> None:
    scope, user = scope_of(), scope_of()

    def work() -> bool:
        if what == "make":
            make_chain(empty_bucket, scope, "base", "step")
        else:
            release(layers, scope.build_id, collect=True)
        return True

    for writes in range(0, MOST_REQUESTS, stride):
        if what == "release":
            make_chain(empty_bucket, scope, "base", "step")
        struck = {"kind": kind, "status": 403, "operation": WRITES, "skip": writes}
        dead = {"kind": "status", "status": 403, "operation": WRITES, "count": None}
        survived = False
        with (
            storage.faults({**dead, "skip": writes + 1}, struck),
            contextlib.suppress(TemplateManagerError, AssertionError),
        ):
            survived = work()
        found = layers.refer(id_of("step"), user)
        if found is not None:
            assert is_whole(empty_bucket, found)
            base = layers.read(BASE)
            assert base is not None
            assert is_whole(empty_bucket, base)
            assert found.below == (base.reference,)
        for _ in range(4):  # what one sweep lets go, the next one removes
            sweep(empty_bucket)
        assert names_of(empty_bucket) == []
        if survived:
            return
    raise AssertionError("it never ends")
