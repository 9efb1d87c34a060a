"""One process at a time publishes; who takes over adopts what was published, so no stale signer forks."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from audit import _store
from audit.checkpoints import Checkpoint, add_signatures, cosign, parse_checkpoint_note, sign_checkpoint
from audit.errors import LeaseLostError, SignerBusyError, SignerError, SignerRewriteError, SignerRollbackError
from audit.lease import Lease
from audit.ledger import Ledger
from audit.notes import NoteSigner, open_note
from audit.publisher import LEASE, Publisher
from audit.signer import Signer, publish
from audit.tlog_policy import Policy
from tests.waiting import lapse, took_at_best

Place = Path | str


@pytest.fixture
def log(place: Place, log_tools: SimpleNamespace) -> Iterator[Ledger]:
    with Ledger.create(place, log_tools.ORIGIN) as ledger:
        log_tools.fill(ledger, range(5))
        yield ledger


@pytest.fixture
def signer(tmp_path: Path, log_tools: SimpleNamespace) -> Signer:
    return Signer.create(tmp_path / "signer", log_tools.ORIGIN)


def copied(signer: Signer, target: Path) -> Signer:
    """A signer on another machine: the same key, and the state as it was when it was copied."""
    shutil.copytree(signer.home, target)
    return Signer.open(target)


def size_of(note: bytes | None) -> int:
    assert note is not None
    return parse_checkpoint_note(note).tree_size


def test_lease_has_one_owner_until_it_ends(log: Ledger) -> None:
    first, second = (log.lease("x", owner, ttl_s=400) for owner in ("a", "b"))
    assert (first.acquire(), second.acquire(), first.acquire()) == (True, False, True)
    assert (first.token, second.token) == (1, 0)
    lapse(log, "x", 390)
    assert not second.acquire()
    lapse(log, "x", 10)
    assert (second.acquire(), first.acquire()) == (True, False)
    assert second.token == 2
    first.release()  # it is not his to give back
    assert not first.acquire()
    second.release()
    assert first.acquire()
    assert first.token == 3


def left_s(log: Ledger, lease: Lease) -> float:
    state = lease.state()
    assert state is not None
    return (state.expires_ms - state.now_ms) / 1000


def test_lease_is_prolonged_when_half_of_it_is_over_or_a_checkpoint_is_stored(
    log: Ledger, signer: Signer
) -> None:
    lease = log.lease("signer", "a", ttl_s=400)
    assert lease.acquire()
    lapse(log, "signer", 100)
    assert lease.acquire()
    assert left_s(log, lease) <= 300, "more than half is left: nothing is written"
    lapse(log, "signer", 150)
    assert lease.acquire()
    assert left_s(log, lease) > 300
    lapse(log, "signer", 100)
    publish(log, signer, lease)
    assert left_s(log, lease) > 300


def test_who_has_nothing_to_write_about_a_lease_waits_for_no_writer(log: Ledger) -> None:
    first, second = (log.lease("x", owner, ttl_s=400) for owner in ("a", "b"))
    assert first.acquire()
    with _store.writing(log._engine):
        assert first.acquire()
        assert not second.acquire()


def test_eight_threads_ask_for_a_lease_and_one_gets_it(log: Ledger) -> None:
    got: list[str] = []
    barrier = threading.Barrier(8)

    def ask(owner: str) -> None:
        lease = log.lease("x", owner, ttl_s=30)
        barrier.wait()
        if lease.acquire():
            got.append(owner)

    threads = [threading.Thread(target=ask, args=(f"t{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1


def test_checkpoint_is_published_when_the_log_grows_and_again_when_it_idles(
    log: Ledger, signer: Signer, log_tools: SimpleNamespace
) -> None:
    said: list[int] = []
    publisher = Publisher(log, signer, republish_s=300, announce=lambda note: said.append(size_of(note)))
    assert size_of(publisher.step()) == 5
    assert publisher.step() is None
    lapse(log, LEASE, 200)
    assert publisher.step() is None
    lapse(log, LEASE, 100)
    assert size_of(publisher.step()) == 5
    log_tools.fill(log, range(5, 8))
    assert size_of(publisher.step()) == 8
    assert said == [5, 5, 8]


def test_waiting_callers_hear_within_a_second_that_their_entry_is_checkpointed(
    log: Ledger, signer: Signer, log_tools: SimpleNamespace
) -> None:
    publisher, stop = Publisher(log, signer), threading.Event()

    def run() -> None:
        while not stop.wait(0.2):
            publisher.step()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        numbers = itertools.count(5)

        def wait() -> None:
            number = next(numbers)
            placed = log_tools.fill(log, range(number, number + 1))[0]
            assert size_of(log.wait_checkpointed(placed.leaf_index, 60)) > placed.leaf_index

        assert took_at_best(wait, 1.0) < 1.0
    finally:
        stop.set()
        thread.join()


def test_waiting_for_witnesses_needs_the_policy_quorum(
    log: Ledger, signer: Signer, new_witness_key: Callable[[str], NoteSigner]
) -> None:
    witness = new_witness_key("site-a")
    policy = Policy.parse(f"log {signer.vkey}\nwitness a {witness.vkey}\nquorum a\n")
    note = Publisher(log, signer).step()
    assert note is not None

    def accept(found: bytes) -> bool:
        return policy.open(found, now=1_000).quorum.satisfied

    with pytest.raises(TimeoutError, match="witnessed"):
        log.wait_witnessed(4, accept, timeout_s=0.2)
    log.store_checkpoint(add_signatures(note, [cosign(note, witness, 1_000)]))
    assert accept(log.wait_witnessed(4, accept, timeout_s=60))
    with pytest.raises(TimeoutError, match="checkpointed"):
        log.wait_checkpointed(5, timeout_s=0.1)


def test_second_publisher_waits_for_the_first_and_takes_over_after_its_end(
    log: Ledger, signer: Signer, log_tools: SimpleNamespace, tmp_path: Path
) -> None:
    other = copied(signer, tmp_path / "other")
    first, second = Publisher(log, signer, ttl_s=500), Publisher(log, other, ttl_s=500)
    assert size_of(first.step()) == 5
    assert second.step() is None
    log_tools.fill(log, range(5, 9))
    with pytest.raises(SignerBusyError):
        second.publish(timeout_s=0.1)
    lapse(log, LEASE, 500)  # the first one is dead
    assert size_of(second.step()) == 9
    assert other.state().checkpoint.tree_size == 9
    assert first.step() is None
    second.close()
    assert first.step() is None  # nothing new to publish, but the lease is his again
    assert first.lease.token == 3
    assert signer.state().checkpoint.tree_size == 9, "it adopted what the other one signed"


def test_who_is_alone_keeps_the_lease_between_checkpoints_and_no_longer(
    log: Ledger, signer: Signer, log_tools: SimpleNamespace, tmp_path: Path
) -> None:
    first = Publisher(log, signer, ttl_s=400)
    second = Publisher(log, copied(signer, tmp_path / "other"), ttl_s=400)
    assert size_of(first.publish()) == 5
    assert size_of(second.publish()) == 5  # it was given back
    with first.keeping():
        log_tools.fill(log, range(5, 7))
        assert size_of(first.publish()) == 7
        token = first.lease.token
        log_tools.fill(log, range(7, 9))
        assert size_of(first.publish()) == 9
        assert first.lease.token == token, "it was not taken over from itself"
        log_tools.fill(log, range(9, 11))
        with pytest.raises(SignerBusyError):
            second.publish(timeout_s=0.1)
        lapse(log, LEASE, 500)  # it slept
        assert size_of(second.publish()) == 11
        log_tools.fill(log, range(11, 13))
        assert size_of(first.publish()) == 13
        assert first.lease.token > token
        assert signer.state().checkpoint.tree_size == 13, "it adopted what the other one had signed"
    state = first.lease.state()
    assert state is not None
    assert state.is_free


def test_who_is_alone_and_may_not_sign_holds_no_lease(
    log: Ledger, signer: Signer, log_tools: SimpleNamespace, tmp_path: Path
) -> None:
    with Ledger.create(tmp_path / "longer.db", log_tools.ORIGIN) as longer:
        log_tools.fill(longer, range(50, 60))
        Publisher(longer, signer).publish()
    publisher = Publisher(log, signer, ttl_s=400)
    with publisher.keeping():
        with pytest.raises(SignerError):
            publisher.publish()
        state = publisher.lease.state()
        assert state is not None
        assert state.is_free


def test_a_copy_of_the_process_gives_back_no_lease_of_its_parent(log: Ledger, signer: Signer) -> None:
    publisher = Publisher(log, signer, ttl_s=400)
    with publisher.keeping():
        publisher.publish()
        publisher._lease = (os.getpid() + 1, publisher.lease)  # as in a forked child
    state = log.lease(LEASE, "look", ttl_s=1).state()
    assert state is not None
    assert not state.is_free


def test_old_holder_that_wakes_up_stores_nothing(
    log: Ledger, signer: Signer, log_tools: SimpleNamespace, tmp_path: Path
) -> None:
    first = Publisher(log, signer, ttl_s=100)
    first.step()
    lapse(log, LEASE, 100)
    second = Publisher(log, copied(signer, tmp_path / "other"), ttl_s=30)
    second.step()
    log_tools.fill(log, range(5, 7))
    with pytest.raises(LeaseLostError):
        publish(log, signer, first.lease)
    assert size_of(log.latest_checkpoint()) == 5


def test_stale_signer_with_a_restored_database_refuses_to_fork(
    tmp_path: Path, log_tools: SimpleNamespace, signer: Signer
) -> None:
    """The signer of the last minutes is gone, the database is an old backup, a witness saw more."""
    stale = copied(signer, tmp_path / "stale")
    with Ledger.create(tmp_path / "log.db", log_tools.ORIGIN) as ledger:
        log_tools.fill(ledger, range(5))
        seen = Publisher(ledger, signer).publish()
        log_tools.fill(ledger, range(5, 9))
        seen = Publisher(ledger, signer).publish()
    with Ledger.create(tmp_path / "restored.db", log_tools.ORIGIN) as restored:
        log_tools.fill(restored, range(6))
        log_tools.fill(restored, range(50, 60))  # other entries than those that were witnessed
        publisher = Publisher(restored, stale, views=[lambda: [seen]])
        with pytest.raises(SignerRewriteError):
            publisher.step()
        assert restored.latest_checkpoint() is None
        assert stale.state().note == seen, "it knows now what was signed, and signs nothing else"
        state = restored.lease("signer", "look", ttl_s=1).state()
        assert state is not None
        assert state.is_free, "a signer that may not sign holds no lease"
    with Ledger.create(tmp_path / "short.db", log_tools.ORIGIN) as short:
        log_tools.fill(short, range(6))
        with pytest.raises(SignerRollbackError):
            Publisher(short, stale, views=[lambda: [seen]]).step()


def test_fail_over_adopts_the_largest_witnessed_tree_and_ignores_strangers(
    log: Ledger,
    signer: Signer,
    log_tools: SimpleNamespace,
    log_signer: NoteSigner,
    tmp_path: Path,
    new_witness_key: Callable[[str], NoteSigner],
) -> None:
    fresh = copied(signer, tmp_path / "fresh")
    witness = new_witness_key("site-a")
    policy = Policy.parse(f"log {signer.vkey}\nwitness a {witness.vkey}\nquorum a\n")
    first = Publisher(log, signer)
    note = first.publish()
    log.store_checkpoint(add_signatures(note, [cosign(note, witness, 1_000)]))
    log_tools.fill(log, range(5, 8))
    stranger = sign_checkpoint(Checkpoint(log.origin, 8, log.root_hash), log_signer)
    log.store_checkpoint(stranger)
    taken = Publisher(log, fresh, policy=policy, clock=lambda: 1_000.0)
    assert taken._largest() == [log.checkpoint_at(5), log.checkpoint_at(5)]
    log_tools.fill(log, range(8, 9))
    assert size_of(taken.step()) == 9
    open_note(log.latest_checkpoint() or b"", [signer.verifier])


def test_adopting_refuses_notes_of_others_and_other_histories(
    log: Ledger, signer: Signer, log_signer: NoteSigner, log_tools: SimpleNamespace, tmp_path: Path
) -> None:
    publish(log, signer)
    with pytest.raises(Exception, match="no known key"):
        signer.adopt(sign_checkpoint(Checkpoint(log.origin, 5, log.root_hash), log_signer), log)
    twin = copied(signer, tmp_path / "twin")
    with Ledger.create(tmp_path / "twin.db", log_tools.ORIGIN) as other:
        log_tools.fill(other, range(100, 109))
        forged = sign_checkpoint(Checkpoint(other.origin, 9, other.root_hash), twin.note_signer)
        log_tools.fill(log, range(5, 9))
        for ledger in (log, other):
            with pytest.raises(SignerError):
                signer.adopt(forged, ledger)
    assert signer.state().checkpoint.tree_size == 5
