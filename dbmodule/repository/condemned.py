"""Sentences: what an expiry is about to remove, announced before anything goes.

    condemned/ID/list.json      the backups and packs; gone when all of them are
    condemned/ID/verdict.json   confirmed or withdrawn; stays

A backup that begins after the announcement does not build on what is listed; expiry looks for
backups that began before, after it has announced. So of the two at least one sees the other.
Invariant: a verdict is given once, by creating an object whose name is never freed; so an expiry
that was taken for dead between its announcement and its verdict cannot go on.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from dbmodule.errors import CorruptObjectError, LockedError, ObjectExistsError, ObjectMissingError
from dbmodule.ident import BackupId
from dbmodule.repository.document import Documents
from dbmodule.repository.pack import PackId

PREFIX = "condemned/"
LIST = "list.json"
VERDICT = "verdict.json"

BackupName = tuple[str, BackupId]
"""Cluster and id."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """Backups and packs that are to go."""

    id: str
    backups: tuple[BackupName, ...]
    """In the order in which they are removed: none before its dependents."""
    packs: frozenset[PackId]
    """No backup but those in `backups` needs them."""
    rewritten: frozenset[PackId]
    """Backups need them, but not any more once each has its husk."""
    confirmed_at: datetime | None
    """None: announced only."""

    def object(self, part: str) -> str:
        return f"{PREFIX}{self.id}/{part}"


class Condemned:
    """The sentences of one repository."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents

    def load(self) -> list[Sentence]:
        """Those that were announced and neither withdrawn nor carried out, in order.

        Raises `CorruptObjectError` when one cannot be read: nobody may go on without knowing it.
        """
        parts: dict[str, set[str]] = {}
        for name in self._documents.store.list(PREFIX):
            _, sentence, part = name.split("/", 2)
            parts.setdefault(sentence, set()).add(part)
        found = []
        for sentence, there in sorted(parts.items()):
            if LIST in there:
                with suppress(ObjectMissingError):  # carried out since it was listed
                    found.append(self._read(sentence, decided=VERDICT in there))
        return [sentence for sentence in found if sentence is not None]

    def _read(self, sentence: str, *, decided: bool) -> Sentence | None:
        name = f"{PREFIX}{sentence}/{LIST}"
        body = self._documents.get(name)
        verdict = self._documents.get(f"{PREFIX}{sentence}/{VERDICT}") if decided else None
        try:
            if verdict is not None and verdict["confirmed"] is not True:
                return None
            return Sentence(
                sentence,
                tuple((str(c), BackupId(str(b))) for c, b in body["backups"]),
                frozenset(PackId(str(pack)) for pack in body["packs"]),
                frozenset(PackId(str(pack)) for pack in body["rewritten"]),
                None if verdict is None else datetime.fromisoformat(verdict["at"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptObjectError(f"{name}: not a valid list: {error}") from error

    def announce(
        self,
        backups: Sequence[BackupName],
        packs: Collection[PackId],
        rewritten: Collection[PackId] = (),
    ) -> Sentence:
        now = datetime.now(UTC)
        sentence = Sentence(
            f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(8)}",
            tuple(backups),
            frozenset(packs),
            frozenset(rewritten),
            None,
        )
        body = {
            "backups": list(backups),
            "packs": sorted(packs),
            "rewritten": sorted(rewritten),
            "at": now.isoformat(),
        }
        self._documents.put(sentence.object(LIST), body)
        return sentence

    def confirm(self, sentence: Sentence) -> Sentence:
        """From now on it is final; raises `LockedError` when another run has withdrawn it."""
        now = datetime.now(UTC)
        try:
            self._decide(sentence, True, now)
        except ObjectExistsError:
            raise LockedError(
                f"another expiry has withdrawn {sentence.id}, which this one had announced",
                hint="This run was stopped for too long: run it again.",
            ) from None
        return replace(sentence, confirmed_at=now)

    def withdraw(self, sentence: Sentence) -> None:
        """Nothing of it will go. Not for one that was confirmed."""
        self._decide(sentence, False, datetime.now(UTC))
        self.finish(sentence)

    def _decide(self, sentence: Sentence, confirmed: bool, now: datetime) -> None:
        body = {"confirmed": confirmed, "at": now.isoformat()}
        self._documents.put(sentence.object(VERDICT), body)

    def finish(self, sentence: Sentence) -> None:
        """What is listed is gone, or stays."""
        self._documents.store.delete(sentence.object(LIST))

    def tidy(self) -> None:
        """Remove the lists of withdrawn sentences, which a crash has left."""
        known = {sentence.id for sentence in self.load()}
        for name in list(self._documents.store.list(PREFIX)):
            _, sentence, part = name.split("/", 2)
            if part == LIST and sentence not in known:
                self._documents.store.delete(name)
