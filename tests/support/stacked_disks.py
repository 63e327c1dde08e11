"""Disks in the bucket that are stacks of layers, written by the format alone."""

from __future__ import annotations

import hashlib
import random
import uuid
from pathlib import Path

from activities.contract.results import LayerReference, UploadedArtifact
from activities.store.bucket import Bucket
from activities.store.headers import BLOCK_BYTES, Header
from activities.template.upload import Below, scan
from tests.support.step_checks import go_on


def changed_disks(directory: Path, count: int, mebibytes: int = 12) -> list[Path]:
    """Write disks, each the one before with some blocks changed, some zeroed, and a longer end."""
    chance, paths = random.Random(count), list[Path]()
    content = bytearray(mebibytes << 20)
    for number in range(count):
        content += bytes(BLOCK_BYTES * 3)
        for _ in range(40):
            at = chance.randrange(len(content) // BLOCK_BYTES - 64) * BLOCK_BYTES
            length = chance.randrange(1, 64) * BLOCK_BYTES
            content[at : at + length] = chance.choice([bytes(length), chance.randbytes(length)])
        paths.append(directory / f"disk-{number}")
        paths[-1].write_bytes(content)
    return paths


def store_stack(bucket: Bucket, disks: list[Path]) -> UploadedArtifact:
    """Store disks, each as what the one before has not; returns the last, with the others below."""
    below: Below | None = None
    layers: tuple[LayerReference, ...] = ()
    for generation, path in enumerate(disks):
        own, data = uuid.uuid4(), bytearray()
        found = scan(path, BLOCK_BYTES, data.extend, go_on, below=below)
        base = uuid.UUID(layers[0].layer_id) if layers else own
        header = Header(BLOCK_BYTES, found.size_bytes, own, base, found.extents, generation)
        objects = {
            "data": bucket.write_object(f"{own}/rootfs.ext4", bytes(data)),
            "header": bucket.write_object(f"{own}/rootfs.ext4.header", header.to_bytes()),
        }
        top = UploadedArtifact(
            name="rootfs.ext4",
            objects=objects,
            size_bytes=found.size_bytes,
            sent_bytes=found.stored_bytes,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            layers=layers,
        )
        below = Below(path, header, path.stat().st_mtime_ns)
        layers = (*layers, LayerReference(layer_id=str(own), objects=objects))
    return top
