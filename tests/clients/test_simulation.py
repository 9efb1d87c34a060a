"""A whole federation through Flower's own objects: trained, logged, witnessed, and loud when it cannot be."""

from __future__ import annotations

import shutil

import pandas as pd
import pytest

from audit.entries import RoundCompleted, RunAccepted, SiteStatement, event_hash
from audit.keys import SigningKey
from audit.principal import LocalOwner, Principal
from clients.agent import Agent
from clients.demo_data import HOSPITALS, PUBLIC_ROWS, deal, demo_charter, features, write_demo_files
from clients.errors import LedgerBehindError, SimulationError
from clients.home import SiteHome
from clients.simulated_launch import inprocess_launch
from clients.simulation import new_coordinator, run_federation, simulate
from federation.charter import Charter
from federation.errors import CharterError, RunFailedError
from federation.service import TrainRequest, train

CHARTER = """
name: toy
task: binary
features: [{name: x, type: number, lower: -3, upper: 3}, {name: z, type: boolean, missing: midpoint}]
label: {name: y, classes: ["no", "yes"]}
model: {family: logistic_regression}
plan: {learning_rate: 4, rounds: 3}
privacy: {unit: row, relation: add_remove, epsilon: 8, delta: 1e-5, max_grad_norm: 1, grid_bits: 24}
gates: [{metric: auc, margin_over_baseline: 0.2}]
"""
CALIBRATED = CHARTER.replace(
    "grid_bits: 24", "grid_bits: 24, noise_multiplier: 1.5"
)  # quicker: nothing to find


def frame(rows, seed):
    random = pd.Series(range(rows)).sample(frac=1, random_state=seed)
    x = (random - rows / 2) / rows * 6
    return pd.DataFrame({"x": x, "z": random % 2 == 0, "y": ["yes" if value > 0 else "no" for value in x]})


SITES = {"a": frame(300, 1), "b": frame(200, 2), "c": frame(260, 3)}
PUBLIC = frame(120, 4)


@pytest.fixture(scope="module")
def run():
    made = simulate(CHARTER, SITES, public=PUBLIC)
    made.register()
    yield made
    made.close()


def test_every_round_is_logged_and_witnessed_by_every_site(run):
    assert run.history["cosignatures"].tolist() == [3, 3, 3]
    assert run.history["sites"].tolist() == [3, 3, 3]
    log = run.federation.coordinator
    assert [body.round for _, body in log.bodies(RoundCompleted)] == [1, 2, 3]
    assert len(list(log.bodies(SiteStatement))) == 9


def test_a_run_learns_and_says_what_it_cost(run):
    assert run.history["auc"].iloc[-1] > 0.9
    assert run.history["epsilon"].is_monotonic_increasing
    assert run.epsilons["run_epsilon"].between(7, 8).all()
    assert run.version.gates_passed


def test_ledgers_and_log_agree_on_every_event(run):
    statements = [body for _, body in run.federation.coordinator.bodies(SiteStatement)]
    for name, home in run.federation.homes.items():
        agent = Agent.open(home)
        own = [release.statement for release in agent.ledger.releases(agent.population)]
        assert own == [body for body in statements if body.site == name]
        assert all(release.delivered for release in agent.ledger.releases(agent.population))
        assert agent.ledger.open_reservations(agent.population) == ()
        agent.close()


def test_a_run_shows_itself_and_predicts(run):
    html = run._repr_html_()
    assert run.version.digest[:12] in html
    assert "epsilon" in html
    answers = run.predict(PUBLIC.head(5))
    assert list(answers["label"].isin(["no", "yes"])) == [True] * 5
    assert len(run.plot().axes) == 2


def test_without_privacy_is_labelled_and_never_registered():
    made = simulate(CALIBRATED, SITES, public=PUBLIC, privacy=None)
    assert "NOT PRIVATE" in made._repr_html_()
    assert made.history["auc"].iloc[-1] > 0.95
    with pytest.raises(SimulationError, match="cannot be registered"):
        made.register()
    made.close()


def test_a_second_run_continues_the_same_odometers(tmp_path):
    made = simulate(CALIBRATED, SITES, public=PUBLIC, folder=tmp_path / "sim")
    charter, homes = made.charter, made.federation.homes
    run_federation(charter, homes, made.federation.coordinator, made.federation.scientist.key)
    by_site = {}
    for _, body in made.federation.coordinator.bodies(SiteStatement):
        by_site.setdefault(body.site, []).append(body)
    for statements in by_site.values():
        assert [body.sequence for body in statements] == [1, 2, 3, 4, 5, 6]
        assert [b.previous_event for b in statements[1:]] == [event_hash(b) for b in statements[:-1]]
    made.close()


def test_a_site_whose_whole_home_is_an_old_copy_joins_no_further_run(tmp_path):
    """Ledger, high-water mark and witness state all rewound together: only the log still knows."""
    run = simulate(CALIBRATED.replace("rounds: 3", "rounds: 1"), SITES, public=PUBLIC, folder=tmp_path / "f")
    federation = run.federation
    home = federation.homes["a"]
    shutil.copytree(home.path, tmp_path / "old")

    def again():
        return run_federation(
            run.charter,
            federation.homes,
            federation.coordinator,
            federation.scientist.key,
            public_set=federation.public_file,
        )

    again()
    shutil.rmtree(home.path)
    shutil.copytree(tmp_path / "old", home.path)
    before = federation.coordinator.ledger.tree_size
    with pytest.raises(LedgerBehindError):
        again()
    assert federation.coordinator.ledger.tree_size == before
    run.close()


def train_over_a_bad_network(folder, fault, minimum_sites=3):
    """Set up a federation, then carry a run of it out with messages lost as `fault` says."""
    patient = CALIBRATED.replace(
        "rounds: 3", f"rounds: 3, round_timeout_s: 12, minimum_sites: {minimum_sites}"
    )
    made = simulate(patient, SITES, public=PUBLIC, folder=folder)
    agents = {name: Agent.open(home) for name, home in made.federation.homes.items()}
    author = made.federation.scientist.key
    try:
        run = train(
            made.federation.coordinator,
            Principal(id="curie", role="scientist", key=author.text),
            LocalOwner(),
            TrainRequest(charter=made.charter),
            author,
            inprocess_launch(agents, fault=fault),
        )
        spent = {name: agent.ledger.head(agent.population).sequence for name, agent in agents.items()}
        undelivered = {
            name: len(agent.ledger.undelivered(agent.population)) for name, agent in agents.items()
        }
    finally:
        for agent in agents.values():
            agent.close()
    statements = [b for _, b in made.federation.coordinator.bodies(SiteStatement) if b.run == run.run]
    made.close()
    return statements, spent, undelivered


def test_a_lost_reply_costs_a_repetition_and_no_second_debit(tmp_path):
    lost = []

    def lose_first_reply(site, message):
        if site == "b" and message.metadata.reply_to_message_id and message.metadata.message_type == "train":
            lost.append(site)
            return None if len(lost) == 1 else 0.0
        return 0.0

    statements, spent, undelivered = train_over_a_bad_network(tmp_path / "sim", lose_first_reply)
    assert len(lost) > 1
    assert len(statements) == 9
    assert spent == {"a": 6, "b": 6, "c": 6}
    assert undelivered == {"a": 0, "b": 0, "c": 0}


def test_a_site_whose_replies_are_lost_stays_debited_and_the_others_go_on(tmp_path):
    def lose_replies(site, message):
        is_reply = bool(message.metadata.reply_to_message_id)
        return None if site == "b" and is_reply and message.metadata.message_type == "train" else 0.0

    statements, spent, undelivered = train_over_a_bad_network(tmp_path / "sim", lose_replies, minimum_sites=2)
    assert {b.site for b in statements} == {"a", "c"}
    assert spent == {"a": 6, "b": 4, "c": 6}  # round 1 was debited at b, answered, and never arrived
    assert undelivered == {"a": 0, "b": 1, "c": 0}


def test_a_run_beyond_a_sites_cap_fails_before_any_release(tmp_path):
    with pytest.raises(RunFailedError, match="budget_exhausted"):
        simulate(CALIBRATED, SITES, public=PUBLIC, folder=tmp_path / "sim", lifetime_epsilon="1")
    from federation.coordinator import Coordinator

    with Coordinator.open(tmp_path / "sim" / "coordinator") as log:
        assert list(log.bodies(SiteStatement)) == []
        assert list(log.bodies(RunAccepted)) == []
    agent = Agent.open(SiteHome.open(tmp_path / "sim" / "sites" / "a"))
    assert agent.ledger.head(agent.population).sequence == 0
    assert agent.ledger.open_reservations(agent.population) == ()
    agent.close()


@pytest.mark.parametrize(
    ("charter", "sites", "error", "message"),
    [
        (CALIBRATED, {}, SimulationError, "no sites"),
        (CALIBRATED, {"Ward 7": SITES["a"]}, SimulationError, "cannot name a site"),
        (CALIBRATED, {"a": SITES["a"].head(0)}, SimulationError, "no rows"),
        (CALIBRATED, {"a": "/nowhere/at-all.csv"}, SimulationError, "does not exist"),
        (CALIBRATED.replace("epsilon: 8", "epsilon: -8"), SITES, CharterError, "epsilon"),
        (CALIBRATED.replace("epsilon:", "epsillon:"), SITES, CharterError, "epsillon"),
        (CALIBRATED.replace("logistic_regression", "perceptron"), SITES, CharterError, "family"),
    ],
)
def test_a_bad_simulation_is_refused_by_name(charter, sites, error, message):
    with pytest.raises(error, match=message):
        simulate(charter, sites)


def test_a_missing_column_stops_the_run_and_is_named_at_the_site_alone(caplog):
    bad = {**SITES, "b": SITES["b"].drop(columns="x")}
    with pytest.raises(RunFailedError, match="contract_not_met") as error:
        simulate(CALIBRATED, bad, public=PUBLIC)
    assert "'x'" not in str(error.value)
    assert "column 'x': the column is missing" in caplog.text


def test_homes_must_be_the_charters(tmp_path, run):
    with new_coordinator(tmp_path) as log, pytest.raises(SimulationError, match="homes of"):
        run_federation(run.charter, {"a": run.federation.homes["a"]}, log, run.federation.scientist.key)


def test_the_demo_deals_every_patient_once():
    dealt = deal()
    assert {name: len(rows) for name, rows in dealt.items()} == {
        **{hospital.name: hospital.rows for hospital in HOSPITALS},
        "public": PUBLIC_ROWS,
    }
    everyone = [tuple(row) for rows in dealt.values() for row in rows]
    assert len(set(everyone)) == len(everyone) == 569
    assert deal() == dealt
    assert deal(seed=1) != dealt


def test_the_demos_charter_fits_its_own_epsilon_and_holds_its_own_data(tmp_path):
    from clients.loader import inspect_file, load_training_data
    from clients.terms import read_terms
    from federation.accounting import plan_cost

    files = write_demo_files(tmp_path)
    keys = {name: SigningKey.generate().text for name in files.sites}
    officers = {"olsen": SigningKey.generate().text}
    text = demo_charter(public=files.public, identities=keys, officers=officers)
    charter = Charter.parse(text)
    assert plan_cost(charter).fits
    for name, path in files.sites.items():
        terms = read_terms(charter.canonical().decode(), site=name)
        assert {found.problem.split(" ", 1)[1].split(" ")[0] for found in inspect_file(path, terms)} <= {"is"}
        assert len(load_training_data(path, terms).inputs) == charter.site(name).nominal_rows
    assert len(features()) == 30


def test_the_shared_federation_is_live_and_whole(trained):
    from federation.registry import LIVE, find_version

    with trained.open() as log:
        assert find_version(log.ledger, trained.version).state == LIVE


@pytest.mark.slow  # starting Ray takes most of it
def test_the_same_objects_run_under_flowers_own_simulation(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed; it comes with affidavit[simulation]")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's and Flower's own deprecations
        made = simulate(CALIBRATED.replace("rounds: 3", "rounds: 2"), SITES, public=PUBLIC, engine="ray")
    assert made.history["sites"].tolist() == [3, 3]
    assert made.register().gates_passed
    made.close()
