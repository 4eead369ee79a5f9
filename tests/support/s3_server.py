"""An S3 server on this machine, in a process of its own, behind a proxy that can disturb what passes.

`boto3` looks at what is there: it is not what lorafuse reads and writes with.
"""

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from disturbing_proxy import DisturbingProxy

SERVE = """
import sys, threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class S3Server(DisturbingProxy):
    """The server, behind the proxy."""

    def __init__(self, home: Path) -> None:
        self._errors = open(home / "moto.log", "wb")
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )
        assert self._process.stdout
        super().__init__(int(self._process.stdout.readline()))
        self._client: Any = None

    @property
    def client(self) -> Any:
        """boto3's, past the proxy."""
        import boto3

        if self._client is None:
            self._client = boto3.client(
                "s3",
                endpoint_url=f"http://127.0.0.1:{self.port}",
                region_name="us-east-1",
                aws_access_key_id="key",
                aws_secret_access_key="hush",
            )
        return self._client

    def bucket(self, name: str) -> None:
        """An empty bucket of that name."""
        with suppress(Exception):
            self.client.create_bucket(Bucket=name)
        for key in self.keys(name):
            self.client.delete_object(Bucket=name, Key=key)

    def upload(self, path: Path, bucket: str) -> str:
        """The URL of a copy of a directory."""
        for file in path.rglob("*"):
            if file.is_file():
                key = f"{path.name}/{file.relative_to(path).as_posix()}"
                self.client.put_object(Bucket=bucket, Key=key, Body=file.read_bytes())
        return f"s3://{bucket}/{path.name}"

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]

    def files(self, url: str) -> dict[str, bytes]:
        """What lies below a URL."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        return {
            key.removeprefix(f"{prefix}/"): self.client.get_object(Bucket=bucket, Key=key)["Body"].read()
            for key in self.keys(bucket, f"{prefix}/")
        }

    def uploads(self, bucket: str) -> list[str]:
        """The keys of uploads that nobody completed or aborted."""
        found = self.client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
        return [upload["Key"] for upload in found]

    def close(self) -> None:
        super().close()
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(10)
        self._errors.close()
