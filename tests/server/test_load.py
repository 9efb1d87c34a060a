"""Real workers under load: killed, swapped, drained; what was answered is in the log, and nothing else is.

A small share runs each time; `make soak` runs the counts that docs/results/log.md states.
"""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.server.load import Load, check_log, served
from tests.server.test_runtime import second, swap
from tests.waiting import wait_until

PROBABILITY = {"first": 0.296817}


def kill_under_load(lab, kills, callers=6):
    """Kill one worker after the other: every second one while its sibling is starting."""
    slowest_s = 0.0
    with served(lab.folder, "--workers", "2") as server:
        with Load(server.url, lab.tokens["consumer"], callers) as load:
            for number in range(kills):
                before, begun = len(load.told.answers), time.monotonic()
                until = begun + 240  # both may be starting, on a machine that does other things
                while len(load.told.answers) < before + callers or len(server.workers()) < 1:
                    assert time.monotonic() < until, "no answers any more"
                    time.sleep(0.02)
                slowest_s = max(slowest_s, time.monotonic() - begun)
                workers = server.workers()
                os.kill(workers[number % len(workers)], signal.SIGKILL)
        told = load.told
    assert told.errors == []
    untold = check_log(lab, told, exactly=False)
    # a worker that dies may leave entries durable whose callers heard nothing: at most one a caller and kill
    assert untold <= kills * callers
    return told, untold, slowest_s


def swap_under_load(lab, times, callers=4):
    other = second(lab)
    swapped = lab.version
    with served(lab.folder, "--workers", "2") as server:
        with Load(server.url, lab.tokens["consumer"], callers) as load:
            for number in range(times):
                out, into = (lab.version, other) if number % 2 == 0 else (other, lab.version)
                begun = time.monotonic()
                swap(lab, out, into, from_state="approved" if number == 0 else "retired")
                at = len(load.told.answers)
                while not any(a["version"] == into for a in load.told.answers[at:]):
                    assert time.monotonic() - begun < 120, "the swap never counted"
                    time.sleep(0.005)
                swapped = into
        told = load.told
    assert (told.errors, told.broken) == ([], 0)
    check_log(lab, told, exactly=told.shed == 0)
    seen = {(answer["version"], answer["probability"]) for answer in told.answers}
    assert len(seen) == 2
    assert (lab.version, PROBABILITY["first"]) in seen
    return told, swapped


@pytest.mark.slow  # starts two workers, kills each once, and starts them again
def test_killed_workers_lose_no_answer(lab):
    kill_under_load(lab, 2)


@pytest.mark.slow  # two workers of their own, and swaps one after the other under load
def test_swaps_and_roll_backs_under_load_fail_no_request(lab):
    told, _ = swap_under_load(lab, 4)
    assert told.shed == 0


@pytest.mark.slow  # starts and stops a real server under load
def test_stopped_server_acknowledges_what_it_answers(lab):
    drain = {"AFFIDAVIT_DRAIN_S": "0.5"}
    with served(lab.folder, environ=drain) as server, Load(server.url, lab.tokens["consumer"], 4) as load:
        while len(load.told.answers) < 20:
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not server.is_ready())
        server.process.wait(60)
    assert load.told.errors == []
    check_log(lab, load.told, exactly=True)


@pytest.mark.soak
@pytest.mark.reported
@pytest.mark.parametrize("database", ["SQLite", "PostgreSQL"])
def test_fifty_killed_workers_lose_no_answer(request, report, database):
    lab = request.getfixturevalue("lab" if database == "SQLite" else "postgresql_lab")
    told, untold, slowest_s = kill_under_load(lab, 50)
    report(
        "serving_kills",
        size=f"50 kills of one of 2 workers, {database}, {len(told.answers):,} answers",
        result=f"0 answers missing from the log; {untold} entries whose callers heard nothing; "
        f"answers again after {slowest_s:.1f} s at most, both killed",
    )


@pytest.mark.soak
@pytest.mark.reported
@pytest.mark.parametrize(("database", "times"), [("SQLite", 100), ("PostgreSQL", 40)])
def test_a_hundred_swaps_under_load_fail_no_request(request, report, database, times):
    lab = request.getfixturevalue("lab" if database == "SQLite" else "postgresql_lab")
    told, _ = swap_under_load(lab, times)
    assert told.shed == 0
    report(
        "serving_swaps",
        size=f"{times} swaps and roll-backs, {database}, {len(told.answers):,} answers of 2 workers",
        result="0 requests failed; each answer by the version that its entry names",
    )


@pytest.mark.soak
@pytest.mark.reported
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("callers", [16, 64, 256])
def test_load_of_a_minute_answers_exactly_what_the_log_holds(lab, report, callers, workers):
    with (
        served(lab.folder, "--workers", str(workers)) as server,
        Load(server.url, lab.tokens["consumer"], callers) as load,
    ):
        time.sleep(60)
    assert (load.told.errors, load.told.broken) == ([], 0)
    untold = check_log(lab, load.told, exactly=True)
    report(
        "serving_load",
        size=f"{callers} connections, {workers} worker{'s' if workers > 1 else ''}, 60 s",
        result=f"{len(load.told.answers):,} answers and {len(load.told.answers) + untold:,} entries; "
        f"{load.told.shed:,} shed, 0 errors",
    )
