"""The files of the model that training ends with: each is stored once, however often the end is tried."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from components.contract import Folder, Guard
from components.training.data import MODEL

_STORED = "stored"


class ModelFiles:
    """Stores files into `model/` of an artifact and leaves a mark for each in the checkpoint they were made of."""

    def __init__(self, folder: Folder, guard: Guard, checkpoint: Folder, scratch: Path) -> None:
        """`checkpoint`: what the weights come from; its marks hold for these weights and no others."""
        self._folder, self._guard, self._scratch = folder, guard, scratch
        self._marks = checkpoint.sub(_STORED)

    def store(self, name: str, write: Callable[[Path], None]) -> None:
        """Let `write` make the file `name` in a folder, and store it, unless that was done before."""
        if self._stored(name):
            return
        with tempfile.TemporaryDirectory(dir=self._room()) as room:
            write(Path(room))
            self._put(Path(room) / name)
        self._marks.write(name, json.dumps({"size": self._size(name)}).encode())

    def store_rest(self, write: Callable[[Path], None]) -> None:
        """Store all files that `write` makes; they are small."""
        with tempfile.TemporaryDirectory(dir=self._scratch) as room:
            write(Path(room))
            for path in sorted(Path(room).iterdir()):
                self._guard.check()
                self._folder.upload(path, f"{MODEL}/{path.name}")

    def _stored(self, name: str) -> bool:
        if (mark := self._marks.fetch(name)) is None:
            return False
        return bool(json.loads(mark[0])["size"] == self._size(name))

    def _size(self, name: str) -> int | None:
        found = self._folder.stat(f"{MODEL}/{name}")
        return None if found is None else found.size

    def _room(self) -> Path:
        """Beside the goal where that is a folder, so that nothing is copied: what a kill leaves there goes with the
        checkpoint."""
        if (marks := self._marks.local_path) is None:
            return self._scratch
        marks.mkdir(parents=True, exist_ok=True)
        return marks

    def _put(self, path: Path) -> None:
        self._guard.check()
        goal = self._folder.local_path
        if goal is None:
            self._folder.upload(path, f"{MODEL}/{path.name}")
            return
        with path.open("rb") as file:
            os.fsync(file.fileno())
        (goal / MODEL).mkdir(parents=True, exist_ok=True)
        # In its place at once: what lies there may be the same file as in an earlier try.
        path.replace(goal / MODEL / path.name)
