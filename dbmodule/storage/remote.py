"""Object stores in the network: S3 and what speaks its language, Google Cloud Storage, Azure.

An object is created by one conditional request (``If-None-Match: *`` on S3), so of any number of
writers of a name one wins. A request whose answer was lost is sent again, and may then meet the
object that it has made itself: so each carries a random token, by which the writer knows its own.
Objects too large for one request are sent in parts under ``tmp/``, which no name reaches, and then
copied to their name on the same condition. Not every server checks that condition as strictly as
the one on a single request (SeaweedFS lets two of six racing copies win), so nothing that writers
contend for may be longer than `SINGLE_PUT`: manifests and bindings are far shorter, and packs are
named by their content. Safe to use from many threads and processes at once.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar

import obstore
from obstore import exceptions
from obstore.store import AzureStore, GCSStore, S3Store

from dbmodule.errors import ObjectExistsError, ObjectMissingError, RepositoryError, UsageError
from dbmodule.ports import Buffer
from dbmodule.storage.names import TEMPORARY, check_name, check_prefix, clip, is_segment
from dbmodule.storage.source import Source

Backend = S3Store | GCSStore | AzureStore
T = TypeVar("T")

SINGLE_PUT = 64 << 20
"""Bytes: what is longer is not held in memory but sent in parts. Packs are shorter."""
_PART = 16 << 20
_PARTS_AT_ONCE = 3
_LISTED_AT_ONCE = 1000
_WRITER = "dbmodulewrite"
_CLIENT = {
    # Of one request: 64 MB have to pass in that time.
    "timeout": timedelta(minutes=10),
    "connect_timeout": timedelta(seconds=10),
    "read_timeout": timedelta(seconds=60),
}
_RETRY = {
    "max_retries": 8,
    "retry_timeout": timedelta(minutes=3),
    "backoff": {
        "init_backoff": timedelta(milliseconds=100),
        "max_backoff": timedelta(seconds=15),
        "base": 2,
    },
}
# What is not sent again by the client itself: a creation of unknown fate, a list cut in its middle.
_PAUSES = (0.2, 1.0, 5.0)

# The client's NotFoundError is a FileNotFoundError, and nothing else.
_CLIENT_ERRORS = (exceptions.BaseError, FileNotFoundError)
_CREDENTIALS = (
    "Check the credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or those of Google or "
    "Azure) in the environment of dbmodule and its agent."
)
_HINTS = {
    "NoSuchBucket": "Create the bucket, or correct url in [repository].",
    "ContainerNotFound": "Create the container, or correct url in [repository].",
    "InvalidAccessKeyId": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "ExpiredToken": _CREDENTIALS,
    "AuthenticationFailed": _CREDENTIALS,
    "AccessDenied": "The credentials lack a right: dbmodule gets, puts, lists and deletes objects.",
    "RequestTimeTooSkewed": "This machine's clock is wrong: set it, best with NTP.",
    "SlowDown": "The store throttles: run again later, or with fewer threads.",
}


class RemoteStore:
    """`ports.ObjectStore` on a bucket or container, below the prefix of `backend`."""

    def __init__(self, backend: Backend, url: str, *, single_put: int = SINGLE_PUT) -> None:
        self._backend = backend
        self.url = url
        self._single_put = single_put

    def put_new(self, name: str, chunks: Iterable[Buffer]) -> int:
        check_name(name)
        source = Source(chunks)
        rest = iter(source)
        head: list[Buffer] = []
        for chunk in rest:
            head.append(chunk)
            if source.size > self._single_put:
                self._create_in_parts(name, chain(head, rest), source)
                return source.size
        self._create(name, b"".join(head))
        return source.size

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        check_name(name)
        clip(0, offset, length)
        if length == 0:
            return self._nothing_of(name)
        wanted: Any = {"offset": offset} if length is None else (offset, offset + length)
        options: Any = {} if offset == 0 and length is None else {"range": wanted}

        def request() -> bytes:
            try:
                return bytes(obstore.get(self._backend, name, options=options).bytes())
            except _CLIENT_ERRORS as error:
                if not _is_behind_the_end(error):
                    raise
            return self._nothing_of(name)

        return self._ask("read", name, request)

    def size(self, name: str) -> int:
        check_name(name)
        return self._ask("read", name, lambda: obstore.head(self._backend, name)["size"])

    def list(self, prefix: str) -> Iterator[str]:
        folder = check_prefix(prefix).rpartition("/")[0]

        def request() -> list[str]:
            pages = obstore.list(self._backend, folder or None, chunk_size=_LISTED_AT_ONCE)
            return [found["path"] for page in pages for found in page]

        names = self._ask("list", prefix, request)
        return iter(sorted(name for name in names if name.startswith(prefix) and _is_ours(name)))

    def delete(self, name: str) -> None:
        check_name(name)
        with suppress(ObjectMissingError):
            self._ask("delete", name, lambda: obstore.delete(self._backend, name))

    def _nothing_of(self, name: str) -> bytes:
        """No bytes of an object, which has to be there."""
        self.size(name)
        return b""

    def _create(self, name: str, content: bytes) -> None:
        token = secrets.token_hex(16)

        def request() -> None:
            try:
                obstore.put(
                    self._backend, name, content, mode="create", attributes={_WRITER: token}
                )
            except exceptions.AlreadyExistsError:
                if self._writer(name) != token:
                    raise ObjectExistsError(f"object already exists: {self.url}/{name}") from None
                # Created, but the answer was lost.

        self._ask("write", name, request)

    def _writer(self, name: str) -> str | None:
        """The token of the request that made an object."""
        options: Any = {"head": True}
        found = self._ask("read", name, lambda: obstore.get(self._backend, name, options=options))
        return found.attributes.get(_WRITER)

    def _create_in_parts(self, name: str, chunks: Iterator[Buffer], source: Source) -> None:
        temporary = f"{TEMPORARY}/{secrets.token_hex(16)}"
        try:
            obstore.put(
                self._backend,
                temporary,
                chunks,
                chunk_size=_PART,
                max_concurrency=_PARTS_AT_ONCE,
            )
            obstore.copy(self._backend, temporary, name, overwrite=False)
        except exceptions.AlreadyExistsError:
            raise ObjectExistsError(f"object already exists: {self.url}/{name}") from None
        except _CLIENT_ERRORS as error:
            if source.failed:
                raise
            raise self._failure("write", name, error) from error
        finally:
            _try_delete(self._backend, temporary)

    def _ask(self, action: str, name: str, request: Callable[[], T]) -> T:
        """What the store answers, asked again as long as it gives no answer at all."""
        pauses = iter(_PAUSES)
        while True:
            try:
                return request()
            except _CLIENT_ERRORS as error:
                answered = _code(error) or isinstance(error, FileNotFoundError)
                pause = None if answered else next(pauses, None)
                if pause is None:
                    raise self._failure(action, name, error) from error
                time.sleep(pause)

    def _failure(self, action: str, name: str, error: Exception) -> RepositoryError:
        code = _code(error)
        if isinstance(error, FileNotFoundError) and code not in _HINTS:
            return ObjectMissingError(f"no such object: {self.url}/{name}")
        hint = _HINTS.get(code)
        if hint is None and isinstance(
            error, (exceptions.UnauthenticatedError, exceptions.PermissionDeniedError)
        ):
            hint = _CREDENTIALS
        return RepositoryError(
            f"cannot {action} {self.url}/{name}: {_reason(error)}",
            hint=hint or "Check that the store can be reached: url and options in [repository].",
        )


def open_remote(scheme: str, bucket: str, prefix: str, options: Mapping[str, str]) -> RemoteStore:
    """The store of scheme ``s3``, ``gs`` or ``az``; raises `UsageError` for unknown `options`.

    What `options` leave out is taken from the environment, as the provider's own tools do.
    """
    config = {key.lower(): value for key, value in options.items()}
    endpoint = config.get("endpoint", "")
    client = {**_CLIENT, **({"allow_http": True} if endpoint.startswith("http://") else {})}
    if scheme == "s3":
        config.setdefault("copy_if_not_exists", "multipart")
    made: dict[str, type[Any]] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
    try:
        backend = made[scheme](
            bucket,
            prefix=prefix or None,
            config=config,
            client_options=client,
            retry_config=_RETRY,
        )
    except (exceptions.BaseError, ValueError) as error:
        raise UsageError(
            f"the object store cannot be used as it is configured: {_reason(error)}",
            hint="docs/configuration.md lists the options of [repository].",
        ) from None
    return RemoteStore(backend, f"{scheme}://{'/'.join(filter(None, [bucket, prefix]))}")


def _is_ours(name: str) -> bool:
    first, *_ = segments = name.split("/")
    return first != TEMPORARY and all(map(is_segment, segments))


def _code(error: Exception) -> str:
    """The provider's own word for an error, else the HTTP status; empty when nobody answered."""
    for pattern in (r"<Code>(\w+)</Code>", r'"reason": ?"(\w+)"', r"status code: (\d+)"):
        if found := re.search(pattern, str(error)):
            return found[1]
    return ""


def _is_behind_the_end(error: Exception) -> bool:
    """Was a range asked for that begins at the object's end or later?

    Some servers refuse it (S3: InvalidRange); others send what there is, which the client refuses.
    """
    return _code(error) in ("InvalidRange", "416") or "Wanted range starting at" in str(error)


def _reason(error: Exception) -> str:
    """The first line of an error, and the provider's message: addresses, but never keys."""
    text = str(error)
    message = re.search(r"<Message>([^<]*)</Message>", text)
    line = text.partition("\n")[0].partition(": <?xml")[0].strip()
    return f"{line} ({message[1]})" if message else line


def _try_delete(backend: Backend, name: str) -> None:
    """Remove what nobody refers to; if that fails, the sweep of ``tmp/`` does it later."""
    try:
        obstore.delete(backend, name)
    except _CLIENT_ERRORS:
        return
