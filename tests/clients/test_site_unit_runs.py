"""Whole runs whose unit is the site: what leaves, what is proved, what a liar can do, one odometer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from torch import Tensor

from audit.canonical import canonical_bytes
from audit.cost_bodies import UNBOUNDED
from audit.entries import (
    RoundAbandoned,
    RoundCompleted,
    RunFailed,
    SiteStatement,
    SiteUndelivered,
)
from audit.principal import LocalOwner, Principal
from audit.secure_bodies import RoundOpened
from audit.service import export_evidence
from audit.verify import Verdict, Word, verify_evidence
from clients.agent import Agent
from clients.agreement import complete_charter
from clients.dp.site_update import LocalTraining, SiteMechanism, plain_training
from clients.proposals import Proposal
from clients.reviewing import review_proposal
from clients.service import review, status_of
from clients.simulated_launch import inprocess_launch
from clients.simulation import _set_up, join_all, run_federation, simulate
from clients.terms import Terms
from clients.trainer import Workshop, local_training, mechanism_terms
from federation import service
from federation.charter import Charter
from federation.errors import RunFailedError
from federation.model_card import model_card
from federation.service import TrainRequest, train
from federation.torch_models import build_model
from tests.audit_verify.judging import CHARTER as CHARTER_STEP
from tests.audit_verify.judging import EPSILON, REPLAY

CHARTER = """
name: toy
task: binary
features: [{name: x, type: number, lower: -3, upper: 3}, {name: z, type: boolean, missing: midpoint}]
label: {name: y, classes: ["no", "yes"]}
model: {family: logistic_regression}
plan:
  {learning_rate: 1, rounds: 2, local_steps: 6, local_learning_rate: 2, round_timeout_s: 10, minimum_sites: 4}
privacy:
  {unit: site, relation: replace_one, epsilon: 8, delta: 0.001, max_update_norm: 0.5, noise_multiplier: 1}
secure_aggregation: {tolerated: 1}
"""
ROWS = CHARTER.replace("unit: site", "unit: row").replace("max_update_norm: 0.5", "max_grad_norm: 1").replace(
    "local_steps: 6, ", ""
)  # fmt: skip
NAMES = ("a", "b", "c", "d", "e")
NOISE = "The noise and the data"


def frame(rows: int, seed: int) -> pd.DataFrame:
    x = np.random.default_rng(seed).uniform(-3, 3, rows)
    return pd.DataFrame({"x": x, "z": x > 1, "y": np.where(x > 0, "yes", "no")})


SITES = {name: frame(30 + 40 * seed, seed) for seed, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def run() -> Any:
    gates = "gates: [{metric: auc, source: public_set, margin_over_baseline: -0.5}]\n"
    made = simulate(CHARTER + gates, SITES, public=frame(100, 9))
    made.register()
    made.approve()
    yield made
    made.close()


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the epsilon of a mu-GDP mechanism, written out again (Balle and Wang 2018, theorem 8)."""

    def above(epsilon: float) -> float:
        def cdf(x: float) -> float:
            return 0.5 * math.erfc(-x / math.sqrt(2))

        return cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * cdf(-mu / 2 - epsilon / mu)

    low, high = 0.0, 50.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if above(middle) <= delta else (middle, high)
    return high


# an honest run


def test_the_verifier_recomputes_a_site_s_epsilon_from_the_log(run: Any) -> None:
    report = verify_evidence(run.evidence(), policy_text=run.policy)
    assert report.verdict is Verdict.VALID, report.text()
    events = {body.event for _, body in run.federation.coordinator.bodies(SiteStatement)}
    (event,) = events
    assert (event.unit, event.steps, event.sample_rate, event.relation) == ("site", 1, "1", "replace_one")
    exact = gaussian_epsilon(math.sqrt(2) * event.sensitivity_grid / event.sigma_grid, 0.001)
    lines = {(line.unit, line.site): line for line in report.epsilons}
    assert set(lines) == {(unit, site) for unit in ("site", "row") for site in NAMES}
    for line in lines.values():
        assert float(line.run_epsilon) == pytest.approx(exact, abs=2e-4)
        assert float(line.run_epsilon) >= exact - 1e-9
        assert line.relation == "replace_one"
    step = report.step(EPSILON)
    assert step.word is Word.PROVED
    assert "one site, replace/one" in step.detail
    assert "every round in full (q = 1); a row has its site's protection alone" in step.detail
    assert "at most 1 of 5 sites collude" in step.detail


def test_what_is_proved_and_what_is_only_attested(run: Any) -> None:
    report = verify_evidence(run.evidence(), policy_text=run.policy)
    noise = report.step(NOISE)
    assert noise.word is Word.ATTESTED
    assert "that each site's whole update was clipped and the noise was drawn" in noise.detail
    assert "rows were clipped" not in noise.detail
    assert "no sum is longer than clipped updates and their noise" in report.step(REPLAY).detail
    assert "one site" in report.step(CHARTER_STEP).detail


def test_the_card_says_what_a_row_has(run: Any) -> None:
    log = run.federation.coordinator
    card = model_card(log.ledger, run.version.digest, log.blobs.find)
    assert "a row has its site's protection and none of its own" in card
    assert "Epsilon for one **site**" in card
    assert "not told" in card  # the table has no number of rows
    assert "one subject at one site" not in card
    assert "leaves a site is its whole update, clipped" in card


def test_the_model_moves_by_the_mean_of_whole_updates(run: Any) -> None:
    from audit.models import initial_weights, weights_of_file
    from audit.weights import decode_update

    log = run.federation.coordinator
    opened = next(body for _, body in log.bodies(RoundOpened))
    total = decode_update(log.blobs.get(opened.total))
    completed = next(body for _, body in log.bodies(RoundCompleted))
    after = weights_of_file(run.charter.layers, log.blobs.get(completed.output_model))
    before = initial_weights(run.charter.layers, run.charter.digest)
    wanted = [x + value * 0.5 / 2**20 / 5 for x, value in zip(before, total, strict=True)]
    assert after == pytest.approx(wanted, abs=1e-12)


def test_the_same_recipe_without_noise_learns() -> None:
    made = simulate(CHARTER, SITES, public=frame(100, 9), privacy=None)
    try:
        assert made.history["accuracy"].iloc[-1] > 0.75  # half of the public rows are of one class
    finally:
        made.close()


def test_virtual_sites_of_one_process_are_units_too() -> None:
    made = simulate(CHARTER, SITES, homes="memory")
    try:
        carried = Carried(made.federation, made.charter, None, made.id)
        report = carried.report()
        assert report.step(EPSILON).word is Word.PROVED, report.text()
        assert report.step(REPLAY).word is Word.PROVED
        assert {body.event.unit for body in carried.bodies(SiteStatement)} == {"site"}
    finally:
        made.close()


# what leaves a site


Lie = Callable[[Agent], None]


@dataclass
class Carried:
    federation: Any
    charter: Charter
    failed: RunFailedError | None
    run: str
    answers: list[tuple[str, str, Any]] = field(default_factory=list)

    def bodies(self, kind: type) -> list[Any]:
        return [body for _, body in self.federation.coordinator.bodies(kind)]

    def report(self) -> Any:
        log = self.federation.coordinator
        ((stored, _),) = log.entries(run=self.run, type="run.completed")
        data = export_evidence(log.ledger, log.blobs.find, leaf_index=stored.leaf_index)
        return verify_evidence(data, policy_text=next(iter(self.federation.homes.values())).policy().format())


@dataclass
class Seen:
    """An agent whose every answer is kept; it may be gone from some request on."""

    agent: Agent
    answers: list[tuple[str, str, Any]]
    gone_at: tuple[str, str] = ("", "")
    gone: bool = False

    def handle(self, kind: str, header: bytes, blobs: Mapping[str, bytes]) -> tuple[bytes, dict[str, bytes]]:
        self.gone = self.gone or self.gone_at == (self.agent.name, kind)
        if self.gone:
            return canonical_bytes({"error": "site_closed"}), {}
        answer, back = self.agent.handle(kind, header, blobs)
        sizes = {name: len(blob) for name, blob in back.items()}
        self.answers.append((self.agent.name, kind, [json.loads(answer), sizes]))
        return answer, back


@pytest.fixture
def carry_out(tmp_path: Path) -> Any:
    """Return `carry_out(...)`: one run, with what every site answered."""
    opened: list[Any] = []

    def carry(
        charter: str = CHARTER,
        *,
        sites: Mapping[str, pd.DataFrame] = SITES,
        lie: Lie = lambda agent: None,
        gone_at: tuple[str, str] = ("", ""),
    ) -> Carried:
        folder = tmp_path / f"sim-{len(opened)}"
        federation, agreed = _set_up(charter, dict(sites), None, folder, "1000")
        opened.append(federation)
        join_all(federation.homes, federation.coordinator)
        agents = {name: Agent.open(home) for name, home in federation.homes.items()}
        for agent in agents.values():
            lie(agent)
        answers: list[tuple[str, str, Any]] = []
        links: Any = {name: Seen(agent, answers, gone_at) for name, agent in agents.items()}
        failed, run = None, ""
        principal = Principal(id="curie", role="scientist", key=federation.scientist.key.text)
        try:
            request, launch = TrainRequest(charter=agreed), inprocess_launch(links)
            made = train(
                federation.coordinator, principal, LocalOwner(), request, federation.scientist.key, launch
            )
            run = made.run
        except RunFailedError as error:
            failed, run = error, error.run
        finally:
            for agent in agents.values():
                agent.close()
        return Carried(federation, agreed, failed, run, answers)

    yield carry
    for federation in opened:
        federation.close()


def shape(value: Any) -> Any:
    """A document with the length of each text in its place, and every number as it is."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value]
    return len(value) if isinstance(value, str) else value


def test_a_site_s_answers_differ_by_nothing_but_masks_hashes_and_signatures(carry_out: Any) -> None:
    """One site without a usable row, then with 300: the same answers, to the length of every text."""
    few = carry_out(sites={**SITES, "c": pd.DataFrame({"x": [99.0], "z": [True], "y": ["perhaps"]})})
    many = carry_out(sites={**SITES, "c": frame(300, 71)})
    assert few.failed is None
    assert many.failed is None

    def told(done: Carried) -> list[tuple[str, Any]]:
        return [(kind, shape(answer)) for site, kind, answer in done.answers if site == "c"]

    asked = [kind for kind, _ in told(few)]
    assert {"round", "masked.keys", "masked.survivors", "run.propose", "charter.sign"} <= set(asked)
    skip = ("cosign", "enrol")  # what they answer follows from the log's size
    assert [item for item in told(few) if item[0] not in skip] == [
        item for item in told(many) if item[0] not in skip
    ]
    for done in (few, many):
        assert {site["nominal_rows"] for site in done.charter.document["sites"]} == {1}


def test_one_site_may_drop_out(carry_out: Any) -> None:
    done = carry_out(gone_at=("b", "masked.shares"))
    assert done.failed is None, done.failed
    report = done.report()
    assert report.step(REPLAY).word is Word.PROVED, report.text()
    assert "at most 0 of 4 sites collude" in report.step(EPSILON).detail


# a site that lies


class Unclipped(SiteMechanism):
    """Sends its update so many times as long as the bound, with a share of the noise."""

    times = 1.0

    def _sum(self, inputs: Tensor, targets: Tensor) -> Tensor:
        base = self._weights()
        step = LocalTraining(steps=1, learning_rate=1.0)
        moved = plain_training(self._model, "binary_cross_entropy", inputs, targets, step) - base
        self._set(base)
        return moved / moved.norm() * (self.times * float(self.terms.max_grad_norm))

    def _bounded(self, total: Tensor) -> Tensor:
        return total


class Liar(Workshop):
    def __init__(self, times: float) -> None:
        super().__init__()
        self.times = times

    def mechanism(self, terms: Terms) -> SiteMechanism:
        model = build_model([dict(layer) for layer in terms.layers])
        made = Unclipped(model, mechanism_terms(terms), terms.loss, local_training(terms))
        made.times = self.times
        return made


def unclipped(times: float, site: str = "d") -> Lie:
    def lie(agent: Agent) -> None:
        if agent.name == site:
            agent._trainer._workshop = Liar(times)

    return lie


def test_an_update_far_beyond_the_bound_moves_no_model(carry_out: Any) -> None:
    """Nobody can tell whose it is, so the round is lost: an honest site's noise was enough all the same."""
    spare = CHARTER.replace("rounds: 2", "rounds: 2, spare_rounds: 1")
    done = carry_out(spare, lie=unclipped(1000.0))
    assert done.failed is not None
    assert done.failed.reason == "not_opened"
    assert done.bodies(RoundCompleted) == done.bodies(RoundOpened) == []
    assert [body.reason for body in done.bodies(RoundAbandoned)] == ["not_opened", "not_opened"]
    assert [body.reason for body in done.bodies(RunFailed)] == ["not_opened"]
    assert len(done.bodies(SiteUndelivered)) == 10  # all of it stays debited


def test_a_little_beyond_the_bound_is_what_nobody_can_see(carry_out: Any) -> None:
    """And so it is not claimed: clipping is attested by the site, and the epsilon is that of honest sites."""
    done = carry_out(lie=unclipped(3.0))
    assert done.failed is None, done.failed
    report = done.report()
    assert report.step(NOISE).word is Word.ATTESTED
    assert report.step(REPLAY).word is Word.PROVED, report.text()


# one odometer


def second(done: Carried, text: str) -> Any:
    """Agree on another charter with the same sites, run it, register its version."""
    federation = done.federation
    identities = {name: home.keys().identity.text for name, home in federation.homes.items()}
    officer = federation.officer.public
    gates = "gates: [{metric: auc, source: public_set, margin_over_baseline: -0.5}]\n"
    public = frame(40, 5).to_csv(index=False).encode()
    charter = complete_charter(
        text.replace("name: toy", "name: other") + gates,
        identities=identities,
        rows=dict.fromkeys(identities, 100),
        officers={"olsen": officer},
        public_set=public,
        public_rows=40,
    )
    path = federation.folder / "public.csv"
    path.write_bytes(public)
    author = federation.scientist
    trained = run_federation(charter, federation.homes, federation.coordinator, author.key, public_set=path)
    principal = Principal(id="curie", role="scientist", key=author.public)
    request = service.RegisterRequest(run=trained.run)
    return service.register(federation.coordinator, principal, LocalOwner(), request)


def judged(done: Carried, version: Any) -> Any:
    from clients.service import cosign_here

    log = done.federation.coordinator
    cosign_here(done.federation.homes, log)
    data = export_evidence(log.ledger, log.blobs.find, leaf_index=version.leaf_index)
    return verify_evidence(data, policy_text=next(iter(done.federation.homes.values())).policy().format())


@pytest.mark.slow  # three runs after each other, and what each is accounted to
def test_runs_of_rows_and_of_sites_stand_on_one_odometer(carry_out: Any) -> None:
    """First rows: nothing bounds a site over its life then, and nobody claims it. Later rows count both."""
    rows = ROWS.replace("noise_multiplier: 1", "noise_multiplier: 3")
    done = carry_out(rows)
    assert done.failed is None, done.failed
    version = second(done, CHARTER)
    assert {claim.lifetime_epsilon for claim in version.registered.costs} == {UNBOUNDED}
    report = judged(done, version)
    assert report.step(EPSILON).word is Word.PROVED, report.text()
    lines = {line.unit: line for line in report.epsilons if line.site == "a"}
    assert lines["site"].lifetime_epsilon == UNBOUNDED
    assert float(lines["row"].lifetime_epsilon) > float(lines["row"].run_epsilon)
    version = second(done, rows)
    claim = version.registered.costs[0]
    assert (claim.unit, claim.events) == ("row", 2)
    assert float(claim.lifetime_epsilon) > float(lines["row"].lifetime_epsilon) > float(claim.run_epsilon)
    report = judged(done, version)
    assert report.step(EPSILON).word is Word.PROVED, report.text()
    (line,) = [line for line in report.epsilons if line.site == "a"]
    assert (line.unit, line.events) == ("row", 6)
    assert float(line.lifetime_epsilon) == pytest.approx(float(claim.lifetime_epsilon), abs=2e-3)


def test_a_zeroed_out_site_tells_a_row_more_and_its_people_read_both(carry_out: Any) -> None:
    done = carry_out(CHARTER.replace("replace_one", "zero_out"))
    lines = {line.unit: float(line.run_epsilon) for line in done.report().epsilons}
    (event,) = {body.event for body in done.bodies(SiteStatement)}
    mu = math.sqrt(2) * event.sensitivity_grid / event.sigma_grid
    assert lines["site"] == pytest.approx(gaussian_epsilon(mu, 0.001), abs=2e-4)
    assert lines["row"] == pytest.approx(gaussian_epsilon(2 * mu, 0.001), abs=2e-4)
    home = done.federation.homes["a"]
    proposal = Proposal(charter=done.charter.canonical().decode(), run=None)
    found = review_proposal(home, proposal)
    assert (found.unit, found.relation) == ("site", "zero_out")
    assert found.row_epsilon is not None
    assert found.row_epsilon > 1.5 * found.run_epsilon
    assert found.lifetime_after > found.lifetime_before >= found.row_epsilon * (1 - 1e-9)
    said = review(home, proposal.charter)
    assert (said.unit, said.row_epsilon) == ("site", pytest.approx(found.row_epsilon))
    ledger = Agent.open(home)
    try:
        status = status_of(home, ledger.ledger)
    finally:
        ledger.close()
    assert status.whole_site_epsilon is not None
    assert status.whole_site_epsilon < status.lifetime_epsilon  # one length for the site, two for a row
