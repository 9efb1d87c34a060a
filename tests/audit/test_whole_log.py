"""A whole log file against a policy: an edited database never passes for the witnessed one."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from audit.checkpoints import Checkpoint, add_signatures, cosign, sign_checkpoint
from audit.entries import RunFailed, columns_of, encode_entry, new_entry
from audit.errors import MalformedPolicyError
from audit.keys import SigningKey
from audit.ledger import Ledger
from audit.notes import KeyType, NoteSigner
from audit.verify.report import Verdict, Word
from audit.whole_log import CHECKPOINT, FILE, verify_log

ORIGIN = "hospital.example/whole"
LOG = NoteSigner(ORIGIN, SigningKey.generate())
WITNESSES = tuple(
    NoteSigner(name, SigningKey.generate(), KeyType.COSIGNATURE) for name in ("east", "north", "west")
)


def policy_of(log: NoteSigner = LOG, witnesses: tuple[NoteSigner, ...] = WITNESSES) -> str:
    names = " ".join(witness.name for witness in witnesses)
    lines = [f"log {log.vkey}", *(f"witness {w.name} {w.vkey}" for w in witnesses)]
    return "\n".join([*lines, f"group members 2 {names}", "quorum members", ""])


def entry(number: int, run: str = "run") -> tuple[bytes, str]:
    body = RunFailed(run=run, charter="a" * 64, round=number, reason="stopped")
    made = new_entry(body, actor="coordinator", time="2026-01-02T03:04:05Z")
    return encode_entry(made), made.event_id


def fill(ledger: Ledger, count: int, run: str = "run") -> None:
    made = [entry(number, run) for number in range(count)]
    futures = [
        ledger.append(data, event_id=event_id, index_columns=columns_of(data)) for data, event_id in made
    ]
    for future in futures:
        future.result(30)


def checkpoint(ledger: Ledger, witnesses: tuple[NoteSigner, ...] = WITNESSES, log: NoteSigner = LOG) -> None:
    tree = Checkpoint(ORIGIN, ledger.tree_size, ledger.root_at(ledger.tree_size))
    note = sign_checkpoint(tree, log)
    ledger.store_checkpoint(add_signatures(note, [cosign(note, w, int(time.time())) for w in witnesses]))


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "log.db"
    with Ledger.create(path, ORIGIN) as ledger:
        fill(ledger, 300)
        checkpoint(ledger)
    return path


@pytest.fixture
def copy(honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(honest, tmp_path / "log.db"))


def edit(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def test_the_witnessed_log_is_valid(honest: Path) -> None:
    report = verify_log(honest, policy_text=policy_of())
    assert report.verdict is Verdict.VALID
    assert [step.word for step in report.steps] == [Word.PROVED, Word.PROVED, Word.PROVED]
    assert "300 entries" in report.text()


@pytest.mark.parametrize(
    ("statement", "code", "leaf"),
    [
        ("UPDATE leaf SET body = replace(body, 'stopped', 'skipped') WHERE idx = 7", "log.leaf_hash", 7),
        ("UPDATE leaf SET leaf_hash = zeroblob(32) WHERE idx = 7", "log.leaf_hash", 7),
        ("UPDATE leaf SET run = 'other' WHERE idx = 7", "log.columns", 7),
        ("UPDATE leaf SET time = '2020-01-01T00:00:00Z' WHERE idx = 299", "log.columns", 299),
        ("UPDATE leaf SET event_id = 'x' WHERE idx = 7", "log.event_id", 7),
        ("DELETE FROM leaf WHERE idx = 7", "log.leaf_order", None),
        ("DELETE FROM leaf WHERE idx = 299", "log.head", None),
        ("UPDATE node SET hash = zeroblob(32) WHERE level = 8", "log.node", None),
        ("DELETE FROM node", "log.node", None),
        ("UPDATE head SET size = 299", "log.checkpoint", None),
        ("UPDATE head SET origin = 'another.example/log'", "log.checkpoint", None),
        ("UPDATE checkpoint SET note = replace(note, '300', '299')", "log.checkpoint", None),
        ("DROP INDEX ix_leaf_run", "log.schema", None),
    ],
)
def test_an_edited_database_fails_and_is_named(
    copy: Path, statement: str, code: str, leaf: int | None
) -> None:
    edit(copy, statement)
    report = verify_log(copy, policy_text=policy_of())
    (step,) = report.steps
    assert report.verdict is Verdict.INVALID
    assert (step.title, step.word, step.code) == (FILE, Word.FAIL, code)
    if leaf is not None:
        assert step.entry == leaf


def test_a_log_rewritten_and_signed_again_by_its_operator_is_unwitnessed(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "log.db", ORIGIN) as ledger:
        fill(ledger, 20, run="another history")
        checkpoint(ledger, witnesses=())
    report = verify_log(tmp_path / "log.db", policy_text=policy_of())
    assert report.verdict is Verdict.UNWITNESSED
    assert report.step(CHECKPOINT).code == "verify.unwitnessed"


def test_cosignatures_moved_to_a_rewritten_log_do_not_fit(honest: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(honest)) as source:
        size, note, digest = source.execute("SELECT tree_size, note, note_hash FROM checkpoint").fetchone()
    path = tmp_path / "log.db"
    with Ledger.create(path, ORIGIN) as ledger:
        fill(ledger, 300, run="another history")
    with closing(sqlite3.connect(path)) as target, target:
        target.execute("INSERT INTO checkpoint VALUES (?, ?, ?)", (size, note, digest))
    (step,) = verify_log(path, policy_text=policy_of()).steps
    assert (step.word, step.code) == (Word.FAIL, "log.checkpoint")


def test_entries_nobody_cosigned_yet_are_named(copy: Path) -> None:
    with Ledger.open(copy) as ledger:
        fill(ledger, 3, run="later")
        checkpoint(ledger, witnesses=WITNESSES[:1])
    report = verify_log(copy, policy_text=policy_of())
    assert report.verdict is Verdict.VALID
    assert "the last 3 entries came later" in report.step(CHECKPOINT).detail


@pytest.mark.parametrize(
    ("policy", "verdict", "code"),
    [
        (lambda: None, Verdict.SELF_CONSISTENT_ONLY, "verify.no_policy"),
        (lambda: policy_of(NoteSigner(ORIGIN, SigningKey.generate())), Verdict.INVALID, None),
        (
            lambda: policy_of(
                witnesses=tuple(
                    NoteSigner(w.name, SigningKey.generate(), KeyType.COSIGNATURE) for w in WITNESSES
                )
            ),
            Verdict.UNWITNESSED,
            "verify.unwitnessed",
        ),
    ],
)
def test_trust_comes_from_the_policy_alone(
    honest: Path, policy: Callable[[], str | None], verdict: Verdict, code: str | None
) -> None:
    report = verify_log(honest, policy_text=policy())
    assert report.verdict is verdict
    assert code is None or report.step(CHECKPOINT).code == code


def test_a_cosignature_from_the_future_does_not_count(honest: Path) -> None:
    before = datetime.now(UTC) - timedelta(hours=2)
    assert verify_log(honest, policy_text=policy_of(), now=before).verdict is Verdict.UNWITNESSED


def test_a_malformed_policy_is_an_error_of_its_own(honest: Path) -> None:
    with pytest.raises(MalformedPolicyError):
        verify_log(honest, policy_text="quorum everybody\n")


def test_the_command_takes_a_log_file(honest: Path, tmp_path: Path) -> None:
    (tmp_path / "policy.txt").write_text(policy_of())
    run = [sys.executable, "-m", "audit.verify", str(honest), "--policy", str(tmp_path / "policy.txt")]
    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, "VALID" in done.stdout) == (0, True), done.stderr


def test_a_file_that_only_begins_like_a_database_fails(tmp_path: Path) -> None:
    (tmp_path / "log.db").write_bytes(b"SQLite format 3\x00" + bytes(500))
    report = verify_log(tmp_path / "log.db", policy_text=policy_of())
    assert report.verdict is Verdict.INVALID
