"""obstore's client of a bucket: how long it waits, how often it asks again, and with which credentials."""

import os
from datetime import timedelta
from functools import cache
from threading import Lock
from typing import Any

from lorafuse._version import __version__
from lorafuse.errors import UsageError, shown
from lorafuse.files.cloud_aws import aws_options
from lorafuse.files.cloud_errors import not_installed, unusable
from lorafuse.files.cloud_url import AZURE, S3, CloudUrl
from lorafuse.files.names import scheme_of

# A call is made again after an error that may pass: connections that break, 5xx, throttling.
N_RETRIES, FIRST_WAIT_S, LONGEST_WAIT_S, ALL_WAITS_S = 8, 0.2, 8, 90
CONNECT_S, REQUEST_S = 5, 60
_LOCK = Lock()
# Where these say so, HTTP without TLS is allowed: to an emulator on this machine, as a rule.
AZURE_ENDPOINTS = ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
GOOGLE_HTTP = "GOOGLE_ALLOW_HTTP"


def opened(url: CloudUrl) -> Any:
    """The store of a bucket, which all who use it share. Raises UsageError."""
    with _LOCK:
        return _store(url.root)


@cache
def _store(root: str) -> Any:
    os.environ.setdefault("TOKIO_WORKER_THREADS", "2")  # of obstore; one a core would hold memory in each
    try:
        from obstore.store import MemoryStore, from_url
    except ImportError:
        raise not_installed(root) from None
    scheme = scheme_of(root)
    if scheme == "memory":
        return MemoryStore()
    client = {
        "user_agent": f"lorafuse/{__version__}",
        "connect_timeout": timedelta(seconds=CONNECT_S),
        "timeout": timedelta(seconds=REQUEST_S),
    }
    retries = {
        "max_retries": N_RETRIES,
        "backoff": {
            "init_backoff": timedelta(seconds=FIRST_WAIT_S),
            "max_backoff": timedelta(seconds=LONGEST_WAIT_S),
        },
        "retry_timeout": timedelta(seconds=ALL_WAITS_S),
    }
    options = aws_options(os.environ, root) if scheme in S3 else {}
    if _asks_for_http(scheme):
        client["allow_http"] = True
    client |= options.pop("client_options", {})
    try:
        return from_url(root, client_options=client, retry_config=retries, **options)  # type: ignore[call-overload]
    except Exception as e:
        if "Account must be specified" in str(e):
            raise UsageError(
                f"{shown(root)}: names no account; set AZURE_STORAGE_ACCOUNT_NAME, or give "
                "abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/FOLDER."
            ) from None
        raise unusable(e, root) from None


def _asks_for_http(scheme: str) -> bool:
    if scheme in AZURE:
        return any(os.environ.get(name, "").startswith("http://") for name in AZURE_ENDPOINTS)
    return scheme == "gs" and os.environ.get(GOOGLE_HTTP, "").lower() in ("1", "true")
