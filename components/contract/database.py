"""The SQLite file of an MLflow store, as a path and as a URI: the one place where one becomes the other."""

from __future__ import annotations

import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

from llava.errors import RefusedInput

_SQLITE = "sqlite:///"


def database_uri(path: Path) -> str:
    """The URI of the SQLite file `path`; RefusedInput where MLflow would take another file for it."""
    return checked(_SQLITE + str(path.expanduser().absolute()))


def checked(uri: str) -> str:
    """`uri`; RefusedInput for an SQLite file whose path contains `%`, `?` or `#`.

    MLflow and the libraries below it decode such a path once, twice or not at all, and make files beside it.
    """
    found = sorted({mark for mark in "%?#" if uri.startswith(_SQLITE) and mark in uri})
    if found:
        raise RefusedInput(
            f"{uri.removeprefix(_SQLITE)}: MLflow cannot keep its database in a path with {' or '.join(found)}: "
            "rename the folder, or name another root"
        )
    return uri


def database_path(uri: str) -> Path | None:
    """The SQLite file of a tracking URI; None where it names a server or another database."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def is_new(uri: str) -> bool:
    """Whether `uri` is an SQLite file that is not there yet."""
    database = database_path(uri)
    return database is not None and not database.exists()


def check_writable(uri: str) -> None:
    """RefusedInput where the SQLite file of `uri` cannot be made or written: MLflow would try for minutes.

    A file that another process writes just now is one that can be written. One that is not there is not made.
    """
    database = database_path(uri)
    if database is None:
        return
    try:
        if database.exists():
            with closing(sqlite3.connect(database, timeout=0, isolation_level=None)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")
        else:
            folder = next(path for path in database.parents if path.exists())
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"x")
    except (OSError, sqlite3.Error) as error:
        if "locked" in str(error):
            return
        reason = getattr(error, "strerror", None) or str(error)
        raise RefusedInput(
            f"MLflow database {database}: cannot write there ({reason}): make room, name another root, or set "
            "MLFLOW_TRACKING_URI"
        ) from None
