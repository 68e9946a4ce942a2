"""An S3 prefix as a store: conditional writes (If-None-Match, If-Match), multipart upload, paging.

Endpoint, region and credentials come from the environment as every AWS tool reads them (`AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, profiles, roles).
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse
from uuid import uuid4

from components.contract import outages
from components.contract.outages import Patience
from components.contract.store.base import SCRATCH, Entry, Stat, Store, StoreError, check_key
from components.contract.store.s3_client import broken, client, region, service, transfer, tries_of_arrow
from components.contract.store.s3_errors import (
    away,
    connection_reason,
    missing_is_none,
    no_bucket,
    outage,
    reason,
    status,
)
from llava.errors import RefusedInput

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_WRITER = "llava-writer"  # metadata: tells our own write, whose answer was lost, from another writer's
_AT_ONCE = 1000  # S3's limit for one request that lists or deletes
_CONFLICTS = 8

Result = TypeVar("Result")


class S3Store(Store):
    """Objects under one prefix of one bucket."""

    def __init__(self, bucket: str, prefix: str = "") -> None:
        if not _BUCKET.fullmatch(bucket):
            raise RefusedInput(f"s3://{bucket}: not a bucket's name; give s3://bucket/prefix")
        self._bucket = bucket
        self._prefix = prefix.strip("/")
        if self._prefix:
            check_key(self._prefix)
        self._base = f"{self._prefix}/" if self._prefix else ""
        self.uri = f"s3://{bucket}/{self._prefix}".rstrip("/")

    @classmethod
    def from_uri(cls, uri: str) -> S3Store:
        """The store for `s3://bucket/prefix`; RefusedInput for anything that is not one."""
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        return cls(bucket, prefix)

    def fetch(self, key: str, most: int | None = None) -> tuple[bytes, str] | None:
        """Bytes and ETag from one answer, so that they belong together."""

        def whole() -> tuple[bytes, str]:
            answer = self._client.get_object(**self._at(key))
            self._bound(key, answer["ContentLength"], most)
            return answer["Body"].read(), answer["ETag"]

        with self._errors(key), missing_is_none():
            return self._persist(whole)
        return None

    def write(self, key: str, data: bytes) -> None:
        """One PUT."""
        with self._errors(key):
            self._client.put_object(**self._at(key), Body=data)

    def create(self, key: str, data: bytes) -> bool:
        """PUT with `If-None-Match: *`: 412 means taken, 409 means try again."""
        return self._put_if(key, data, IfNoneMatch="*")

    def swap(self, key: str, data: bytes, version: str) -> bool:
        """PUT with `If-Match: <ETag>`: 412 means changed, 404 means gone, 409 means try again."""
        return self._put_if(key, data, IfMatch=version)

    def stat(self, key: str) -> Stat | None:
        """Size and ETag, or None."""
        with self._errors(key), missing_is_none():
            answer = self._client.head_object(**self._at(key))
            return Stat(answer["ContentLength"], answer["ETag"])
        return None

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Objects, fetched page by page, in the order of their keys."""
        # Other tools mark "folders" by empty objects that end in "/"; and not every server keeps to S3's order
        # (SeaweedFS lists folder by folder).
        files = (entry for entry in self._objects(prefix) if not _is_hidden(entry.key))
        yield from sorted(files, key=lambda entry: entry.key.encode())

    def folders(self) -> Sequence[str]:
        """The common prefixes, by one request per thousand."""
        with self._errors(""):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._base, Delimiter="/"
            )
            found = [item["Prefix"] for page in pages for item in page.get("CommonPrefixes", ())]
        return sorted(prefix.removeprefix(self._base).rstrip("/") for prefix in found)

    def delete(self, key: str) -> None:
        """DELETE, which S3 answers alike whether or not the object exists."""
        with self._errors(key):
            self._client.delete_object(**self._at(key))

    def delete_all(self, prefix: str = "") -> None:
        """Delete a thousand objects per request, other tools' folder marks too."""
        folder = prefix.strip("/")
        entries = iter(tuple(self._objects(f"{check_key(folder)}/" if folder else "")))
        with self._errors(prefix):
            while batch := [{"Key": self._base + entry.key} for entry in islice(entries, _AT_ONCE)]:
                self._delete_some(batch)

    def _delete_some(self, batch: Sequence[dict[str, str]]) -> None:
        """One request; the answer says for each object whether it is gone, and some may have to be asked again."""
        patience = Patience(service())
        while batch:
            answer = self._client.delete_objects(
                Bucket=self._bucket, Delete={"Objects": batch, "Quiet": True}
            )
            failed = answer.get("Errors", ())
            for one in failed:
                if not (away(0, one.get("Code", "")) and patience.wait(one["Code"])):
                    raise StoreError(f"s3://{self._bucket}/{one['Key']}: not deleted: {one.get('Message')}")
            batch = [{"Key": one["Key"]} for one in failed]

    def upload(self, path: Path | str, key: str) -> None:
        """Upload in parts where the file is large."""
        with self._errors(key):
            self._persist(lambda: self._client.upload_file(str(path), **self._at(key), Config=transfer()))

    def download(self, key: str, path: Path | str) -> None:
        """Download in parts beside `path`, then rename."""
        goal = Path(path)
        goal.parent.mkdir(parents=True, exist_ok=True)
        temporary = goal.parent / f"{SCRATCH}{uuid4().hex}"
        try:
            with self._errors(key):
                self._persist(
                    lambda: self._client.download_file(
                        **self._at(key), Filename=str(temporary), Config=transfer()
                    )
                )
            temporary.replace(goal)
        finally:
            temporary.unlink(missing_ok=True)

    def copy(self, source: Store, key: str, to: str) -> None:
        """Copied by the server, in parts where the object is large."""
        assert isinstance(source, S3Store)
        origin = source._at(key)
        with self._errors(to):
            self._persist(lambda: self._client.copy(origin, **self._at(to), Config=transfer()))

    def chunks(self, key: str, size: int = 8 << 20) -> Iterator[bytes]:
        """The object's bytes as they arrive; a stream that breaks goes on where it ended, in the same object."""
        from botocore.exceptions import BotoCoreError

        with self._errors(key):
            answer = self._client.get_object(**self._at(key))
            version, length = answer["ETag"], answer["ContentLength"]
            patience, got = Patience(service()), 0
            while got < length:
                try:
                    for chunk in answer["Body"].iter_chunks(size):
                        got += len(chunk)
                        patience.advanced()
                        yield chunk
                except BotoCoreError as error:
                    why = outage(error)
                    if why is None or not patience.wait(why):
                        raise
                    answer = self._rest(key, got, length, version)

    def _rest(self, key: str, start: int, length: int, version: str) -> Any:
        """The answer with the bytes from `start` on; StoreError if the object is no longer the one it was."""
        from botocore.exceptions import ClientError

        try:
            answer = self._client.get_object(**self._at(key), Range=f"bytes={start}-", IfMatch=version)
        except ClientError as error:
            if status(error) not in {412, 416}:
                raise
        else:
            if (answer["ETag"], answer["ContentLength"]) == (version, length - start):
                return answer
        raise StoreError(f"{self.uri}/{key}: changed while it was read, {start:,} bytes in: run again")

    def sub(self, prefix: str) -> S3Store:
        """The store for `prefix` under this one."""
        return S3Store(self._bucket, self._base + check_key(prefix.strip("/")))

    def arrow(self) -> tuple[Any, str]:
        """pyarrow's own S3 file system on the same endpoint, and bucket/prefix."""
        from pyarrow.fs import AwsDefaultS3RetryStrategy, S3FileSystem

        class Patient(S3FileSystem):  # type: ignore[misc]
            """One that another process, such as Ray's, does not make again without how often it tries."""

            def __reduce__(self) -> Any:
                return _arrow_of, (uri,)

        uri = self.uri
        options: dict[str, Any] = {
            "connect_timeout": 5,
            "request_timeout": 30,
            "retry_strategy": AwsDefaultS3RetryStrategy(max_attempts=tries_of_arrow()),
        }
        if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
            parsed = urlparse(endpoint)
            options |= {"endpoint_override": parsed.netloc, "scheme": parsed.scheme, "region": region()}
        elif named := os.environ.get("AWS_REGION", os.environ.get("AWS_DEFAULT_REGION")):
            options["region"] = named
        return Patient(**options), f"{self._bucket}/{self._prefix}".rstrip("/")

    def probe(self) -> None:
        """Write under the prefix with short timeouts; RefusedInput says what is wrong and what to set."""
        try:
            self._probe_with(_HastyS3Store(self._bucket, self._prefix))
        except StoreError as error:
            raise RefusedInput(str(error)) from None

    @property
    def _client(self) -> Any:
        return client(hasty=False)

    def _persist(self, call: Callable[[], Result]) -> Result:
        """`call` again where the body of an answer broke, or a transfer in parts cannot go on."""
        return outages.persist(service(), call, broken)

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._base + check_key(key)}

    def _objects(self, prefix: str) -> Iterator[Entry]:
        with self._errors(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._base + prefix, PaginationConfig={"PageSize": _AT_ONCE}
            )
            for page in pages:
                for item in page.get("Contents", ()):
                    yield Entry(item["Key"].removeprefix(self._base), item["Size"], item["ETag"])

    def _put_if(self, key: str, data: bytes, **condition: str) -> bool:
        from botocore.exceptions import ClientError

        writer = uuid4().hex
        with self._errors(key):
            for attempt in range(_CONFLICTS):
                try:
                    self._client.put_object(
                        **self._at(key), Body=data, Metadata={_WRITER: writer}, **condition
                    )
                    return True
                except ClientError as error:
                    code = status(error)
                    if code == 409:
                        time.sleep(0.05 * 2**attempt)
                    elif code in {404, 412} and not no_bucket(error):
                        # A retry after a lost answer finds our own write in the way.
                        return self._writer_of(key) == writer
                    else:
                        raise
        raise StoreError(f"{self.uri}/{key}: {_CONFLICTS} write conflicts in a row (HTTP 409): try again")

    def _writer_of(self, key: str) -> str | None:
        with missing_is_none():
            metadata: dict[str, str] = self._client.head_object(**self._at(key))["Metadata"]
            return metadata.get(_WRITER)
        return None

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Turn boto's errors into one line that names the URI and the way out."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        key = f"{self.uri}/{key}" if key else self.uri
        try:
            yield
        except ClientError as error:
            if status(error) == 404 and not no_bucket(error):
                raise FileNotFoundError(f"{key} does not exist") from None
            raise StoreError(f"{key}: {reason(error, self._bucket)}") from error
        except (BotoCoreError, Boto3Error, ValueError) as error:
            raise StoreError(f"{key}: {connection_reason(error)}") from error


class _HastyS3Store(S3Store):
    """The same prefix for a check before start: short timeouts, and errors that name the root alone."""

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        with super()._errors(""):
            yield

    @property
    def _client(self) -> Any:
        return client(hasty=True)


def _arrow_of(uri: str) -> Any:
    return S3Store.from_uri(uri).arrow()[0]


def _is_hidden(key: str) -> bool:
    return not key or key.endswith("/") or key.rpartition("/")[2].startswith(SCRATCH)
