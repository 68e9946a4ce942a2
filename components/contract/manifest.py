"""The manifest of a finished artifact, and the artifact as its readers see it.

A root may have been written by anybody who can write there: what a manifest says is checked when it is read, since its
fields become file names, URIs and lines on a terminal.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field

from components.contract.digest import canonical_json, sha256_of
from components.contract.lease import LEASE
from components.contract.printable import has_controls, printable
from components.contract.store import Folder, Store, check_key, open_store
from llava.errors import RefusedInput

MANIFEST = "manifest.json"
RUN = "run.json"
"""The MLflow run of an artifact that is not finished, or whose run is not closed yet."""
ATTEMPTS = "attempts"
"""Where in an artifact's folder the second owner and those after it write, each at a place of its own."""
MARKS = (MANIFEST, RUN, LEASE)
LARGEST = 256 << 20  # bytes of a manifest: one of a million files
_ADDRESS = re.compile(r"([a-z_]+/[0-9a-f]{16})/(.+)")
HASH_UP_TO = 4 << 30  # bytes: a few seconds of hashing; above it, finding an artifact looks at sizes alone


Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""Hex sha256."""
ComponentName = Annotated[str, Field(pattern="^[a-z_]{1,64}$")]
RunId = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,64}$")]
"""Of an MLflow run."""


def _one_line(text: str) -> str:
    if has_controls(text):
        raise ValueError("must not hold control characters")
    return text


Finite = Annotated[float, Field(allow_inf_nan=False)]
Line = Annotated[str, Field(max_length=1000), pydantic.AfterValidator(_one_line)]
"""A name or a version: one line that a terminal only shows."""


class FileEntry(pydantic.BaseModel):
    """One file of an artifact: path inside it, size in bytes, hex sha256."""

    model_config = pydantic.ConfigDict(frozen=True)

    path: Line
    size: int = Field(ge=0)
    sha256: Digest

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

    component: ComponentName
    version: Line
    digest: Digest
    recipe: dict[str, Any]
    run: dict[str, Any] = {}
    inputs: dict[Line, Digest] = {}
    external: dict[Line, Line] = {}
    files: list[FileEntry]
    metrics: dict[Line, Finite] = {}
    notes: dict[str, Any] = {}
    mlflow_run_id: RunId | None = None
    code: Line
    versions: dict[Line, Line] = {}
    attempt: str = Field("", pattern=rf"^({ATTEMPTS}/[0-9]{{6,12}}-[0-9a-f]{{8}})?$")
    """Where in the artifact's folder its files lie: nowhere else ("") where the first owner finished it."""
    created: datetime = Field(default_factory=lambda: datetime.now(UTC))

    @pydantic.field_validator("recipe", "run")
    @classmethod
    def _numbers_are_finite(cls, values: dict[str, Any]) -> dict[str, Any]:
        canonical_json(values)  # digests are taken of them
        return values

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def to_bytes(self) -> bytes:
        """The file's contents."""
        return self.model_dump_json(indent=1).encode() + b"\n"


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its address, which is the folder `COMPONENT/DIGEST` of a root, and its manifest."""

    address: Folder
    manifest: Manifest

    @property
    def folder(self) -> Folder:
        """Where its files lie, at the paths that the manifest gives."""
        return attempt_folder(self.address, self.manifest.attempt)

    @property
    def uri(self) -> str:
        """The URI of its address, by which it is known."""
        return self.address.uri

    @property
    def root(self) -> Folder:
        """The root that it lies in."""
        return open_store(self.uri.rsplit("/", 2)[0])

    @property
    def digest(self) -> str:
        """Hex sha256 of what it was made from."""
        return self.manifest.digest

    def parquet(self, split: str) -> tuple[str, ...]:
        """The paths of its Parquet files of one split, in their order."""
        return parquet_in((file.path for file in self.manifest.files), split)

    def note(self, name: str, kind: Any) -> Any:
        """The note `name` of the manifest, which is of the type `kind`. Raises RefusedInput where it is not."""
        try:
            return pydantic.TypeAdapter(kind).validate_python(self.manifest.notes.get(name))
        except pydantic.ValidationError as error:
            raise _damaged(self.address, error, "notes", name) from None

    def read(self, path: str) -> bytes:
        """The contents of one of its files; RefusedInput where the artifact has none of that name."""
        try:
            return self.folder.read(path)
        except FileNotFoundError:
            raise RefusedInput(f"{self.uri}: holds no {path}; make the artifact again") from None

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


def parquet_in(keys: Iterable[str], folder: str = "") -> tuple[str, ...]:
    """The Parquet files right inside `folder` among `keys`, sorted; "": beside everything else."""
    inside = f"{folder}/" if folder else ""
    return tuple(
        sorted(
            key
            for key in keys
            if key.startswith(inside) and key.endswith(".parquet") and "/" not in key.removeprefix(inside)
        )
    )


def attempt_folder(address: Folder, attempt: str) -> Folder:
    """The folder of an attempt to make the artifact at `address`; that of the first one is the address itself."""
    return address.sub(attempt) if attempt else address


def artifact_with(folder: str, subfolder: str) -> Artifact | None:
    """The finished artifact, verified, whose `subfolder` is the folder at the URI `folder`; None if it is none's."""
    above, _, last = folder.rstrip("/").rpartition("/")
    if last != subfolder:
        return None
    address = re.sub(rf"/{ATTEMPTS}/[^/]+\Z", "", above)
    if not address or open_store(address).stat(MANIFEST) is None:
        return None
    found = open_artifact(address)
    return found if found.folder.sub(subfolder).uri == open_store(folder).uri else None


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
    found = folder.fetch(MANIFEST, LARGEST)
    if found is None:
        return None
    try:
        return Artifact(folder, Manifest.model_validate_json(found[0]))
    except pydantic.ValidationError as error:
        raise _damaged(folder, error) from None


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
            if found[2] in MARKS or found[1].partition("/")[0] in known:
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


def _damaged(folder: Folder, error: pydantic.ValidationError, *inside: str) -> RefusedInput:
    first = error.errors(include_input=False, include_url=False)[0]
    where = printable(".".join(str(part) for part in (*inside, *first["loc"])))[:200] or "the file"
    return RefusedInput(f"{folder.uri}/{MANIFEST} is damaged ({where}: {first['msg']}): {_way_out(folder)}")


def _way_out(folder: Folder) -> str:
    return f"Delete {folder.uri} (or see `llava prune`) and run again to make it anew"


def _cache() -> Path:
    chosen = os.environ.get("LLAVA_CACHE")
    return (
        Path(chosen)
        if chosen
        else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "llava-workflow").expanduser()
    )
