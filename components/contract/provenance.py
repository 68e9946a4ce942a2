"""Which code and which libraries made an artifact."""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path

_LIBRARIES = ("torch", "ray", "deepspeed", "transformers", "mlflow", "pyarrow")
_PACKAGE = "llava-workflow"
_SOURCES = ("llava", "components", "workflows")


@functools.cache
def code_revision() -> str:
    """The git commit of this checkout ("-dirty" with uncommitted changes), else the package's version."""
    root = Path(__file__).resolve().parents[2]
    # An installed copy may lie inside somebody else's repository.
    if _git(root, "rev-parse", "--show-toplevel") == str(root) and (
        commit := _git(root, "rev-parse", "HEAD")
    ):
        return f"{commit}-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else commit
    return f"{_PACKAGE} {_version(_PACKAGE)}"


def source_digest() -> str:
    """Hex sha256 of the code that this process runs: every .py and .yaml of our packages, wherever they lie."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for path in sorted(path for name in _SOURCES for path in (root / name).rglob("*")):
        if path.suffix in (".py", ".yaml"):
            contents = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(root).as_posix()} {contents}\n".encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide results; nothing is imported for it."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _LIBRARIES}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
