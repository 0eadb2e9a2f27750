"""Where master keys come from, what is refused, and that no message holds one."""

from __future__ import annotations

import os
import shlex
import stat
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from dbmodule import unlock
from dbmodule.config import RepositorySection, load_config, render_toml
from dbmodule.errors import MasterKeyError, UsageError
from dbmodule.reports import NewKey
from dbmodule.repository.secret import Secret

KEY = "ab" * 32


def settings(**more: object) -> RepositorySection:
    return RepositorySection.model_validate({"url": "/backups", **more})


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "master.key"
    path.write_text(KEY + "\n")
    path.chmod(0o600)
    return path


def printing(text: str) -> str:
    return shlex.join([sys.executable, "-c", f"print({text!r})"])


def test_a_key_comes_from_environment_file_or_command(key_file: Path) -> None:
    assert unlock.master_secret(settings()) is None
    for given in (
        {"key": SecretStr(KEY)},
        {"key_file": key_file},
        {"key_command": printing(KEY)},
        {"key": SecretStr(KEY), "key_file": key_file.with_name("lost")},
    ):
        assert unlock.master_secret(settings(**given)) == Secret(KEY.encode())


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o620, 0o660, 0o601])
def test_a_key_that_others_can_read_is_refused(key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    with pytest.raises(MasterKeyError, match=f"its mode is {mode:04o}") as caught:
        unlock.master_secret(settings(key_file=key_file))
    assert KEY not in caught.value.message + caught.value.hint


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_root_may_lend_a_key_to_a_group(key_file: Path) -> None:
    key_file.chmod(0o640)
    assert unlock.master_secret(settings(key_file=key_file)) == Secret(KEY.encode())
    os.chown(key_file, 1, 1)
    with pytest.raises(MasterKeyError, match="0640"):
        unlock.master_secret(settings(key_file=key_file))


@pytest.mark.parametrize("content", [b"", b"\n", b"short\n"])
def test_a_file_without_a_key_is_refused(key_file: Path, content: bytes) -> None:
    key_file.write_bytes(content)
    with pytest.raises(MasterKeyError, match="empty or too short"):
        unlock.master_secret(settings(key_file=key_file))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MasterKeyError, match=r"cannot read the master key in .*lost"):
        unlock.master_secret(settings(key_file=tmp_path / "lost"))


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (shlex.join([sys.executable, "-c", f"print('{KEY}'); raise SystemExit(7)"]), "exit code 7"),
        ("/no/such/program " + KEY, "No such file"),
        ("'" + KEY, "not a command line"),
        (printing(""), "empty or too short"),
    ],
)
def test_a_command_that_fails_is_refused_without_its_words(command: str, says: str) -> None:
    with pytest.raises(MasterKeyError, match=says) as caught:
        unlock.master_secret(settings(key_command=command))
    error = caught.value
    assert KEY not in error.message + error.hint + repr(error.__cause__)


def test_a_new_key_file_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "new.key"
    made = unlock.new_secret(NewKey(path))
    assert (made.kind, stat.S_IMODE(path.stat().st_mode)) == ("key", 0o600)
    assert unlock.new_secret(NewKey(path)) == made
    unlock.make_key_file(path)
    assert unlock.new_secret(NewKey(path)) == made
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(MasterKeyError, match="cannot write"):
        unlock.new_secret(NewKey(tmp_path / "nowhere" / "new.key"))
    for neither in (NewKey(), NewKey(path, "cat")):
        with pytest.raises(UsageError, match="name one"):
            unlock.new_secret(neither)
    assert unlock.new_secret(NewKey(command=printing(KEY))) == Secret(KEY.encode())


def test_a_key_is_never_written_to_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "dbmodule.toml"
    monkeypatch.setenv("DBMODULE_REPOSITORY__KEY", KEY)
    path.write_text('[repository]\nurl = "/backups"\n')
    config = load_config(path)
    assert unlock.master_secret(config.repository) == Secret(KEY.encode())
    shown = repr(config) + str(config) + render_toml(config)
    assert KEY not in shown + config.model_dump_json()
    path.write_text(f'[repository]\nurl = "/backups"\nkey = "{KEY}"\n')
    with pytest.raises(UsageError, match="must not stand in the configuration") as caught:
        load_config(path)
    assert KEY not in caught.value.message + caught.value.hint


@pytest.mark.parametrize("text", ["0123456789012345", "[1, 2, 3, 4, 5]", '{"a": "passphrase"}'])
def test_a_key_in_the_environment_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    path = tmp_path / "dbmodule.toml"
    path.write_text('[repository]\nurl = "/backups"\n')
    monkeypatch.setenv("DBMODULE_REPOSITORY__KEY", text)
    assert unlock.master_secret(load_config(path).repository) == Secret(text.encode())


def test_two_places_for_a_key_are_one_too_many(tmp_path: Path) -> None:
    path = tmp_path / "dbmodule.toml"
    path.write_text('[repository]\nurl = "/b"\nkey_file = "/k"\nkey_command = "k"\n')
    with pytest.raises(UsageError, match="both set"):
        load_config(path)
    path.write_text('[repository]\nurl = "/b"\nkey_file = "k"\n')
    with pytest.raises(UsageError, match="absolute"):
        load_config(path)
