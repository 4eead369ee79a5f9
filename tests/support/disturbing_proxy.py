"""What lies between lorafuse and a server of an object store: a proxy that can disturb what passes."""

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
# What a fault may do: answer, break the connection before or after the server has heard or within its
# answer, or wait.
Fault = Callable[
    [str, str], Any
]  # (method, path with query) → (status, body), "cut", "lost", "short" or None


class DisturbingProxy:
    """Before the server at `port` of this machine. `url` is that of the proxy, `log` has (method, path) of
    each request, `faults` are asked in turn."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.log: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._proxy.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._proxy.server_address[1]}"
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()

    @contextmanager
    def disturbed(self, *faults: Fault) -> Iterator[None]:
        self.faults = [*faults]
        try:
            yield
        finally:
            self.faults = []

    def asked(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """What the server answers: status, headers, body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        data = response.read()
        connection.close()
        return response.status, dict(response.headers), data

    def close(self) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()


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


def _handler(server: DisturbingProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or the body of an answer waits for 40 ms

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
                status, headers, data = server.asked(self.command, self.path, dict(self.headers), body)
                if done == "lost":
                    self._break()
                else:
                    self._answer(status, headers, data, short=done == "short")

        def _answer(self, status: int, headers: dict[str, str], data: bytes, short: bool = False) -> None:
            self.send_response(status)
            sizes = [value for name, value in headers.items() if name.lower() == "content-length"]
            length = sizes[0] if sizes and self.command == "HEAD" else None
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


@contextmanager
def told_soon(monkeypatch: Any) -> Iterator[None]:
    """Clients of object stores are made anew, and do not ask for long."""
    from lorafuse.files import cloud_client

    monkeypatch.setattr(cloud_client, "N_RETRIES", 3)
    monkeypatch.setattr(cloud_client, "FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(cloud_client, "LONGEST_WAIT_S", 0.1)
    cloud_client._store.cache_clear()
    yield
    cloud_client._store.cache_clear()
