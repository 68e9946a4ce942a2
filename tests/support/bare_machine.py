"""A machine on which only some packages are installed: what else this one has cannot be found.

A python that finds a module sitecustomize on PYTHONPATH runs it first; BARE_MACHINE names the modules that are not
there.
"""

import os
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement

HIDING = """
import os, sys

MISSING = frozenset(os.environ["BARE_MACHINE"].split(","))


class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING or not hasattr(self.finder, "find_spec"):
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def with_dependencies(packages: list[str]) -> set[str]:
    """The distributions that pip brings along with `packages`, as far as they are here."""
    found: set[str] = set()
    waiting = [Requirement(package).name for package in packages]
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        found.add(name)
        waiting += [
            need.name
            for need in map(Requirement, needs)
            if need.marker is None or need.marker.evaluate({"extra": ""})
        ]
    return found


def environment(folder: Path, packages: list[str]) -> dict[str, str]:
    """Variables for a python that finds `packages`, what they need, and nothing else that was installed."""
    kept = with_dependencies(packages)
    hidden = {
        module
        for module, names in packages_distributions().items()
        if not kept & {name.lower().replace("_", "-") for name in names}
    }
    # Of this repository a copy is looked at, which comes first on the path.
    hidden -= {"llava"}
    (folder / "sitecustomize.py").write_text(HIDING)
    named = {"BARE_MACHINE": ",".join(sorted(hidden)), "PYTHONPATH": str(folder)}
    return {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"} | named
