"""Photos inside one .zip or .tar, read in place: the driver reads the table of contents, the tasks single members.

A zip has its table at the end: two ranged reads, wherever it lies. A tar has none: it is walked once, which on S3
means to stream it. What stands in an archive is not trusted: links, encrypted members, unknown compression and
members over the limit are refused before a byte of them is unpacked; one that lies outside the archive, or unpacks
to another size or another checksum than the table says, is broken.
"""

from __future__ import annotations

import hashlib
import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, NamedTuple, cast

import numpy as np

from components.shard.sources.record_index import File, read_at
from components.shard.sources.tars import Stream, members_of
from llava.data.images import BadImage
from llava.errors import RefusedInput

SUFFIXES = (".zip", ".tar")
_LONGEST_TABLE = 256 * 2**20  # bytes of a zip's table: a few million members
_TABLE_SIZE = 5  # where zipfile's record of the end has the table's length
_STORED, _DEFLATED, _LINK, _OTHER = range(4)
_MEMBER = np.dtype(
    [("name", "u8"), ("start", "i8"), ("packed", "i8"), ("size", "i8"), ("crc", "u4"), ("kind", "u1")]
)
_ZIP_HEADER = 30
_SLACK = 2**20  # bytes by which packing may make a member longer
_MOST = 2**63 - 1


class Member(NamedTuple):
    """What the table says of one file; `packed`, `size`: bytes before and after unpacking."""

    name: str
    start: int
    packed: int
    size: int
    crc: int
    kind: int


class Archive:
    """A table of contents as one array, so that it can travel with every task: 37 bytes a member."""

    def __init__(self, file: File) -> None:
        """Read the table. RefusedInput where the file is damaged or compressed as a whole."""
        self.file = file
        self._zipped = file.key.endswith(".zip")
        try:
            members = list(_zip_members(file) if self._zipped else _tar_members(file))
        except (
            zipfile.BadZipFile, tarfile.TarError, NotImplementedError, EOFError, LookupError, OverflowError, ValueError,
            struct.error,
        ) as error:  # fmt: skip
            raise RefusedInput(
                f"{file}: no {file.key[-3:]} archive that can be read in place: {error}"
            ) from None
        # Of a name that stands there twice the last counts, as unpacking would have it.
        members = list({member.name: member for member in members}.values())
        table = np.array([(_hash(one.name), *one[1:]) for one in members], _MEMBER)
        self._table = table[np.argsort(table["name"])]
        names = self._table["name"]
        if (names[1:] == names[:-1]).any():
            raise RefusedInput(f"{file}: two names with one hash; unpack the archive")

    def __len__(self) -> int:
        return len(self._table)

    def read(self, path: str, longest: int) -> bytes | None:
        """The member `path`, or the one below a folder of the archive's own name; None if there is none.

        Raises BadImage for one that is refused.
        """
        found = self._find(path)
        if found is None:
            found = self._find(f"{PurePosixPath(self.file.key).stem}/{path}")
        if found is None:
            return None
        start, packed, size, crc, kind = found
        if kind == _LINK:
            raise BadImage("link", f"{self.file}: {path} is a link")
        if kind == _OTHER:
            raise BadImage("archive-member", f"{self.file}: {path} is encrypted or packed in an unknown way")
        if size > longest:
            raise BadImage(
                "too-many-bytes", f"{self.file}: {path} would unpack to {size:,} bytes; limit {longest:,}"
            )
        if packed > longest + _SLACK or (kind == _STORED and packed != size):
            raise BadImage("broken", f"{self.file}: {path} takes {packed:,} bytes for {size:,}")
        if start < 0 or start + (_ZIP_HEADER if self._zipped else 0) + packed > self.file.size:
            raise BadImage("broken", f"{self.file}: {path} does not lie inside the archive")
        data = self._zip_data(start, packed) if self._zipped else read_at(self.file, start, packed)
        if kind == _DEFLATED:
            data = self._inflated(data, path, size)
        if self._zipped and (len(data) != size or zlib.crc32(data) != crc):
            raise BadImage("broken", f"{self.file}: {path} is not what the archive's table says")
        return data

    def version(self, path: str) -> str | None:
        """What changes when the member does; of a tar, which has no checksums, when the archive does."""
        found = self._find(path) or self._find(f"{PurePosixPath(self.file.key).stem}/{path}")
        if found is None:
            return None
        _, _, size, crc, kind = found
        return f"{size}-{crc}-{kind}" if self._zipped else f"{self.file.version}-{size}-{kind}"

    def _find(self, path: str) -> tuple[int, int, int, int, int] | None:
        name = _hash(path)
        at = int(np.searchsorted(self._table["name"], np.uint64(name)))
        if at == len(self._table) or int(self._table["name"][at]) != name:
            return None
        return cast(tuple[int, int, int, int, int], self._table[at].tolist()[1:])

    def _zip_data(self, start: int, packed: int) -> bytes:
        # The member's own header repeats the name, with an extra field of a length that only it tells.
        usual = min(_ZIP_HEADER + 512 + packed, self.file.size - start)
        data = read_at(self.file, start, usual)
        skip = _ZIP_HEADER + int.from_bytes(data[26:28], "little") + int.from_bytes(data[28:30], "little")
        missing = min(skip + packed, self.file.size - start) - len(data)
        if missing > 0:
            data += read_at(self.file, start + len(data), missing)
        return data[skip : skip + packed]

    def _inflated(self, data: bytes, path: str, size: int) -> bytes:
        try:
            return zlib.decompressobj(-15).decompress(data, size + 1)
        except zlib.error as error:
            raise BadImage("broken", f"{self.file}: {path} does not unpack: {error}") from None


def _hash(name: str) -> int:
    data = name.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _zip_members(file: File) -> Iterator[Member]:
    with file.store.open(file.key) as opened:
        table = zipfile._EndRecData(opened)  # type: ignore[attr-defined]
        if table is not None and table[_TABLE_SIZE] > _LONGEST_TABLE:
            raise zipfile.BadZipFile(f"a table of {table[_TABLE_SIZE]:,} bytes, limit {_LONGEST_TABLE:,}")
        yield from _zip_table(opened)


def _zip_table(opened: IO[bytes]) -> Iterator[Member]:
    with zipfile.ZipFile(opened) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            kind = {zipfile.ZIP_STORED: _STORED, zipfile.ZIP_DEFLATED: _DEFLATED}.get(
                info.compress_type, _OTHER
            )
            if info.flag_bits & 0x41:
                kind = _OTHER
            if info.external_attr >> 28 == 0o12:
                kind = _LINK
            start, packed, size = (
                min(number, _MOST) for number in (info.header_offset, info.compress_size, info.file_size)
            )
            yield Member(info.filename, start, packed, size, info.CRC, kind)


def _tar_members(file: File) -> Iterator[Member]:
    local = file.store.local_path is not None
    with file.store.open(file.key) if local else io.BufferedReader(Stream(file), 2**20) as opened:
        for info in members_of(opened, "r:" if local else "r|", file.size):
            if info.isdir():
                continue
            kind = _STORED if info.isreg() and not info.issparse() else _LINK
            name = info.name.removeprefix("./")
            yield Member(name, info.offset_data, info.size, info.size, 0, kind)
