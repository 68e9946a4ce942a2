"""Training checkpoints in an artifact's folder: files first, the commit marker last, the newest few kept.

A checkpoint lies in `checkpoints/{step}-{token}/`, where `token` is the lease's fencing token, in the folder of the
try that made it: a worker of a lost run can never write into the checkpoint of the run that took over. A later try
reads those of the earlier ones where they are, since they are large.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from components.contract import Folder, Guard
from components.contract.digest import sha256_of
from components.contract.store import check_key
from llava.data.jsonl import from_json
from llava.errors import LlavaError

FOLDER = "checkpoints"
COMMITTED = "COMMITTED"


class Saver:
    """Stores checkpoints in a thread of its own while training goes on; one at a time, in order."""

    def __init__(
        self, folder: Folder, guard: Guard, keep: int, scratch: Path, earlier: Sequence[Folder] = ()
    ):
        """`earlier`: the folders of earlier tries, whose checkpoints count for `keep` too."""
        self._folder, self._guard, self._keep, self._scratch = folder, guard, keep, scratch
        self._earlier = earlier
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def wait(self) -> None:
        """Until the checkpoint before is committed; raises what went wrong with it."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Commit what `write` puts into a local folder as the checkpoint of `step`, after the one before."""
        self.wait()
        self._pending = self._pool.submit(self._store, step, write)

    def close(self) -> None:
        """Let a checkpoint that is under way arrive; its failure no longer matters to whoever fails himself."""
        self._pool.shutdown(wait=True)

    def _store(self, step: int, write: Callable[[Path], None]) -> None:
        with tempfile.TemporaryDirectory(dir=self._scratch) as local:
            write(Path(local))
            save(self._folder, self._guard, step, Path(local), self._keep, self._earlier)


def save(
    folder: Folder, guard: Guard, step: int, local: Path, keep: int, earlier: Sequence[Folder] = ()
) -> None:
    """Store the files of `local` as the checkpoint of `step` and drop the oldest ones over `keep`."""
    guard.check()
    name = f"{step:09d}-{guard.token:06d}"
    there = folder.sub(f"{FOLDER}/{name}")
    there.delete_all()
    files = sorted(path for path in local.iterdir() if path.is_file())
    for path in files:
        there.upload(path, path.name)
    # An upload may take longer than a lost lease takes to be taken over.
    guard.check()
    there.write(COMMITTED, json.dumps({path.name: path.stat().st_size for path in files}).encode())
    for old in _committed([folder, *earlier])[:-keep]:
        old.delete(COMMITTED)
        old.delete_all()


def newest(folders: Sequence[Folder]) -> Folder | None:
    """The folder of the newest committed checkpoint of several tries, or None."""
    return found[-1] if (found := _committed(folders)) else None


@contextmanager
def fetched(there: Folder, first: bool, barrier: Callable[[], None]) -> Iterator[Path]:
    """A local folder with the files of the checkpoint `there`, for as long as any rank of this node is inside.

    A checkpoint of a 7B model is 80 GB: only the `first` rank of a node downloads it, the others wait at the
    `barrier` of all ranks. The folder's name is that of the checkpoint, so that what a killed rank left is replaced.
    """
    copy = Path(tempfile.gettempdir()) / f"llava-checkpoint-{sha256_of(there.uri)[:16]}"
    own = first and there.local_path is None
    try:
        if own:
            shutil.rmtree(copy, ignore_errors=True)
            for file in _marker(there):
                there.download(file, copy / file)
        barrier()
        yield _whole(there, there.local_path or copy)
        barrier()
    finally:
        if own:
            shutil.rmtree(copy, ignore_errors=True)


def _whole(there: Folder, where: Path) -> Path:
    """`where`, if its files have the sizes of the marker."""
    for file, size in _marker(there).items():
        found = (where / file).stat().st_size if (where / file).exists() else None
        if found != size:
            raise LlavaError(
                f"checkpoint {there.uri}: {file} has {found} bytes, {size} were committed; "
                f"delete {there.uri} to resume from the one before"
            )
    return where


def _marker(there: Folder) -> dict[str, int]:
    """The size of each file, by its name in the checkpoint."""
    try:
        sizes: dict[str, int] = from_json(there.read(COMMITTED))
        return {check_key(file): int(size) for file, size in sizes.items()}
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise LlavaError(
            f"checkpoint {there.uri}: {COMMITTED} is damaged ({error}); delete {there.uri} to resume from the "
            "one before"
        ) from None


def _committed(folders: Sequence[Folder]) -> list[Folder]:
    """The committed checkpoints, by step and token."""
    ending = f"/{COMMITTED}"
    found = [
        (entry.key.removesuffix(ending), folder)
        for folder in folders
        for entry in folder.list(f"{FOLDER}/")
        if entry.key.endswith(ending)
    ]
    return [folder.sub(key) for key, folder in sorted(found, key=lambda one: one[0])]
