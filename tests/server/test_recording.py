"""A worker that cannot record is not ready, and finds out by itself when it can again."""

from __future__ import annotations

import threading

import pytest
from starlette.testclient import TestClient

from audit.errors import LedgerWriteError
from server import recording
from server.app import create_app
from server.recording import Recording, try_log
from tests.waiting import Moved


class Log:
    """A log that can be written to, or not; counts how often it was tried."""

    is_well, tried = False, 0

    def __call__(self):
        self.tried += 1
        if not self.is_well:
            raise OSError(28, "No space left on device")


@pytest.fixture
def log():
    return Log()


@pytest.fixture
def now():
    return Moved(1_000.0)


@pytest.fixture
def kept(log, now):
    return Recording(log, monotonic=now, patience_s=60)


def fail(kept, times=3):
    for _ in range(times):
        kept.failed()


def test_a_few_failures_are_no_doubt_and_a_success_ends_the_count(kept, log):
    fail(kept, 2)
    assert kept.problem() == ""
    kept.succeeded()
    fail(kept, 2)
    assert (kept.problem(), log.tried) == ("", 0)


def test_in_doubt_each_question_tries_and_the_first_that_succeeds_ends_it(kept, log):
    fail(kept)
    for tried in (1, 2, 3):
        assert "3 entries in a row" in kept.problem()
        assert log.tried == tried
    log.is_well = True
    assert kept.problem() == ""
    assert (kept.problem(), log.tried) == ("", 4)


def test_the_next_entry_ends_the_doubt_without_a_trial(kept, log):
    fail(kept)
    kept.succeeded()
    assert (kept.problem(), log.tried) == ("", 0)


def test_trial_that_entries_contradict_is_believed_less_readily(kept, log, now):
    log.is_well = True
    fail(kept)
    assert kept.problem() == ""
    for wait_s in (2.0, 4.0, 8.0, 16.0, 30.0, 30.0):
        fail(kept)
        now.forward(wait_s - 0.5)
        assert kept.problem() != ""
        now.forward(1.0)
        assert kept.problem() == ""
    kept.succeeded()
    fail(kept)
    assert kept.problem() == ""


def test_failures_during_a_trial_outweigh_it(now):
    def trial():
        kept.failed()

    kept = Recording(trial, monotonic=now, patience_s=60)
    fail(kept)
    assert "4 entries in a row" in kept.problem()


def test_trial_that_hangs_keeps_nobody_waiting_and_is_not_begun_twice(now):
    begun, goes_on = [], threading.Event()

    def trial():
        begun.append(1)
        goes_on.wait(60)

    kept = Recording(trial, monotonic=now, patience_s=0.0)
    fail(kept)
    assert [kept.problem() != "" for _ in range(5)] == [True] * 5
    trying = kept._trying
    goes_on.set()
    trying.join()
    assert (kept.problem(), begun) == ("", [1])


def test_trial_that_breaks_in_a_way_of_its_own_is_a_failed_one(now):
    def trial():
        raise RuntimeError("a defect")

    kept = Recording(trial, monotonic=now, patience_s=60)
    fail(kept)
    assert kept.problem() != ""


def test_trial_of_a_log_makes_no_entry_and_needs_room(lab, monkeypatch):
    ledger = lab.coordinator.ledger
    before = ledger.tree_size
    for _ in range(2):
        try_log(ledger)
    assert ledger.tree_size == before

    def no_room(descriptor, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recording, "reserve", no_room)
    with pytest.raises(OSError, match="No space"):
        try_log(ledger)


@pytest.mark.parametrize("what", ["entries", "counts"])
def test_server_that_cannot_record_is_unready_but_alive_and_ready_again_by_itself(
    lab, as_role, row, monkeypatch, what
):
    broken = [True]
    quota = {"quota_rows_per_minute": 100} if what == "counts" else {}
    app = create_app(lab.settings(**quota), clock=lab.clock)
    with TestClient(app) as client:
        context = app.state.context

        def refusing(real):
            def call(*arguments, **options):
                if broken[0]:
                    raise LedgerWriteError("database or disk is full")
                return real(*arguments, **options)

            return call

        def trial():
            if broken[0]:
                raise OSError(28, "No space left on device")

        ledger = context.coordinator.ledger
        for name in ("append_from_loop", "append_waiting") if what == "entries" else ():
            monkeypatch.setattr(ledger, name, refusing(getattr(ledger, name)))
        if what == "counts":
            quotas = context.predicting.quotas
            monkeypatch.setattr(quotas, "_take_all", refusing(quotas._take_all), raising=True)
        kept = context.journal.recording
        monkeypatch.setattr(kept, "_trial", trial)
        monkeypatch.setattr(kept, "_patience_s", 60)
        body = {"purpose": "triage", "rows": [row]}

        def ask():
            return client.post("/v1/models/toy/predict", headers=as_role("consumer"), json=body).status_code

        assert client.get("/readyz").status_code == 200
        assert [ask() for _ in range(3)] == [503] * 3
        for path in ("/readyz", "/v2/health/ready"):
            assert client.get(path).status_code == 503
        assert "did not become durable" in client.get("/readyz").json()["detail"]
        assert client.get("/healthz").status_code == 200
        broken[0] = False
        assert client.get("/readyz").status_code == 200
        assert ask() == 200
        assert kept._failures == 0
