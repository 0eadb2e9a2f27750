"""A server on loopback that speaks the language of Azure's blob storage: Azurite.

It is started once, when the first test asks for it. Tests with it are collected only where it is
installed, as `INSTALLED` says: it comes from another registry than everything else.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dbmodule.storage import RemoteStore, open_store

CONTAINER = "backups"
ACCOUNT = "tests"
_PROGRAM = Path(sys.prefix) / "azurite" / "node_modules" / ".bin" / "azurite-blob"
INSTALLED = _PROGRAM.exists()
_READY_SECONDS = 60


@dataclass(frozen=True)
class Azure:
    """Where the server is, and the key of its account."""

    port: int
    key: str

    def store(self, **changed: str) -> RemoteStore:
        """An empty store, below a prefix that nobody uses."""
        options = {
            "endpoint": f"http://127.0.0.1:{self.port}/{ACCOUNT}",
            "account_name": ACCOUNT,
            "account_key": self.key,
            **changed,
        }
        store = open_store(f"az://{CONTAINER}/{secrets.token_hex(6)}/tests", options)
        assert isinstance(store, RemoteStore)
        return store

    def create_container(self) -> int:
        """The status that the server answers with; `OSError` when it does not."""
        headers = {
            "x-ms-date": datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT"),
            "x-ms-version": "2021-12-02",
        }
        signed = "PUT" + "\n" * 12
        signed += "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
        signed += f"/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container"
        digest = hmac.digest(base64.b64decode(self.key), signed.encode(), hashlib.sha256)
        headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            path = f"/{ACCOUNT}/{CONTAINER}?restype=container"
            connection.request("PUT", path, headers={**headers, "Content-Length": "0"})
            return connection.getresponse().status
        finally:
            connection.close()


@pytest.fixture(scope="session")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azure]:
    directory = tmp_path_factory.mktemp("azure")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Azure(port, base64.b64encode(secrets.token_bytes(64)).decode())
    command = [str(_PROGRAM), "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    command += ["--location", str(directory), "--silent", "--skipApiVersionCheck"]
    command += ["--disableTelemetry"]
    log = directory.with_suffix(".log")
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            env={"PATH": os.environ["PATH"], "AZURITE_ACCOUNTS": f"{ACCOUNT}:{server.key}"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + _READY_SECONDS
        while not _made(server):
            assert process.poll() is None, log.read_text(errors="replace")[-4000:]
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
            time.sleep(0.1)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(directory, ignore_errors=True)


def _made(server: Azure) -> bool:
    try:
        return server.create_container() == http.client.CREATED
    except OSError:
        return False
