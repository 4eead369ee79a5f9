"""Azurite, Microsoft's emulator of Azure's object store, on this machine, behind a proxy that can disturb
what passes. It looks at what is there by obstore, past the proxy."""

import base64
import email.utils
import hashlib
import hmac
import os
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

from disturbing_proxy import DisturbingProxy

# As Microsoft publishes them: the same in every emulator.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
INSTALLED = Path(__file__).parents[2] / "build/clouds/node_modules/.bin/azurite-blob"


def azurite() -> str | None:
    """The emulator, where it is installed."""
    return (
        os.environ.get("AZURITE")
        or shutil.which("azurite-blob")
        or (str(INSTALLED) if INSTALLED.exists() else None)
    )


class AzureServer(DisturbingProxy):
    """The emulator with a container `models`, behind the proxy."""

    scheme = "az"

    def __init__(self, home: Path) -> None:
        command = [azurite(), "--blobHost", "127.0.0.1", "--blobPort", "0", "--location", str(home)]
        self._process = subprocess.Popen(
            [*command, "--disableTelemetry", "--skipApiVersionCheck"], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout
        port = next(
            m[1] for line in self._process.stdout if (m := re.search(r"listens on http://.*:(\d+)", line))
        )
        super().__init__(int(port))
        self._make_container()

    def _make_container(self) -> None:
        date, version = email.utils.formatdate(usegmt=True), "2021-08-06"
        signed = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{version}\n"
        signed += f"/{ACCOUNT}/{ACCOUNT}/models\nrestype:container"
        mac = hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()
        headers = {"x-ms-date": date, "x-ms-version": version, "Content-Length": "0"}
        headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(mac).decode()}"
        url = f"http://127.0.0.1:{self.port}/{ACCOUNT}/models?restype=container"
        urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers)).close()

    def settings(self) -> dict[str, str]:
        """What a user sets."""
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_STORAGE_ENDPOINT": f"{self.url}/{ACCOUNT}",
        }

    def store(self) -> Any:
        """obstore's, past the proxy."""
        from obstore.store import AzureStore

        return AzureStore(
            "models", account_name=ACCOUNT, account_key=KEY, client_options={"allow_http": True},
            endpoint=f"http://127.0.0.1:{self.port}/{ACCOUNT}",
        )  # fmt: skip

    def close(self) -> None:
        super().close()
        self._process.kill()
        self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()
