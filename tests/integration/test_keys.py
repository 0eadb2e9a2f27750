"""Master keys: added, replaced and revoked without touching data, whatever fails meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from dbmodule.errors import (
    CorruptObjectError,
    FormatVersionError,
    MasterKeyError,
    ObjectExistsError,
    RefusedError,
    RepositoryError,
    UsageError,
)
from dbmodule.ident import SystemId
from dbmodule.ports import Buffer, ObjectStore
from dbmodule.repository.document import seal, unseal
from dbmodule.repository.keys import Keyring
from dbmodule.repository.repository import DESCRIPTION, Repository
from dbmodule.repository.secret import Secret
from dbmodule.storage import LocalStore, MemoryStore
from tests.fault.fault_store import DamagedStore, Fault
from tests.fault.key_changes import FIRST, SECOND, THIRD, ChangeFaults, change, keyring

REPOSITORY_ROOT = Path(__file__).parents[2]
RAISING = (Fault.BEFORE, Fault.FULL, Fault.AFTER)
KILLING = (Fault.KILL_BEFORE, Fault.KILL_WITHIN, Fault.KILL_AFTER)
CHANGES = ("add", "rotate", "revoke")


def prepared(store: ObjectStore, what: str) -> None:
    """An encrypted repository that is ready for a change of its keys."""
    Repository.create(store, FIRST).bind("main", SystemId(7))
    if what == "revoke":
        keyring(store).add(SECOND, "the second")


def opens(store: ObjectStore, secret: Secret) -> bool:
    try:
        assert Repository.open(store, secret).bound_to("main") == "7"
    except MasterKeyError:
        return False
    return True


def who_opens(store: ObjectStore) -> list[bool]:
    return [opens(store, secret) for secret in (FIRST, SECOND, THIRD)]


def data_of(store: ObjectStore) -> dict[str, bytes]:
    return {name: store.get(name) for name in store.list("") if not name.startswith("keys/")}


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def test_every_key_opens_until_it_is_revoked(store: MemoryStore) -> None:
    prepared(store, "add")
    before = data_of(store)
    change(store, "add")
    assert who_opens(store) == [True, True, False]
    change(store, "rotate")
    assert who_opens(store) == [False, True, True]
    third = keyring(store, THIRD)
    second = next(key for key in third.listed() if not key.current)
    assert (second.label, second.kind, second.problem) == ("the second", "key", "")
    third.revoke(second.key_id)
    assert who_opens(store) == [False, False, True]
    assert [key.label for key in third.listed()] == ["the third"]
    assert data_of(store) == before


def test_a_passphrase_is_a_key(store: MemoryStore) -> None:
    prepared(store, "add")
    passphrase = Secret.read(b"correct horse battery staple\n")
    assert keyring(store).add(passphrase, "").kind == "passphrase"
    assert opens(store, passphrase)
    assert not opens(store, Secret.read(b"correct horse battery stapl\n"))


def test_what_is_asked_for_in_vain_is_refused(store: MemoryStore) -> None:
    prepared(store, "revoke")
    keys = keyring(store)
    before = {name: store.get(name) for name in store.list("")}
    with pytest.raises(UsageError, match="in use"):
        keys.revoke(keys.key_id)
    with pytest.raises(UsageError, match="in use"):
        keys.rotate(FIRST, "")
    for unknown in ("f" * 32, "../manifests", ""):
        with pytest.raises(UsageError, match="no master key"):
            keys.revoke(unknown)
    with pytest.raises(UsageError, match="label"):
        keys.add(THIRD, "x" * 201)
    assert keys.add(SECOND, "again").label == "the second"
    assert {name: store.get(name) for name in store.list("")} == before


@pytest.mark.parametrize("secret", [None, SECOND])
def test_without_the_right_key_nothing_opens(store: MemoryStore, secret: Secret | None) -> None:
    prepared(store, "add")
    with pytest.raises(MasterKeyError) as caught:
        Repository.open(store, secret)
    assert caught.value.exit_code == 5
    assert caught.value.hint
    for told in (FIRST.text, SECOND.text):
        assert told.decode() not in caught.value.message + caught.value.hint


def test_a_key_for_what_is_not_encrypted_is_refused(store: MemoryStore) -> None:
    """Else whoever exchanges the repository gets the next backup in the clear."""
    Repository.create(store)
    with pytest.raises(RefusedError, match="not encrypted"):
        Repository.open(store, FIRST)


def test_the_keys_of_another_repository_do_not_open_this_one(store: MemoryStore) -> None:
    """Not even those of the same user's, with the same master key."""
    prepared(store, "add")
    other = MemoryStore()
    prepared(other, "add")
    planted = {name: other.get(name) for name in other.list("keys/")}
    with pytest.raises(CorruptObjectError):
        # The same name, since it follows from key and description: only the content is another's.
        own = next(store.list("keys/"))
        Repository.open(DamagedStore(store, {own: next(iter(planted.values()))}), FIRST)
    for name in store.list("keys/"):
        planted[name] = None  # type: ignore[assignment]
    with pytest.raises(MasterKeyError):
        Repository.open(DamagedStore(store, planted), FIRST)
    # Nor does this one's key open it with another description.
    description = {DESCRIPTION: other.get(DESCRIPTION)}
    with pytest.raises(MasterKeyError):
        Repository.open(DamagedStore(store, description), FIRST)


def test_an_unknown_cipher_is_refused(store: MemoryStore) -> None:
    prepared(store, "add")
    body = json.loads(store.get(DESCRIPTION).split(b"\n")[0])
    planted = {DESCRIPTION: seal({**body, "cipher": "rot13"}, None)}
    with pytest.raises(FormatVersionError, match="rot13"):
        Repository.open(DamagedStore(store, planted), FIRST)


def test_a_damaged_key_is_named_and_can_be_revoked(store: MemoryStore) -> None:
    prepared(store, "revoke")
    keys = keyring(store)
    other = next(key.key_id for key in keys.listed() if not key.current)
    name = f"keys/{other}.json"
    data = store.get(name)
    store.delete(name)
    store.put_new(name, [data[:60] + b"x" + data[61:]])
    assert [bool(key.problem) for key in keys.listed() if not key.current] == [True]
    with pytest.raises(CorruptObjectError):
        keys.add(SECOND, "")  # which would leave the user with a key that does not open
    keys.revoke(other)
    keys.add(SECOND, "")
    assert opens(store, SECOND)


def test_two_who_revoke_each_others_key_both_stay(store: MemoryStore) -> None:
    """Seen to end without any key when nobody looks again."""
    prepared(store, "revoke")

    class Meanwhile(DamagedStore):
        """Just before one key is removed, the other is."""

        def delete(self, name: str) -> None:
            second.revoke(first.key_id)
            store.delete(name)

    second = keyring(store, SECOND)
    first = keyring(Meanwhile(store, {}))
    first.revoke(second.key_id)
    assert opens(store, FIRST)


def test_a_repository_is_not_there_before_its_key_is(store: MemoryStore) -> None:
    for number in range(1, 10):
        for fault in RAISING:
            inner = MemoryStore()
            failing = ChangeFaults(inner, number, fault)
            try:
                Repository.create(failing, FIRST)
            except RepositoryError:
                assert failing.struck
            else:
                assert number == 3
                return
            if Repository.exists(inner):
                Repository.open(inner, FIRST)
            else:
                Repository.create(inner, FIRST)
    raise AssertionError("creating never succeeded")


def test_of_two_who_create_one_wins(store: MemoryStore) -> None:
    class Race(DamagedStore):
        """Between a look whether there is a repository and its creation another makes one."""

        def size(self, name: str) -> int:
            try:
                return store.size(name)
            finally:
                if name == DESCRIPTION and not list(store.list("")):
                    Repository.create(store, SECOND)

    with pytest.raises(ObjectExistsError):
        Repository.create(Race(store, {}), FIRST)
    assert len(list(store.list("keys/"))) == 1
    Repository.open(store, SECOND)


def test_an_answer_that_came_wrong_costs_no_key(store: MemoryStore) -> None:
    """The description is there, and the store says that it was there before."""

    class Confused(DamagedStore):
        def put_new(self, name: str, chunks: Iterable[Buffer]) -> int:
            size = store.put_new(name, chunks)
            if name == DESCRIPTION:
                raise ObjectExistsError(f"object already exists: {name}")
            return size

    with pytest.raises(ObjectExistsError):
        Repository.create(Confused(store, {}), FIRST)
    Repository.open(store, FIRST)


def test_what_is_known_of_a_key_cannot_be_changed(store: MemoryStore) -> None:
    """Not even where the hash of its document is made anew, which takes no key."""
    prepared(store, "add")
    (name,) = store.list("keys/")
    body, _ = unseal(name, store.get(name), None)
    for member in ("info", "wrapped"):
        planted = bytearray.fromhex(body[member])
        planted[-20] ^= 1
        changed = seal({**body, member: planted.hex()}, None)
        with pytest.raises(CorruptObjectError):
            Repository.open(DamagedStore(store, {name: changed}), FIRST)


def check_after(store: ObjectStore, what: str, before: dict[str, bytes]) -> None:
    """A key that is valid opens it, nothing else changed, and the change can be made again."""
    first, second, third = who_opens(store)
    assert {"add": first, "rotate": first or third, "revoke": first}[what]
    assert not ({"add": third, "rotate": second, "revoke": third}[what])
    assert data_of(store) == before


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("fault", RAISING)
def test_a_change_that_fails_at_any_write(what: str, fault: Fault) -> None:
    failed = 0
    for number in range(1, 10):
        inner = MemoryStore()
        prepared(inner, what)
        before = data_of(inner)
        store = ChangeFaults(inner, number, fault)
        try:
            change(store, what)
        except RepositoryError:
            assert store.struck
            failed += 1
            check_after(inner, what, before)
            if opens(inner, FIRST) and (what != "revoke" or opens(inner, SECOND)):
                change(inner, what)
        else:
            assert not store.struck
            check_after(inner, what, before)
            assert who_opens(inner) == EXPECTED[what]
            assert failed == WRITES[what]
            return
    raise AssertionError("the change never succeeded")


WRITES = {"add": 1, "rotate": 2, "revoke": 1}
EXPECTED = {
    "add": [True, True, False],
    "rotate": [False, False, True],
    "revoke": [True, False, False],
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_that_is_killed_at_any_write(what: str, tmp_path: Path) -> None:
    killed = 0
    for number in range(1, 10):
        for fault in KILLING:
            root = tmp_path / f"{number}-{fault}"
            prepared(LocalStore(root), what)
            before = data_of(LocalStore(root))
            code = run_killed(root, what, number, fault)
            check_after(LocalStore(root), what, before)
            if code == 0:
                assert who_opens(LocalStore(root)) == EXPECTED[what]
                assert killed == WRITES[what] * len(KILLING)
                return
            assert code == -signal.SIGKILL
            killed += 1
    raise AssertionError("the change never succeeded")


def run_killed(root: Path, what: str, number: int, fault: Fault) -> int:
    command = [sys.executable, "-m", "tests.fault.killed_key", str(root), what, str(number), fault]
    path = os.pathsep.join([str(REPOSITORY_ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        command,
        cwd=REPOSITORY_ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in result.stderr, result.stderr
    return result.returncode


def test_keys_are_checked_by_what_they_hold(store: MemoryStore) -> None:
    """The key that is about to be relied on is read back, before the other one is removed."""
    prepared(store, "add")

    class Forgetful(DamagedStore):
        """Says that it has written, and has not what it was given."""

        def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
            data = super().get(name, offset, length)
            return data if keyring(store).key_id in name or name == DESCRIPTION else data[:-70]

    keys: Keyring = keyring(Forgetful(store, {}))
    actions: list[Callable[[], object]] = [
        lambda: keys.rotate(THIRD, ""),
        lambda: keys.add(SECOND, ""),
    ]
    for action in actions:
        with pytest.raises(CorruptObjectError):
            action()
    assert opens(store, FIRST)
