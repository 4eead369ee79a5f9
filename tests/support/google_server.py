"""The requests of Google's object store, in its XML dialect, translated for the S3 server of the tests: the
two differ in the names of headers and in that conditions are about generations, which are kept here.

It is made from Google's documentation, and says nothing of what Google's own servers do beyond it.
"""

import json
import threading
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from disturbing_proxy import DisturbingProxy

IF_GENERATION, GENERATION, COPIED = "x-goog-if-generation-match", "x-goog-generation", "x-goog-copy-source"
# The S3 server asks who it is, and does not check it.
SIGNED = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
UNMET = b"<?xml version='1.0'?><Error><Code>PreconditionFailed</Code><Message>no</Message></Error>"


class GoogleServer(DisturbingProxy):
    """The proxy before an S3 server with a bucket `models`."""

    scheme = "gs"

    def __init__(self, port: int, home: Path) -> None:
        super().__init__(port)
        self._lock = threading.Lock()
        self._generations: dict[str, int] = {}
        self._n = 0
        self._account = home / "account.json"
        account = {"gcs_base_url": self.url, "disable_oauth": True}
        account |= {"client_email": "", "private_key": "", "private_key_id": ""}
        self._account.write_text(json.dumps(account))

    def settings(self) -> dict[str, str]:
        return {"GOOGLE_SERVICE_ACCOUNT": str(self._account), "GOOGLE_ALLOW_HTTP": "true"}

    def store(self) -> Any:
        """obstore's of S3, past the proxy."""
        from obstore.store import S3Store

        return S3Store(
            "models", endpoint=f"http://127.0.0.1:{self.port}", region="us-east-1", access_key_id="key",
            secret_access_key="hush", client_options={"allow_http": True},
        )  # fmt: skip

    def asked(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        name, _, query = path.partition("?")
        name = quote(unquote(name))
        headers = {header.lower(): value for header, value in headers.items()} | {"authorization": SIGNED}
        wanted = headers.pop(IF_GENERATION, None)
        if source := headers.pop(COPIED, None):
            headers["x-amz-copy-source"] = source
        with self._lock:
            if wanted is not None and int(wanted) != self._generations.get(name, 0):
                return 412, {}, UNMET
            answer = super().asked(method, f"{name}?{query}" if query else name, headers, body)
            self._count(method, name, query, answer[0])
            return answer[0], {**answer[1], GENERATION: str(self._generations.get(name, 0))}, answer[2]

    def _count(self, method: str, name: str, query: str, status: int) -> None:
        """An object that is replaced gets another generation."""
        if status >= 300:
            return
        if (method == "PUT" and not query) or (method == "POST" and query.startswith("uploadId")):
            self._n += 1
            self._generations[name] = self._n
        elif method == "DELETE" and not query:
            self._generations.pop(name, None)
