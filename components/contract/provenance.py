"""Which code and which libraries made an artifact."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

_LIBRARIES = ("torch", "ray", "deepspeed", "transformers", "mlflow", "pyarrow")
_PACKAGE = "llava-workflow"
_SOURCES = ("llava", "components", "workflows")


@functools.cache
def code_revision() -> str:
    """The git commit of this checkout ("-dirty" with uncommitted changes), else the package's version."""
    root = source_root()
    # An installed copy may lie inside somebody else's repository.
    if _git(root, "rev-parse", "--show-toplevel") == str(root) and (
        commit := _git(root, "rev-parse", "HEAD")
    ):
        return f"{commit}-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else commit
    return f"{_PACKAGE} {_version(_PACKAGE)}"


def source_root() -> Path:
    """The folder that holds the packages which this process runs."""
    return Path(__file__).resolve().parents[2]


def installed_root() -> Path | None:
    """The folder of the packages as they are installed here, editable or not; None where they are not."""
    try:
        distribution = metadata.distribution(_PACKAGE)
    except metadata.PackageNotFoundError:
        return None
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        return Path(url2pathname(urlparse(origin["url"]).path)).resolve()
    return Path(str(distribution.locate_file(""))).resolve()


def source_digest(root: Path | None = None) -> str:
    """Hex sha256 of the code under `root`, or else of what this process runs: our packages' .py and .yaml files."""
    root = root or source_root()
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
