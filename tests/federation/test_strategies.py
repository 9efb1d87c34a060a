"""Aggregation is the definition's, bit for bit, and Flower's own to rounding; no reply counts unproved."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedYogi

from audit.canonical import canonical_bytes
from audit.entries import ZERO_DIGEST
from audit.models import model_file
from audit.replay import AggregationPlan, Aggregator, ReplayError, SiteUpdate
from federation.charter import Charter
from federation.exchange import Request
from federation.grid import InProcessGrid
from federation.mechanism import planned_event
from federation.statements import OdometerHead, RoundTerms
from federation.strategies import AffidavitFedAdam, AffidavitFedAvg, AffidavitFedYogi, strategy_of

STRATEGIES = {"fedavg": AffidavitFedAvg, "fedadam": AffidavitFedAdam, "fedyogi": AffidavitFedYogi}


@pytest.fixture
def rig(federation):
    return Rig(federation)


class Rig:
    """One round at a time: proved statements in, weights out, without a log."""

    def __init__(self, federation):
        self.federation = federation
        self.sites = federation.sites
        for site in self.sites.values():
            site.charter = federation.charter
        self.grid = InProcessGrid(federation.client_app(), {name: {} for name in self.sites})
        self.nodes = {info.name: info.node_id for info in self.grid.get_nodes()}
        self.grid.close()

    def use(self, charter):
        for site in self.sites.values():
            site.charter = charter
        return charter

    def terms(self, charter, number, weights, previous):
        return RoundTerms(
            run="r",
            round=number,
            charter=charter.digest,
            base_model=hashlib.sha256(model_file(charter.layers, weights)).hexdigest(),
            participants=tuple(sorted(self.sites)),
            previous_round=previous,
            event=planned_event(charter),
            released=charter.released,
            enrolments={name: site.enrolment() for name, site in self.sites.items()},
            heads={
                name: OdometerHead(sequence=s.sequence, event_hash=s.head) for name, s in self.sites.items()
            },
        )

    def messages(self, charter, number):
        request = Request(kind="round", header={"round": number})
        return {name: request.message(self.nodes[name], "") for name in self.sites}

    def reply(self, message, header, blobs):
        content = RecordDict(
            {
                "header": ConfigRecord({"kind": "round", "header": canonical_bytes(header)}),
                "blobs": ConfigRecord(blobs),
            }
        )
        return Message(content, reply_to=message)

    def round(self, strategy, charter, number, weights):
        terms = self.terms(charter, number, weights, ZERO_DIGEST)
        messages = self.messages(charter, number)
        strategy.open_round(terms, messages)
        request = {
            "run": "r",
            "round": number,
            "charter": charter.digest,
            "participants": sorted(self.sites),
            "previous_round": None,
        }
        blobs = {"base_model": model_file(charter.layers, weights)}
        replies = []
        for name, site in self.sites.items():
            header, out = site.round(request, blobs)
            if site.tamper is not None:
                site.tamper("round", header, out)
            replies.append(self.reply(messages[name], header, out))
        return strategy.aggregate_train(number, replies)


def varied(seed):
    """Integers of every size, also beyond 2^53, the same for the same seed."""

    def values(dimension):
        rng = np.random.default_rng(seed)
        scale = rng.choice(np.array([1, 1 << 20, 1 << 40, 1 << 58]), size=dimension)
        return [int(v) for v in rng.integers(-7, 8, size=dimension) * scale]

    return values


def changed(charter_text, **terms):
    text = charter_text.replace("rounds: 3", "rounds: 4")
    for old, new in terms.items():
        text = text.replace("plan: {", f"plan: {{{old}: {new}, ") if old != "text" else text
    return Charter.parse(text)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("local_steps", [1, 3])
def test_aggregation_is_the_definition_bit_for_bit(rig, charter_text, name, local_steps):
    charter = rig.use(changed(charter_text, strategy=name, local_steps=local_steps))
    strategy = strategy_of(charter, [0.25] * charter.dimension)
    assert type(strategy) is STRATEGIES[name]
    reference = Aggregator(AggregationPlan.of_charter(charter.document))
    weights = [0.25] * charter.dimension
    for number in range(1, 5):
        for index, site in enumerate(rig.sites.values()):
            site.values = varied(100 * number + index)
        arrays, _ = rig.round(strategy, charter, number, weights)
        updates = [
            SiteUpdate(
                site=site["name"],
                nominal_rows=site["nominal_rows"],
                weight=float(site["weight"]),
                values=strategy.accepted[site["name"]].values,
            )
            for site in charter.document["sites"]
        ]
        weights = reference.step(number, weights, updates)
        assert strategy.weights.tolist() == weights
        assert [v for a in arrays.values() for v in a.numpy().reshape(-1).tolist()] == weights


def flower_step(flower, number, weights, deltas):
    """Let Flower's own strategy take the step that moves weights by the mean of `deltas`."""
    flower.current_arrays = {"w": np.array(weights)}
    replies = []
    for delta in deltas:
        content = RecordDict(
            {
                "arrays": ArrayRecord({"w": Array(np.array(weights) + delta)}),
                "metrics": MetricRecord({"num-examples": 1}),
            }
        )
        origin = Message(RecordDict(), 7, "train")
        replies.append(Message(content, reply_to=origin))
    arrays, _ = flower.aggregate_train(number, replies)
    return arrays["w"].numpy()


@pytest.mark.parametrize(("name", "theirs"), [("fedadam", FedAdam), ("fedyogi", FedYogi)])
def test_adaptive_steps_are_flowers_own(rig, charter_text, name, theirs):
    charter = rig.use(changed(charter_text, strategy=name, local_steps=2, tau="0.01"))
    strategy = strategy_of(charter, [0.0] * charter.dimension)
    flower = theirs(eta=2.0, eta_l=0.1, beta_1=0.9, beta_2=0.99, tau=0.01, fraction_evaluate=0.5)
    ours = np.zeros(charter.dimension)
    for number in range(1, 5):
        for index, site in enumerate(rig.sites.values()):
            site.values = lambda dimension, k=index, n=number: [
                (k + 1) * n * (i - 3) * 90_000 for i in range(dimension)
            ]
        before = ours
        rig.round(strategy, charter, number, before.tolist())
        ours = strategy.weights
        delta = sum(
            weight * np.array(strategy.accepted[site].values) / 2.0**20
            for site, weight in (("north", 100 / 220), ("south", 50 / 220), ("west", 70 / 220))
        )
        expected = flower_step(flower, number, before, [delta])
        assert ours == pytest.approx(expected, rel=1e-11, abs=1e-13)


def test_averaging_is_flowers_own_weighted_mean(rig, charter_text):
    charter = rig.use(
        Charter.parse(charter_text.replace("learning_rate: 2", "learning_rate: 1, local_steps: 2"))
    )
    strategy = strategy_of(charter, [0.5] * charter.dimension)
    assert isinstance(strategy, FedAvg)
    for index, site in enumerate(rig.sites.values()):
        site.values = lambda dimension, k=index: [(k + 1) * i << 12 for i in range(dimension)]
    rig.round(strategy, charter, 1, [0.5] * charter.dimension)
    rows = {"north": 100, "south": 50, "west": 70}
    replies = []
    for site, count in rows.items():
        moved = 0.5 + np.array(strategy.accepted[site].values) / 2.0**20
        content = RecordDict(
            {"arrays": ArrayRecord({"w": Array(moved)}), "metrics": MetricRecord({"num-examples": count})}
        )
        replies.append(Message(content, reply_to=Message(RecordDict(), 7, "train")))
    arrays, _ = FedAvg().aggregate_train(1, replies)
    assert strategy.weights == pytest.approx(arrays["w"].numpy(), rel=1e-12)


def resigned(site, header, /, **changes):
    """Sign the statement again with the site's own key after changing it: a lie, not a forgery."""
    from dataclasses import replace

    from audit.entries import SiteStatement, body_document, parse_body

    body = replace(parse_body(SiteStatement, header["statement"]), **changes)
    header["statement"] = body_document(site.signed(body, site.statement))


LIES = {
    "run": {"run": "another"},
    "round": {"round": 2},
    "charter": {"charter": "1" * 64},
    "population": {"population": "0" * 32},
    "base_model": {"base_model": "2" * 64},
    "participants": {"participants": ("north", "west")},
    "previous_round": {"previous_round": "3" * 64},
    "sequence": {"sequence": 2},
    "previous_event": {"previous_event": "4" * 64},
    "update": {"update": "5" * 64},
    "site": {"site": "south"},
}


@pytest.mark.parametrize("field", LIES)
def test_a_signed_lie_is_rejected_and_the_field_named(rig, charter, field):
    site = rig.sites["west"]
    site.tamper = lambda kind, header, blobs: resigned(site, header, **LIES[field])
    strategy = strategy_of(charter, [0.0] * charter.dimension)
    arrays, _ = rig.round(strategy, charter, 1, [0.0] * charter.dimension)
    assert arrays is not None
    assert sorted(strategy.accepted) == ["north", "south"]
    assert strategy.rejected["west"].field == field


def test_less_noise_than_agreed_is_rejected(rig, charter):
    from dataclasses import replace

    site = rig.sites["west"]
    quiet = replace(planned_event(charter), sigma_grid=planned_event(charter).sigma_grid - 1)
    site.tamper = lambda kind, header, blobs: resigned(site, header, event=quiet)
    strategy = strategy_of(charter, [0.0] * charter.dimension)
    rig.round(strategy, charter, 1, [0.0] * charter.dimension)
    assert strategy.rejected["west"].field == "event"


def test_a_statement_changed_on_its_way_is_rejected(rig, charter):
    def tamper(kind, header, blobs):
        header["statement"] = {**header["statement"], "agent_code": "9" * 64}

    rig.sites["north"].tamper = tamper
    strategy = strategy_of(charter, [0.0] * charter.dimension)
    rig.round(strategy, charter, 1, [0.0] * charter.dimension)
    assert strategy.rejected["north"].field == "signature"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda header, blobs: blobs.update(update=blobs["update"][:-1] + bytes([blobs["update"][-1] ^ 1])),
        lambda header, blobs: blobs.clear(),
        lambda header, blobs: header.clear(),
        lambda header, blobs: header.update(statement="signed, trust me"),
        lambda header, blobs: header["statement"].pop("update"),
    ],
)
def test_a_spoilt_reply_is_rejected(rig, charter, spoil):
    rig.sites["north"].tamper = lambda kind, header, blobs: spoil(header, blobs)
    strategy = strategy_of(charter, [0.0] * charter.dimension)
    rig.round(strategy, charter, 1, [0.0] * charter.dimension)
    assert set(strategy.rejected) == {"north"}


def test_an_update_of_another_length_is_rejected(rig, charter):
    rig.sites["north"].values = lambda dimension: [1] * (dimension + 1)
    strategy = strategy_of(charter, [0.0] * charter.dimension)
    rig.round(strategy, charter, 1, [0.0] * charter.dimension)
    assert strategy.rejected["north"].field == "update"


def test_too_few_proved_statements_leave_the_weights_alone(rig, charter):
    for name in ("north", "west"):
        rig.sites[name].tamper = lambda kind, header, blobs: blobs.clear()
    strategy = strategy_of(charter, [1.0] * charter.dimension)
    assert rig.round(strategy, charter, 1, [1.0] * charter.dimension) == (None, None)
    assert strategy.weights.tolist() == [1.0] * charter.dimension


def test_a_round_that_was_not_opened_aggregates_nothing(charter):
    strategy = strategy_of(charter, [0.0] * charter.dimension)
    with pytest.raises(ReplayError, match="not opened"):
        strategy.aggregate_train(1, [])
