"""Where a log is: a path means SQLite, a URL names SQLite or PostgreSQL.

A home says so in `config.yaml`, key `database`; AFFIDAVIT_DATABASE overrides it. A password is never
written there: it comes from AFFIDAVIT_DATABASE_PASSWORD, from the file that AFFIDAVIT_DATABASE_PASSWORD_FILE
names, or from what libpq reads itself (PGPASSWORD, PGPASSFILE).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from audit.errors import LocationError

LOG_FILE: Final = "log.db"
VAULT_FILE: Final = "vault.db"
CONFIG: Final = "config.yaml"
DATABASE: Final = "AFFIDAVIT_DATABASE"
VAULT: Final = "AFFIDAVIT_VAULT"
PASSWORD: Final = "AFFIDAVIT_DATABASE_PASSWORD"  # noqa: S105 - the name of a variable


@dataclass(frozen=True, slots=True)
class Location:
    """One log's database; `path` for SQLite, `url` for PostgreSQL."""

    path: Path | None = None
    url: URL | None = None

    @classmethod
    def parse(cls, place: Location | Path | str) -> Location:
        """Read a path or a URL.

        Raises:
            LocationError: a URL of a database that is not supported, or that names none.
        """
        if isinstance(place, Location):
            return place
        if isinstance(place, Path) or "://" not in place:
            return cls(path=Path(place))
        try:
            url = make_url(place)
            backend = url.get_backend_name()
        except (ArgumentError, ValueError) as error:
            raise LocationError("the log's URL is none; write postgresql://USER@HOST/DATABASE") from error
        if backend == "sqlite":
            if not url.database or url.query:
                raise LocationError("write sqlite:///PATH, without options: a log needs a file")
            return cls(path=Path(url.database))
        if backend != "postgresql" or url.drivername not in ("postgresql", "postgresql+psycopg"):
            raise LocationError(
                f"a log cannot live in {url.drivername!r}; use a path, sqlite:///PATH or postgresql://HOST/DATABASE"
            )
        if not url.database:
            raise LocationError("the log's URL names no database; write postgresql://USER@HOST/DATABASE")
        return cls(url=url.set(drivername="postgresql+psycopg"))

    def __str__(self) -> str:
        if self.url is not None:
            return self.url.set(drivername="postgresql").render_as_string(hide_password=True)
        return str(self.path)


def read_secret(variable: str, environ: Mapping[str, str] | None = None) -> str | None:
    """Return a secret from the environment, or from the file that `<variable>_FILE` names.

    Raises:
        LocationError: both are set, or the file cannot be read or is empty.
    """
    environ = os.environ if environ is None else environ
    value, file = environ.get(variable), environ.get(f"{variable}_FILE")
    if value and file:
        raise LocationError(f"set {variable} or {variable}_FILE, not both")
    if not file:
        return value or None
    try:
        text = Path(file).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise LocationError(f"{variable}_FILE: {file} cannot be read as text") from error
    if not text:
        raise LocationError(f"{variable}_FILE: {file} is empty")
    return text


def log_location(home: Path, environ: Mapping[str, str] | None = None) -> Location:
    """Return where the log of a coordinator's home is.

    Raises:
        LocationError: the configuration cannot be read, or holds a password.
    """
    environ = os.environ if environ is None else environ
    place = environ.get(DATABASE) or _configured(home / CONFIG, "database")
    if place is None:
        return Location(path=home / LOG_FILE)
    return _located(home, place, "database", environ, from_file=not environ.get(DATABASE))


def vault_location(home: Path, environ: Mapping[str, str] | None = None) -> Location:
    """Return where the vault of a coordinator's home is: key `vault` of `config.yaml`, AFFIDAVIT_VAULT, else
    `vault.db` beside a log that is a file, or tables of its own beside one in PostgreSQL.

    Raises:
        LocationError: as `log_location`.
    """
    environ = os.environ if environ is None else environ
    place = environ.get(VAULT) or _configured(home / CONFIG, "vault")
    if place is not None:
        return _located(home, place, "vault", environ, from_file=not environ.get(VAULT))
    log = log_location(home, environ)
    return log if log.url is not None else Location(path=home / VAULT_FILE)


def _located(home: Path, place: Any, key: str, environ: Mapping[str, str], *, from_file: bool) -> Location:
    if not isinstance(place, str) or not place:
        raise LocationError(f"{home / CONFIG}: `{key}` must be a path or a URL")
    location = Location.parse(place)
    if location.path is not None:
        return Location(path=home / location.path)
    url = location.url
    assert url is not None  # noqa: S101 - the other half of Location
    if url.password and from_file:
        raise LocationError(
            f"{home / CONFIG}: `{key}` holds a password; give it by {PASSWORD}_FILE or {PASSWORD}"
        )
    password = read_secret(PASSWORD, environ)
    return Location(url=url.set(password=password) if password else url)


def _configured(path: Path, key: str) -> Any:
    if not path.is_file():
        return None
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LocationError(f"{path}: is not readable YAML; correct it") from error
    return document.get(key) if isinstance(document, dict) else None
