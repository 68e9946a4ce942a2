"""What went wrong with an S3 server, in the words of who has to set it right."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from components.contract.outages import CUT, brief, chain

_AWAY = frozenset((408, 429, 500, 502, 503, 504, 509))
_AWAY_CODES = frozenset(
    (
        "BadDigest",
        "InternalError",
        "RequestThrottledException",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
    )
)


@contextlib.contextmanager
def missing_is_none() -> Iterator[None]:
    """Pass over "no such key", so that the caller's next line answers None; no bucket stays an error."""
    from botocore.exceptions import ClientError

    try:
        yield
    except ClientError as error:
        if status(error) != 404 or no_bucket(error):
            raise


def status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def no_bucket(error: Any) -> bool:
    return bool(error.response.get("Error", {}).get("Code") == "NoSuchBucket")


def reason(error: Any, bucket: str) -> str:
    details = error.response.get("Error", {})
    code, message = details.get("Code", "?"), details.get("Message", "")
    if no_bucket(error):
        return f"bucket {bucket} does not exist: create it, or correct the root"
    if status(error) in {401, 403}:
        return (
            f"the S3 server refuses these credentials here ({code}): check AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, and that they may read and write this prefix"
        )
    return f"the S3 server answers {status(error)} {code} {message}".rstrip()


def outage(error: BaseException) -> str | None:
    """Why the server did not answer, in a few words; None for every other error."""
    from boto3.exceptions import RetriesExceededError
    from botocore import exceptions as boto

    if isinstance(error, boto.ClientError):
        code = error.response.get("Error", {}).get("Code", "")
        return f"HTTP {status(error)} {code}".rstrip() if away(status(error), code) else None
    cut = (
        boto.ConnectionClosedError,
        boto.IncompleteReadError,
        boto.ResponseStreamingError,
        boto.ChecksumError,
        boto.FlexibleChecksumError,
        RetriesExceededError,
    )
    if isinstance(error, cut):
        return CUT
    if isinstance(error, boto.ConnectionError | boto.ReadTimeoutError):
        return brief(chain(error))
    return None


def away(http_status: int, code: str) -> bool:
    """Whether an answer with that status and S3's code for the error means that another try may do better."""
    return http_status in _AWAY or code in _AWAY_CODES


def connection_reason(error: Exception) -> str:
    from botocore.exceptions import CredentialRetrievalError, NoCredentialsError, PartialCredentialsError

    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if isinstance(error, NoCredentialsError | PartialCredentialsError | CredentialRetrievalError):
        return "no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a role or profile)"
    where = f"AWS_ENDPOINT_URL={endpoint}" if endpoint else "AWS itself, since AWS_ENDPOINT_URL is not set"
    if outage(error) == CUT:
        return (
            f"answers of {where} break off in the middle: run the same command again, or see to the network"
        )
    return f"no answer from {where}: set AWS_ENDPOINT_URL to a running S3 server ({type(error).__name__})"
