"""Two real workers while something that they need is gone: the database, the disk, the signer, the issuer.

Each time the refusal says what is missing and when to come back, nothing is answered without an entry, and
the service goes on by itself when the thing is there again. One server a database serves all of the tests.
"""

from __future__ import annotations

import copy
import http.client
import itertools
import json
import resource
import shutil
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from audit.receipts import Receipt, verify_receipt
from federation.coordinator import Coordinator
from tests.postgresql import running_server
from tests.server.conftest import ROW, Clock, Lab, stocked_lab
from tests.server.load import Load, Served, Told, check_log, served
from tests.server.test_runtime import second, swap
from tests.server.test_tokens import AUDIENCE, running_issuer
from tests.waiting import took_at_best, wait_until

LATE_S = 15  # longer than a busy machine stands still
DAY_ROWS = 12_000  # of one principal; tests take keys of their own
OPTIONS = {
    "AFFIDAVIT_CHECKPOINT_LATE_S": str(LATE_S),
    "AFFIDAVIT_PUBLISH_INTERVAL_S": "0.2",
    "AFFIDAVIT_KEY_RECHECK_S": "0.5",
    "AFFIDAVIT_QUOTA_ROWS_PER_DAY": str(DAY_ROWS),
}
PREDICT = "/v1/models/toy/predict"


@dataclass
class Running:
    """A server of two workers and whose home it serves."""

    server: Served
    lab: Lab
    issuer: Any = None
    database: Any = None
    log: Path = Path()

    def connect(self):
        return http.client.HTTPConnection(urlsplit(self.server.url).netloc, timeout=60)

    def ask(self, token, rows=1, connection=None):
        """One request for answers, over a connection of its own; returns (status, headers, document)."""
        body = json.dumps({"purpose": "triage", "rows": [ROW] * rows})
        with closing(self.connect() if connection is None else connection) as used:
            used.request("POST", PREDICT, body, {"Authorization": f"Bearer {token}"})
            reply = used.getresponse()
            return reply.status, reply.headers, json.loads(reply.read())

    def everywhere(self, *tokens):
        """Ask eight times or more, of both workers; return the statuses that came."""
        connections, begun = [], time.monotonic()
        while len(connections) < 8 or not self.is_spread():
            assert time.monotonic() - begun < 60, "one worker takes all connections"
            time.sleep(0.2 if len(connections) > 20 else 0)  # the other may be starting
            connections.append(self.connect())
            connections[-1].request("GET", "/healthz")
            connections[-1].getresponse().read()
        asked = zip(connections, itertools.cycle(tokens), strict=False)
        return {self.ask(token, connection=connection)[0] for connection, token in asked}

    def until(self, wanted, *tokens, within_s=90.0):
        """Ask both workers until they agree on that status; return how long it took."""
        begun = time.monotonic()
        while self.everywhere(*tokens) != {wanted}:
            assert time.monotonic() - begun < within_s, f"{wanted} was never all there was"
            time.sleep(0.05)
        return time.monotonic() - begun

    def load(self, callers=4):
        return Load(self.server.url, self.lab.key("consumer"), callers)

    def is_spread(self):
        """Whether both workers hold connections."""
        return all(self.server.connections(pid) for pid in self.server.workers())


def settled(count, for_s=2.0):
    """Wait until the count has not grown for so long, whatever was on its way; return it."""
    seen = [-1]

    def rests():
        seen.append(count())
        time.sleep(for_s)
        return count() == seen[-1]

    wait_until(rests)
    return seen[-1]


@contextmanager
def running(lab, log, **found):
    environ = dict(OPTIONS)
    if "issuer" in found:
        environ |= {"AFFIDAVIT_OIDC_ISSUER": found["issuer"].url, "AFFIDAVIT_OIDC_AUDIENCE": AUDIENCE}
    with served(lab.folder, "--workers", "2", environ=environ) as server:
        yield Running(server, lab, log=log, **found)


@pytest.fixture(scope="module")
def on_sqlite(lab_template, tmp_path_factory):
    base = tmp_path_factory.mktemp("outages")
    shutil.copytree(lab_template.folder, base / "homes")
    lab = copy.copy(lab_template)
    lab.folder, lab.clock, lab.previous = base / "homes", Clock(), dict(lab_template.previous)
    lab.coordinator = Coordinator.open(lab.folder / "coordinator", lab.folder / "signer", clock=lab.clock)
    with running_issuer() as issuer:
        issuer.post("/behave", {"how": "error"})
        with running(lab, base / "serve.err", issuer=issuer) as found:
            yield found
    lab.close()


@pytest.fixture(scope="module")
def on_postgresql(tmp_path_factory):
    base = tmp_path_factory.mktemp("outages-pg")
    with running_server() as database:
        lab = stocked_lab(base / "homes", database.new_schema())
        with running(lab, base / "serve.err", database=database) as found:
            yield found
        lab.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def on_either(request):
    return request.getfixturevalue(f"on_{request.param}")


# what is gone


@pytest.mark.slow  # the first test here pays for two workers
def test_issuer_that_is_down_lets_no_token_in_and_keys_go_on(on_sqlite):
    token, key = on_sqlite.issuer.sign(), on_sqlite.lab.key("consumer")
    for _ in range(4):
        status, headers, document = on_sqlite.ask(token=token)
        assert (status, document["code"]) == (503, "access.issuer_unreachable")
        assert int(headers["retry-after"]) >= 1
    assert on_sqlite.ask(token=key)[0] == 200
    on_sqlite.issuer.post("/behave", {"how": "well"})
    on_sqlite.until(200, token)
    on_sqlite.issuer.post("/behave", {"how": "error"})  # what is known counts on, for tokens not seen before
    fresh = [on_sqlite.issuer.sign(sub=f"dr-{number}") for number in range(8)]
    assert on_sqlite.everywhere(*fresh) == {200}
    forged = fresh[0][:-8] + "AAAAAAAA"
    assert on_sqlite.everywhere(forged) == {401}


def test_signer_that_is_gone_ends_the_answers_at_the_declared_age_and_no_later(on_sqlite):
    lab, token = on_sqlite.lab, on_sqlite.lab.key("consumer")
    assert on_sqlite.ask(token=token)[0] == 200
    signer = lab.folder / "signer"
    signer.rename(lab.folder / "taken-away")
    try:
        begun = time.monotonic()
        status, _, answered = on_sqlite.ask(token=token)
        assert status == 200  # sequenced: its receipt's deadline is far
        assert (answered["level"], answered["proof"]) == ("sequenced", None)
        took_s = on_sqlite.until(503, token)
        status, headers, document = on_sqlite.ask(token=token)
        assert (status, document["code"]) == (503, "audit.checkpoint_late")
        assert "signer" in document["detail"]
        assert int(headers["retry-after"]) >= 1
        assert took_s >= LATE_S / 2
        assert time.monotonic() - begun < LATE_S + 60
        assert not on_sqlite.server.is_ready()
        size = lab.coordinator.ledger.count(type="prediction")
        assert on_sqlite.everywhere(token) == {503}
        assert lab.coordinator.ledger.count(type="prediction") == size
    finally:
        (lab.folder / "taken-away").rename(signer)
    on_sqlite.until(200, token)
    assert on_sqlite.server.is_ready()


def test_disk_that_takes_no_more_ends_the_answers_until_it_does(on_sqlite):
    """The limit on a file's size refuses what a full disk refuses, where no disk can be filled."""
    lab, workers = on_sqlite.lab, on_sqlite.server.workers()
    on_sqlite.until(200, lab.key("consumer"))  # both: one that still starts would end without a disk
    with on_sqlite.load() as load:
        wait_until(lambda: len(load.told.answers) >= 20)
        before = [resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in workers]
        for pid in workers:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (4_096, before[0][1]))
        wait_until(lambda: load.told.shed >= 20)
        at, shed = settled(lambda: len(load.told.answers)), load.told.shed
        wait_until(lambda: load.told.shed >= shed + 20)
        assert len(load.told.answers) == at, "an answer without room for its entry"
        for pid, limits in zip(workers, before, strict=True):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
        wait_until(lambda: len(load.told.answers) >= at + 20)
    assert (load.told.errors, load.told.broken) == ([], 0)
    assert load.told.codes <= {"audit.ledger_unavailable", "audit.checkpoint_late", "audit.ledger_write"}
    assert on_sqlite.server.workers() == workers
    _all_in_log(lab, load.told)


@pytest.mark.slow  # the first test here pays for a PostgreSQL server and two workers
@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_database_that_is_gone_ends_the_answers_until_it_is_back(on_postgresql, mode):
    lab, database, workers = on_postgresql.lab, on_postgresql.database, on_postgresql.server.workers()
    on_postgresql.until(200, lab.key("consumer"))  # both: one that still starts would end without a database
    with on_postgresql.load() as load:
        wait_until(lambda: len(load.told.answers) >= 20)
        database.stop(mode)
        at, shed = settled(lambda: len(load.told.answers)), load.told.shed
        time.sleep(1.5)  # longer than a key is remembered
        wait_until(lambda: load.told.shed > shed)
        assert len(load.told.answers) <= at, "an answer without a database"
        assert not on_postgresql.server.is_ready()
        with closing(on_postgresql.connect()) as connection:  # a restart would not bring the database back
            connection.request("GET", "/healthz")
            assert connection.getresponse().status == 200
        database.start()
        wait_until(lambda: len(load.told.answers) >= at + 20)
    assert (load.told.errors, load.told.broken) == ([], 0)
    codes = {"audit.ledger_unavailable", "audit.ledger_unreachable", "audit.checkpoint_late"}
    assert load.told.codes <= codes
    assert on_postgresql.server.workers() == workers
    untold = _all_in_log(lab, load.told)
    assert untold <= 4  # a commit whose word was lost: at most one a caller


def _all_in_log(lab, told):
    """Return how many entries since the load began nobody was told of."""
    check_log(lab, told, exactly=False)
    places = [answer["leaf_index"] for answer in told.answers]
    within = lab.coordinator.ledger.count(type="prediction", after=min(places) - 1, before=max(places) + 1)
    return within - len(places)


# what is there on either database


def test_quota_is_one_count_over_both_workers(on_either):
    wait_until(lambda: time.time() % 86_400 < 86_370)  # the window's day must not end meanwhile
    token, told = on_either.lab.key("consumer"), []

    def ask():
        while not told or told[-1][0] != 429:
            told.append(on_either.ask(token=token, rows=600))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answered = [document for status, _, document in told if status == 200]
    refused = {(status, document["code"]) for status, _, document in told if status != 200}
    late = {(503, "audit.ledger_unavailable")}  # of a machine that stood still while a count was locked
    assert refused - late == {(429, "predict.quota")}
    assert len(answered) == DAY_ROWS // 600
    denied = [
        entry for entry in on_either.lab.entries("prediction.denied") if entry["body"]["reason"] == "quota"
    ]
    assert len(denied) == 1, "the first refusal of a window is an entry, no later one"


def test_revoked_key_is_refused_by_both_workers_within_five_seconds(on_either):
    store = on_either.lab.keys()
    keys = [store.create(role="consumer") for _ in range(5)]

    def revoke():
        token, view = keys.pop()
        store.revoke(view.key_id)
        on_either.until(401, token)

    assert on_either.everywhere(*(token for token, _ in keys)) == {200}
    for token, _ in keys:
        assert on_either.everywhere(token) == {200}
    assert took_at_best(revoke, 5.0) < 5
    store.close()


def test_receipt_of_either_worker_is_the_logs_and_its_proof_comes(on_either):
    token = on_either.lab.key("consumer")
    _, _, answered = on_either.ask(token=token)
    receipt = Receipt.from_json(answered["receipt"])
    verify_receipt(receipt, on_either.lab.coordinator.signer.verifier)
    assert receipt.leaf_hash.hex() == answered["entry"]["leaf_hash"]
    path = f"/v1/receipts/{answered['entry']['id']}?wait=checkpointed"
    with closing(on_either.connect()) as connection:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
        reply = connection.getresponse()
        assert reply.status == 200
        assert reply.read().startswith(b"c2sp.org/tlog-proof@v1\n")


@pytest.mark.reported
def test_roll_back_by_the_command_counts_in_both_workers_at_once(on_either, tmp_path, report):
    returned_s = started_s = float("inf")
    for turn in range(3):  # a machine that stands still makes one of them late, not all
        late_s, whole_s, told = roll_back_under_load(on_either, tmp_path / str(turn), bias=0.125 + turn)
        assert (told.errors, told.broken, told.shed) == ([], 0, 0)
        returned_s, started_s = min(returned_s, late_s), min(started_s, whole_s)
        if returned_s < 1:
            break
    assert returned_s < 1
    assert started_s < 30  # the command's own start included, on a machine that does other things
    report(
        "serving_swaps",
        size=f"one `models rollback` by the command, {'PostgreSQL' if on_either.database else 'SQLite'}, "
        f"2 workers, {len(told.answers):,} answers",
        result=f"last answer of the version that went out {started_s:.1f} s after the command's start, "
        f"{returned_s:.1f} s after its return; 0 requests failed",
    )


def roll_back_under_load(running, folder, bias=0.125):
    """Return how long after the command's return, and its start, the last answer of the newer one came."""
    lab = running.lab
    newer = second(lab, [0.5, 1.0, -0.25, 0.75, -0.5, 0.5, bias])
    older = lab.version
    swap(lab, older, newer, from_state="approved")
    (folder / "identity").mkdir(parents=True)
    lab.officer.save(folder / "identity" / "key.pem", None)
    command = [Path(sys.executable).with_name("affidavit"), "models", "rollback", "toy"]
    assert running.everywhere(lab.key("consumer")) == {200}, "both have started"
    with ExitStack() as stack:
        loads = []
        while not loads or not running.is_spread():  # who accepts a connection is the kernel's choice
            assert len(loads) < 12, "one worker takes all connections"
            loads.append(stack.enter_context(running.load(4)))
            wait_until(lambda: len(loads[-1].told.answers) >= 8)
        begun = time.monotonic()
        done = subprocess.run(
            [*command, "--officer", str(folder), "--home", str(lab.folder)],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        ended = time.monotonic()
        assert done.returncode == 0, done.stderr
        time.sleep(0.5)
        assert running.is_spread()
    moved = lab.entries("version.transition")[-2:]
    lab.previous["toy"] = lab.coordinator.ledger.stored_entry(moved[-1]["leaf_index"]).leaf_hash.hex()
    assert [(entry["body"]["to_state"], entry["body"]["version"]) for entry in moved] == [
        ("live", older),
        ("retired", newer),
    ]
    told = Told()
    for load in loads:
        told.answers += load.told.answers
        told.errors += load.told.errors
        told.broken += load.told.broken
        told.shed += load.told.shed
    for answer in told.answers:  # not one entry behind the transition is the newer version's
        assert answer["version"] == (newer if answer["leaf_index"] < moved[0]["leaf_index"] else older)
    last = max(answer["at"] for answer in told.answers if answer["version"] == newer)
    assert any(answer["version"] == older for answer in told.answers)
    check_log(lab, told, exactly=False)
    return max(last - ended, 0.0), last - begun, told
