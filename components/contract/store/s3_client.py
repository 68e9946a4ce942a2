"""boto's client for S3, made once per process and environment, and how long a request of it is tried again."""

from __future__ import annotations

import math
import os
import threading
from typing import Any

from components.contract import outages
from components.contract.outages import Errors, Patience, Service
from components.contract.store.s3_errors import away, outage

_PART = 32 << 20
_PATIENCE = "llava-patience"
_FIRST_PAUSE_OF_ARROW = 0.05

_clients: dict[tuple[Any, ...], Any] = {}
_clients_lock = threading.Lock()


def client(hasty: bool) -> Any:
    """One client per environment: boto's clients are safe to share between threads, making one is not."""
    names = (
        "AWS_ENDPOINT_URL",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_PROFILE",
    )
    environment = tuple(os.environ.get(name) for name in names)
    key = (os.getpid(), hasty, *environment)
    with _clients_lock:
        if key not in _clients:
            import boto3
            from botocore.config import Config

            config = Config(
                connect_timeout=2 if hasty else 3,
                read_timeout=4 if hasty else 30,
                retries={"mode": "legacy", "total_max_attempts": 1},
                max_pool_connections=16,
                s3={"addressing_style": "path"} if environment[0] else None,
            )
            made = boto3.Session().client("s3", config=config, region_name=region())
            if not hasty:
                # Every request of the client goes through here, those of its transfers in parts and pages too.
                made.meta.events.unregister("needs-retry.s3", unique_id="retry-config-s3")
                made.meta.events.register("needs-retry.s3", _pause, unique_id=_PATIENCE)
            _clients[key] = made
        return _clients[key]


def _pause(response: Any, caught_exception: Any, request_dict: dict[str, Any], **_: Any) -> float | None:
    """Seconds until a request is tried again, None for no more: what boto asks after every answer and error."""
    if caught_exception is not None:
        why = outage(caught_exception)
    else:
        status_, code = response[0].status_code, response[1].get("Error", {}).get("Code", "")
        why = f"HTTP {status_} {code}".rstrip() if away(status_, code) else None
    if why is None:
        if caught_exception is None:
            service().answered()
        return None
    context = request_dict["context"]
    patience: Patience = context.setdefault(_PATIENCE, Patience(service()))
    return patience.pause(why)


def service() -> Service:
    return outages.service(f"S3 at {os.environ.get('AWS_ENDPOINT_URL') or 'AWS'}")


def broken(errors: Errors) -> str | None:
    """As `outage`; a transfer in parts whose end was answered with an error may be over, and begins again."""
    from botocore.exceptions import ClientError

    for error in errors:
        if isinstance(error, ClientError) and error.response.get("Error", {}).get("Code") == "NoSuchUpload":
            return "NoSuchUpload"
        if why := outage(error):
            return why
    return None


def tries_of_arrow() -> int:
    """pyarrow has its own client, which doubles its pauses without end: so many tries take as long as ours."""
    return max(1, math.ceil(math.log2(1 + outages.seconds() / _FIRST_PAUSE_OF_ARROW)))


def region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def transfer() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=2 * _PART, multipart_chunksize=_PART, max_concurrency=4)
