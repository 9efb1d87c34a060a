"""What a process under fault does: each job prepares, then acts, and says what it was promised.

`say(text)` reaches the test at once. A job says "ack ..." only after the call that promises durability
returned, "refused CODE" for an error that the package declares; whatever else escapes is said as "raw ...".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from audit.canonical import canonical_bytes
from audit.entries import IndexColumns
from audit.errors import AuditError
from audit.keys import SigningKey
from audit.ledger import Ledger
from audit.notes import KeyType, NoteSigner
from audit.signer import Signer, publish
from audit.witness import Witness
from audit.witness_request import AddCheckpoint

Say = Callable[[str], None]
COLUMNS = IndexColumns(type="test.event", actor="tester", time="2026-11-23T22:23:12Z")


def body_of(event_id: str) -> bytes:
    document = {"actor": "tester", "event_id": event_id, "text": "x" * 600, "time": COLUMNS.time}
    return canonical_bytes({**document, "type": "test.event"})


def append_one(ledger: Ledger, event_id: str, say: Say) -> None:
    """Append, and as callers must, ask once more with the same event id if refused."""
    for _ in range(2):
        try:
            placed = ledger.append_wait(body_of(event_id), event_id=event_id, index_columns=COLUMNS)
        except AuditError as error:
            say(f"refused {error.code}")
        else:
            say(f"ack {event_id} {placed.leaf_index}")
            return


def append(say: Say, path: str, names: list[str]) -> Iterator[None]:
    ledger = Ledger.open(path)
    append_one(ledger, "warm", say)  # from here on the sequencer's thread and connection exist
    yield
    for name in names:
        append_one(ledger, name, say)


def append_and_close(say: Say, path: str, names: list[str]) -> Iterator[None]:
    """The write-ahead log goes into the file when the last connection closes."""
    ledger = Ledger.open(path)
    for name in names:
        append_one(ledger, name, say)
    yield
    ledger.close()


def open_and_append(say: Say, path: str, names: list[str]) -> Iterator[None]:
    """Recovery, when the last writer was killed."""
    yield
    with Ledger.open(path) as ledger:
        for name in names:
            append_one(ledger, name, say)


def create(say: Say, path: str, origin: str) -> Iterator[None]:
    yield
    Ledger.create(path, origin).close()
    say("ack created")


def sign(say: Say, path: str, home: str) -> Iterator[None]:
    ledger, signer = Ledger.open(path), Signer.open(home)
    yield
    for _ in range(2):
        try:
            say(f"ack {publish(ledger, signer).hex()}")
        except AuditError as error:
            say(f"refused {error.code}")


def create_signer(say: Say, home: str, origin: str) -> Iterator[None]:
    yield
    Signer.create(home, origin)
    say("ack created")


def cosign(say: Say, path: str, key: str, log: str, requests: list[str]) -> Iterator[None]:
    """Answer one request after the other, each as soon as the one before is recorded."""
    witness = Witness(path, NoteSigner("site-a", SigningKey.load(key), KeyType.COSIGNATURE), log)
    yield
    for text in requests:
        asked = AddCheckpoint.parse(text.encode())
        try:
            line = witness.cosign(asked.note, asked.old_size, asked.proof, 1_700_000_000)
        except AuditError as error:
            say(f"refused {error.code}")
        else:
            say(f"ack {line.hex()}")


JOBS: dict[str, Callable[..., Iterator[None]]] = {
    job.__name__: job
    for job in (append, append_and_close, open_and_append, create, sign, create_signer, cosign)
}


def run(name: str, arguments: dict[str, Any], out: int, ready: Callable[[], None]) -> None:
    """Run one job in this process."""

    def say(text: str) -> None:
        os.writev(out, [text.encode() + b"\n"])  # no test fails this call, so that what was said is heard

    try:
        job = JOBS[name](say, **arguments)
        next(job)
        ready()
        for _ in job:
            raise RuntimeError(f"{name} stops twice")
    except AuditError as error:
        say(f"refused {error.code}")
    except BaseException as error:  # noqa: BLE001 - the test is told, and fails
        say(f"raw {error!r}")
