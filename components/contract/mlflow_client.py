"""MLflow's client, made quiet and patient, and its errors in one line.

MLflow takes seconds to import, so it is imported where it is used. Its own client tries every request again, also those
that make something anew each time: that is switched off, and `outages.py` decides.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from components.contract import outages
from components.contract.database import database_path
from components.contract.outages import Errors, Service
from components.contract.printable import one_line
from components.contract.store.s3_errors import outage as s3_outage
from llava.errors import LlavaError

_AWAY = frozenset((408, 429, 500, 502, 503, 504))
_ANEW = frozenset(("create_model_version", "create_run", "log_table"))
"""Calls that are not done twice: what they make, they make again. See `made_once`."""
_STATUS = re.compile(r"too many (\d{3}) error responses|failed with error code (\d{3})")


class TrackingError(LlavaError):
    """MLflow did not take what it was given; the message names its URI."""


_clients: dict[tuple[int, str], Any] = {}


class _Patient:
    """MLflow's client, whose calls wait for a service that is away."""

    def __init__(self, uri: str, impatient: Any) -> None:
        self._uri, self._impatient = uri, impatient

    def __getattr__(self, name: str) -> Any:
        if name in _ANEW:
            raise TypeError(f"{name}: not to be done twice, so it goes through made_once")
        call = getattr(self._impatient, name)

        @functools.wraps(call)
        def patient(*args: Any, **named: Any) -> Any:
            outage = functools.partial(_outage, self._uri)
            return outages.persist(_service(self._uri), lambda: call(*args, **named), outage)

        return patient


def client(uri: str) -> Any:
    """MLflow's client for `uri`; where MLflow is away its calls wait as `outages.py` says."""
    return _Patient(uri, impatient_client(uri))


def impatient_client(uri: str) -> Any:
    """MLflow's client for `uri`, made once per process, with its noise turned down; it tries nothing twice."""
    quiet = {
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "AWS_MAX_ATTEMPTS": "1",  # of the client with which MLflow puts files on S3
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
        os.environ["MLFLOW_S3_ENDPOINT_URL"] = endpoint
    key = (os.getpid(), uri)
    if key not in _clients:
        if (database := database_path(uri)) is not None:
            database.parent.mkdir(parents=True, exist_ok=True)
        # It tells each failure of its database at length, and raises it as well.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        from mlflow import MlflowClient

        for logger in ("mlflow", "alembic"):
            logging.getLogger(logger).setLevel(logging.WARNING)
        _clients[key] = MlflowClient(tracking_uri=uri, registry_uri=uri)
    return _clients[key]


def made_once(
    uri: str, make: Callable[[Any], str], find: Callable[[Any], list[str]], undo: Callable[[Any, str], None]
) -> str:
    """The name of what `make` makes at `uri`, once, though its answer may be lost; each is given a client.

    Before another try `find` looks whether an earlier one came through, and after it whether one did so late: the first
    that `find` gives counts, and `undo` removes the others. `find` gives what this call made, and nothing else.
    """
    mlflow, tries = impatient_client(uri), 0

    def once() -> str:
        nonlocal tries
        if tries and (there := find(mlflow)):
            return there[0]
        tries += 1
        return make(mlflow)

    made = outages.persist(_service(uri), once, functools.partial(_outage, uri))
    if tries > 1:
        made, *others = find(client(uri)) or [made]
        for other in others:
            undo(client(uri), other)
    return made


@contextlib.contextmanager
def errors(uri: str) -> Iterator[None]:
    try:
        yield
    except LlavaError:
        raise
    except Exception as error:
        raise TrackingError(f"MLflow at {uri}: {one_line(error)}") from error


def _service(uri: str) -> Service:
    return outages.service(f"MLflow at {uri}")


def _outage(uri: str, errors: Errors) -> str | None:
    """Why a call was not answered, in a few words; None where it was."""
    import requests
    from mlflow.exceptions import MlflowException, RestException

    broken = requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError
    for one in errors:
        if isinstance(one, requests.HTTPError) and one.response is not None:
            return f"HTTP {one.response.status_code}" if one.response.status_code in _AWAY else None
        if isinstance(one, MlflowException) and (why := _told(uri, one)):
            return why
        if isinstance(one, RestException | LlavaError):
            return None
        if isinstance(one, (requests.ConnectionError, requests.Timeout, *broken)):
            return outages.brief(errors[errors.index(one) :])
        if why := s3_outage(one):
            return f"the store of its files: {why}"
    return None


def _told(uri: str, error: Any) -> str | None:
    """Why MLflow or its database is away, from the answer that it gave."""
    from mlflow.exceptions import RestException

    text = str(error)
    if found := _STATUS.search(text):
        status = int(found[1] or found[2])
        return f"HTTP {status}" if status in _AWAY else None
    if isinstance(error, RestException) and error.error_code in {"INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED"}:
        return str(error.error_code)
    if error.error_code != "TEMPORARILY_UNAVAILABLE":
        return None
    # Of an SQLite file this is said also where it cannot be read or written at all, which does not pass.
    return "its database does not answer" if database_path(uri) is None or "locked" in text else None
