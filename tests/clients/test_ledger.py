"""The odometer: durable, gap-free, and impossible to set back by restarting, killing or restoring."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys

import pytest

from audit.canonical import canonical_bytes
from audit.entries import ZERO_DIGEST, MechanismEvent, SiteStatement, body_document, event_hash
from clients.agent import Agent
from clients.errors import HomeError, LedgerBehindError, OdometerError
from clients.ledger import Head, Reservation, SiteLedger

EVENT = MechanismEvent(
    mechanism="discrete_gaussian",
    sampling="full",
    sample_rate="1",
    steps=1,
    sigma_grid=1000,
    sensitivity_grid=100,
    dimension=3,
    grid_bits=8,
    relation="add_remove",
    unit="row",
)


def statement(sequence=1, previous=ZERO_DIGEST, run="run-1", number=1, population="p" * 32):
    return SiteStatement(
        run=run,
        round=number,
        charter="c" * 64,
        site="alpha",
        population=population,
        base_model="b" * 64,
        participants=("alpha", "beta"),
        agent_code="a" * 64,
        previous_round=ZERO_DIGEST,
        event=EVENT,
        sequence=sequence,
        previous_event=previous,
        update="d" * 64,
        signature="",
    )


def charter_safe(body):
    return dataclasses.replace(body, charter="0" * 64, base_model="0" * 64, agent_code="0", update="0" * 64)


@pytest.fixture
def paths(tmp_path):
    return tmp_path / "ledger.db", tmp_path / "odometer.json"


@pytest.fixture
def ledger(paths):
    opened = SiteLedger.create(*paths)
    yield opened
    opened.close()


def release(ledger, number, run="run-1"):
    head = ledger.head("p" * 32)
    body = charter_safe(statement(head.sequence + 1, head.event_hash, run, number))
    return ledger.commit_release(body, b"update %d" % number, f"request {number}")


def test_a_release_is_found_again_with_its_very_bytes(ledger, paths):
    made = release(ledger, 1)
    ledger.close()
    again = SiteLedger(*paths)
    assert again.release_of("run-1", 1) == made
    assert again.release_of("run-1", 2) is None
    again.close()


def test_the_odometer_counts_and_chains(ledger):
    first, second = release(ledger, 1), release(ledger, 2)
    assert second.statement.previous_event == event_hash(first.statement)
    assert ledger.head("p" * 32) == Head(2, event_hash(second.statement))
    assert ledger.head("q" * 32) == Head(0, ZERO_DIGEST)


@pytest.mark.parametrize(
    "body",
    [
        statement(sequence=2),
        statement(sequence=0),
        statement(sequence=1, previous="1" * 64),
        statement(sequence=3, previous=ZERO_DIGEST),
    ],
)
def test_a_release_that_does_not_continue_the_odometer_is_refused(ledger, body):
    with pytest.raises(OdometerError, match="does not"):
        ledger.commit_release(charter_safe(body), b"", "r")
    assert ledger.head("p" * 32).sequence == 0


def test_a_round_is_released_once(ledger):
    release(ledger, 1)
    with pytest.raises(OdometerError, match="released before"):
        release(ledger, 1)
    assert ledger.head("p" * 32).sequence == 1


def test_a_run_is_reserved_once_and_its_rest_is_freed_by_closing(ledger):
    plan = Reservation("run-1", "p" * 32, "text", (EVENT,) * 3, b"acceptance", False)
    ledger.reserve(plan)
    assert ledger.reservation("run-1") == plan
    with pytest.raises(OdometerError, match="accepted before"):
        ledger.reserve(plan)
    release(ledger, 1)
    assert len(ledger.committed_events("p" * 32)) == 3
    ledger.close_run("run-1")
    assert len(ledger.committed_events("p" * 32)) == 1


def test_undelivered_releases_stay_until_seen(ledger):
    release(ledger, 1)
    release(ledger, 2)
    ledger.mark_delivered("run-1", 1)
    assert [body.round for body in ledger.undelivered("p" * 32)] == [2]


def test_one_process_holds_the_ledger(ledger, paths):
    with pytest.raises(HomeError, match="another process"):
        SiteLedger(*paths)


def test_an_old_copy_of_the_ledger_is_refused(ledger, paths, tmp_path):
    release(ledger, 1)
    ledger.close()
    shutil.copy(paths[0], tmp_path / "old.db")
    newer = SiteLedger(*paths)
    release(newer, 2)
    newer.close()
    shutil.copy(tmp_path / "old.db", paths[0])
    for suffix in ("-wal", "-shm"):
        paths[0].with_name(paths[0].name + suffix).unlink(missing_ok=True)
    with pytest.raises(LedgerBehindError, match="an old copy was put back") as error:
        SiteLedger(*paths)
    assert (error.value.ledger, error.value.seen) == (1, 2)


def test_a_deleted_ledger_is_not_a_new_beginning(ledger, paths):
    release(ledger, 1)
    ledger.close()
    for path in paths[0].parent.glob("ledger.db*"):
        path.unlink()
    with pytest.raises(HomeError, match="never starts over"):
        SiteLedger(*paths)
    with pytest.raises(HomeError, match="never starts over"):
        SiteLedger.create(*paths)
    paths[1].unlink()
    with pytest.raises(HomeError, match="never starts over"):
        SiteLedger(*paths)


def test_a_release_altered_on_disk_no_longer_matches_the_high_water_mark(ledger, paths):
    release(ledger, 1)
    ledger.close()
    with sqlite3.connect(paths[0]) as connection:
        connection.execute("UPDATE release SET event_hash = ?", ("0" * 64,))
    connection.close()
    with pytest.raises(LedgerBehindError):
        SiteLedger(*paths)


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM release WHERE sequence = 1",
        "DELETE FROM release WHERE sequence = 2",
        "UPDATE release SET sequence = 9 WHERE sequence = 2",
        "UPDATE release SET round = 7 WHERE sequence = 2",
        "UPDATE release SET run = 'run-9' WHERE sequence = 1",
        "UPDATE release SET population = 'q' WHERE sequence = 1",
        "UPDATE release SET event_hash = '00' WHERE sequence = 2",
        "UPDATE release SET statement = (SELECT statement FROM release WHERE sequence = 3)",
        "UPDATE release SET statement = x'7b7d' WHERE sequence = 2",
        "UPDATE release SET statement = replace(statement, '\"sigma_grid\":1000', '\"sigma_grid\":9000')",
    ],
)
def test_a_ledger_edited_to_count_less_does_not_open(ledger, paths, change):
    for number in (1, 2, 3):
        release(ledger, number)
    ledger.close()
    with sqlite3.connect(paths[0]) as connection:
        assert connection.execute(change).rowcount
    connection.close()
    with pytest.raises((HomeError, LedgerBehindError, OdometerError)):
        SiteLedger(*paths)


@pytest.mark.parametrize("mark", [b"", b"[]", b'{"p":1}', b"\xff"])
def test_a_damaged_high_water_mark_is_not_ignored(ledger, paths, mark):
    release(ledger, 1)
    ledger.close()
    paths[1].write_bytes(mark)
    with pytest.raises((HomeError, LedgerBehindError)):
        SiteLedger(*paths)


def test_a_ledger_of_another_schema_is_refused(ledger, paths):
    ledger.close()
    with sqlite3.connect(paths[0]) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(HomeError, match="schema 99"):
        SiteLedger(*paths)


def test_every_commit_reaches_the_disk(paths, ledger):
    with ledger._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


KILLED_AFTER_COMMIT = """
import os, signal, sys
from pathlib import Path
from audit.canonical import parse_canonical
from audit.entries import SiteStatement, parse_body
from clients.ledger import SiteLedger

class Dying:
    def raise_to(self, *arguments):
        os.kill(os.getpid(), signal.SIGKILL)

folder = Path(sys.argv[1])
ledger = SiteLedger(folder / "ledger.db", folder / "odometer.json")
ledger._marks = Dying()
body = parse_body(SiteStatement, parse_canonical(Path(sys.argv[2]).read_bytes()))
ledger.commit_release(body, b"the update", "the request")
"""


def test_a_kill_right_after_the_commit_keeps_the_debit(ledger, paths, tmp_path, repository):
    ledger.close()
    body = charter_safe(statement())
    (tmp_path / "body").write_bytes(canonical_bytes(body_document(body)))
    command = [sys.executable, "-c", KILLED_AFTER_COMMIT, str(tmp_path), str(tmp_path / "body")]
    died = subprocess.run(command, cwd=repository, check=False)
    assert died.returncode == -signal.SIGKILL
    ledger = SiteLedger(*paths)
    assert ledger.release_of("run-1", 1).update == b"the update"
    with pytest.raises(OdometerError):
        ledger.commit_release(body, b"another update", "another request")
    ledger.close()


KILLED_BEFORE_SENDING = """
import os, signal, sys
from pathlib import Path
from clients.agent import Agent

agent = Agent.open(Path(sys.argv[1]))
agent.handle("round", Path(sys.argv[2]).read_bytes(), {"base_model": Path(sys.argv[3]).read_bytes()})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_between_debit_and_sending_costs_one_event_and_gives_the_same_bytes(
    network, tmp_path, repository
):
    network.start()
    agent = network.agents["alpha"]
    header = canonical_bytes(network.round_header(1, "alpha"))
    (tmp_path / "header").write_bytes(header)
    (tmp_path / "base").write_bytes(network.base)
    agent.close()
    command = [sys.executable, "-c", KILLED_BEFORE_SENDING, str(agent.home.path)]
    died = subprocess.run(
        [*command, str(tmp_path / "header"), str(tmp_path / "base")], cwd=repository, check=False
    )
    assert died.returncode == -signal.SIGKILL
    network.agents["alpha"] = again = Agent.open(agent.home.path)
    debited = again.ledger.releases(again.population)
    assert len(debited) == 1
    answer, blobs = again.handle("round", header, {"base_model": network.base})
    assert blobs["update"] == debited[0].update
    assert json.loads(answer)["statement"]["sequence"] == 1
    assert again.ledger.head(again.population).sequence == 1


def test_a_restart_neither_resets_the_odometer_nor_the_run(network, code_of):
    network.start()
    network.play(1)
    again = network.restart("alpha")
    assert again.ledger.head(again.population).sequence == 1
    network.play(2)
    assert again.ledger.head(again.population).sequence == 2
    assert code_of(network.ask("alpha", 1, participants=["alpha", "beta"])[0]) == "already_released"


def test_a_wholly_rewound_home_is_found_out_by_the_log(network, code_of, tmp_path):
    network.start()
    network.play(1)
    network.agents["alpha"].close()
    shutil.copytree(network.folder / "sites" / "alpha", tmp_path / "old-alpha")
    network.restart("alpha")
    network.play(2)
    network.agents["alpha"].close()
    shutil.rmtree(network.folder / "sites" / "alpha")
    shutil.copytree(tmp_path / "old-alpha", network.folder / "sites" / "alpha")
    rewound = network.restart("alpha")  # ledger, mark and witness state are all old, and agree
    assert rewound.ledger.head(rewound.population).sequence == 1
    assert code_of(network.ask("alpha", 3)[0]) == "ledger_behind_log"
    assert code_of(network.ask("alpha", 2)[0]) == "ledger_behind_log"
    assert rewound.ledger.head(rewound.population).sequence == 1


def test_a_rewound_home_accepts_no_run_once_its_last_statement_is_shown(
    network, request_of, code_of, tmp_path
):
    network.start()
    network.play(1)
    network.agents["alpha"].close()
    shutil.copytree(network.folder / "sites" / "alpha", tmp_path / "old-alpha")
    network.restart("alpha")
    network.play(2)
    last = network.logged(network.previous[1]["alpha"])
    network.agents["alpha"].close()
    shutil.rmtree(network.folder / "sites" / "alpha")
    shutil.copytree(tmp_path / "old-alpha", network.folder / "sites" / "alpha")
    rewound = network.restart("alpha")
    network.run, network.previous = "run-2", None
    header = {"run_started": network.run_started(), "charter": network.text(), "own_statement": last}
    assert code_of(request_of(rewound, "run.propose", header)[0]) == "ledger_behind_log"
    assert rewound.ledger.reservation("run-2") is None


def test_releases_that_reached_no_round_are_reported_at_the_next_run(network, request_of):
    network.start()
    network.play(1)
    network.ask("alpha", 2)  # debited, and never logged
    for agent in network.agents.values():
        request_of(agent, "run.finished", {"run": network.run})
    network.run, network.previous = "run-2", None
    answer = network.propose()["alpha"]
    reported = [(body["run"], body["round"], body["sequence"]) for body in answer["undelivered"]]
    assert reported == [("run-1", 2, 2)]  # round 1 was shown in witnessed history
    assert answer["acceptance"]["next_sequence"] == 3


def test_files_of_a_home_are_their_owners_alone(network):
    for path in (network.folder / "sites" / "alpha" / "keys").iterdir():
        assert os.stat(path).st_mode & 0o077 == 0, path
