"""Whole masked runs through Flower's own objects: sites that vanish, agents that lie, runs that verify."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from audit.canonical import canonical_bytes
from audit.entries import (
    RoundAbandoned,
    RoundCompleted,
    RunFailed,
    SiteRefused,
    SiteUndelivered,
    body_document,
    parse_body,
)
from audit.entries import SiteStatement as Statement
from audit.keys import SigningKey
from audit.principal import LocalOwner, Principal
from audit.secure_bodies import RoundOpened, SharesOpened
from audit.service import export_evidence
from audit.verify import Word, verify_evidence
from audit.weights import decode_update
from clients.agent import Agent
from clients.agent_server import served_agents
from clients.client_app import app as client_app
from clients.inprocess import live_agents
from clients.proposals import Proposal
from clients.reviewing import review_proposal
from clients.service import review
from clients.simulated_launch import inprocess_launch
from clients.simulation import _set_up, join_all, run_federation, simulate
from federation import service
from federation.accounting import plan_cost, plan_report
from federation.anomaly import views_of_run
from federation.charter import Charter
from federation.errors import CharterError, MaskedRunError, PlanDoesNotFitError, RunFailedError
from federation.exchange import Exchange
from federation.grid import InProcessGrid
from federation.model_card import model_card
from federation.resume import RunPast
from federation.server_app import carry_out as carry_run_out
from federation.service import TrainRequest, train
from tests.audit_verify.judging import EPSILON, REPLAY
from tests.federation.dying import CrashError, Dying

CHARTER = """
name: toy
task: binary
features: [{name: x, type: number, lower: -3, upper: 3}, {name: z, type: boolean, missing: midpoint}]
label: {name: y, classes: ["no", "yes"]}
model: {family: logistic_regression}
plan: {learning_rate: 4, rounds: 2, round_timeout_s: 10, minimum_sites: 3}
privacy:
  {unit: row, relation: add_remove, epsilon: 8, delta: 1e-5, max_grad_norm: 1, noise_multiplier: 1.5}
secure_aggregation: {tolerated: 1}
"""
NAMES = ("a", "b", "c", "d")


def frame(rows: int, seed: int) -> pd.DataFrame:
    x = np.random.default_rng(seed).uniform(-3, 3, rows)
    return pd.DataFrame({"x": x, "z": x > 1, "y": np.where(x > 0, "yes", "no")})


SITES = {name: frame(120, seed) for seed, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def run() -> Any:
    made = simulate(CHARTER, SITES, public=frame(100, 9))
    yield made
    made.close()


Lie = Callable[[Agent, str, dict[str, Any]], None]  # who, kind, the answer's header, to be changed in place
Hold = Callable[[str, str], bool]  # site, kind: whether the site is gone before it answers this


class Between:
    """An agent as the relay sees it: some answers never come, some are changed on their way."""

    def __init__(self, agent: Agent, hold: Hold, lie: Lie) -> None:
        self.agent, self.hold, self.lie, self.gone = agent, hold, lie, False

    def handle(self, kind: str, header: bytes, blobs: Mapping[str, bytes]) -> tuple[bytes, dict[str, bytes]]:
        if self.gone or self.hold(self.agent.name, kind):
            self.gone = True
            return canonical_bytes({"error": "site_closed"}), {}  # what is not asked again
        answer, back = self.agent.handle(kind, header, blobs)
        document = json.loads(answer)
        self.lie(self.agent, kind, document)
        return canonical_bytes(document), back


def never(site: str, kind: str) -> bool:
    return False


def honestly(agent: Agent, kind: str, answer: dict[str, Any]) -> None:
    pass


@dataclasses.dataclass
class Carried:
    federation: Any
    charter: Charter
    failed: RunFailedError | None
    run: str

    def bodies(self, kind: type) -> list[Any]:
        return [body for _, body in self.federation.coordinator.bodies(kind)]

    def report(self) -> Any:
        log = self.federation.coordinator
        ((stored, _),) = log.entries(run=self.run, type="run.completed")
        data = export_evidence(log.ledger, log.blobs.find, leaf_index=stored.leaf_index)
        policy = next(iter(self.federation.homes.values())).policy().format()
        return verify_evidence(data, policy_text=policy)


@pytest.fixture
def carry_out(tmp_path: Path) -> Any:
    """Return `carry_out(hold, lie)`: one run of made-up sites over that bad a network."""
    opened = []

    def carry(hold: Hold = never, lie: Lie = honestly, charter: str = CHARTER) -> Carried:
        federation, agreed = _set_up(charter, SITES, None, tmp_path / "sim", "1000")
        opened.append(federation)
        join_all(federation.homes, federation.coordinator)
        agents = {name: Agent.open(home) for name, home in federation.homes.items()}
        links: Any = {name: Between(agent, hold, lie) for name, agent in agents.items()}
        author, failed, run = federation.scientist.key, None, ""
        try:
            principal = Principal(id="curie", role="scientist", key=author.text)
            request, launch = TrainRequest(charter=agreed), inprocess_launch(links)
            run = train(federation.coordinator, principal, LocalOwner(), request, author, launch).run
        except RunFailedError as error:
            failed, run = error, error.run
        finally:
            for agent in agents.values():
                agent.close()
        return Carried(federation, agreed, failed, run)

    yield carry
    for federation in opened:
        federation.close()


def test_a_masked_run_learns_and_is_verified(run: Any) -> None:
    assert len(run.entries("round.opened")) == 2
    assert run.history["sites"].tolist() == [4, 4]
    version = run.register()
    assert version.registered.epsilons[0].run_epsilon
    report = verify_evidence(run.evidence(), policy_text=run.policy)
    assert report.step(REPLAY).word is Word.PROVED, report.text()
    assert "masks come off" in report.step(REPLAY).detail
    assert "at most 1 of 4 sites collude" in report.step(EPSILON).detail


def test_nobody_is_shown_a_picture_of_masked_updates(run: Any) -> None:
    with pytest.raises(MaskedRunError, match="only their sum"):
        list(views_of_run(run.federation.coordinator, run.id))
    assert run.entries("round.examined") == []


def test_the_model_moves_by_the_sum_that_was_opened(run: Any) -> None:
    """The opened total, divided by all rows, is the gradient step: nothing else entered the model."""
    from audit.models import initial_weights, weights_of_file
    from audit.replay import AggregationPlan

    log = run.federation.coordinator
    opened = next(body for _, body in log.bodies(RoundOpened))
    total = decode_update(log.blobs.get(opened.total))
    completed = next(body for _, body in log.bodies(RoundCompleted))
    plan = AggregationPlan.of_charter(run.charter.document)
    after = weights_of_file(run.charter.layers, log.blobs.get(completed.output_model))
    before = initial_weights(run.charter.layers, run.charter.digest)
    wanted = [x - 4 * (value / plan.divisor(480)) for x, value in zip(before, total, strict=True)]
    assert after == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "counted"),
    [
        ("masked.shares", 3),
        ("masked.survivors", 4),
    ],
)
def test_a_site_that_vanishes_in_any_phase_stops_nobody(carry_out: Any, kind: str, counted: int) -> None:
    done = carry_out(hold=lambda site, asked: (site, asked) == ("b", kind))
    assert done.failed is None, done.failed
    first, second = done.bodies(RoundCompleted)
    assert (len(first.statements), len(second.statements)) == (counted, 3)
    assert [body.survivors for body in done.bodies(RoundOpened)][1] == ("a", "c", "d")
    assert done.report().step(REPLAY).word is Word.PROVED


@pytest.mark.parametrize(
    "change",
    [
        ("learning_rate: 4", "learning_rate: 0.1, strategy: fedadam"),
        ("noise_multiplier: 1.5", "noise_multiplier: 3, sample_rate: 0.5"),
        ("secure_agg", "evaluation: {share: 0.2, noise_multiplier: 4}\nsecure_agg"),
    ],
    ids=["fedadam", "sampled rows", "with counts of its own"],
)
def test_what_needs_the_sum_alone_goes_with_masks(carry_out: Any, change: tuple[str, str]) -> None:
    done = carry_out(charter=CHARTER.replace(*change))
    assert done.failed is None, done.failed
    assert done.report().step(REPLAY).word is Word.PROVED, done.report().text()


def test_two_that_vanish_end_the_run_and_nothing_is_opened(carry_out: Any) -> None:
    done = carry_out(hold=lambda site, kind: site in ("b", "c") and kind == "masked.survivors")
    assert done.failed is not None
    assert done.failed.reason == "not_opened"
    assert [body.reason for body in done.bodies(RoundAbandoned)] == ["not_opened"]
    assert [body.reason for body in done.bodies(RunFailed)] == ["not_opened"]
    assert done.bodies(RoundOpened) == []
    assert done.bodies(RoundCompleted) == []
    assert len(done.bodies(SiteUndelivered)) == 4  # all were released, and stay debited


def test_two_that_vanish_before_their_updates_cost_nobody_anything(carry_out: Any) -> None:
    done = carry_out(hold=lambda site, kind: site in ("b", "c") and kind == "masked.shares")
    assert done.failed is not None
    assert done.failed.reason == "not_enough_sites"
    assert done.bodies(Statement) == done.bodies(SiteUndelivered) == []


def test_a_new_run_after_a_lost_one_has_new_keys_noise_and_debits(carry_out: Any, tmp_path: Path) -> None:
    done = carry_out(hold=lambda site, kind: site in ("b", "c") and kind == "masked.survivors")
    lost = {body.statement.site: body.statement for body in done.bodies(SiteUndelivered)}
    federation = done.federation
    run_federation(done.charter, federation.homes, federation.coordinator, federation.scientist.key)
    fresh = {body.site: body for body in done.bodies(Statement) if body.round == 1}
    assert fresh.keys() == lost.keys()
    for site, statement in fresh.items():
        assert statement.sequence == 2
        assert statement.roster != lost[site].roster
        assert statement.update != lost[site].update


def test_one_wrong_share_among_enough_is_passed_over(carry_out: Any) -> None:
    def lie(agent: Agent, kind: str, answer: dict[str, Any]) -> None:
        if agent.name == "a" and "opened" in answer:
            body = parse_body(SharesOpened, answer["opened"])
            bad = dataclasses.replace(body, seeds=(body.seeds[1], body.seeds[0], *body.seeds[2:]))
            answer["opened"] = body_document(agent.home.keys().signed(bad))

    done = carry_out(lie=lie)
    assert done.failed is None, done.failed
    assert done.report().step(REPLAY).word is Word.PROVED


def test_an_altered_sealed_share_costs_its_receivers_the_round_and_says_why(carry_out: Any) -> None:
    def lie(agent: Agent, kind: str, answer: dict[str, Any]) -> None:
        if (agent.name, kind) == ("a", "masked.shares") and "b" in answer.get("shares", {}):
            answer["shares"]["b"] = answer["shares"]["c"]

    done = carry_out(lie=lie)
    assert done.failed is None, done.failed
    refusals = done.bodies(SiteRefused)
    assert [(body.site, body.round, body.reason) for body in refusals] == [("b", 1, "roster_not_proved")]
    assert done.bodies(RoundOpened)[0].survivors == ("a", "c", "d")


def test_keys_under_anothers_signature_are_left_out(carry_out: Any) -> None:
    def lie(agent: Agent, kind: str, answer: dict[str, Any]) -> None:
        if (agent.name, kind) == ("d", "masked.keys") and "keys" in answer:
            answer["keys"]["round"] = 2

    done = carry_out(lie=lie)
    assert done.failed is None
    assert done.bodies(RoundOpened)[0].survivors == ("a", "b", "c")


# charters


WHOLE = "site_level: {max_update_norm: 5, epsilon: 90}"
COUNTS = "evaluation: {share: 0.2, noise_multiplier: 2}"

PROBLEMS = [
    (("tolerated: 1", "tolerated: 2"), NAMES, "secure_aggregation.tolerated"),
    (("minimum_sites: 3", "minimum_sites: 2"), NAMES, "plan.minimum_sites"),
    (("minimum_sites: 3", "minimum_sites: 2"), NAMES[:2], "secure_aggregation"),
    (("rounds: 2", "rounds: 2, local_steps: 3"), NAMES, "plan.local_steps"),
    (("secure_agg", "aggregation: {rule: median, norm_bound: false}\nsecure_agg"), NAMES, "aggregation.rule"),
    (("secure_agg", "aggregation: {rule: mean}\nsecure_agg"), NAMES, "aggregation.norm_bound"),
    (("secure_agg", "aggregation: {rule: krum, byzantine: 0}\nsecure_agg"), NAMES, "aggregation.rule"),
    (("1.5}", "1.5, grid_bits: 36}"), NAMES, "privacy.grid_bits"),
    (("noise_multiplier: 1.5}", "noise_multiplier: 0.01, grid_bits: 8}"), NAMES, "privacy.grid_bits"),
    (("secure_agg", f"{COUNTS}\n{WHOLE}\nsecure_agg"), NAMES, "evaluation"),
    (("secure_aggregation: {tolerated: 1}", WHOLE), NAMES, "site_level"),
]


@pytest.mark.parametrize(("change", "sites", "path"), PROBLEMS, ids=[path for _, _, path in PROBLEMS])
def test_what_masks_exclude_is_said_when_the_charter_is_checked(
    change: tuple[str, str], sites: tuple[str, ...], path: str
) -> None:
    with pytest.raises(CharterError) as raised:
        checked(CHARTER.replace(*change), sites)
    assert path in {problem.path for problem in raised.value.problems}, raised.value
    assert all(problem.fix for problem in raised.value.problems)


def checked(source: str, sites: tuple[str, ...] = NAMES) -> Charter:
    members = "".join(
        f'  - {{name: {name}, identity: "{SigningKey.generate().text}", nominal_rows: 120}}\n'
        for name in sites
    )
    return Charter.parse(f"{source}sites:\n{members}purposes: [research]\n")


def test_weights_of_its_own_making_are_refused() -> None:
    members = "".join(
        f'  - {{name: {n}, identity: "{SigningKey.generate().text}", nominal_rows: 120, weight: 1}}\n'
        for n in NAMES
    )
    with pytest.raises(CharterError, match="plain sum"):
        Charter.parse(f"{CHARTER}sites:\n{members}purposes: [research]\n")


def test_local_layers_are_refused() -> None:
    layers = CHARTER.replace(
        "model: {family: logistic_regression}", "model: {family: mlp, hidden: [4], local_layers: [0]}"
    )
    with pytest.raises(CharterError, match="share of the noise alone"):
        checked(layers)


def test_a_plain_charter_keeps_its_digest_and_a_masked_one_reads_back() -> None:
    plain = checked(CHARTER.replace("secure_aggregation: {tolerated: 1}\n", ""))
    assert "secure_aggregation" not in plain.document
    assert "site_level" not in plain.document
    masked = checked(CHARTER + "site_level: {max_update_norm: 12.5, epsilon: 90}\n")
    assert Charter.from_canonical(masked.canonical().decode()).digest == masked.digest
    assert Charter.parse(masked.to_yaml()).digest == masked.digest
    assert masked.document["secure_aggregation"] == {"tolerated": 1}


def test_the_report_names_whom_epsilon_counts_on() -> None:
    charter = checked(CHARTER + "site_level: {max_update_norm: 12.5, epsilon: 90}\n")
    report, cost = plan_report(charter), plan_cost(charter)
    assert "each site draws" in report or "a site draws 1/sqrt(3)" in report
    assert "with 3 in a round at most 0 may collude, with all 4 at most 1" in report
    assert cost.alone is not None
    assert cost.whole_site is not None
    assert cost.alone > cost.sites[0].spent.pld
    assert cost.whole_site > cost.alone
    assert "a whole site: epsilon" in report


def test_a_run_that_costs_a_whole_site_more_than_promised_is_not_started(carry_out: Any) -> None:
    with pytest.raises(PlanDoesNotFitError, match="whole site"):
        carry_out(charter=CHARTER + "site_level: {max_update_norm: 12.5, epsilon: 1}\n")


def test_row_and_site_level_stand_in_one_ledger(carry_out: Any) -> None:
    done = carry_out(charter=CHARTER + "site_level: {max_update_norm: 3, epsilon: 90}\n")
    assert done.failed is None
    events = {body.event for body in done.bodies(Statement)}
    (event,) = events
    assert event.site_sensitivity_grid > 3 * 2**20
    assert event.sharers == 3
    report = done.report()
    assert report.step(EPSILON).word is Word.PROVED
    assert {(line.unit, line.site) for line in report.epsilons} >= {("row", "a"), ("site", "a")}


# a coordinator that is killed


def test_a_masked_run_whose_coordinator_is_killed_anywhere_goes_on_to_the_same_sums(tmp_path: Path) -> None:
    """Killed again and again, a few durable steps further each time: no sum is opened twice, none differs."""
    federation, agreed = _set_up(CHARTER, SITES, None, tmp_path / "sim", "1000")
    join_all(federation.homes, federation.coordinator)
    agents = {name: Agent.open(home) for name, home in federation.homes.items()}
    author = federation.scientist.key
    principal = Principal(id="curie", role="scientist", key=author.text)
    try:
        run = service.start_run(
            federation.coordinator, principal, LocalOwner(), TrainRequest(charter=agreed), author
        )
        kills = 0
        while kills < 40:
            home: Any = Dying(federation.coordinator, 12 + 3 * kills)
            with (
                live_agents(agents),
                InProcessGrid(client_app, {name: {} for name in agents}) as grid,
            ):
                exchange = Exchange(grid, poll_s=0.001, discovery_s=5)
                try:
                    carry_run_out(grid, home, run, exchange=exchange, hold_s=0.2, principal="curie")
                    break
                except CrashError:
                    kills += 1
    finally:
        for agent in agents.values():
            agent.close()
    assert kills >= 3
    done = Carried(federation, agreed, None, run)
    assert [body.round for body in done.bodies(RoundCompleted)] == [1, 2]
    assert [body.round for body in done.bodies(RoundOpened)] == [1, 2]
    assert len(done.bodies(Statement)) == 8
    report = done.report()
    assert report.step(REPLAY).word is Word.PROVED, report.text()
    federation.close()


def test_a_sum_that_was_opened_before_the_crash_is_taken_as_it_is(tmp_path: Path) -> None:
    """d was away when round 1 was opened, and is back when the run is: nobody asks it for what cannot count,
    and so nobody is entered as having refused.
    """
    federation, agreed = _set_up(CHARTER, SITES, None, tmp_path / "sim", "1000")
    join_all(federation.homes, federation.coordinator)
    agents = {name: Agent.open(home) for name, home in federation.homes.items()}
    author = federation.scientist.key
    principal = Principal(id="curie", role="scientist", key=author.text)
    log = federation.coordinator
    run = service.start_run(log, principal, LocalOwner(), TrainRequest(charter=agreed), author)

    def away(site: str, kind: str) -> bool:
        return (site, kind) == ("d", "round")

    def go_on(links: Any, home: Any) -> None:
        with live_agents(links), InProcessGrid(client_app, {name: {} for name in agents}) as grid:
            exchange = Exchange(grid, poll_s=0.001, discovery_s=5)
            carry_run_out(grid, home, run, exchange=exchange, hold_s=0.2, principal="curie")

    links = {name: Between(agent, away, honestly) for name, agent in agents.items()}
    dying: Any = Dying(log, 10_000, lambda: bool(RunPast.read(log.ledger, run).opened))
    with pytest.raises(CrashError):
        go_on(links, dying)
    go_on(agents, log)
    for agent in agents.values():
        agent.close()
    done = Carried(federation, agreed, None, run)
    assert done.bodies(SiteRefused) == []
    assert [(body.round, body.missing) for body in done.bodies(RoundCompleted)] == [(1, ("d",)), (2, ())]
    assert done.report().step(REPLAY).word is Word.PROVED
    federation.close()


# what people are told


def test_a_model_card_says_whom_the_noise_counts_on_and_what_a_whole_site_pays(carry_out: Any) -> None:
    done = carry_out(charter=CHARTER + "site_level: {max_update_norm: 3, epsilon: 90}\n")
    log, author = done.federation.coordinator, done.federation.scientist
    principal = Principal(id="curie", role="scientist", key=author.public)
    version = service.register(log, principal, LocalOwner(), service.RegisterRequest(run=done.run))
    card = model_card(log.ledger, version.digest, log.blobs.find)
    assert "whole while 3 of those in a round are honest" in card
    assert "A whole site, all its rows replaced by nothing: epsilon" in card


def test_the_people_of_a_site_are_told_whom_their_epsilon_counts_on(tmp_path: Path) -> None:
    federation, agreed = _set_up(CHARTER, SITES, None, tmp_path / "sim", "1000")
    proposal = Proposal(charter=agreed.canonical().decode(), run=None)
    found = review_proposal(federation.homes["a"], proposal)
    assert found.counts_on.startswith("3 honest sites of at least 3 in a round")
    assert "if all others collude, epsilon is" in found.counts_on
    assert review(federation.homes["a"], proposal.charter).counts_on == found.counts_on  # before signing, too
    federation.close()


def test_a_masked_run_over_the_agents_sockets(tmp_path: Path) -> None:
    """The same bytes through real Unix sockets, as SuperNodes reach their agents."""
    federation, agreed = _set_up(CHARTER, SITES, None, tmp_path / "sim", "1000")
    join_all(federation.homes, federation.coordinator)
    agents = {name: Agent.open(home) for name, home in federation.homes.items()}
    author = federation.scientist.key
    principal = Principal(id="curie", role="scientist", key=author.text)
    request = TrainRequest(charter=agreed)
    run = service.start_run(federation.coordinator, principal, LocalOwner(), request, author)
    with tempfile.TemporaryDirectory(prefix="af-") as short, served_agents(Path(short), agents):
        places = {name: {"agent": f"unix:{short}"} for name in agents}
        with InProcessGrid(client_app, places) as grid:
            carry_run_out(grid, federation.coordinator, run, exchange=Exchange(grid, poll_s=0.005))
    for agent in agents.values():
        agent.close()
    done = Carried(federation, agreed, None, run)
    assert len(done.bodies(RoundOpened)) == 2
    assert done.report().step(REPLAY).word is Word.PROVED
    federation.close()
