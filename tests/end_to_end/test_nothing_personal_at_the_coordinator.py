"""Every byte that a coordinator keeps is read: no row, name, private key or sum without noise is in it."""

from __future__ import annotations

import base64
import logging
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import clients.simulation as simulation
from audit.entries import SiteRefused, SiteStatement
from audit.principal import LocalOwner, Principal
from clients.agent import Agent
from clients.dp.mechanism import Mechanism
from clients.simulated_launch import inprocess_launch
from clients.terms import Terms, read_terms
from clients.trainer import Workshop, mechanism_terms
from federation.network.supervisor import Part, Supervisor
from federation.service import RegisterRequest, TrainRequest, register, train
from federation.torch_models import build_model
from tests.raw_scan import number_forms, scan, size_of, text_forms, vector_forms

CHARTER = """
name: canaries
task: binary
features: [{name: x, type: number, lower: -3, upper: 3}, {name: w, type: number, lower: 0, upper: 9}]
label: {name: y, classes: ["no", "yes"]}
model: {family: logistic_regression}
plan: {learning_rate: 4, rounds: 2, round_timeout_s: 3, minimum_sites: 2}
privacy: {unit: subject, relation: add_remove, epsilon: 8, delta: 1e-5, max_grad_norm: 1,
  noise_multiplier: 1.5, subject_id: patient, max_rows_per_subject: 2}
evaluation: {share: 0.25, noise_multiplier: 2}
"""
CANARY_X, CANARY_W = 2.7182818284501, 5.7721566490153
NAME, SUBJECT = "Zaphira Quillfeather", "subject-7f3e-canary"
SITES = ("aspen", "birch", "clover")


class Overheard(Workshop):
    """Computes with a mechanism that tells what it adds up before the noise."""

    def __init__(self, mechanism: Mechanism) -> None:
        super().__init__()
        self._given = mechanism

    def mechanism(self, terms: Terms) -> Mechanism:
        return self._given


def frame(seed: int) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    x = draw.uniform(-3, 3, 80).round(4)
    made = pd.DataFrame(
        {"x": x, "w": draw.uniform(0, 9, 80).round(4), "y": np.where(x > 0.3, "yes", "no"),
         "patient": [f"{SUBJECT}-{seed}-{row}" for row in range(80)]}
    )  # fmt: skip
    made.loc[3, ["x", "w"]] = [CANARY_X, CANARY_W]
    made.loc[5, "y"] = NAME  # a cell that breaks the contract: its text must not leave with an error
    return made


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A real run with files; one site's data vanish in the middle, under a folder with a telling name."""
    base = tmp_path_factory.mktemp("canaries")
    federation, charter = simulation._set_up(
        CHARTER, {name: frame(seed) for seed, name in enumerate(SITES, start=1)}, None, base, "1000"
    )
    sums: list[list[int]] = []

    def record(event: str, value: object) -> None:
        if event == "inside.sum":
            sums.append([int(number) for number in np.asarray(value).ravel()])

    simulation.join_all(federation.homes, federation.coordinator)
    agents = {}
    for name, home in federation.homes.items():
        agents[name] = agent = Agent.open(home)
        terms = read_terms(charter.canonical().decode(), site=name)
        model = build_model([dict(layer) for layer in terms.layers], precision=terms.precision, site=0)
        mechanism = Mechanism(model, mechanism_terms(terms), terms.loss, recorder=record)
        agent._trainer._workshop = Overheard(mechanism)

    def lose(event):
        if event.kind == "round" and event.round == 1:
            federation.files["clover"].unlink(missing_ok=True)

    author = federation.scientist
    person = Principal(id="p", role="scientist", key=author.public)
    handler = logging.FileHandler(base / "coordinator" / "federation.log")
    logger = logging.getLogger("federation")
    logger.addHandler(handler)
    try:
        run = train(
            federation.coordinator, person, LocalOwner(), TrainRequest(charter=charter), author.key,
            inprocess_launch(agents), on_event=lose,
        )  # fmt: skip
    finally:
        logger.removeHandler(handler)
        handler.close()
    register(federation.coordinator, person, LocalOwner(), RegisterRequest(run=run.run))
    federation.coordinator.publish()
    for agent in agents.values():
        agent.close()
    before = base / "before"  # what lay on the disk while the log was open: the write-ahead log too
    shutil.copytree(base / "coordinator", before / "coordinator")
    shutil.copytree(base / "signer", before / "signer")
    yield federation, base, sums
    federation.close()


def kept_by_coordinator(base: Path) -> list[Path]:
    return [base / "coordinator", base / "before" / "coordinator"]


def personal() -> list[tuple[str, bytes]]:
    needles = [(f"text {text!r}", form) for text in (NAME, SUBJECT) for form in text_forms(text)]
    needles += [
        (f"number {value!r}", form)
        for value in (CANARY_X, CANARY_W)
        for form in (*number_forms(value), str(value).encode())
    ]
    return needles


def test_no_row_name_or_subject_is_anywhere_at_the_coordinator(ran):
    federation, base, _ = ran
    assert size_of(kept_by_coordinator(base)) > 100_000
    assert any(path.name.endswith("-wal") for path in (base / "before").rglob("*"))
    assert scan([*kept_by_coordinator(base), base / "signer"], personal()) == []
    found = {hit.what for hit in scan([base / "data"], personal())}
    assert {f"text {NAME!r}", f"text {SUBJECT!r}", f"number {CANARY_X!r}"} <= found  # the scan can find them
    refused = [body for _, body in federation.coordinator.bodies(SiteRefused)]
    assert ("clover", "contract_not_met") in {(body.site, body.reason) for body in refused}


def test_no_sum_without_its_noise_is_anywhere_at_the_coordinator(ran, tmp_path):
    federation, base, sums = ran
    assert len(sums) >= 5
    needles, alone = [], []
    for at, values in enumerate(sums):
        needles += [("a whole sum", form) for form in vector_forms(values)]
        needles += [("two of a sum's numbers", f) for pair in pairwise(values) for f in vector_forms(pair)]
        alone += [(f"sum {at}, number {v}", f) for v in values if abs(v) >= 1 << 20 for f in number_forms(v)]
        needles += [("a sum's number", str(v).encode()) for v in values if abs(v) >= 10**7]
    assert len(needles) > 40
    (tmp_path / "sums").write_bytes(b"".join(form for _, form in alone))
    assert {hit.what for hit in scan([tmp_path], alone)} == {what for what, _ in alone} != set()
    assert scan(kept_by_coordinator(base), needles) == []
    # One number is three bytes of chance, which pages hold in one of 8,000 runs; two are none.
    assert len({hit.what for hit in scan(kept_by_coordinator(base), alone)}) <= 1
    from audit.weights import decode_update

    statement = next(body for _, body in federation.coordinator.bodies(SiteStatement))
    noised = federation.coordinator.blobs.get(statement.update)
    assert scan(kept_by_coordinator(base), [("a release", noised)])  # the scan can find what is there
    assert len(decode_update(noised)) == len(sums[0])


def test_no_private_key_is_anywhere_at_the_coordinator(ran):
    federation, base, _ = ran
    needles = []
    for name, home in federation.homes.items():
        keys = home.keys()
        for label, key in (
            ("identity", keys.identity),
            ("statement", keys.statement),
            ("witness", keys.witness),
        ):
            needles.append((f"{name}'s {label} key", key._private.private_bytes_raw()))
        needles.append((f"{name}'s agreement key", keys.agreement.private_bytes_raw()))
        for path in (home.path / "keys").iterdir():
            lines = path.read_text().splitlines()
            needles += [(f"{name}'s {path.name}", line.encode()) for line in lines if "-----" not in line]
    needles = [(what, raw) for what, raw in needles if len(raw) >= 32]
    assert len(needles) >= 4 * len(SITES)
    assert scan([*kept_by_coordinator(base), base / "signer"], needles) == []
    assert scan([base / "sites"], needles)
    seeds = [(what, base64.b64decode(raw)[-32:]) for what, raw in needles if len(raw) >= 60]
    assert scan([*kept_by_coordinator(base), base / "signer"], seeds) == []


def test_no_process_of_ours_leaves_a_core_dump(tmp_path):
    look = "import resource; print(resource.getrlimit(resource.RLIMIT_CORE))"
    command = f"import affidavit; affidavit.main(['--version']); {look}"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "(0, 0)"
    supervisor = Supervisor([Part(name="part", command=[sys.executable, "-c", look])], tmp_path)
    supervisor._tick = lambda: supervisor.stop() if (tmp_path / "part.log").read_text() else None
    supervisor.run()
    assert (tmp_path / "part.log").read_text().splitlines()[0] == "(0, 0)"
