"""An S3 server for a benchmark: SeaweedFS on free loopback ports, gone at the end."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

BUCKET = "benchmark"


@dataclass(frozen=True)
class S3:
    """A running server."""

    endpoint: str
    env: dict[str, str]
    """What points every AWS client at it."""

    @property
    def root(self) -> str:
        """The bucket."""
        return f"s3://{BUCKET}"

    def client(self) -> Any:
        """A boto3 client."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
        )

    def upload(self, folder: Path) -> dict[str, list[str]]:
        """Bring `folder` to `shards/`; a presigned URL for each file, by the folder inside that it lies in."""
        client, urls = self.client(), dict[str, list[str]]()
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            inside = path.relative_to(folder)
            where = {"Bucket": BUCKET, "Key": f"shards/{inside}"}
            client.upload_file(str(path), **where)
            url = client.generate_presigned_url("get_object", Params=where, ExpiresIn=6 * 3600)
            urls.setdefault(inside.parts[0], []).append(url)
        return urls


@contextmanager
def s3_server(folder: Path) -> Iterator[S3 | None]:
    """A server whose data lie in `folder`; None where `weed` is not installed."""
    weed = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
    if weed is None:
        yield None
        return
    (folder / "data").mkdir(parents=True)
    access, secret = uuid4().hex, uuid4().hex
    identity = {
        "name": "benchmark",
        "credentials": [{"accessKey": access, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    master, volume, filer, port, admin = (str(_free_port()) for _ in range(5))
    command = [
        weed, "mini", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-master.port={master}",
        f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={port}", f"-admin.port={admin}",
        "-admin.ui=false", "-webdav=false", f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0",
        "-s3.port.lance=0", "-master.telemetry=false",
    ]  # fmt: skip
    endpoint = f"http://127.0.0.1:{port}"
    env = {
        "AWS_ENDPOINT_URL": endpoint,
        "S3_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": access,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env={**os.environ, **env}, stdout=log, stderr=log)
    server = S3(endpoint, env)
    try:
        _wait_until_it_takes_writes(server, process)
        yield server
    finally:
        process.kill()
        process.wait()


def _wait_until_it_takes_writes(server: S3, process: subprocess.Popen[bytes]) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    client, end = server.client(), time.monotonic() + 90
    while time.monotonic() < end and process.poll() is None:
        with suppress(BotoCoreError, ClientError):
            with suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
            return
        time.sleep(0.3)
    raise SystemExit("SeaweedFS does not start")


def _free_port() -> int:
    """A port that is free, and free 10,000 above too, where SeaweedFS opens a second one."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with suppress(OSError), socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", port))
            two.bind(("127.0.0.1", port + 10_000))
            return port
