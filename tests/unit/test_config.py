"""Where settings come from, which source wins, and what is said about a wrong one."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmodule import config as config_module
from dbmodule.config import (
    AgentSection,
    BackupSection,
    Config,
    RepositorySection,
    ServerSection,
    config_path,
    load_config,
    render_toml,
)
from dbmodule.errors import UsageError
from dbmodule.retention import Policy

MINIMAL = '[repository]\nurl = "/backups"\n'


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.upper().startswith("DBMODULE_")]:
        monkeypatch.delenv(name)
    yield


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "dbmodule.toml"
    path.write_text(MINIMAL)
    return path


def test_defaults(file: Path) -> None:
    config = load_config(file)
    assert config.server == ServerSection(pgdata=None, dsn="")
    assert config.repository == RepositorySection(url="/backups", cluster="main")
    assert config.repository.compression_level == 1
    assert config.backup.threads == min(len(os.sched_getaffinity(0)), 8)
    assert config.agent.poll_seconds == 5.0


def test_the_environment_wins_over_the_file_and_overrides_over_both(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(MINIMAL + 'cluster = "from-file"\n[backup]\nthreads = 3\n')
    monkeypatch.setenv("DBMODULE_REPOSITORY__CLUSTER", "from-environment")
    monkeypatch.setenv("DBMODULE_AGENT__POLL_SECONDS", "0.5")
    monkeypatch.setenv("DBMODULE_BACKUP__THREADS", "")
    config = load_config(file)
    assert (config.repository.url, config.repository.cluster) == ("/backups", "from-environment")
    assert config.backup.threads == 3, "an empty variable counts as unset"
    assert config.agent.poll_seconds == 0.5
    config = load_config(file, overrides={"repository": {"cluster": "from-option"}})
    assert (config.repository.url, config.repository.cluster) == ("/backups", "from-option")


def test_the_environment_alone_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config_module, "_SYSTEM_FILE", tmp_path / "etc.toml")
    monkeypatch.setenv("DBMODULE_REPOSITORY__URL", "/elsewhere")
    assert load_config().repository.url == "/elsewhere"


def test_the_search_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    system = tmp_path / "etc.toml"
    monkeypatch.setattr(config_module, "_SYSTEM_FILE", system)
    assert config_path(None) is None
    Path("dbmodule.toml").write_text(MINIMAL)
    assert config_path(None) == Path("dbmodule.toml")
    system.write_text(MINIMAL)
    assert config_path(None) == system
    monkeypatch.setenv("DBMODULE_CONFIG", "named.toml")
    assert config_path(None) == Path("named.toml")
    assert config_path(Path("explicit.toml")) == Path("explicit.toml")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "repository.url is not set", "dbmodule init"),
        ("x = ", "is not valid TOML", "Correct"),
        (MINIMAL + "urll = 1", "repository.urll: unknown key", "url, options, cluster"),
        ('[repo]\nurl = "/x"', "repo: unknown section", "server, repository"),
        ("repository = 3", "repository: must be a table", ""),
        ("[repository]\nurl = 3", "repository.url: input should be a valid string", ""),
        ('[repository]\nurl = ""', "repository.url: string should have at least 1", ""),
        (MINIMAL + 'cluster = "a/b"', "repository.cluster: string should match", ""),
        (MINIMAL + "compression_level = 20", "repository.compression_level: input", ""),
        (MINIMAL + "[backup]\nthreads = 0", "backup.threads: input should be greater", ""),
        (MINIMAL + "[retention]\nkeep_last = 0", "retention.keep_last: input", ""),
        (MINIMAL + "[retention]\nkeep_fulls = 1", "retention.keep_fulls: unknown", "keep_chains"),
        (MINIMAL + '[retention]\ntimezone = "Mars"', "retention.timezone: is not a time zone", ""),
        (MINIMAL + '[retention]\ntimezone = "../x"', "retention.timezone: is not a time zone", ""),
        (MINIMAL + "[agent]\npoll_seconds = nan", "agent.poll_seconds: input", ""),
        (MINIMAL + '[server]\npgdata = "data"', "server.pgdata: must be an absolute path", ""),
    ],
)
def test_a_wrong_file_is_named_with_key_and_reason(
    file: Path, text: str, message: str, hint: str
) -> None:
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_config(file)
    assert caught.value.message.startswith(str(file))
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DBMODULE_BACKUP__THREADS", "many", "valid integer"),
        ("DBMODULE_BACKUP__THREDS", "1", "unknown key"),
        ("DBMODULE_BAKCUP__THREADS", "1", "unknown section"),
        ("DBMODULE_BACKUP", "{}", "is a section, not a key"),
    ],
)
def test_a_wrong_variable_is_named(
    file: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"^environment: {name}: .*{message}"):
        load_config(file)


def test_a_wrong_override_is_named(file: Path) -> None:
    with pytest.raises(UsageError, match=r"^option for repository\.cluster: "):
        load_config(file, overrides={"repository": {"cluster": "a b"}})


def test_a_named_file_must_exist_unless_it_is_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "missing.toml"
    with pytest.raises(UsageError, match=r"cannot read configuration .*missing\.toml: No such"):
        load_config(missing)
    overrides = {"repository": {"url": "/x"}}
    assert load_config(missing, overrides=overrides, missing_ok=True).repository.url == "/x"
    monkeypatch.setenv("DBMODULE_CONFIG", str(missing))
    with pytest.raises(UsageError, match=r"missing\.toml"):
        load_config()


def test_bytes_that_are_no_text_are_reported(file: Path) -> None:
    file.write_bytes(b'[repository]\nurl = "\xff"\n')
    with pytest.raises(UsageError, match="not valid TOML"):
        load_config(file)


def test_secrets_are_never_shown(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(MINIMAL + '[server]\ndsn = "password=hunter2"\n')
    assert "hunter2" not in repr(load_config(file)) + str(load_config(file))
    file.write_text(MINIMAL + '[server]\ndsn = ["hunter2"]\n')
    monkeypatch.setenv("DBMODULE_BACKUP__THREADS", "hunter2")
    with pytest.raises(UsageError) as caught:
        load_config(file)
    assert "hunter2" not in str(caught.value) + caught.value.hint + repr(caught.value.__cause__)


def test_a_config_is_frozen(file: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(file).repository.url = "/other"


text = st.text(st.characters(exclude_categories=["Cs"]))


@given(
    url=text.filter(bool),
    dsn=text,
    level=st.integers(1, 19),
    threads=st.integers(1, 256),
    poll=st.floats(0.001, 3600),
    pgdata=st.none() | text.filter(lambda value: "\0" not in value).map(lambda p: Path("/" + p)),
)
def test_what_is_rendered_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    url: str,
    dsn: str,
    level: int,
    threads: int,
    poll: float,
    pgdata: Path | None,
) -> None:
    config = Config(
        server=ServerSection(pgdata=pgdata, dsn=dsn),
        repository=RepositorySection(url=url, cluster="c", compression_level=level),
        backup=BackupSection(threads=threads),
        agent=AgentSection(poll_seconds=poll),
    )
    assert Config.model_validate(tomllib.loads(render_toml(config))) == config


def test_only_what_was_set_is_rendered_as_a_setting(file: Path) -> None:
    rendered = render_toml(load_config(file))
    assert tomllib.loads(rendered) == {
        "server": {},
        "repository": {"url": "/backups"},
        "backup": {},
        "retention": {},
        "agent": {},
    }
    assert "\n# threads = " in rendered
    assert "\n# keep_days = 7\n" in rendered


def test_the_documented_example_is_valid(file: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    file.write_text(page.split("```toml\n")[1].split("```")[0])
    assert load_config(file).repository.cluster == "orders"


def test_every_key_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    for section, field in Config.model_fields.items():
        assert f"## `[{section}]`" in page
        assert isinstance(field.annotation, type)
        for key in field.annotation.model_fields:
            assert f"`{key}`" in page, f"{section}.{key}"
            assert f"`DBMODULE_{section.upper()}__{key.upper()}`" in page


def test_a_policy_is_read_from_file_and_environment(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_config(file).retention.policy() == Policy()
    file.write_text(MINIMAL + '[retention]\nkeep_last = 3\ntimezone = "Europe/Berlin"\n')
    monkeypatch.setenv("DBMODULE_RETENTION__KEEP_LAST", "4")
    monkeypatch.setenv("DBMODULE_RETENTION__KEEP_YEARLY", "10")
    policy = load_config(file).retention.policy()
    assert policy == Policy(keep_last=4, keep_yearly=10, zone=ZoneInfo("Europe/Berlin"))
    file.write_text(render_toml(load_config(file)))
    assert load_config(file).retention.policy() == policy


def test_options_of_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "dbmodule.toml"
    path.write_text(
        '[repository]\nurl = "s3://b/p"\noptions = { region = "x", endpoint = "\'y" }\n'
    )
    config = load_config(path)
    assert config.repository.options == {"region": "x", "endpoint": "'y"}
    assert "'y" not in repr(config)
    path.write_text(render_toml(config))
    assert load_config(path) == config
    monkeypatch.setenv("DBMODULE_REPOSITORY__OPTIONS__ENDPOINT", "http://localhost")
    assert load_config(path).repository.options == {"endpoint": "http://localhost"}
