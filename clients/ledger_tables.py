"""The tables of a site's ledger, with metadata of their own: no other store shares them."""

from __future__ import annotations

from typing import ClassVar

from sqlalchemy import LargeBinary, MetaData, UniqueConstraint
from sqlmodel import Field, SQLModel


class SiteTable(SQLModel):
    metadata: ClassVar[MetaData] = MetaData()


class ReleaseRow(SiteTable, table=True):
    __tablename__ = "release"
    __table_args__ = (UniqueConstraint("population", "sequence"), UniqueConstraint("run", "round"))
    id: int | None = Field(default=None, primary_key=True)
    population: str
    sequence: int
    run: str
    round: int
    charter: str
    request_digest: str
    event_hash: str
    statement: bytes = Field(sa_type=LargeBinary)  # canonical bytes of the signed body
    update: bytes = Field(sa_type=LargeBinary)  # the update file as sent
    delivered: int = 0


class MaskedRoundRow(SiteTable, table=True):
    """What the site knows of one masked round; secrets are dropped once they have served."""

    __tablename__ = "masked_round"
    run: str = Field(primary_key=True)
    round: int = Field(primary_key=True)
    state: bytes = Field(sa_type=LargeBinary)  # canonical bytes, see clients.masked_rounds


class ReservationRow(SiteTable, table=True):
    __tablename__ = "reservation"
    run: str = Field(primary_key=True)
    population: str
    charter: str
    planned: bytes = Field(sa_type=LargeBinary)  # canonical bytes of the planned events
    acceptance: bytes = Field(sa_type=LargeBinary)  # canonical bytes of the signed body
    closed: int = 0
