"""An S3 server on this machine, in a process of its own, and before it a proxy that can disturb what passes.

`boto3` looks at what is there: it is not what lorafuse reads and writes with.
"""

import http.client
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SERVE = """
import sys, threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
# What a fault may do: answer, break the connection before or after the server has heard or within its
# answer, or wait.
Fault = Callable[
    [str, str], Any
]  # (method, path with query) → (status, body), "cut", "lost", "short" or None


class S3Server:
    """`url` is that of the proxy, `log` has (method, path) of each request, `faults` are asked in turn."""

    def __init__(self, home: Path) -> None:
        self._errors = open(home / "moto.log", "wb")
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )
        assert self._process.stdout
        self.port = int(self._process.stdout.readline())
        self.log: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._proxy.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._proxy.server_address[1]}"
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
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

    @contextmanager
    def disturbed(self, *faults: Fault) -> Iterator[None]:
        self.faults = [*faults]
        try:
            yield
        finally:
            self.faults = []

    def close(self) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(10)
        self._errors.close()


def times(n: int, what: Any, method: str = "", part: str = "") -> Fault:
    """A fault of the first n requests of that method whose path has that part."""
    left, lock = [n], threading.Lock()

    def fault(found: str, path: str) -> Any:
        with lock:
            if found.startswith(method) and part in path and left[0] > 0:
                left[0] -= 1
                return what
        return None

    return fault


def every(nth: int, what: Any) -> Fault:
    """A fault of every nth request."""
    n, lock = [0], threading.Lock()

    def fault(found: str, path: str) -> Any:
        with lock:
            n[0] += 1
            return what if n[0] % nth == 0 else None

    return fault


def _handler(server: S3Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            with suppress(ConnectionError):
                super().handle_one_request()

        def _pass(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            server.log.append((self.command, self.path))
            faults = server.faults
            done = next((d for fault in faults if (d := fault(self.command, self.path))), None)
            if isinstance(done, float):
                time.sleep(done)
            if done == "cut" or faults is not server.faults:  # who asked is gone, and shall have no effect
                self._break()
            elif isinstance(done, tuple):
                self._answer(done[0], {}, done[1])
            else:
                status, headers, data = self._asked(body)
                if done == "lost":
                    self._break()
                else:
                    self._answer(status, headers, data, short=done == "short")

        def _asked(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            data = response.read()
            connection.close()
            return response.status, dict(response.headers), data

        def _answer(self, status: int, headers: dict[str, str], data: bytes, short: bool = False) -> None:
            self.send_response(status)
            length = headers.get("Content-Length") if self.command == "HEAD" else None
            for name, value in headers.items():
                if name.lower() not in (
                    "content-length",
                    "transfer-encoding",
                    "connection",
                    "date",
                    "server",
                ):
                    self.send_header(name, value)
            self.send_header("Content-Length", length or str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if short else data)
            if short:
                self._break()

        def _break(self) -> None:
            self.close_connection = True
            self.wfile.flush()
            with suppress(OSError):
                self.connection.shutdown(2)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Nothing is printed."""

    return Handler
