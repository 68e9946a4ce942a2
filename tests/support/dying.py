"""A process that dies, or waits, at a place in the program: kill -9 from inside, without a line of it in the program.

Python runs `sitecustomize` of the first folder of PYTHONPATH in every process, also in Ray's workers. The one written
here wraps a function when its module is imported. What is to happen there happens once, in one process.
"""

import os
from pathlib import Path

_CODE = """
import importlib.abc, importlib.machinery, os, signal, sys, time

PLACES = {places!r}
FOLDER = {folder!r}


def once(name):
    try:
        os.close(os.open(os.path.join(FOLDER, name), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def patch(module, path, action):
    owner = module
    *parents, last = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    plain = getattr(owner, last)

    def wrapped(*args, **kwargs):
        if once(path):
            if action == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(action)
        return plain(*args, **kwargs)

    setattr(owner, last, wrapped)


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in PLACES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            for place, action in PLACES[name]:
                patch(module, place, action)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
"""


def dying_at(folder: Path, *places: str, waits: float | None = None) -> dict[str, str]:
    """Environment of a command that dies at the first call of each place, such as `package.module:Class.method`.

    With `waits` it does not die: it waits there for so many seconds. `happened` tells whether it was there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[tuple[str, str | float]]] = {}
    for place in places:
        module, _, path = place.partition(":")
        found.setdefault(module, []).append((path, "die" if waits is None else waits))
    (folder / "sitecustomize.py").write_text(_CODE.format(places=found, folder=str(folder)))
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{folder}{os.pathsep}{before}" if before else str(folder)}


def happened(folder: Path, place: str) -> bool:
    """Whether a process was at that place."""
    return (folder / place.partition(":")[2]).exists()
