"""A recipe of docs/extending.md, followed word for word in a copy of the packages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.repository import REPOSITORY

PAGE = REPOSITORY / "docs" / "extending.md"
COPIED = ("benchmarks", "llava", "components", "workflows", "tests")
_FENCE = re.compile(r"^```(\w+) (\S+)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Recipe:
    """What a section of the page makes: new files with their contents, and changes of files that are there."""

    new: dict[str, str]
    changes: dict[str, str]

    @classmethod
    def read(cls, title: str) -> Recipe:
        """The section `## title`."""
        sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S))
        found = _FENCE.findall(sections[title])
        return cls(
            {path: text for kind, path, text in found if kind != "diff"},
            {path: text for kind, path, text in found if kind == "diff"},
        )

    def follow(self, copy: Path) -> None:
        """Do it in the copy; a new file that is there already, or a line that is not, is an AssertionError."""
        for path, text in self.new.items():
            assert not (copy / path).exists(), f"{path} is there already"
            (copy / path).write_text(text)
        for path, text in self.changes.items():
            changed = (copy / path).read_text()
            for hunk in re.split(r"^@@\n", text, flags=re.M):
                lines = hunk.splitlines(keepends=True)
                before = "".join(line[1:] for line in lines if line[0] in " -")
                after = "".join(line[1:] for line in lines if line[0] in " +")
                assert changed.count(before) == 1, f"{path} has not once:\n{before}"
                changed = changed.replace(before, after)
            (copy / path).write_text(changed)


def copied(folder: Path) -> Path:
    """The packages and their tests, in `folder`."""
    for name in COPIED:
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    return folder


def run(copy: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """`python COMMAND...` on the code of the copy; RAY_ADDRESS is left out: its cluster would run other code."""
    env = {**os.environ, "PYTHONPATH": str(copy), "RAY_USAGE_STATS_ENABLED": "0"}
    env.pop("RAY_ADDRESS", None)
    return subprocess.run(
        [sys.executable, *command], cwd=copy, env=env, capture_output=True, text=True, check=False
    )


def passed(copy: Path, *arguments: str) -> int:
    """How many tests of the copy pass; an AssertionError with the end of the output where one fails."""
    done = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    found = re.search(r"(\d+) passed", done.stdout)
    return int(found[1]) if found else done.stdout.count(".")


def lint(copy: Path, *paths: str) -> None:
    """The page's code is as clean as that of the house."""
    for command in (["check"], ["format", "--check"]):
        done = run(copy, "-m", "ruff", *command, *paths)
        assert done.returncode == 0, done.stdout + done.stderr
