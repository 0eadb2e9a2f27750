"""Holds and expire through the library, on repositories of a tiny data directory and a server."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from dbmodule.app import App
from dbmodule.config import Config, RepositorySection, RetentionSection, ServerSection
from dbmodule.errors import DbmoduleError, RefusedError, UsageError
from dbmodule.ident import BackupId, BackupType
from dbmodule.pruning import holds_in_force, parse_moment
from dbmodule.reports import RetentionReport
from dbmodule.repository.condemned import Condemned, Sentence
from dbmodule.repository.document import seal
from dbmodule.repository.holds import read_holds
from dbmodule.repository.repository import Repository
from dbmodule.retention import Hold
from dbmodule.storage import open_store
from tests.fault import mini
from tests.fix_backup import Site, SiteFactory
from tests.fix_cluster import Clusters

FULL, DIFF, INCR = BackupType.FULL, BackupType.DIFF, BackupType.INCR
KINDS = [FULL, DIFF, INCR, FULL, INCR]
NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def stopped(clusters: Clusters) -> Path:
    cluster = clusters.at(clusters.directory() / "data", 18)
    cluster.init(wal_segsize_mb=1, extra_args=["--no-sync"])
    return cluster.datadir


def removed(report: RetentionReport) -> list[str]:
    assert report.removal is not None
    assert report.removal.postponed == ""
    return sorted(report.removal.removed)


class Shelf:
    """A repository in a directory with two chains: full, diff, incr; full, incr."""

    def __init__(self, stopped: Path, base: Path) -> None:
        self.path = base / "repository"
        self.root = base / "data"
        mini.make_mini(stopped, self.root)
        store = open_store(str(self.path))
        Repository.create(store)
        self.ids: list[BackupId] = []
        for step, kind in enumerate(KINDS, 1):
            self.ids.append(mini.back_up(store, self.root, kind).backup_id)
            mini.change_state(self.root, step)

    def app(self, **rules: object) -> App:
        return App.open(
            Config(
                server=ServerSection(dsn="host=/nonexistent port=1"),
                repository=RepositorySection(url=str(self.path), cluster=mini.CLUSTER),
                retention=RetentionSection.model_validate(rules),
            )
        )

    @property
    def repository(self) -> Repository:
        return Repository.open(open_store(str(self.path)))

    def manifest(self, position: int) -> Path:
        return self.path / "manifests" / mini.CLUSTER / f"{self.ids[position]}.json"

    def there(self) -> list[BackupId]:
        return self.repository.backup_ids(mini.CLUSTER)

    def hold_files(self) -> list[Path]:
        return sorted((self.path / "holds").rglob("*.json"))


@pytest.fixture
def shelf(stopped: Path, tmp_path: Path) -> Shelf:
    return Shelf(stopped, tmp_path)


def test_what_the_policy_does_not_keep_goes_and_the_rest_restores(
    shelf: Shelf, tmp_path: Path
) -> None:
    app = shelf.app(keep_chains=1)
    planned = app.expire(dry_run=True)
    assert (planned.dry_run, removed(planned)) == (True, shelf.ids[:3])
    assert [d.keep for d in planned.decisions] == [False, False, False, True, True]
    assert shelf.there() == shelf.ids
    done = app.expire()
    assert (done.dry_run, removed(done)) == (False, shelf.ids[:3])
    assert done.decisions == planned.decisions
    assert shelf.there() == shelf.ids[3:]
    assert app.verify(None).status == "sound"
    for backup in shelf.ids[3:]:
        mini.restore_to(shelf.repository.store, backup, tmp_path / backup)
    assert removed(app.expire()) == []


def test_without_a_policy_nothing_goes_and_the_way_to_one_is_shown(shelf: Shelf) -> None:
    report = shelf.app().expire()
    assert (report.policy, shelf.there()) == ({}, shelf.ids)
    assert report.removal is not None and report.removal.removed == []
    assert "[retention]" in report.hint
    assert all(d.keep for d in report.decisions)


def test_a_held_backup_stays_with_its_chain_until_it_is_released(shelf: Shelf) -> None:
    app = shelf.app(keep_last=1)
    held = app.hold(shelf.ids[1])
    assert held.hold == "forever"
    assert {b.backup_id: b.hold for b in app.backups()}[shelf.ids[1]] == "forever"
    assert app.show(shelf.ids[1]).backup.hold == "forever"
    assert removed(app.expire()) == [shelf.ids[2]]
    assert app.release(shelf.ids[1]).released == 1
    assert app.backups()[0].hold is None
    assert shelf.hold_files() == []
    assert removed(app.expire()) == shelf.ids[:2]


def test_another_hold_takes_the_place_of_the_first_and_changes_no_object(shelf: Shelf) -> None:
    app = shelf.app()
    app.hold(shelf.ids[0], keep_until="2999-01-01T00:00Z")
    (first,) = shelf.hold_files()
    before = first.read_bytes()
    assert app.hold(shelf.ids[0], keep_until="2998-01-01T00:00Z").hold.startswith("2998")
    (second,) = shelf.hold_files()
    assert second.name != first.name
    assert app.backups()[0].hold == "2998-01-01T00:00:00+00:00"
    # A crash in between leaves both: the longer one counts.
    first.write_bytes(before)
    assert app.backups()[0].hold == "2999-01-01T00:00:00+00:00"
    assert app.release(shelf.ids[0]).released == 2


def test_a_hold_that_cannot_be_read_holds_for_ever_and_is_damage(shelf: Shelf) -> None:
    app = shelf.app(keep_last=1)
    app.hold(shelf.ids[0], keep_until="2999-01-01T00:00Z")
    (hold,) = shelf.hold_files()
    sound = hold.read_bytes()
    for damaged in (sound[:-1], sound.replace(b"2999", b"1999"), b""):
        hold.write_bytes(damaged)
        assert app.backups()[0].hold == "forever"
        damage = app.verify(None).damage
        assert [d.object for d in damage] == [str(hold.relative_to(shelf.path))]
    # One of another backup, sealed by the same key and put into this one's place.
    app.hold(shelf.ids[1])
    other = next(path for path in shelf.hold_files() if shelf.ids[1] in str(path))
    hold.write_bytes(other.read_bytes())
    assert app.backups()[0].hold == "forever"
    assert app.verify(None).status == "damaged"


def test_holds_that_are_over_hold_nothing() -> None:
    one, two = BackupId("20260131-000001-full-000001"), BackupId("20260131-000002-full-000002")
    past, soon = NOW - timedelta(days=1), NOW + timedelta(days=1)
    holds = [Hold(one, past), Hold(one, soon), Hold(two, past)]
    assert holds_in_force(holds, NOW) == {one: soon.isoformat()}
    assert holds_in_force([*holds, Hold(one, None)], NOW) == {one: "forever"}
    assert holds_in_force([Hold(one, None), *holds], NOW) == {one: "forever"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2027-01-31", "2027-02-01T00:00:00+01:00"),
        ("2027-03-28", "2027-03-29T00:00:00+02:00"),
        ("2027-01-31T18:00", "2027-01-31T18:00:00+01:00"),
        ("2027-07-01T18:00", "2027-07-01T18:00:00+02:00"),
        ("2027-01-31T18:00-05:00", "2027-01-31T18:00:00-05:00"),
    ],
)
def test_moments_are_of_the_policy_s_zone_and_days_last_to_their_end(
    text: str, expected: str
) -> None:
    assert parse_moment(text, ZoneInfo("Europe/Berlin"), NOW).isoformat() == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [("soon", "not a moment"), ("2026-06-30", "has passed"), ("9999-12-31", "not a moment")],
)
def test_a_moment_that_is_none_or_over_is_refused(shelf: Shelf, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_moment(text, UTC, NOW)
    with pytest.raises(UsageError):
        shelf.app().hold("latest", keep_until="1999-01-01")
    assert shelf.hold_files() == []


def test_a_backup_that_is_not_there_or_not_held_is_a_usage_error(shelf: Shelf) -> None:
    with pytest.raises(UsageError, match="there is no backup"):
        shelf.app().hold("20200101-000000-full-abcdef")
    with pytest.raises(UsageError, match="is not held"):
        shelf.app().release("latest")
    # A hold outlives what it held, and can be let go of.
    shelf.app().hold(shelf.ids[4])
    shelf.manifest(4).unlink()
    assert shelf.app().release(shelf.ids[4]).released == 1


def test_a_manifest_that_cannot_be_read_stops_expire(shelf: Shelf) -> None:
    app = shelf.app(keep_last=1)
    data = shelf.manifest(2).read_bytes()
    shelf.manifest(2).write_bytes(data[:-2])
    planned = app.expire(dry_run=True)
    assert all(d.keep for d in planned.decisions)
    assert planned.decisions[2].finished_at is None
    with pytest.raises(RefusedError) as caught:
        app.expire()
    assert shelf.ids[2] in caught.value.message
    assert shelf.manifest(2).name in caught.value.hint
    assert shelf.there() == shelf.ids
    shelf.manifest(2).unlink()
    assert removed(app.expire()) == shelf.ids[:2]


def test_a_backup_whose_baseline_was_replaced_does_not_count(shelf: Shelf) -> None:
    """The manifest of the second full is another one, sealed with the repository's own key."""
    body = json.loads(shelf.manifest(3).read_bytes().splitlines()[0])
    shelf.manifest(3).write_bytes(seal({**body, "label": "forged"}, shelf.repository.key))
    decisions = shelf.app(keep_last=1).expire(dry_run=True).decisions
    assert decisions[4].reasons[-1] == (
        f"does not count: {shelf.ids[3]} is not the backup that it was built on"
    )
    # Only what is built on it has lost its proof.
    assert [d.keep for d in decisions] == [False, False, False, True, True]


def test_a_hold_that_comes_while_an_expiry_is_at_work_wins_or_is_refused(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce = Condemned.announce
    app = shelf.app(keep_chains=1)

    def before(self: Condemned, *what: Any) -> Sentence:
        app.hold(shelf.ids[1])
        return announce(self, *what)

    with monkeypatch.context() as patch:
        patch.setattr(Condemned, "announce", before)
        report = app.expire()
    assert report.removal is not None
    assert shelf.ids[1] in report.removal.postponed
    assert shelf.there() == shelf.ids
    assert shelf.repository.condemned.load() == []
    assert removed(app.expire()) == [shelf.ids[2]], "the chain of what is held stays"
    app.release(shelf.ids[1])

    def after(self: Condemned, *what: Any) -> Sentence:
        sentence = announce(self, *what)
        if sentence.backups:  # and not only packs
            with pytest.raises(RefusedError, match="is being removed"):
                app.hold(shelf.ids[1])
        return sentence

    with monkeypatch.context() as patch:
        patch.setattr(Condemned, "announce", after)
        assert removed(app.expire()) == shelf.ids[:2]
    assert shelf.hold_files() == []


def test_holds_of_another_cluster_are_its_own(shelf: Shelf) -> None:
    shelf.app().hold(shelf.ids[0])
    assert read_holds(shelf.repository, "other") == []


def test_removed_backups_leave_the_sql_catalog(make_site: SiteFactory, pg_major: int) -> None:
    site = make_site(pg_major)
    old = [site.full(), site.diff(), site.incr()]
    new = site.full()
    app = _with_policy(site, keep_chains=1)
    assert removed(app.expire()) == [backup.backup_id for backup in old]
    assert _recorded(site) == [new.backup_id]
    assert site.cluster.scalar("SELECT count(*) FROM dbmodule.backup_dependency") == 0


def test_a_catalog_that_cannot_be_reached_does_not_stop_expire(
    make_site: SiteFactory, pg_major: int, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site(pg_major)
    old, new = site.full(), site.full()
    site.cluster.stop("fast")
    app = _with_policy(site, keep_last=1)
    assert removed(app.expire()) == [old.backup_id]
    assert "SQL catalog" in caplog.text
    site.cluster.start()
    assert _recorded(site) == [old.backup_id, new.backup_id]
    with pytest.raises(DbmoduleError):
        site.restore(old.backup_id)


def _with_policy(site: Site, **rules: int) -> App:
    retention = RetentionSection.model_validate(rules)
    return App.open(site.config.model_copy(update={"retention": retention}))


def _recorded(site: Site) -> list[str]:
    rows = site.cluster.query("SELECT backup_id FROM dbmodule.backup ORDER BY backup_id")
    return [row[0] for row in rows]
