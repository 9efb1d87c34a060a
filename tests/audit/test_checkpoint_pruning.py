"""Old checkpoints thin out, and nothing that a policy accepts is lost by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit._checkpoint_pruning import HOUR_S, superseded
from audit._checkpoint_store import CheckpointStore
from audit.checkpoints import Checkpoint, cosign, sign_checkpoint
from audit.errors import LedgerBusyError
from audit.fsck import fsck
from audit.keys import SigningKey
from audit.ledger import Ledger
from audit.notes import KeyType, NoteSigner, SignatureLine, parse_note

ORIGIN = "hospital.example/log"
TEXT = b"hospital.example/log\n1\n" + b"A" * 43 + b"=\n"
NAMES = ["a", "b", "c", "d"]


def made(signers: frozenset[str], hour: int) -> bytes:
    """A note with lines of the right form; nobody verifies a signature in order to prune."""
    lines = [SignatureLine(ORIGIN, b"logk", bytes(64)).format()]
    for name in sorted(signers):
        payload = (hour * HOUR_S + 5).to_bytes(8, "big") + bytes(64)
        lines.append(SignatureLine(name, name.encode() * 4, payload).format())
    return TEXT + b"\n" + b"".join(lines)


HISTORIES = st.lists(
    st.tuples(st.frozensets(st.sampled_from(NAMES)), st.integers(0, 3)), min_size=1, max_size=25
)


@given(HISTORIES, st.sampled_from(NAMES), st.integers(0, 4))
def test_what_any_policy_accepts_is_still_there(
    history: list[tuple[frozenset[str], int]], trusted: str, need: int
) -> None:
    sizes = dict(enumerate(history))
    gone = set(superseded((size, made(*history[size])) for size in reversed(range(len(history)))))
    left = sizes.keys() - gone

    def accepted(size: int) -> bool:
        signers = history[size][0]
        return len(signers) >= need and (need < 2 or trusted in signers)

    assert max(filter(accepted, sizes), default=None) == max(filter(accepted, left), default=None)
    for leaf in sizes:

        def rank(size: int) -> tuple[int, int]:
            return len(history[size][0]), size

        covering = [size for size in sizes if size > leaf]
        if covering:
            assert max(covering, key=rank) == max((size for size in left if size > leaf), key=rank)
    for size in gone:
        signers, hour = history[size]
        assert any(
            other > size and signers <= history[other][0] and (not signers or history[other][1] == hour)
            for other in left
        )


@given(HISTORIES)
def test_pruning_again_finds_nothing(history: list[tuple[frozenset[str], int]]) -> None:
    notes = [(size, made(*history[size])) for size in reversed(range(len(history)))]
    gone = superseded(notes)
    assert superseded([note for note in notes if note[0] not in gone]) == []


def test_a_year_of_busy_seconds_leaves_one_note_an_hour() -> None:
    both = frozenset({"a", "b"})
    notes = [(second, made(both, second // HOUR_S)) for second in reversed(range(0, 10 * HOUR_S, 20))]
    assert len(notes) - len(superseded(notes)) == 10


def test_a_note_that_does_not_parse_is_left_for_the_examination() -> None:
    assert superseded([(3, made(frozenset(), 0)), (2, b"rubbish"), (1, made(frozenset(), 0))]) == [1]


def test_a_hostile_time_protects_only_its_own_note() -> None:
    ancient = TEXT + b"\n" + SignatureLine("a", b"aaaa", b"\xff" * 8 + bytes(64)).format()
    assert superseded([(3, made(frozenset({"a"}), 1)), (2, ancient), (1, made(frozenset({"a"}), 1))]) == [1]


@pytest.fixture
def crowded(place: Path | str, log_tools: SimpleNamespace, log_signer: NoteSigner) -> Iterator[Ledger]:
    witness = NoteSigner("site-a", SigningKey.generate(), KeyType.COSIGNATURE)
    with Ledger.create(place, log_tools.ORIGIN) as ledger:
        log_tools.fill(ledger, range(30))
        for size in range(1, 31):
            note = sign_checkpoint(Checkpoint(log_tools.ORIGIN, size, ledger.root_at(size)), log_signer)
            if size % 2:
                note += cosign(note, witness, size // 10 * HOUR_S)
            ledger.store_checkpoint(note)
        yield ledger


def test_both_databases_keep_the_newest_and_one_an_hour(
    crowded: Ledger, place: Path | str, log_tools: SimpleNamespace
) -> None:
    before = set(crowded.checkpoints())
    store = crowded._checkpoints
    assert store.prune(keep_newest=4) == 30 - 4 - 2
    kept = [note.split(b"\n")[1] for note in crowded.checkpoints()]
    assert kept == [b"9", b"19", b"27", b"28", b"29", b"30"]
    assert store.prune(keep_newest=4) == 0
    assert set(crowded.checkpoints()) < before
    assert fsck(place, columns_of=log_tools.columns_of).ok


def test_note_cosigned_while_pruning_stays(
    ledger: Ledger, log_tools: SimpleNamespace, log_signer: NoteSigner
) -> None:
    log_tools.fill(ledger, range(3))
    witness = NoteSigner("site-a", SigningKey.generate(), KeyType.COSIGNATURE)
    notes = [
        sign_checkpoint(Checkpoint(log_tools.ORIGIN, size, ledger.root_at(size)), log_signer)
        for size in (1, 2, 3)
    ]
    for note in notes:
        ledger.store_checkpoint(note)

    store = ledger._checkpoints
    read = store._unwanted(keep_newest=1)
    ledger.store_checkpoint(notes[0] + cosign(notes[0], witness, 100))
    store._delete(read)
    assert [len(parse_note(note).signatures) for note in ledger.checkpoints()] == [2, 1]
    assert store.prune(keep_newest=1) == 0


def test_publishing_prunes_by_itself(
    ledger: Ledger, log_tools: SimpleNamespace, log_signer: NoteSigner
) -> None:
    log_tools.fill(ledger, range(3))
    lease = ledger.lease("signer", "me", ttl_s=60)
    assert lease.acquire()
    pruned: list[int] = []
    store = ledger._checkpoints

    class Watched(CheckpointStore):
        def prune(self, keep_newest: int = 1000) -> int:
            pruned.append(keep_newest)
            raise LedgerBusyError(retry_after_s=1, pending=0)

    watched = Watched(store._engine, log_tools.ORIGIN, ledger.root_at)
    for size in (1, 2, 3):
        note = sign_checkpoint(Checkpoint(log_tools.ORIGIN, size, ledger.root_at(size)), log_signer)
        assert watched.store(note, lease) == note  # stored, although pruning failed
    assert pruned == [1000]
