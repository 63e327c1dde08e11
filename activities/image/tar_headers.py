"""Following the headers of a layer's tar while it streams by, as dockerd's own reader takes them.

Nothing is unpacked or kept but one header at a time. Python's `tarfile` is not for this: it has
looped for ever over headers that were made for it (CVE-2025-8194).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

BLOCK = 512
MAX_EXTENSION_BYTES = 1024 * 1024  # of one long name or set of PAX records; as in Go's reader
LARGEST = 2**63 - 1
PAX, PAX_GLOBAL, LONG_NAME, LONG_LINK, OLD_SPARSE, OLD_FILE = b"x", b"g", b"L", b"K", b"S", b"\0"
EXTENSIONS = frozenset({PAX, PAX_GLOBAL, LONG_NAME, LONG_LINK})
WITHOUT_CONTENT = frozenset(b"123456"[i : i + 1] for i in range(6))  # links, devices, directories
SPARSE_SIZES = ("GNU.sparse.realsize", "GNU.sparse.size")
NAMES = ("path", "linkpath", "GNU.sparse.name")


class TarError(ValueError):
    """This is no tar that anybody reads."""


class TarEntry(NamedTuple):
    """What a header says of an entry."""

    file_bytes: int
    """Its size when it is unpacked: a sparse file's holes included."""
    name_bytes: int
    """Of its name or its link's target, whichever is longer."""


class TarHeaders:
    """Reads a tar that is fed to it; tells each entry before its content."""

    def __init__(self, tell: Callable[[TarEntry], None]) -> None:
        """`tell` ends the reading by raising."""
        self._tell = tell
        self._held = bytearray()
        self._wanted = BLOCK
        self._take: Callable[[bytes], None] = self._header
        self._skip = 0
        self._content = 0
        self._has_ended = False
        self._pax: dict[str, str] = {}
        self._long_name_bytes = 0
        self._is_long_name_of_directory = False

    def feed(self, data: bytes) -> None:
        """Read on. Raises TarError, and what `tell` raises."""
        at = 0
        while at < len(data) and not self._has_ended:
            skipped = min(self._skip, len(data) - at)
            self._skip -= skipped
            at += skipped
            part = data[at : at + self._wanted - len(self._held)] if not self._skip else b""
            self._held += part
            at += len(part)
            if len(self._held) == self._wanted:
                self._take_held()

    def _take_held(self) -> None:
        held, take = bytes(self._held), self._take
        self._held.clear()
        self._wanted, self._take = BLOCK, self._header
        take(held)

    def _header(self, block: bytes) -> None:
        kind, size = block[156:157], _number(block[124:136])
        if not any(block):
            self._has_ended = True
        elif kind in EXTENSIONS:
            self._extension(kind, size)
        else:
            self._entry(kind, block, size)

    def _extension(self, kind: bytes, size: int) -> None:
        if size > MAX_EXTENSION_BYTES:
            raise TarError(f"a name or attributes of {size} bytes")
        if size:
            self._wanted = _padded(size)
            self._take = lambda content: self._extended(kind, content[:size])
        else:
            self._extended(kind, b"")

    def _extended(self, kind: bytes, content: bytes) -> None:
        if kind == PAX:
            self._pax = _pax_records(content)
        elif kind == PAX_GLOBAL:  # to Go an entry: what came before it was that one's
            self._forget_extensions()
        else:
            name = content.partition(b"\0")[0]
            self._long_name_bytes = max(self._long_name_bytes, len(name))
            self._is_long_name_of_directory |= name.endswith(b"/")

    def _forget_extensions(self) -> None:
        self._pax, self._long_name_bytes, self._is_long_name_of_directory = {}, 0, False

    def _entry(self, kind: bytes, block: bytes, size: int) -> None:
        if "size" in self._pax:
            size = _decimal(self._pax["size"])
        told = [_decimal(self._pax[name]) for name in SPARSE_SIZES if name in self._pax]
        if kind == OLD_SPARSE:
            told.append(_number(block[483:495]))
        names = [
            len(self._pax[name].encode(errors="replace")) for name in NAMES if name in self._pax
        ]
        plain = len(block[:100].rstrip(b"\0")) + len(block[345:500].rstrip(b"\0"))
        content = 0 if kind in WITHOUT_CONTENT else size
        if kind == OLD_FILE and content and self._may_be_directory(block):
            raise TarError("a directory with content, which is to some what follows it")
        self._content = _padded(content)
        self._after_header(bool(kind == OLD_SPARSE and block[482]))
        name_bytes = max(plain, self._long_name_bytes, *names, 0)
        self._forget_extensions()
        self._tell(TarEntry(max(content, *told, 0), name_bytes))

    def _may_be_directory(self, block: bytes) -> bool:
        """Whether a file of the oldest kind has the name of a directory: Go takes it for one."""
        plain = block[:100].partition(b"\0")[0]
        is_one = not plain or plain.endswith(b"/")  # none ends with what is before it, and a slash
        return is_one or self._is_long_name_of_directory or self._pax.get("path", "").endswith("/")

    def _after_header(self, goes_on: bool) -> None:
        # The header of an old sparse file may go on in blocks before its content.
        if goes_on:
            self._take = lambda block: self._after_header(bool(block[504]))
        else:
            self._skip = self._content


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _number(field: bytes) -> int:
    """Read a number in octal, or in base 256 where its first bit is set."""
    if field[0] & 0x80:
        value = (
            -1 if field[0] & 0x40 else int.from_bytes(field, "big") - (0x80 << 8 * len(field[1:]))
        )
    else:
        text = field.strip(b" \0").split(b"\0")[0] or b"0"
        if not all(byte in b"01234567" for byte in text):
            raise TarError("a header without a size")
        value = int(text, 8)
    if not 0 <= value <= LARGEST:
        raise TarError("an entry of a size that no file has")
    return value


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(LARGEST))):
        raise TarError("a size that is no number")
    return int(text)


def _pax_records(content: bytes) -> dict[str, str]:
    """Read `<length> <key>=<value>\\n`, the length being that of all of it."""
    records, at = {}, 0
    while at < len(content):
        digits, space, _ = content[at : at + 20].partition(b" ")
        end = at + (_decimal(digits.decode(errors="replace")) if space else 0)
        key, equals, value = content[at + len(digits) + 1 : end].partition(b"=")
        if not equals or not value.endswith(b"\n") or end > len(content):
            raise TarError("attributes that cannot be read")
        records[key.decode(errors="replace")] = value[:-1].decode(errors="replace")
        at = end
    return records
