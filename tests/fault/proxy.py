"""A proxy for HTTP that mishandles chosen requests, and passes all others on as they are."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self


@dataclass
class Fault:
    """What happens to the next `times` requests whose first line matches `pattern`."""

    pattern: str
    act: Callable[[Exchange], None]
    times: int = 1
    met: int = 0


@dataclass(frozen=True)
class Exchange:
    """One request, before it is passed on."""

    client: socket.socket
    request: bytes
    upstream: tuple[str, int]

    def answer(self) -> bytes:
        """Pass the request on, and give the server's whole answer."""
        head, _, body = self.request.partition(b"\r\n\r\n")
        head = re.sub(rb"(?im)^connection:.*\r\n", b"", head + b"\r\n")
        with socket.create_connection(self.upstream) as server:
            server.sendall(head + b"connection: close\r\n\r\n" + body)
            return b"".join(iter(lambda: server.recv(1 << 16), b""))


def pass_on(exchange: Exchange) -> None:
    exchange.client.sendall(exchange.answer())


def refuse(exchange: Exchange) -> None:
    """Close before the server has seen anything."""


def lose_the_answer(exchange: Exchange) -> None:
    """The server does it, and the client never hears of it."""
    exchange.answer()


def cut_the_answer(exchange: Exchange) -> None:
    """The client gets the head of the answer and half of its body."""
    answer = exchange.answer()
    start = answer.index(b"\r\n\r\n") + 4
    exchange.client.sendall(answer[: start + (len(answer) - start) // 2])


def reply(status: str, code: str = "", message: str = "injected") -> Callable[[Exchange], None]:
    """An answer of the proxy's own."""
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>" if code else ""

    def act(exchange: Exchange) -> None:
        exchange.client.sendall(
            f"HTTP/1.1 {status}\r\ncontent-type: application/xml\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n{body}".encode()
        )

    return act


@dataclass
class Proxy:
    upstream: tuple[str, int]
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """First lines, in the order in which they came."""

    def __enter__(self) -> Self:
        self._lock = threading.Lock()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def plan(self, pattern: str, act: Callable[[Exchange], None], times: int = 1) -> Fault:
        fault = Fault(pattern, act, times)
        self.faults.append(fault)
        return fault

    def _accept(self) -> None:
        threads = []
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                break
            threads.append(threading.Thread(target=self._serve, args=(client,), daemon=True))
            threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        """One request to a connection; the client opens another for the next."""
        with client:
            try:
                request = _read_request(client)
                if request:
                    self._act_of(request)(Exchange(client, request, self.upstream))
            except OSError:
                return  # the client has gone

    def _act_of(self, request: bytes) -> Callable[[Exchange], None]:
        line = request.partition(b"\r\n")[0].decode()
        with self._lock:
            self.requests.append(line)
            for fault in self.faults:
                if fault.met < fault.times and re.search(fault.pattern, line):
                    fault.met += 1
                    return fault.act
        return pass_on


def _read_request(client: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        part = client.recv(1 << 16)
        if not part:
            return b""
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"(?im)^content-length: *(\d+)", head)
    missing = (int(length[1]) if length else 0) - len(body)
    parts = [data]
    while missing > 0:
        part = client.recv(min(missing, 1 << 20))
        if not part:
            return b""
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
