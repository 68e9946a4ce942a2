"""MLflow's client, made quiet, and its errors in one line.

MLflow takes seconds to import, so it is imported where it is used.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from components.contract.database import database_path
from llava.errors import LlavaError


class TrackingError(LlavaError):
    """MLflow did not take what it was given; the message names its URI."""


_clients: dict[tuple[int, str], Any] = {}


def client(uri: str) -> Any:
    """MLflow's client for `uri`, made once per process, with its noise turned down."""
    quiet = {
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
        os.environ["MLFLOW_S3_ENDPOINT_URL"] = endpoint
    key = (os.getpid(), uri)
    if key not in _clients:
        if (database := database_path(uri)) is not None:
            database.parent.mkdir(parents=True, exist_ok=True)
        from mlflow import MlflowClient

        for logger in ("mlflow", "alembic"):
            logging.getLogger(logger).setLevel(logging.WARNING)
        _clients[key] = MlflowClient(tracking_uri=uri)
    return _clients[key]


@contextlib.contextmanager
def errors(uri: str) -> Iterator[None]:
    try:
        yield
    except LlavaError:
        raise
    except Exception as error:
        raise TrackingError(f"MLflow at {uri}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300] or type(error).__name__
