"""One bit of the database flipped: whatever changes an answer is found by fsck."""

from __future__ import annotations

import functools
import hashlib
import os
import random
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from audit.canonical import canonical_bytes, parse_strict
from audit.checkpoints import Checkpoint, cosign, sign_checkpoint
from audit.entries import IndexColumns
from audit.errors import AuditError, SignerRollbackError
from audit.fsck import event_id_of, fsck
from audit.keys import SigningKey
from audit.ledger import Ledger
from audit.notes import KeyType, NoteSigner
from audit.signer import Signer, publish
from tests.soak_report import Report

ORIGIN = "hospital.example/flipped"
LOG = NoteSigner(ORIGIN, SigningKey.generate())
SITE = NoteSigner("site-a", SigningKey.generate(), KeyType.COSIGNATURE)
NAMES = [field.name for field in fields(IndexColumns)]


@functools.cache
def columns_of(body: bytes) -> IndexColumns:
    """The columns of an entry; a body that was seen already is not parsed again."""
    document = parse_strict(body)
    assert isinstance(document, dict)
    return IndexColumns(**{name: document.get(name) for name in NAMES})  # type: ignore[arg-type]


id_of = functools.cache(event_id_of)


def make_body(number: int, filling: int) -> bytes:
    document: dict[str, Any] = {
        "event_id": f"{number:032x}",
        "type": ("prediction", "site.statement", "audit.read")[number % 3],
        "actor": f"actor-{number % 5}",
        "time": f"2026-11-23T22:{number // 60:02d}:{number % 60:02d}Z",
        "text": hashlib.sha256(b"%d" % number).hexdigest() * (filling // 64),
    }
    for place, name in enumerate(("model", "version", "run", "site", "principal")):
        if number % (place + 2) == 0:
            document[name] = f"{name}-{number % 7}"
    if number % 2:
        document["round"] = number % 9
    return canonical_bytes(document)


def make_log(path: Path, entries: int, filling: int) -> Path:
    with Ledger.create(path, ORIGIN) as ledger:

        def add(numbers: range) -> None:
            for body in [make_body(number, filling) for number in numbers]:
                last = ledger.append(body, event_id=id_of(body), index_columns=columns_of(body))
            last.result(30)

        add(range(entries - 10))
        ledger.lease("signer", "somebody", ttl_s=5).acquire()
        note = sign_checkpoint(Checkpoint(ORIGIN, entries - 10, ledger.root_hash), LOG)
        ledger.store_checkpoint(note + cosign(note, SITE, 100))
        add(range(entries - 10, entries))
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_log(tmp_path_factory.mktemp("flips") / "log.db", 300, 64)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than 400 KB, of entries as long as real ones."""
    path = make_log(tmp_path_factory.mktemp("flips") / "log.db", 320, 640)
    assert path.stat().st_size >= 400 << 10
    return path


def answers(path: Path) -> object:
    """Everything that a reader can ask of the log, or the error it gets."""
    try:
        with Ledger.open(path) as ledger:
            return list(_ask(ledger))
    except AuditError as error:
        return error.code


def _ask(ledger: Ledger) -> Iterator[object]:
    size = ledger.tree_size
    yield size, ledger.origin, ledger.root_hash, [ledger.root_at(n) for n in range(0, size + 1, 16)]
    yield ledger.entries(0, size), ledger.leaf_hashes(0, size)
    yield ledger.search(limit=1000), ledger.search(limit=1000, newest_first=True)
    bodies = ledger.entries(0, size)
    for name in NAMES:
        for value in sorted({getattr(columns_of(body), name) for body in bodies} - {None}, key=str):
            if name != "time":
                yield name, value, ledger.count(**{name: value})
                yield [found.leaf_index for found in ledger.search(**{name: value}, limit=1000)]
    for minute in range(6):
        since = f"2026-11-23T22:{minute:02d}:07Z"
        yield ledger.count(since=since), ledger.count(until=since), ledger.search(since=since, limit=9)
    yield [ledger.find_event(id_of(body)) for body in bodies]
    yield ledger.find_event("unheard of"), [ledger.stored_entry(n) for n in range(0, size, 20)]
    yield [ledger.node(level, n) for level in range(9) for n in range(size >> level)]
    yield [ledger.inclusion_proof(n, size) for n in range(size)]
    yield [ledger.consistency_proof(n, size) for n in range(1, size)]
    yield ledger.checkpoints(), ledger.latest_checkpoint(), ledger.checkpoint_at(size - 10)


def raw(path: Path) -> object:
    """What SQLite holds, cheaper than `answers`: every table and index read through, every row looked up.

    Whoever gets the same from all of these gets the same from any query. Interior pages of a table are not
    part of a reading through, hence the look-ups.
    """
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            ask = connection.execute
            found: list[object] = [ask("SELECT * FROM sqlite_master").fetchall()]
            found += [ask(f"PRAGMA {name}").fetchall() for name in ("application_id", "encoding")]
            for table in ("leaf", "node", "head", "checkpoint", "lease", "ledger_migration"):
                found.append(ask(f"SELECT rowid, * FROM {table} NOT INDEXED").fetchall())
            for name in ("event_id", *NAMES):
                found.append(ask(f"SELECT {name}, idx FROM leaf ORDER BY {name}, idx").fetchall())
            rows = [(row[0], row[2]) for row in found[3]]  # type: ignore[index,attr-defined]
            found += [ask("SELECT actor FROM leaf WHERE idx = ?", row[:1]).fetchall() for row in rows]
            found += [ask("SELECT idx FROM leaf WHERE event_id = ?", row[1:]).fetchall() for row in rows]
            return found
    except (sqlite3.Error, UnicodeDecodeError, OverflowError) as error:
        return repr(error)


def flip_bits(original: Path, path: Path, places: list[tuple[int, int]]) -> Counter[str]:
    """Flip one bit at a time; return how often each problem was found, "" where nothing was.

    The flips that fsck does not find are tried against every answer: none may differ. Most of them lie in
    free space; where SQLite holds the very same, one in twenty is tried all the same.
    """
    honest, stored, data = answers(original), raw(original), original.read_bytes()
    assert not isinstance(honest, str)
    assert not isinstance(stored, str)
    path.write_bytes(data)
    found: Counter[str] = Counter()
    for at, bit in places:
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), bytes([data[at] ^ 1 << bit]), at)
        report = fsck(path, columns_of=columns_of, event_id_of=id_of, origin=ORIGIN, log=LOG.verifier)
        found[report.problem] += 1
        if report.ok and (found[""] % 20 == 0 or raw(path) != stored):
            assert answers(path) == honest, f"bit {bit} of byte {at} changed an answer unseen"
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), data[at : at + 1], at)
    assert path.read_bytes() == data, "a reader wrote"
    return found


def drawn(path: Path, seed: int, times: int) -> list[tuple[int, int]]:
    draw, size = random.Random(seed), path.stat().st_size
    return [(draw.randrange(size), draw.randrange(8)) for _ in range(times)]


@pytest.mark.parametrize("seed", range(4))
def test_bit_flip_that_changes_an_answer_is_found(small: Path, tmp_path: Path, seed: int) -> None:
    """Opening may fail cleanly, but no changed answer passes unseen."""
    found = flip_bits(small, tmp_path / "log.db", drawn(small, seed, 50))
    assert found.total() - found[""] > 25


@pytest.mark.soak
@pytest.mark.parametrize("part", range(4))
def test_twenty_thousand_bit_flips_are_found(large: Path, tmp_path: Path, report: Report, part: int) -> None:
    flips = drawn(large, 100 + part, 5000)
    found = flip_bits(large, tmp_path / "log.db", flips)
    unchanged = found.pop("")
    assert found.total() > 2500
    report(
        "flips",
        size=f"{len(flips):,} bits of a database of {large.stat().st_size >> 10} KiB, seed {100 + part}",
        result=f"{found.total():,} found by fsck, {unchanged:,} change no answer, 0 unseen",
    )


def flip_wal_bits(tmp_path: Path, times: int) -> Counter[str]:
    """Flip bits of frames that are not yet in the file. Return how often what happened.

    SQLite takes a frame whose checksum fails for the end of its log, as after a power cut: fsck finds a
    shorter log in order. Its shortness is what the signer's own state shows.
    """
    draw = random.Random(3)
    signer = Signer.create(tmp_path / "signer", ORIGIN)
    with Ledger.create(tmp_path / "log.db", ORIGIN) as ledger:
        for number in range(40):
            body = make_body(number, 64)
            ledger.append_wait(body, event_id=id_of(body), index_columns=columns_of(body))
        signed = publish(ledger, signer)
        data, wal = (tmp_path / "log.db").read_bytes(), (tmp_path / "log.db-wal").read_bytes()
    seen: Counter[str] = Counter()
    for number in range(times):
        path = tmp_path / f"flipped-{number}.db"
        at = draw.randrange(len(wal))
        path.write_bytes(data)
        flipped = wal[:at] + bytes([wal[at] ^ 1 << draw.randrange(8)]) + wal[at + 1 :]
        path.with_name(f"{path.name}-wal").write_bytes(flipped)
        report = fsck(path, columns_of=columns_of, event_id_of=id_of, origin=ORIGIN)
        if not report.ok:
            seen["found by fsck"] += 1
        else:
            with Ledger.open(path) as ledger:
                if ledger.tree_size < 40:
                    with pytest.raises(SignerRollbackError):
                        signer.sign_edge(ledger)
                    seen["shorter log"] += 1
                else:
                    assert signer.sign_edge(ledger) == signed
                    seen["nothing changed"] += 1
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
    return seen


def test_log_that_lost_its_tail_to_a_flipped_bit_is_never_signed(tmp_path: Path) -> None:
    assert flip_wal_bits(tmp_path, 25)["shorter log"] > 12


@pytest.mark.soak
def test_log_that_lost_its_tail_to_two_thousand_flipped_bits_is_never_signed(
    tmp_path: Path, report: Report
) -> None:
    seen = flip_wal_bits(tmp_path, 2000)
    assert seen["shorter log"] > 1000
    report(
        "flips",
        size="2,000 bits of a write-ahead log",
        result=f"{seen['shorter log']:,} times a shorter log, each refused by the signer; "
        f"{seen['nothing changed']:,} change nothing; {seen['found by fsck']:,} found by fsck",
    )
