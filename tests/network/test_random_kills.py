"""kill -9 at random moments, of every kind of process there is, while runs go on over the network.

`AFFIDAVIT_KILLS=20` makes it shorter, `AFFIDAVIT_KILL_SEED` another one. Soak: a run of 200 kills takes most
of an hour on two cores, for a SuperNode that was killed is refused by SuperLink for up to a minute.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from audit.entries import RunCompleted, RunFailed, SiteStatement, SiteUndelivered, event_hash
from audit.round_bodies import RunResumed
from audit.service import export_evidence
from audit.verify import verify_evidence
from clients.ledger import SiteLedger
from federation.runs import find_run
from tests.network.fleet import Fleet, rows_of

pytestmark = pytest.mark.soak

KINDS = ("serverapp", "superlink", "supernode", "agent", "api")
SITES = ("ashfield", "birchwood", "cedar")
PER_RUN = 10
PEACE_S = 900.0


def schedule(kills: int, seed: int) -> list[tuple[float, str, str]]:
    """Return (pause in seconds, kind, site); every kind as often as the others."""
    dice = random.Random(seed)
    kinds = [KINDS[index % len(KINDS)] for index in range(kills)]
    dice.shuffle(kinds)
    return [
        (dice.uniform(0.5, 5.0), kind, dice.choice(SITES) if kind in ("agent", "supernode") else "")
        for kind in kinds
    ]


def test_runs_end_complete_and_nothing_is_spent_twice(report):
    kills = int(os.environ.get("AFFIDAVIT_KILLS", "200"))
    seed = int(os.environ.get("AFFIDAVIT_KILL_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
    plan = schedule(kills, seed)
    print(
        f"seed {seed}:",
        " ".join(f"{pause:.1f}s/{kind}{'/' + site if site else ''}" for pause, kind, site in plan),
    )
    killed: Counter[str] = Counter()
    runs: list[str] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="aff") as folder, Fleet(Path(folder), SITES, rows_of) as fleet:
        while plan:
            run = fleet.start()
            runs.append(run)
            due, plan = plan[:PER_RUN], plan[PER_RUN:]
            for pause, kind, site in due:
                time.sleep(pause)
                if kind == "serverapp" and not fleet.pids(kind) and fleet.end(run) is None:
                    fleet.submit(run)
                if fleet.end(run) is not None:  # the run was quicker: go on killing in the next one
                    _check_run(fleet, run)
                    run = fleet.start()
                    runs.append(run)
                killed[kind] += fleet.kill(kind, site)
                print(f"{time.monotonic() - began:6.0f} s  {run[:6]}  {kind} {site}", flush=True)
            _finish(fleet, run, began)
            _check_run(fleet, run)
        _check_debits(fleet)
        resumed = len(list(fleet.coordinator.bodies(RunResumed)))
        lost = sum(find_run(fleet.ledger, run).undelivered.get(site, 0) for run in runs for site in SITES)
    assert sum(killed.values()) >= kills - 2, killed
    counted = ", ".join(f"{killed[kind]} {kind}" for kind in KINDS)
    report(
        "kills",
        size=f"{sum(killed.values())} kills ({counted}), seed {seed}, {len(runs)} runs of 3 rounds, 3 sites",
        result=f"every run complete and proved, taken up again {resumed} times; one debit a release, "
        f"{lost} of them undelivered and listed",
    )


def _finish(fleet: Fleet, run: str, began: float) -> None:
    """Nobody kills any more: resume until the log shows the end."""
    deadline, free = time.monotonic() + PEACE_S, 0.0
    while fleet.end(run) is None:
        assert time.monotonic() < deadline, f"run {run} neither ends nor can be resumed"
        time.sleep(0.5)
        if fleet.is_carried_out(run) or fleet.pids("serverapp"):
            free = time.monotonic()
        elif time.monotonic() - free > 4:
            assert find_run(fleet.ledger, run).resumable or not _is_begun(fleet, run)
            print(f"{time.monotonic() - began:6.0f} s  {run[:6]}  resume", flush=True)
            fleet.submit(run)
            free = time.monotonic() + 10


def _is_begun(fleet: Fleet, run: str) -> bool:
    return bool(fleet.ledger.search(type="run.started", run=run, limit=1))


def _check_run(fleet: Fleet, run: str) -> None:
    ended = fleet.end(run)
    assert not isinstance(ended, RunFailed), f"run {run} failed: {ended}"
    (stored,) = [stored for stored, body in fleet.coordinator.bodies(RunCompleted, run=run)]

    def published() -> bool:
        fleet.coordinator.publish()
        return True

    fleet.until(published)
    data = export_evidence(fleet.ledger, fleet.coordinator.blobs.find, leaf_index=stored.leaf_index)
    report = verify_evidence(data, policy_text=fleet.homes[SITES[0]].policy().format(), replay=True)
    for title in ("The training run", "The rounds and their statements", "The aggregation", "The odometers"):
        assert report.step(title).code == "ok", report.step(title)


def _check_debits(fleet: Fleet) -> None:
    """Each site's own ledger beside the log: gap-free, one debit a release, none that the site lacks."""
    said: dict[str, set[str]] = {name: set() for name in SITES}
    for kind in (SiteStatement, SiteUndelivered):
        for _, body in fleet.coordinator.bodies(kind):
            statement = body.statement if isinstance(body, SiteUndelivered) else body
            said[statement.site].add(event_hash(statement))
    for name, home in fleet.homes.items():
        ledger = SiteLedger(home.ledger_path, home.high_water_path, look=True)
        try:
            releases = ledger.releases(home.config.population.pseudonym)
            listed = {
                event_hash(statement) for statement in ledger.undelivered(home.config.population.pseudonym)
            }
        finally:
            ledger.close()
        assert [release.statement.sequence for release in releases] == list(range(1, len(releases) + 1))
        assert len({(release.statement.run, release.statement.round) for release in releases}) == len(
            releases
        )
        debited = {event_hash(release.statement) for release in releases}
        assert said[name] <= debited, f"the log shows releases that {name} did not debit"
        assert debited - said[name] <= listed, f"{name} has debits that nobody lists"
