"""The manifest of a finished artifact, and the artifact as its readers see it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pydantic

from components.contract.digest import sha256_of
from components.contract.lease import LEASE
from components.contract.store import Folder, Store, check_key, open_store
from llava.errors import RefusedInput

MANIFEST = "manifest.json"
RUN = "run.json"
"""The MLflow run of an artifact that is not finished, or whose run is not closed yet."""
_MARKS = (MANIFEST, RUN, LEASE)
_ADDRESS = re.compile(r"([a-z_]+/[0-9a-f]{16})/(.+)")
HASH_UP_TO = 4 << 30  # bytes: a few seconds of hashing; above it, finding an artifact looks at sizes alone


class FileEntry(pydantic.BaseModel):
    """One file of an artifact: path inside it, size in bytes, hex sha256."""

    model_config = pydantic.ConfigDict(frozen=True)

    path: str
    size: int
    sha256: str

    @pydantic.field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        try:
            return check_key(path)
        except RefusedInput as error:
            raise ValueError(str(error)) from None


class Manifest(pydantic.BaseModel):
    """What stands in `manifest.json`: written last, once, create-only."""

    model_config = pydantic.ConfigDict(frozen=True)

    component: str
    version: str
    digest: str
    recipe: dict[str, Any]
    run: dict[str, Any] = {}
    inputs: dict[str, str] = {}
    external: dict[str, str] = {}
    files: list[FileEntry]
    metrics: dict[str, float] = {}
    notes: dict[str, Any] = {}
    mlflow_run_id: str | None = None
    code: str
    versions: dict[str, str] = {}
    created: datetime = pydantic.Field(default_factory=lambda: datetime.now(UTC))

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def to_bytes(self) -> bytes:
        """The file's contents."""
        return self.model_dump_json(indent=1).encode() + b"\n"


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its folder and its manifest."""

    folder: Folder
    manifest: Manifest

    @property
    def uri(self) -> str:
        """Where it lies."""
        return self.folder.uri

    @property
    def root(self) -> Folder:
        """The root that it lies in."""
        return open_store(self.uri.rsplit("/", 2)[0])

    @property
    def digest(self) -> str:
        """Hex sha256 of what it was made from."""
        return self.manifest.digest

    def local(self, subfolder: str = "") -> Path:
        """The local folder with the artifact's files (those under `subfolder`): its own, or a verified copy.

        Copies from S3 lie in `LLAVA_CACHE` (else `~/.cache/llava-workflow`) and are kept and shared.
        Raises RefusedInput if a file is not what the manifest says.
        """
        inside = subfolder.strip("/")
        files = [f for f in self.manifest.files if not inside or f.path.startswith(f"{inside}/")]
        if not files:
            raise RefusedInput(
                f"{self.uri}: holds no folder {inside!r}; `llava show {self.uri}` lists what it holds"
            )
        root = self.folder.local_path
        if root is None:
            contents = sha256_of([file.model_dump() for file in self.manifest.files])
            root = _cache() / f"{self.manifest.component}-{self.digest[:16]}-{contents[:16]}"
            for file in files:
                _download(self.folder, file, root / file.path)
        return root / inside


def open_artifact(uri: str | Path) -> Artifact:
    """The finished artifact at `uri`; RefusedInput if there is none or its files are not what it says."""
    folder = open_store(uri)
    artifact = read_artifact(folder)
    if artifact is None:
        raise RefusedInput(f"{folder.uri}: no finished artifact lies there ({MANIFEST} is missing)")
    verify(artifact)
    return artifact


def read_artifact(folder: Folder) -> Artifact | None:
    """The artifact in `folder` as its manifest tells it, files unseen; None if it is not finished."""
    found = folder.fetch(MANIFEST)
    if found is None:
        return None
    try:
        return Artifact(folder, Manifest.model_validate_json(found[0]))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise RefusedInput(
            f"{folder.uri}/{MANIFEST} is damaged ({where}: {first['msg']}): {_way_out(folder)}"
        ) from None


def find_artifact(digest: str, roots: Iterable[Store]) -> Artifact | None:
    """The finished artifact with that digest in one of the roots, whatever component made it; None if none has it."""
    for root in roots:
        for component in root.folders():
            found = read_artifact(root.sub(f"{component}/{digest[:16]}"))
            if found is not None and found.digest == digest:
                return found
    return None


def artifact_folders(root: Store, known: Collection[str] = ()) -> dict[str, int]:
    """Every artifact's address in a root (`component/digest`), finished or not, with the bytes that lie there.

    A folder is an artifact's by its address and by a manifest, a lease or the record of a run; whose it is does not
    matter, so that a stage that this version does not know is seen as well. Of the components `known` it needs no
    such file.
    """
    sizes: dict[str, int] = {}
    artifacts: set[str] = set()
    for entry in root.list():
        if found := _ADDRESS.match(entry.key):
            sizes[found[1]] = sizes.get(found[1], 0) + entry.size
            if found[2] in _MARKS or found[1].partition("/")[0] in known:
                artifacts.add(found[1])
    return {address: size for address, size in sizes.items() if address in artifacts}


def verify(artifact: Artifact, say: Callable[[str], None] | None = None) -> None:
    """Look whether the files are those of the manifest: existence and size; in a local folder sha256 too.

    Above `HASH_UP_TO` bytes the hashes are left out, which `say` is told; files on S3 are hashed when `local`
    fetches them. Raises RefusedInput that names the first file that differs.
    """
    folder, manifest = artifact.folder, artifact.manifest
    sizes = {entry.key: entry.size for entry in folder.list()}
    for file in manifest.files:
        if file.path not in sizes:
            raise _changed(folder, file.path, "is missing")
        if sizes[file.path] != file.size:
            raise _changed(
                folder, file.path, f"has {sizes[file.path]:,} bytes, the manifest says {file.size:,}"
            )
    if folder.local_path is None:
        return
    if manifest.size > HASH_UP_TO:
        if say:
            say(f"{folder.uri}: {manifest.size / 2**30:.1f} GiB, sizes compared, contents not hashed")
        return
    for file in manifest.files:
        _compare(folder, file, folder.sha256(file.path))


def remove_artifact(folder: Folder) -> None:
    """Delete the artifact in `folder`, manifest first: cut short, it is unfinished and not broken."""
    folder.delete(MANIFEST)
    folder.delete_all()


def _download(folder: Folder, file: FileEntry, goal: Path) -> None:
    # A file gets its name in the cache only after its hash was right, so its size is enough to know it again.
    if goal.is_file() and goal.stat().st_size == file.size:
        return
    unproven = goal.with_name(f"{goal.name}.{os.getpid()}.part")
    try:
        folder.download(file.path, unproven)
        with unproven.open("rb") as opened:
            _compare(folder, file, hashlib.file_digest(opened, "sha256").hexdigest())
        unproven.replace(goal)
    except FileNotFoundError:
        raise _changed(folder, file.path, "is missing") from None
    finally:
        unproven.unlink(missing_ok=True)


def _compare(folder: Folder, file: FileEntry, found: str) -> None:
    if found != file.sha256:
        raise _changed(folder, file.path, f"has sha256 {found}, the manifest says {file.sha256}")


def _changed(folder: Folder, path: str, what: str) -> RefusedInput:
    return RefusedInput(
        f"{folder.uri}: {path} {what}: the artifact changed after it was finished. {_way_out(folder)}"
    )


def _way_out(folder: Folder) -> str:
    return f"Delete {folder.uri} (or see `llava prune`) and run again to make it anew"


def _cache() -> Path:
    chosen = os.environ.get("LLAVA_CACHE")
    return (
        Path(chosen)
        if chosen
        else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "llava-workflow").expanduser()
    )
