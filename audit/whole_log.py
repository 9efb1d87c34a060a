"""`affidavit verify LOG.db`: a whole log file against a policy, step by step, as an evidence file is.

The file is examined from its bytes (`audit.fsck`), then its newest checkpoint that the policy's log signed
and a quorum of its witnesses cosigned is looked for. What lies beyond that checkpoint is named: only the
operator stands behind it. Last, every population's odometer is walked over all its releases in the log.
Needs SQLAlchemy, unlike the verification of evidence files.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from audit.entries import Body, columns_of, decode_entry
from audit.errors import AuditError, LogKeyError
from audit.fsck import fsck
from audit.log_keys import LogKeys, read_log_keys
from audit.log_odometers import WALKED, check_log_odometers
from audit.tlog_policy import NO_QUORUM, AcceptedCheckpoint, Policy
from audit.verify.chain import FailError
from audit.verify.report import NO_POLICY, Report, Step, Word

FILE: Final = "The log file"
CHECKPOINT: Final = "The log's checkpoint"
ODOMETERS: Final = "The odometers"
_LEAF: Final = re.compile(r"leaf ([0-9]{1,18})")


def verify_log(path: Path | str, *, policy_text: str | None, now: datetime | None = None) -> Report:
    """Verify a whole log file. A damaged one gives a report, never an exception.

    Raises:
        MalformedPolicyError: the policy is not one; names the line.
    """
    policy = None if policy_text is None else Policy.parse(policy_text)
    now_s = int((now or datetime.now(UTC)).timestamp())
    found = fsck(path, columns_of=columns_of)
    if not found.ok:
        leaf = _LEAF.search(found.where)
        step = Step(
            number=1,
            title=FILE,
            word=Word.FAIL,
            detail=f"{found.where}: {found.detail}; {found.entries} entries before it are in order",
            code=f"log.{found.problem}",
            entry=int(leaf.group(1)) if leaf else None,
        )
        return Report(steps=(step,), scope="log", subject=f"log file {Path(path).name}")
    whole = Step(
        number=1,
        title=FILE,
        word=Word.PROVED,
        detail=f"{found.entries} entries; every column, index, node, root and checkpoint derived again",
        code="ok",
    )
    steps = (whole, _checkpoint(path, policy, found.entries, now_s), _odometers(path))
    return Report(steps=steps, scope="log", subject=f"log file {Path(path).name}")


def _checkpoint(path: Path | str, policy: Policy | None, entries: int, now_s: int) -> Step:
    def step(word: Word, detail: str, code: str = "ok") -> Step:
        return Step(number=2, title=CHECKPOINT, word=word, detail=detail, code=code)

    if policy is None:
        return step(Word.NO_EVIDENCE, "no policy says whose log this is and who watches it", NO_POLICY)
    best: AcceptedCheckpoint | None = None
    refused = "the file holds no checkpoint"
    try:
        keys = _log_keys(path)
    except LogKeyError as error:
        return step(Word.FAIL, f"the entries about the log's keys: {error}", error.code)
    for note in _notes(path):
        try:
            accepted = policy.open(note, now=now_s)
            _check_keys(keys, accepted, witnessed=accepted.quorum.satisfied and policy.quorum != NO_QUORUM)
        except AuditError as error:
            return step(Word.FAIL, f"the policy does not accept a checkpoint: {error}", error.code)
        if accepted.quorum.satisfied:
            best = accepted
            break
        refused = f"{accepted.quorum.have} of the {accepted.quorum.need} witnesses needed cosigned the newest"
    if best is None:
        return step(Word.NO_EVIDENCE, refused, "verify.unwitnessed")
    size = best.opened.checkpoint.tree_size
    beyond = f"; the last {entries - size} entries came later and nobody has cosigned them yet"
    by = "nobody, since the policy asks for no witness"
    if policy.quorum != NO_QUORUM:
        by = ", ".join(best.witnesses)
    word = Word.ATTESTED if policy.quorum == NO_QUORUM else Word.PROVED
    return step(word, f"{size} entries, cosigned by {by}" + (beyond if entries > size else ""))


def _check_keys(keys: LogKeys, accepted: AcceptedCheckpoint, *, witnessed: bool) -> None:
    """At least one of the log's keys that signed was valid for a tree of this size; else `LogKeyError`."""
    size = accepted.opened.checkpoint.tree_size
    refused: LogKeyError | None = None
    for verifier in accepted.opened.log_keys:
        try:
            keys.check(verifier.vkey, size, witnessed=witnessed)
        except LogKeyError as error:
            refused = refused or error
        else:
            return
    if refused is not None:
        raise refused


def _log_keys(path: Path | str) -> LogKeys:
    """What the entries say about the log's keys; the columns were derived from the bytes before this."""
    query = (
        "SELECT idx, body FROM leaf"
        " WHERE type IN ('log.created', 'key.rotated', 'log.compromise') ORDER BY idx"
    )
    with closing(_read_only(path)) as connection:
        return read_log_keys((index, decode_entry(body).body) for index, body in connection.execute(query))


def _odometers(path: Path | str) -> Step:
    try:
        outcome = check_log_odometers(_entries(path), _origin(path))
    except FailError as error:
        return Step(
            number=3,
            title=ODOMETERS,
            word=Word.FAIL,
            detail=error.detail,
            code=error.code,
            entry=error.entry,
        )
    return Step(number=3, title=ODOMETERS, word=outcome.word, detail=outcome.detail, code=outcome.code)


def _entries(path: Path | str) -> Iterator[tuple[int, str, Body]]:
    marks = ", ".join("?" for _ in WALKED)
    query = f"SELECT idx, leaf_hash, body FROM leaf WHERE type IN ({marks}) ORDER BY idx"  # noqa: S608
    with closing(_read_only(path)) as connection:
        for index, leaf_hash, body in connection.execute(query, WALKED):
            yield index, leaf_hash.hex(), decode_entry(body).body


def _origin(path: Path | str) -> str:
    with closing(_read_only(path)) as connection:
        return str(connection.execute("SELECT origin FROM head").fetchone()[0])


def _read_only(path: Path | str) -> sqlite3.Connection:
    return sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True)


def _notes(path: Path | str) -> Iterator[bytes]:
    """The stored notes, newest first."""
    with closing(_read_only(path)) as connection:
        for (note,) in connection.execute("SELECT note FROM checkpoint ORDER BY tree_size DESC"):
            yield bytes(note)
