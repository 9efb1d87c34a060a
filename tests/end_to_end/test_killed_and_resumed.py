"""kill -9 of a process that holds coordinator and agents at once, again and again, until its run is done.

The child is forked by Python's forkserver, which has imported everything once. It tells each event of the
run; the parent kills it a few milliseconds after the one that it chose. Everything is real: agents, ledgers,
log, signer, witnesses, files on disk.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

import clients.simulation as simulation
from audit.entries import RunCompleted, SiteStatement, event_hash
from audit.principal import LocalOwner, Principal
from audit.round_bodies import RunResumed
from audit.service import export_evidence
from audit.verify import verify_evidence
from clients.home import SiteHome
from clients.ledger import SiteLedger
from clients.simulated_launch import inprocess_launch
from federation import service
from federation.coordinator import Coordinator
from federation.runs import find_run
from federation.service import TrainRequest, start_run
from tests.clients.test_private_evaluation import SITES

pytestmark = pytest.mark.slow  # processes that import torch, and are killed

PLAIN = """
name: killed
task: binary
features: [{name: x, type: number, lower: -3, upper: 3}]
label: {name: y, classes: ["no", "yes"]}
model: {family: logistic_regression}
plan: {strategy: fedadam, learning_rate: 0.1, rounds: 3, average_last: 2}
privacy: {unit: row, relation: add_remove, epsilon: 8, delta: 1e-5, max_grad_norm: 1, noise_multiplier: 1.5}
evaluation: {share: 0.25, noise_multiplier: 2}
"""
EVALUATION = "evaluation: {share: 0.25, noise_multiplier: 2}\n"
MASKED = PLAIN.replace(EVALUATION, "secure_aggregation: {tolerated: 1}\n")
ENDED, HOLD_S = 120.0, 0.8


def carry_out(folder: str, run: str, told: int) -> None:
    """In the child: go on with the run, telling each event in one line."""
    base = Path(folder)

    def tell(event):
        os.write(told, json.dumps([event.kind, event.round]).encode() + b"\n")

    with Coordinator.open(base / "coordinator", base / "signer") as coordinator:
        homes = {path.name: SiteHome.open(path) for path in (base / "sites").iterdir()}
        principal = Principal(id="again", role="scientist")
        with ExitStack() as stack:
            launch = inprocess_launch(simulation._open_agents(homes, coordinator, stack))
            service.resume(
                coordinator,
                principal,
                LocalOwner(),
                service.ResumeRequest(run=run),
                lambda config: launch({**config, "hold-s": HOLD_S}),
                on_event=tell,
            )
    os.write(told, b'["ended", 0]\n')


def lived(context, folder: Path, run: str, *, events: int, after_s: float) -> list[list]:
    """Run a child until it told so many events, then kill it; return what it told."""
    reading, writing = multiprocessing.Pipe(duplex=False)
    child = context.Process(target=_child, args=(str(folder), run, writing))
    child.start()
    writing.close()
    told: list[list] = []
    deadline = time.monotonic() + ENDED
    while len(told) < events and time.monotonic() < deadline:
        try:
            told.append(reading.recv())
        except EOFError:
            break
    time.sleep(after_s)
    if child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
    child.join(30)
    reading.close()
    return told


def _child(folder: str, run: str, connection) -> None:
    reading, writing = os.pipe()
    import threading

    def pump() -> None:
        with os.fdopen(reading) as lines:
            for line in lines:
                connection.send(json.loads(line))

    pumping = threading.Thread(target=pump, daemon=True)
    pumping.start()
    carry_out(folder, run, writing)
    os.close(writing)
    pumping.join(10)
    connection.close()


@pytest.fixture(scope="module")
def context():
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["clients.simulation", "clients.agent", "torch"])
    return made


@pytest.mark.parametrize(("text", "kills"), [(PLAIN, 3), (MASKED, 3)], ids=["plain", "masked"])
def test_a_run_that_is_killed_again_and_again_ends_proved_with_one_debit_a_release(
    tmp_path, context, text, kills
):
    federation, charter = simulation._set_up(text, SITES, None, tmp_path, "1000")
    simulation.join_all(federation.homes, federation.coordinator)
    author = federation.scientist
    person = Principal(id="p", role="scientist", key=author.public)
    run = start_run(federation.coordinator, person, LocalOwner(), TrainRequest(charter=charter), author.key)
    federation.coordinator.close()
    dice = random.Random(text)
    ended = False
    for number in range(40):
        peace = number >= kills
        told = lived(
            context, tmp_path, run,
            events=10_000 if peace else dice.randrange(2, 9), after_s=0 if peace else dice.uniform(0, 0.05),
        )  # fmt: skip
        if ["ended", 0] in told:
            ended = True
            break
    assert ended
    with Coordinator.open(tmp_path / "coordinator", tmp_path / "signer") as log:
        ((stored, _),) = log.bodies(RunCompleted)
        data = export_evidence(log.ledger, log.blobs.find, leaf_index=stored.leaf_index)
        assert len(list(log.bodies(RunResumed))) >= 1
        said = {name: [] for name in SITES}
        for _, body in log.bodies(SiteStatement):
            said[body.site].append(body)
        assert find_run(log.ledger, run).undelivered == {}
    report = verify_evidence(data, policy_text=next(iter(federation.homes.values())).policy().format())
    for title in (
        "The rounds and their statements",
        "The aggregation",
        "The model's weights",
        "The odometers",
    ):
        assert report.step(title).code == "ok", report.step(title)
    for name, home in federation.homes.items():
        ledger = SiteLedger(home.ledger_path, home.high_water_path, look=True)
        try:
            releases = ledger.releases(home.config.population.pseudonym)
        finally:
            ledger.close()
        assert [release.statement.sequence for release in releases] == list(range(1, len(releases) + 1))
        assert len({release.statement.round for release in releases}) == len(releases)
        assert [event_hash(body) for body in sorted(said[name], key=lambda body: body.sequence)] == [
            event_hash(release.statement) for release in releases
        ]
