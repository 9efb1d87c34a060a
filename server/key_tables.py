"""The tables of identity and where they are: a file of the home, or beside a log in PostgreSQL."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from sqlalchemy import Engine, MetaData, create_engine, inspect
from sqlmodel import Field, Session, SQLModel, select

from audit._store import open_engine
from audit.location import log_location

FILE: Final = "keys.db"
_MAKING: Final = 0x41464B59  # the advisory lock under which the tables are made


class _Base(SQLModel):
    metadata = MetaData()


class ApiKey(_Base, table=True):
    """One key at rest."""

    __tablename__ = "api_key"

    prefix: str = Field(primary_key=True)
    secret_hash: str
    role: str
    principal: str = Field(unique=True)
    note: str  # the operator's own reminder; stays in this table
    created: str  # RFC 3339
    expires: str  # RFC 3339, or "" for never
    revoked: str  # RFC 3339, or "" while it stands


class KeySite(_Base, table=True):
    """The site that a node's key speaks for; a table of its own, so that older stores gain it."""

    __tablename__ = "api_key_site"

    prefix: str = Field(primary_key=True)
    site: str


class KeyTerms(_Base, table=True):
    """What else a key is bound to; a table of its own, so that older stores gain it."""

    __tablename__ = "api_key_terms"

    prefix: str = Field(primary_key=True)
    principal: str  # of the key that this one replaces; "" for its own
    region: str
    models: str  # names by commas; "" for any
    certificate: str = Field(index=True)  # hex SHA-256 of its DER form, or ""


class TokenSubject(_Base, table=True):
    """The pseudonym of somebody whom an issuer knows; deleting the row ends what leads to them."""

    __tablename__ = "token_subject"

    digest: str = Field(primary_key=True)  # SHA-256 of issuer and subject
    principal: str = Field(unique=True)
    created: str


def open_key_engine(home: Path) -> Engine:
    """Return the engine of a coordinator's keys, its tables made."""
    location = log_location(home)
    path = home / FILE
    if location.url is None:
        if not path.exists():
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 10})
        ApiKey.metadata.create_all(engine)
        return engine
    engine = open_engine(location)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MAKING})")
        is_new = not inspect(connection).has_table(ApiKey.__tablename__)
        ApiKey.metadata.create_all(connection)
    if is_new and path.exists():
        _move(path, engine)
    return engine


def _move(path: Path, engine: Engine) -> None:
    """Take over the keys that a release before this kept in a file, although the log is in PostgreSQL."""
    older = create_engine(f"sqlite:///{path}")
    ApiKey.metadata.create_all(older)
    try:
        with Session(older) as source, Session(engine) as target:
            for kind in (ApiKey, KeySite, KeyTerms, TokenSubject):
                for row in source.exec(select(kind)):
                    target.add(kind(**row.model_dump()))
            target.commit()
    finally:
        older.dispose()
