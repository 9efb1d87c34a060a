"""A small log to attack: entries of a plain kind, their columns, and the keys around them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from audit.canonical import canonical_bytes
from audit.entries import IndexColumns
from audit.keys import SigningKey
from audit.ledger import Ledger, Sequenced
from audit.notes import KeyType, NoteSigner
from audit.vault import Vault

ORIGIN = "hospital.example/log"
TIME = "2026-11-23T22:23:12Z"


@dataclass(frozen=True)
class MadeEntry:
    body: bytes
    event_id: str
    columns: IndexColumns


def columns_of(body: bytes) -> IndexColumns:
    document = json.loads(body)
    return IndexColumns(
        type=document["type"],
        actor=document["actor"],
        time=document["time"],
        run=document.get("run"),
        round=document.get("round"),
    )


def make_entry(number: int, text: str = "", **fields: str | int) -> MadeEntry:
    document = {
        "event_id": f"{number:032x}",
        "type": "test.event",
        "actor": "tester",
        "time": TIME,
        "text": text,
        **fields,
    }
    body = canonical_bytes(document)
    return MadeEntry(body, f"{number:032x}", columns_of(body))


def fill(ledger: Ledger, numbers: range, **fields: str | int) -> list[Sequenced]:
    made = [make_entry(number, **fields) for number in numbers]
    futures = [ledger.append(m.body, event_id=m.event_id, index_columns=m.columns) for m in made]
    return [future.result(30) for future in futures]


@pytest.fixture(scope="session")
def log_tools() -> SimpleNamespace:
    return SimpleNamespace(ORIGIN=ORIGIN, TIME=TIME, make_entry=make_entry, columns_of=columns_of, fill=fill)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.create(tmp_path / "log.db", ORIGIN) as made:
        yield made


@pytest.fixture(scope="session")
def log_signer() -> NoteSigner:
    return NoteSigner(ORIGIN, SigningKey.generate())


@pytest.fixture(scope="session")
def new_witness_key() -> Callable[[str], NoteSigner]:
    return lambda name: NoteSigner(name, SigningKey.generate(), KeyType.COSIGNATURE)


def _postgresql() -> ModuleType:
    path = Path(__file__).parents[1] / "postgresql.py"
    spec = importlib.util.spec_from_file_location("tests_postgresql", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[Any]:
    with _postgresql().running_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """Where a new log may be made, on each database in turn."""
    if request.param == "sqlite":
        return tmp_path / "log.db"
    url: str = request.getfixturevalue("postgresql_server").new_schema()
    return url


@pytest.fixture
def vault(place: Path | str, tmp_path: Path) -> Iterator[Vault]:
    where = place.with_name("vault.db") if isinstance(place, Path) else place
    with Vault.create(where, tmp_path / "vault.key", ORIGIN) as made:
        yield made


@pytest.fixture
def on_file(tmp_path: Path) -> Iterator[Vault]:
    with Vault.create(tmp_path / "vault.db", tmp_path / "vault.key", ORIGIN) as made:
        yield made
