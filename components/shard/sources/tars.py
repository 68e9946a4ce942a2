"""Tars from strangers, read from front to back: nothing in a header, or in what a gzip unpacks to, is believed.

| what a tar holds | result |
|---|---|
| an extended header (PAX, GNU's long names) of over 1 MiB, or many in a row | damaged |
| a size, of a header or in PAX, that is negative or goes beyond the file | damaged |
| a sparse file's map | not read: such members are refused |
| gzip that unpacks to over 100 times its size and 64 MiB | damaged from there on |
| gzip whose checksum or length is wrong, or that is cut off | damaged |

"Damaged" is `tarfile.ReadError`. Memory stays at a few MiB and one member.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from components.shard.sources.record_index import File

UNPACKED = 100
"""Times that unpacking may make a file larger: photos hardly shrink, text shrinks to a tenth."""
SLACK = 64 * 2**20
"""Bytes to which any file may unpack."""
_LONGEST_HEADER = 2**20  # bytes that a tar's own long names may take
_MOST_HEADERS = 8  # extended headers before one member
_BUFFER = 2**20
_GZIP = b"\x1f\x8b"
_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_NOT_MINE = (tarfile.TarError, EOFError, OSError, MemoryError)


def most_unpacked(packed: int) -> int:
    """Bytes to which `packed` bytes may unpack."""
    return UNPACKED * packed + SLACK


class CarefulTarInfo(tarfile.TarInfo):
    """A header that raises ReadError where the standard one would end the archive in silence or take all memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> CarefulTarInfo:
        """One header of 512 bytes."""
        try:
            info = super().frombuf(buf, encoding, errors)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"damaged: {error}") from None
        if info.type in _EXTENSIONS and not 0 <= info.size <= _LONGEST_HEADER:
            raise tarfile.ReadError(f"damaged: a name of {info.size:,} bytes")
        return info

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> CarefulTarInfo:
        """The next member, with the extended headers before it."""
        archive: Any = tarfile
        nested = getattr(archive, "nested_headers", 0)
        if nested > _MOST_HEADERS:
            raise _damaged(f"more than {_MOST_HEADERS} headers before one member")
        archive.nested_headers = nested + 1
        try:
            return super().fromtarfile(tarfile)
        except _NOT_MINE:
            raise
        except Exception as error:  # hostile headers make the parser raise nearly anything
            raise _damaged(f"a header that cannot be read: {error}") from None
        finally:
            archive.nested_headers = nested

    def _proc_gnusparse_00(self, next: Any, *_: Any) -> None:
        next.sparse = []

    _proc_gnusparse_01 = _proc_gnusparse_10 = _proc_gnusparse_00

    def _proc_sparse(self, tarfile: Any) -> CarefulTarInfo:
        """As the standard one, without a list of the parts."""
        _, more, _ = self._sparse_structs  # type: ignore[attr-defined]
        while more:
            block = tarfile.fileobj.read(512)
            more = len(block) == 512 and bool(block[504])
        self.sparse: Any = []
        self.offset_data = tarfile.fileobj.tell()
        tarfile.offset = self.offset_data + self._block(self.size)  # type: ignore[attr-defined]
        return self


class Stream(io.RawIOBase):
    """A file of any store as something to read from front to back."""

    def __init__(self, file: File) -> None:
        self._chunks = file.store.chunks(file.key)
        self._rest = b""
        self.taken = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with what is there; 0 at the end."""
        if not self._rest:
            self._rest = next(self._chunks, b"")
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        self.taken += count
        return count


class Unpacked(io.RawIOBase):
    """What a gzipped stream unpacks to; ReadError once that is too much, or is not what was packed."""

    def __init__(self, packed: Any, stream: Stream) -> None:
        self._gzip, self._stream, self._given = gzip.GzipFile(fileobj=packed), stream, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; 0 at the end, where the checksum was right."""
        try:
            data = self._gzip.read(min(len(buffer), _BUFFER))
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise tarfile.ReadError(f"damaged: gzip: {error}") from None
        self._given += len(data)
        if self._given > (most := most_unpacked(self._stream.taken)):
            raise tarfile.ReadError(
                f"damaged: {self._stream.taken:,} bytes unpack to more than {most:,}: a bomb"
            )
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def reading(stream: Stream, size: int) -> Iterator[Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]]:
    """The members of a tar, or of a gzipped one, of `size` bytes, in order; each can be extracted while it is current.

    Whoever reads them to the end has the checksum compared, too. Raises tarfile.TarError.
    """
    opened: Any = io.BufferedReader(stream, _BUFFER)
    most = size
    if opened.peek(2)[:2] == _GZIP:
        opened, most = io.BufferedReader(cast(Any, Unpacked(opened, stream)), _BUFFER), most_unpacked(size)
    with tarfile.open(fileobj=opened, mode="r|", tarinfo=CarefulTarInfo) as archive:
        yield _members(archive, opened, most)


def _members(
    archive: tarfile.TarFile, opened: IO[bytes], most: int
) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    while (info := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]
        archive.pax_headers.clear()  # type: ignore[attr-defined]
        if info.size < 0 or info.offset_data + info.size > most:
            raise _damaged(f"a member of {info.size:,} bytes")
        yield archive, info
    while opened.read(_BUFFER):
        pass


def members_of(opened: IO[bytes], mode: Any, size: int) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar of `size` bytes one by one, without a list of them in memory. Raises tarfile.TarError."""
    with tarfile.open(fileobj=opened, mode=mode, tarinfo=CarefulTarInfo) as archive:
        for _, info in _members(archive, io.BytesIO(), size):
            yield info


def _damaged(what: str) -> tarfile.ReadError:
    return tarfile.ReadError(f"damaged: {what}")
