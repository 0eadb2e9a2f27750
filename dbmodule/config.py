"""Settings: one frozen `Config`, read from a TOML file and the environment.

This is the only module of the library that reads the environment (libpq reads its own variables).
A key of the environment wins over the same key of the file, and both lose to what a caller
overrides. A key that nobody knows is an error wherever it stands, since a misspelt setting that is
silently ignored shows up when a backup is needed. Messages name file, key and reason, never the
value: it may hold a password.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from datetime import UTC, tzinfo
from pathlib import Path
from typing import Annotated, Any, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from dbmodule.errors import UsageError
from dbmodule.retention import Policy

__all__ = [
    "AgentSection",
    "BackupSection",
    "Config",
    "RepositorySection",
    "RetentionSection",
    "ServerSection",
    "config_path",
    "load_config",
    "render_toml",
]

_PREFIX = "DBMODULE_"
_NESTED = "__"
_SYSTEM_FILE = Path("/etc/dbmodule/dbmodule.toml")
_LOCAL_FILE = Path("dbmodule.toml")
_MAX_DEFAULT_THREADS = 8

Overrides = Mapping[str, Mapping[str, object]]
"""Section → key → value."""


def _default_threads() -> int:
    return min(len(os.sched_getaffinity(0)), _MAX_DEFAULT_THREADS)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class ServerSection(_Section):
    """The server that is backed up."""

    pgdata: Path | None = Field(
        default=None,
        description="Data directory; asked of the server if unset.",
    )
    dsn: str = Field(
        default="",
        repr=False,
        description="libpq connection string; what it leaves out comes from PGHOST, PGSERVICE …",
    )

    @field_validator("pgdata")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_absolute():
            raise ValueError("must be an absolute path")
        return value


class RepositorySection(_Section):
    """Where backups are kept."""

    url: str = Field(min_length=1, description="A path, s3://bucket/prefix, gs://… or az://….")
    options: dict[str, str] = Field(
        default_factory=dict,
        repr=False,
        description="Of an object store: endpoint, region and so on.",
    )
    cluster: str = Field(
        default="main",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$",
        description="This cluster's name in a repository that holds several.",
    )
    compression_level: int = Field(
        default=1, ge=1, le=19, description="zstd level, 1 (fast) to 19."
    )
    key_file: Path | None = Field(
        default=None, description="File with the master key of an encrypted repository."
    )
    key_command: str = Field(
        default="",
        repr=False,
        description="Command that prints the master key, instead of a file; run without a shell.",
    )
    key: SecretStr | None = Field(
        default=None,
        repr=False,
        exclude=True,
        description="The master key itself; in the environment only.",
    )

    @field_validator("key_file")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_absolute():
            raise ValueError("must be an absolute path")
        return value

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if self.key_file is not None and self.key_command:
            raise ValueError("key_file and key_command are both set: choose one")
        return self


class BackupSection(_Section):
    """How a backup or restore runs."""

    threads: int = Field(
        default_factory=_default_threads,
        ge=1,
        le=256,
        description="Threads that compress and hash; by default one per processor, at most 8.",
    )


_Count = Annotated[int, Field(ge=1, le=100_000)]


class RetentionSection(_Section):
    """Which backups `dbmodule expire` keeps; without a rule all of them. Rules add up."""

    keep_last: _Count | None = Field(
        default=None, examples=[14], description="Newest backups of any type."
    )
    keep_chains: _Count | None = Field(
        default=None,
        examples=[2],
        description="Newest fulls, each with everything that is built on it.",
    )
    keep_days: _Count | None = Field(
        default=None,
        examples=[7],
        description="Backups of the last days, and the newest one before them.",
    )
    keep_daily: _Count | None = Field(
        default=None,
        examples=[7],
        description="The newest backup of each of the last days that have one.",
    )
    keep_weekly: _Count | None = Field(default=None, examples=[4], description="The same of weeks.")
    keep_monthly: _Count | None = Field(
        default=None, examples=[12], description="The same of months."
    )
    keep_yearly: _Count | None = Field(
        default=None, examples=[10], description="The same of years."
    )
    timezone: str = Field(
        default="UTC", description="Whose midnight ends a day, as Europe/Berlin names it."
    )

    @field_validator("timezone")
    @classmethod
    def _known(cls, value: str) -> str:
        _zone(value)
        return value

    def policy(self) -> Policy:
        """The rules as the planner takes them."""
        return Policy(zone=_zone(self.timezone), **self.model_dump(exclude={"timezone"}))


def _zone(name: str) -> tzinfo:
    if name == "UTC":
        return UTC  # which needs no time zone database
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError("is not a time zone that this host knows") from None


class AgentSection(_Section):
    """The agent that carries out jobs asked for in SQL."""

    poll_seconds: float = Field(
        default=5.0,
        gt=0,
        le=3600,
        allow_inf_nan=False,
        description="How often the queue is read although no notification came.",
    )


class Config(_Section):
    """Everything that can be set, checked; values only, and safe to print (`repr`)."""

    server: ServerSection = ServerSection()
    repository: RepositorySection
    backup: BackupSection = Field(default_factory=BackupSection)
    retention: RetentionSection = RetentionSection()
    agent: AgentSection = AgentSection()


_KNOWN_SECTIONS = f"The sections are {', '.join(Config.model_fields)}."


class _Settings(BaseSettings):
    """The raw values of all sections, unchecked: which source says what has to be told apart."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, env_nested_delimiter=_NESTED)

    server: dict[str, Any] = {}
    repository: dict[str, Any] = {}
    backup: dict[str, Any] = {}
    retention: dict[str, Any] = {}
    agent: dict[str, Any] = {}


def config_path(explicit: Path | None) -> Path | None:
    """The file to read: `explicit`, else DBMODULE_CONFIG, else the first that exists of
    /etc/dbmodule/dbmodule.toml and ./dbmodule.toml; None when there is neither.
    """
    if explicit is not None:
        return explicit
    if named := os.environ.get(f"{_PREFIX}CONFIG"):
        return Path(named)
    return next((path for path in (_SYSTEM_FILE, _LOCAL_FILE) if path.is_file()), None)


def load_config(
    explicit: Path | None = None,
    *,
    overrides: Overrides | None = None,
    missing_ok: bool = False,
) -> Config:
    """Read, merge and check; raises `UsageError`.

    A file that is named (by `explicit` or DBMODULE_CONFIG) must exist, unless `missing_ok`.
    """
    path = config_path(explicit)
    in_file = {} if path is None or (missing_ok and not path.exists()) else _read_file(path)
    _refuse_secrets(in_file, path)
    in_environment = _read_environment()
    merged: dict[str, Any] = dict(in_file)
    for source in (in_environment, overrides or {}):
        for section, values in source.items():
            below = merged.get(section, {})
            merged[section] = {**below, **values} if isinstance(below, dict) else below
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        # A misspelt key first: it may be why another one is missing.
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        raise _usage_error(first, path, in_environment, overrides or {}) from None


def render_toml(config: Config) -> str:
    """`config` as a file that `load_config` reads back; what was not set is there as a comment."""
    blocks = []
    for section in Config.model_fields:
        values: _Section = getattr(config, section)
        lines = [f"# {type(values).__doc__}", f"[{section}]"]
        for key, field in type(values).model_fields.items():
            if field.exclude:
                continue
            value = getattr(values, key)
            shown = field.examples[0] if value is None and field.examples else value
            lines.append(f"# {field.description}")
            lines.append(
                f"{'' if key in values.model_fields_set and value is not None else '# '}"
                f"{key} = {_toml_value(shown)}"
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _toml_value(value: object) -> str:
    """A TOML literal. A JSON string is a TOML basic string, but that TOML escapes DEL too."""
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, dict):
        pairs = (f"{_toml_value(key)} = {_toml_value(item)}" for key, item in value.items())
        return f"{{ {', '.join(pairs)} }}" if value else "{}"
    text = "" if value is None else str(value)
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _read_file(path: Path) -> dict[str, Any]:
    try:
        # The source takes a file that is not there for an empty one.
        path.open("rb").close()
        return TomlConfigSettingsSource(_Settings, path).toml_data
    except OSError as error:
        raise UsageError(
            f"cannot read configuration {path}: {error.strerror}",
            hint="Name another with --config, or run `dbmodule init` to write one.",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} is not valid TOML: {error}", hint="Correct the file; text goes in quotes."
        ) from None


def _refuse_secrets(in_file: Mapping[str, Any], path: Path | None) -> None:
    """A master key in the clear does not belong where the rest of the configuration is."""
    section = in_file.get("repository")
    if isinstance(section, dict) and "key" in section:
        raise UsageError(
            f"{path}: repository.key: a master key must not stand in the configuration",
            hint="Put it into a file of its own, mode 0600, and name that with key_file.",
        )


def _read_environment() -> dict[str, dict[str, Any]]:
    for name in os.environ:
        if not name.upper().startswith(_PREFIX):
            continue
        section, nested, _ = name.lower()[len(_PREFIX) :].partition(_NESTED)
        known = section in Config.model_fields
        if nested and not known:
            raise UsageError(f"environment: {name}: unknown section", hint=_KNOWN_SECTIONS)
        if known and not nested:
            raise UsageError(
                f"environment: {name}: is a section, not a key",
                hint=f"Set keys one by one, as in {_PREFIX}REPOSITORY{_NESTED}URL.",
            )
    source: PydanticBaseSettingsSource = EnvSettingsSource(_Settings, env_ignore_empty=True)
    return source()


def _usage_error(
    error: ErrorDetails,
    path: Path | None,
    in_environment: Mapping[str, Mapping[str, object]],
    overrides: Overrides,
) -> UsageError:
    """Say in which source the first problem is, under which key, and what it is."""
    section, *rest = (str(part) for part in error["loc"])
    key = rest[0] if rest else ""
    if error["type"] == "missing":
        return UsageError(
            f"{path or 'no configuration file'}: {section}.{key or 'url'} is not set",
            hint="Run `dbmodule init --pgdata DIR --repo URL`, or name a file with --config.",
        )
    if key in overrides.get(section, {}):
        where = f"option for {section}.{key}"
    elif key in in_environment.get(section, {}):
        where = f"environment: {_PREFIX}{section.upper()}{_NESTED}{key.upper()}"
    else:
        where = f"{path}: {section}{'.' if key else ''}{key}"
    return UsageError(f"{where}: {_reason(error)}", hint=_hint(error, section))


def _reason(error: ErrorDetails) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown key" if len(error["loc"]) > 1 else "unknown section"
    if error["type"] == "model_type":
        return "must be a table"
    text = error["msg"].removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


def _hint(error: ErrorDetails, section: str) -> str:
    if error["type"] != "extra_forbidden":
        return "docs/configuration.md lists every key with its type and range."
    if len(error["loc"]) == 1:
        return _KNOWN_SECTIONS
    known = Config.model_fields[section].annotation
    keys = known.model_fields if isinstance(known, type) and issubclass(known, _Section) else {}
    return f"The keys of [{section}] are {', '.join(keys)}."
