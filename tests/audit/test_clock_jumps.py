"""The clock jumps an hour ahead, an hour back, a day back: order, signing and witnessing do not follow it."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import update

from audit import _store
from audit.checkpoints import Checkpoint, add_signatures, cosign, parse_checkpoint_note, sign_checkpoint
from audit.entries import LogCreated, columns_of, encode_entry, new_entry
from audit.errors import WitnessClockError
from audit.fsck import fsck
from audit.keys import SigningKey
from audit.lease import MAX_TTL_S, Lease
from audit.ledger import Ledger
from audit.merkle import consistency_proof_of, hash_leaf, root_of
from audit.notes import KeyType, NoteSigner
from audit.publisher import Publisher
from audit.signer import Signer
from audit.tables import LEASE
from audit.tlog_policy import Policy
from audit.witness import Witness
from tests.soak_report import Report

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
START = datetime(2026, 11, 23, 22, 0, 0, tzinfo=UTC)
NOW = int(START.timestamp())
JUMPS = [HOUR, -HOUR, -DAY]
Place = Path | str


def jumping(jumps: list[timedelta], every: int) -> Iterator[str]:
    """A clock that ticks each second, and jumps now and then."""
    now = START
    for number in itertools.count():
        now += timedelta(seconds=1)
        if number % every == every - 1:
            now += jumps[number // every % len(jumps)]
        yield now.strftime("%Y-%m-%dT%H:%M:%SZ")


def append_by(ledger: Ledger, key: str, clock: Iterator[str], count: int) -> list[str]:
    """Append entries dated by a clock; every one has the index after the one before."""
    times, futures = [], []
    for _ in range(count):
        times.append(next(clock))
        entry = new_entry(LogCreated(origin=ledger.origin, log_key=key), actor="me", time=times[-1])
        body = encode_entry(entry)
        futures.append(ledger.append(body, event_id=entry.event_id, index_columns=columns_of(body)))
    assert [future.result(60).leaf_index for future in futures] == list(range(count))
    return times


@pytest.mark.reported
def test_indices_do_not_follow_the_clock(
    place: Place, tmp_path: Path, log_tools: SimpleNamespace, report: Report
) -> None:
    count, every = 300, 15
    signer = Signer.create(tmp_path / "signer", log_tools.ORIGIN)
    with Ledger.create(place, log_tools.ORIGIN) as ledger:
        times = append_by(ledger, signer.vkey, jumping(JUMPS, every), count)
        assert len({time[:13] for time in times}) > 5
        assert [found.columns.time for found in ledger.search(limit=1000)] == times
        middle = sorted(times)[count // 2]
        early = [index for index, time in enumerate(times) if time < middle]
        assert [found.leaf_index for found in ledger.search(until=middle, limit=1000)] == early
        note = Publisher(ledger, signer).publish()
        assert parse_checkpoint_note(note).tree_size == count
    assert fsck(place, columns_of=columns_of, origin=log_tools.ORIGIN).ok
    database = "SQLite" if isinstance(place, Path) else "PostgreSQL"
    report(
        "clocks",
        size=f"{count} entries on {database}; {count // every} jumps of +1 h, -1 h and -1 day",
        result="indices 0 to 299 in the order of appending; search by time answers by what entries state",
    )


@pytest.mark.parametrize("jump", JUMPS)
def test_dead_owners_lease_is_free_in_time_whatever_the_clock_does(
    tmp_path: Path, log_tools: SimpleNamespace, jump: timedelta
) -> None:
    """Set back by a day, the clock says that the dead owner's lease lasts a day: nobody waits for that."""
    now = [float(NOW)]
    with Ledger.create(tmp_path / "log.db", log_tools.ORIGIN) as ledger:
        dead, other = (
            Lease(ledger._engine, "signer", name, ttl_s=5, clock=lambda: now[0]) for name in ("a", "b")
        )
        assert dead.acquire()
        assert not other.acquire()
        now[0] += jump.total_seconds() + 5
        assert other.acquire()
        assert not dead.acquire()


def test_living_owner_keeps_its_lease_through_a_jump_nobody_else_saw(
    tmp_path: Path, log_tools: SimpleNamespace
) -> None:
    now = [float(NOW)]
    with Ledger.create(tmp_path / "log.db", log_tools.ORIGIN) as ledger:
        owner, other = (
            Lease(ledger._engine, "signer", name, ttl_s=5, clock=lambda: now[0]) for name in ("a", "b")
        )
        assert owner.acquire()
        for jump in JUMPS:
            now[0] += jump.total_seconds()
            assert owner.acquire()
            assert not other.acquire()
        assert owner.token == 1


@pytest.mark.parametrize("ttl_s", [0, -1, MAX_TTL_S + 1])
def test_lease_of_a_senseless_length_is_refused(
    tmp_path: Path, log_tools: SimpleNamespace, ttl_s: float
) -> None:
    with (
        Ledger.create(tmp_path / "log.db", log_tools.ORIGIN) as ledger,
        pytest.raises(ValueError, match="up to"),
    ):
        ledger.lease("signer", "a", ttl_s=ttl_s)


def test_idle_log_is_announced_again_after_the_clock_was_set_back(
    place: Place, tmp_path: Path, log_tools: SimpleNamespace
) -> None:
    signer = Signer.create(tmp_path / "signer", log_tools.ORIGIN)
    with Ledger.create(place, log_tools.ORIGIN) as ledger:
        log_tools.fill(ledger, range(3))
        publisher = Publisher(ledger, signer)
        assert publisher.step() is not None
        assert publisher.step() is None
        with _store.writing(ledger._engine) as connection:  # what was announced seems to lie a day ahead
            connection.execute(update(LEASE).values(published_ms=LEASE.c.published_ms + 86_400_000))
        assert publisher.step() is not None
        assert publisher.step() is None


LOG = NoteSigner("hospital.example/log", SigningKey.generate())
SITES = [NoteSigner(name, SigningKey.generate(), KeyType.COSIGNATURE) for name in ("east", "north", "west")]
LEAVES = [hash_leaf(b"%d" % n) for n in range(9)]


def signed(size: int) -> bytes:
    return sign_checkpoint(Checkpoint(LOG.name, size, root_of(LEAVES[:size])), LOG)


@pytest.mark.reported
def test_cosignature_from_the_future_is_not_counted(report: Report) -> None:
    lines = [f"log {LOG.vkey}", *(f"witness {site.name} {site.vkey}" for site in SITES)]
    policy = Policy.parse("\n".join([*lines, "group sites 2 east north west", "quorum sites"]))
    tried = 0
    for ahead in (-86_400, -3600, 0, 299, 300, 301, 3600, 86_400, 2**40):
        note = add_signatures(
            signed(9), [cosign(signed(9), SITES[0], NOW), cosign(signed(9), SITES[1], NOW + ahead)]
        )
        accepted = policy.open(note, now=NOW)
        assert accepted.quorum.satisfied == (ahead <= 300)
        assert len(accepted.opened.from_the_future) == (ahead > 300)
        tried += 1
    report(
        "clocks",
        size=f"{tried} cosignatures dated -1 day to +1 day",
        result="counted up to +300 s, refused beyond",
    )


def test_witness_whose_clock_went_back_waits_and_loses_nothing(tmp_path: Path) -> None:
    witness = Witness.create(tmp_path / "witness.json", SITES[0], LOG.vkey)
    witness.cosign(signed(4), 0, [], NOW)
    before = witness.path.read_bytes()
    for back in (HOUR, DAY):
        with pytest.raises(WitnessClockError, match="set the clock right"):
            witness.cosign(signed(9), 4, consistency_proof_of(LEAVES, 4), NOW - int(back.total_seconds()))
    assert witness.path.read_bytes() == before
    line = witness.cosign(signed(9), 4, consistency_proof_of(LEAVES, 4), NOW + int(HOUR.total_seconds()))
    assert int.from_bytes(_payload(line)[4:12], "big") == NOW + 3600
    with pytest.raises(WitnessClockError):  # the hour ahead was wrong: it says so until the time has come
        witness.cosign(signed(9), 9, [], NOW)


def _payload(line: bytes) -> bytes:
    return base64.b64decode(line.split(b" ")[2])
