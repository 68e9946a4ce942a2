"""Digests: what makes two runs the same artifact, and fingerprints of what comes from outside the root."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from components.contract.store import open_store
from components.contract.store.files import Found, Links, Tree
from llava.errors import RefusedInput


def canonical_json(value: Any) -> bytes:
    """JSON in one spelling only: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def sha256_of(value: Any) -> str:
    """Hex sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def artifact_digest(
    component: str,
    version: str,
    recipe: Mapping[str, Any],
    inputs: Mapping[str, str],
    external: Mapping[str, str],
) -> str:
    """The digest of an artifact, known before it exists: hex sha256 of what it is made from."""
    return sha256_of(
        {
            "component": component,
            "version": version,
            "recipe": dict(recipe),
            "inputs": dict(inputs),
            "external": dict(external),
        }
    )


def fingerprint(paths: Iterable[str | Path] | str | Path, links: Links = Links.ALL) -> str:
    """Hex sha256 over sorted (relative path, bytes, ETag or mtime in ns) of files, folders or S3 prefixes.

    Cheap on purpose: no contents are read. Which links of a folder are followed, `links` says, as for whoever reads
    it; what is not read enters with its name and the reason. Raises RefusedInput for a path where nothing lies.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    found: list[tuple[str, int, str]] = []
    for path in paths:
        lines = _s3_lines(str(path)) if str(path).startswith("s3://") else _local_lines(Path(path), links)
        if not lines:
            raise RefusedInput(
                f"{path}: nothing lies there; give a file, a folder or an s3:// prefix that holds files"
            )
        found += lines
    return sha256_of(sorted(found))


def _local_lines(path: Path, links: Links) -> list[tuple[str, int, str]]:
    path = path.expanduser()
    if path.is_file():
        status = path.stat()
        return [(path.name, status.st_size, str(status.st_mtime_ns))]
    if not path.is_dir():
        return []
    return [
        (one.key, one.status.st_size, str(one.status.st_mtime_ns))
        if isinstance(one, Found)
        else (one.key, -1, one.reason)
        for one in Tree(str(path.absolute()), links).walk()
    ]


def _s3_lines(uri: str) -> list[tuple[str, int, str]]:
    inside = [(entry.key, entry.size, entry.version) for entry in open_store(uri).list()]
    if inside:
        return inside
    folder, _, name = uri.rstrip("/").rpartition("/")
    if folder in {"s3:/", "s3:"}:
        return []
    stat = open_store(folder).stat(name)
    return [] if stat is None else [(name, stat.size, stat.version)]
