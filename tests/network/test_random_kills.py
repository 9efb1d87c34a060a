"""kill -9 at random moments, of every kind of process there is, while runs go on over the network.

`AFFIDAVIT_KILLS=50` makes it shorter, `AFFIDAVIT_KILL_SEED` another one. Soak: the 200 kills are dealt to
five schedules, which may run side by side, each on a federation of its own; one of 40 takes ten minutes,
mostly waiting, for a SuperNode that was killed is refused by SuperLink for up to a minute.
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
from tests.network.fleet import Fleet, canary_of, rows_of
from tests.raw_scan import number_forms, scan, size_of

pytestmark = pytest.mark.soak

KINDS = ("serverapp", "superlink", "supernode", "agent", "api")
SITES = ("ashfield", "birchwood", "cedar")
PER_RUN = 10
SCHEDULES = 5
PEACE_S = 900.0


def schedule(kills: int, seed: int) -> list[tuple[float, int, str, str]]:
    """Return (seconds to wait, entries to wait for, kind, site); every kind as often as the others.

    Half of the kills come some time after the one before, the others once the log has grown by so much: so
    they find the run in its rounds too, and not only on its way back.
    """
    dice = random.Random(seed)
    kinds = [KINDS[index % len(KINDS)] for index in range(kills)]
    dice.shuffle(kinds)
    return [
        (
            dice.uniform(0.2, 4.0),
            dice.choice((0, dice.randrange(1, 14))),
            kind,
            dice.choice(SITES) if kind in ("agent", "supernode") else "",
        )
        for kind in kinds
    ]


@pytest.mark.parametrize("part", range(SCHEDULES))
def test_runs_end_complete_and_nothing_is_spent_twice(report, part):
    kills = int(os.environ.get("AFFIDAVIT_KILLS", "200")) // SCHEDULES
    seed = int(os.environ.get("AFFIDAVIT_KILL_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
    seed += part
    plan = schedule(kills, seed)
    print(f"seed {seed}:", *[f"{wait:.1f}s+{more} {kind} {site};" for wait, more, kind, site in plan])
    killed: Counter[str] = Counter()
    runs: list[str] = []
    with tempfile.TemporaryDirectory(prefix="aff") as folder, Fleet(Path(folder), SITES, rows_of) as fleet:
        began = time.monotonic()
        while plan:
            run = fleet.start()
            runs.append(run)
            driver = Driver(fleet, run, began)
            due, plan = plan[:PER_RUN], plan[PER_RUN:]
            for number, (wait_s, entries, kind, site) in enumerate(due):
                driver.wait(wait_s, entries)
                if fleet.end(run) is not None:  # it was quicker: the rest of its kills meet the next one
                    plan = [*due[number:], *plan]
                    break
                killed[kind] += driver.kill(kind, site)
            driver.finish()
            _check_run(fleet, run)
        _check_debits(fleet)
        _check_nothing_personal(fleet)
        assert {limit for _, limit in fleet.core_limits} <= {"0"}, fleet.core_limits
        resumed = Counter(body.round for _, body in fleet.coordinator.bodies(RunResumed))
        lost = sum(sum(find_run(fleet.ledger, run).undelivered.values()) for run in runs)
        minutes = (time.monotonic() - began) / 60
    assert sum(killed.values()) >= kills - 2, killed
    counted = ", ".join(f"{killed[kind]} {kind}" for kind in KINDS)
    rounds = ", ".join(f"{count} at round {number}" for number, count in sorted(resumed.items()))
    again = (
        f"taken up again {sum(resumed.values())} times ({rounds})"
        if resumed
        else "never to be taken up again"
    )
    print(f"killed {counted}; {again}; {lost} undelivered; {minutes:.1f} minutes")
    report(
        "kills",
        size=f"{sum(killed.values())} kills ({counted}), seed {seed}, {len(runs)} runs of 3 rounds, 3 sites",
        result=f"every run complete and proved, {again}; "
        f"one debit a release, {lost} undelivered and listed; nothing personal in "
        f"{fleet.scanned_bytes / 1e6:.0f} MB",
    )


class Driver:
    """One run's operator: resumes it whenever nobody carries it out."""

    def __init__(self, fleet: Fleet, run: str, began: float) -> None:
        self._fleet, self._run, self._began = fleet, run, began
        self._busy = time.monotonic()

    def wait(self, seconds: float, entries: int) -> None:
        """Wait, then until the log has so many entries more, the run ends, or ten seconds are over."""
        time.sleep(seconds)
        wanted, deadline = self._fleet.ledger.tree_size + entries, time.monotonic() + 10
        while self._fleet.ledger.tree_size < wanted and time.monotonic() < deadline:
            if self._fleet.end(self._run) is not None:
                return
            self._nudge()
            time.sleep(0.05)

    def kill(self, kind: str, site: str) -> bool:
        if kind == "serverapp" and not self._fleet.pids(kind):
            self._resume()
        done = self._fleet.kill(kind, site)
        self._say(f"{kind} {site}")
        return done

    def finish(self) -> None:
        """Nobody kills any more: resume until the log shows the end."""
        deadline = time.monotonic() + PEACE_S
        while self._fleet.end(self._run) is None:
            assert time.monotonic() < deadline, f"run {self._run} neither ends nor can be resumed"
            self._nudge()
            time.sleep(0.3)
        self._say("ended")

    def _nudge(self) -> None:
        if self._fleet.is_carried_out(self._run) or self._fleet.pids("serverapp"):
            self._busy = time.monotonic()
        elif time.monotonic() - self._busy > 3:
            assert not _is_begun(self._fleet, self._run) or find_run(self._fleet.ledger, self._run).resumable
            self._resume()

    def _resume(self) -> None:
        self._say("resume")
        self._fleet.submit(self._run)
        self._busy = time.monotonic() + 10

    def _say(self, what: str) -> None:
        at = find_run(self._fleet.ledger, self._run).round if _is_begun(self._fleet, self._run) else "-"
        print(
            f"{time.monotonic() - self._began:6.0f} s  {self._run[:6]} after round {at}: {what}", flush=True
        )


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


def _check_nothing_personal(fleet: Fleet) -> None:
    """No site's row and no site's key is in any byte that the coordinator keeps: logs and databases too."""
    needles = []
    for name, home in fleet.homes.items():
        for value in canary_of(name):
            forms = (*number_forms(value), str(value).encode())
            needles += [(f"a row of {name}", form) for form in forms]
        for path in (home.path / "keys").iterdir():
            lines = path.read_text().splitlines()
            needles += [(f"{name}'s {path.name}", line.encode()) for line in lines if "-----" not in line]
    folders = [fleet.home, fleet.base / "signer"]
    assert scan(folders, needles) == []
    assert {hit.what for hit in scan([fleet.base], needles)} == {what for what, _ in needles}
    fleet.scanned_bytes = size_of(folders)


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
