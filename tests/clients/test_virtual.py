"""Virtual sites: a hundred of them in seconds, proved like any others, and as strict as a site on disk."""

from __future__ import annotations

import dataclasses
import tracemalloc
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest

from audit.checkpoints import parse_checkpoint_note
from audit.entries import RoundCompleted, SiteEnrolled, SiteStatement, event_hash
from audit.notes import parse_note
from audit.packing import (
    MAX_PLAIN_DIGESTS,
    PackingError,
    pack_digests,
    pack_text,
    unpack_digests,
    unpack_text,
)
from audit.principal import LocalOwner, Principal
from audit.tlog_policy import Policy
from audit.tlog_proof import TlogProof
from audit.verify import verify_evidence
from clients import simulation
from clients.errors import HomeError, LedgerBehindError, OdometerError, RefusedError
from clients.high_water import Head
from clients.history import History, OpenedNotes
from clients.ledger import SiteLedger
from clients.requests import LoggedEntry
from clients.simulated_launch import inprocess_launch
from clients.simulation import simulate
from clients.trainer import Workshop
from clients.virtual import VIRTUAL_OPERATOR, VirtualHome, VirtualLedger
from federation.service import TrainRequest, train
from federation.trust import MAX_VOICES, asked_to_cosign, chosen_voices, federation_policy

CHARTER = """
name: many
task: binary
features: [{name: x, type: number, lower: -4, upper: 4}, {name: z, type: number, lower: -4, upper: 4}]
label: {name: y, classes: ["no", "yes"]}
model: {family: logistic_regression}
plan: {learning_rate: 4, rounds: 3}
privacy: {unit: row, relation: add_remove, epsilon: 8, delta: 1e-5, max_grad_norm: 1, grid_bits: 24,
  noise_multiplier: 4}
"""
GATES = "gates: [{metric: auc, margin_over_baseline: 0.05}]\n"


def frame(rows, seed):
    rng = np.random.default_rng(seed)
    x = np.clip(rng.normal(size=(rows, 2)), -4, 4)
    return pd.DataFrame({"x": x[:, 0], "z": x[:, 1], "y": np.where(x[:, 0] > 0, "yes", "no")})


@pytest.fixture(scope="module")
def hundred():
    sites = {f"s{i:03d}": frame(20, i) for i in range(100)}
    run = simulate(CHARTER + GATES, sites, public=frame(60, 1000), homes="memory")
    run.register()
    run.approve()
    yield run
    run.close()


def test_a_hundred_sites_are_verified_from_a_file(hundred):
    report = verify_evidence(hundred.evidence(), policy_text=hundred.policy)
    weak = [
        (step.title, step.word, step.detail) for step in report.steps if step.word in ("FAIL", "NO EVIDENCE")
    ]
    assert (report.verdict, weak) == ("VALID", [])


def test_every_statement_of_every_round_is_in_the_log(hundred):
    log = hundred.federation.coordinator
    assert len(list(log.bodies(SiteStatement))) == 300
    assert [len(body.leaves) for _, body in log.bodies(RoundCompleted)] == [100] * 3


def test_every_odometer_stands_where_the_log_says(hundred):
    said = {body.site: body for _, body in hundred.federation.coordinator.bodies(SiteStatement)}
    for name, home in hundred.federation.homes.items():
        ledger, population = home.memory.ledger, home.config.population.pseudonym
        assert ledger.head(population) == Head(3, event_hash(said[name]))
        assert ledger.open_reservations(population) == ()
        assert len(ledger.spent(population)) == 3


def test_virtual_sites_say_that_they_are_simulated_and_count_as_one_voice(hundred):
    log = hundred.federation.coordinator
    assert {body.operator for _, body in log.bodies(SiteEnrolled)} == {VIRTUAL_OPERATOR}
    assert log.origin.startswith("simulation.invalid/")
    note = log.publish()
    opened = Policy.parse(hundred.policy).open(log.ledger.store_checkpoint(note), now=2**40)
    assert opened.quorum.need == 1
    assert 1 <= len(parse_note(opened.opened.note).signatures) - 1 <= MAX_VOICES


def test_a_second_run_goes_on_with_the_same_odometers(hundred):
    from clients.simulation import run_federation

    federation = hundred.federation
    run_federation(hundred.charter, federation.homes, federation.coordinator, federation.scientist.key)
    home = federation.homes["s007"]
    assert home.memory.ledger.head(home.config.population.pseudonym).sequence == 6


def test_memory_does_not_grow_with_the_rounds():
    taken = {}

    def watch(event):
        if event.kind == "round" and event.round in (5, 20):
            taken[event.round] = tracemalloc.get_traced_memory()[0]

    text = CHARTER.replace("rounds: 3", "rounds: 20, average_last: 2").replace(
        "multiplier: 4", "multiplier: 9"
    )
    tracemalloc.start()
    try:
        sites = {f"s{i}": frame(12, i) for i in range(2)}
        simulate(text, sites, homes="memory", on_event=watch).close()
    finally:
        tracemalloc.stop()
    assert taken[20] - taken[5] < 15 * 40_000  # the log's own caches


@pytest.fixture
def statement(hundred):
    (_, first), *_ = hundred.federation.coordinator.bodies(SiteStatement)
    return first


class LedgerContract:
    """What a ledger must refuse, wherever it keeps its rows."""

    def test_a_release_that_does_not_continue_is_refused(self, ledger, statement):
        with pytest.raises(OdometerError):
            ledger.commit_release(dataclasses.replace(statement, sequence=2), b"u", "0" * 64)
        with pytest.raises(OdometerError):
            ledger.commit_release(dataclasses.replace(statement, previous_event="1" * 64), b"u", "0" * 64)
        assert ledger.head(statement.population).sequence == 0

    def test_a_round_is_released_once(self, ledger, statement):
        ledger.commit_release(statement, b"u", "0" * 64)
        again = dataclasses.replace(statement, sequence=2, previous_event=event_hash(statement))
        with pytest.raises(OdometerError):
            ledger.commit_release(again, b"v", "1" * 64)
        assert ledger.release_of(statement.run, statement.round).update == b"u"
        assert [spent.event for spent in ledger.spent(statement.population)] == [statement.event]

    def test_a_statement_it_lacks_is_a_ledger_put_back(self, ledger, statement):
        with pytest.raises(LedgerBehindError):
            ledger.check_not_behind(statement.population, Head(1, event_hash(statement)), witness="the log")
        ledger.commit_release(statement, b"u", "0" * 64)
        ledger.check_not_behind(statement.population, Head(1, event_hash(statement)), witness="the log")
        with pytest.raises(LedgerBehindError):
            ledger.check_not_behind(statement.population, Head(1, "2" * 64), witness="the log")

    def test_what_no_checkpoint_showed_is_undelivered(self, ledger, statement):
        ledger.commit_release(statement, b"u", "0" * 64)
        assert [left.sequence for left in ledger.undelivered(statement.population)] == [1]
        ledger.mark_delivered(statement.run, statement.round)
        assert ledger.undelivered(statement.population) == ()


class TestVirtualLedger(LedgerContract):
    @pytest.fixture
    def ledger(self):
        return VirtualLedger()

    def test_old_bytes_are_gone_and_their_rounds_stay_refused(self, ledger, statement):
        last = statement
        for number in range(1, 6):
            ledger.commit_release(last, b"u%d" % number, "0" * 64)
            ledger.mark_delivered(last.run, number)
            last = dataclasses.replace(
                last, round=number + 1, sequence=number + 1, previous_event=event_hash(last)
            )
        assert ledger.release_of(statement.run, 5).update == b"u5"
        with pytest.raises(RefusedError) as caught:
            ledger.release_of(statement.run, 1)
        assert caught.value.refusal == "already_released"


class TestSiteLedger(LedgerContract):
    @pytest.fixture
    def ledger(self, tmp_path):
        made = SiteLedger.create(tmp_path / "ledger.db", tmp_path / "odometer.json")
        yield made
        made.close()


def test_of_masked_rounds_only_the_last_ones_are_remembered():
    ledger = VirtualLedger()
    ledger.put_masked_round("other", 1, {"keys": "k"})
    for number in range(1, 6):
        ledger.put_masked_round("run", number, {"keys": "k", "secret": "s"})
        ledger.put_masked_round("run", number, {"keys": "k"})
    assert ledger.masked_rounds("run") == (4, 5)
    ledger.put_masked_round("run", 4, {"keys": "forgotten"})
    assert ledger.masked_rounds("run") == (4, 5)
    assert ledger.masked_rounds("other") == (1,)


def test_a_virtual_site_follows_one_log(tmp_path):
    home = VirtualHome.make(
        tmp_path / "a", name="a", data=tmp_path / "a.csv", lifetime_epsilon="1", lifetime_delta="0.00001"
    )
    with pytest.raises(HomeError):
        home.policy()
    with pytest.raises(HomeError):
        home.witness()
    assert not home.follows_a_log
    assert not (tmp_path / "a").exists()


NAMES = [f"s{i:04d}" for i in range(300)]


def test_of_many_voices_everybody_chooses_the_same_ones():
    chosen = chosen_voices(NAMES)
    assert len(chosen) == MAX_VOICES
    assert chosen == chosen_voices(reversed(NAMES)) == asked_to_cosign(NAMES, {})
    assert len(set(chosen) - set(chosen_voices(NAMES[1:]))) <= 1


def test_few_voices_are_all_asked_and_one_operators_sites_are_not():
    assert asked_to_cosign(NAMES[:5], {}) == NAMES[:5]
    assert len(asked_to_cosign(NAMES, dict.fromkeys(NAMES, "one"))) == 4
    assert asked_to_cosign(["a", "b", "c"], {"a": "x", "b": "x"}) == ["a", "b", "c"]


def test_a_policy_of_many_voices_anchors_all_and_counts_those_chosen(hundred):
    keys = {name: home.keys().witness_signer(name).vkey for name, home in hundred.federation.homes.items()}
    text = federation_policy(hundred.federation.coordinator.log_key, keys).format()
    assert text.count("\nwitness ") == 100
    group = next(line for line in text.splitlines() if line.startswith("group "))
    assert sorted(group.split()[3:]) == chosen_voices(keys)


def test_what_is_too_long_is_packed_and_nothing_else():
    digests = tuple(f"{i:064x}" for i in range(MAX_PLAIN_DIGESTS + 1))
    assert pack_digests(digests[1:]) == (digests[1:], "")
    assert unpack_digests(*pack_digests(digests)) == digests
    assert pack_text("short") == ("short", "")
    assert unpack_text(*pack_text("é" * 40_000)) == "é" * 40_000


@pytest.mark.parametrize(
    ("plain", "packed"),
    [
        ("also", pack_text("x" * 60_000)[1]),
        ("", pack_text("x" * 60_000)[1] + "AAAA"),
        ("", pack_text("x" * 60_000)[1][:-8]),
        ("", "no base64!"),
        ("", "eJwDAAAAAAE="),  # the zlib of nothing: short text is never packed
        ("", __import__("base64").b64encode(__import__("zlib").compress(bytes(2 << 20))).decode()),
    ],
    ids=["both", "trailing", "cut", "letters", "short", "bomb"],
)
def test_a_packed_text_that_is_none_is_refused(plain, packed):
    with pytest.raises(PackingError):
        unpack_text(plain, packed)


@pytest.mark.parametrize("count", [1, MAX_PLAIN_DIGESTS, 1025])
def test_packed_digests_are_neither_few_nor_endless(count):
    import base64

    with pytest.raises(PackingError):
        unpack_digests((), base64.b64encode(bytes(32 * count)).decode())
    with pytest.raises(PackingError):
        unpack_digests((), base64.b64encode(bytes(32 * 600 + 1)).decode())
    with pytest.raises(PackingError):
        unpack_digests(("a" * 64,), base64.b64encode(bytes(32 * 600)).decode())


class Loads:
    """A mechanism that only notes what was loaded."""

    def __init__(self):
        self.seen, self.prepared = [], []

    def prepare(self, sets):
        self.prepared.append(list(sets))

    def load(self, weights):
        if not np.isfinite(weights.numpy()).all():
            raise ValueError("not finite")
        self.seen.append(weights.tolist())


def test_a_warm_mechanism_starts_from_the_weights_that_it_is_given():
    workshop, one, two = Workshop(), Loads(), Loads()
    first, second = np.array([1.0, 2.0]), np.array([1.0, 2.0])
    workshop.load(one, first)
    workshop.load(one, first)  # as it was left
    assert one.seen == [[1, 2]]
    workshop.load(two, first)
    workshop.load(one, first)  # another mechanism came in between
    workshop.load(one, second)  # equal, yet not known to be
    workshop.load_other(one, [5.0, 6.0])
    workshop.load(one, second)
    assert (one.seen, two.seen) == ([[1, 2], [1, 2], [1, 2], [5, 6], [1, 2]], [[1, 2]])
    with pytest.raises(ValueError, match="finite"):
        workshop.load(one, np.array([np.nan, 0]))
    workshop.load(one, second)  # what failed in the middle is not trusted
    assert one.seen[-1] == [1, 2]
    assert len(one.seen) == 6


def test_those_who_released_from_the_last_model_are_prepared_for_together():
    workshop, one, two = Workshop(), Loads(), Loads()
    rows = [(object(), object()) for _ in range(4)]

    def round_of(mechanism, *sites):
        workshop.load(mechanism, np.array([1.0, 2.0]))
        for site in sites:
            workshop.join(mechanism, rows[site])

    round_of(one, 0, 1, 2)
    assert one.prepared == []  # who comes is not known yet
    round_of(one, 2, 1)
    assert one.prepared == [[rows[0], rows[1], rows[2]]]
    round_of(one, 1, 3)
    assert one.prepared[1:] == [[rows[2], rows[1]]]
    round_of(two, 1)
    round_of(one, 0)  # another mechanism came in between: others' rows mean nothing to it
    workshop.load_other(one, [1.0, 2.0])
    round_of(one, 0)
    round_of(one, 0)  # one site alone has no company
    assert len(one.prepared) == 2
    assert two.prepared == []


class Watched(Workshop):
    """Notes of each release whether it was prepared for."""

    def __init__(self, taken):
        super().__init__()
        self.taken = taken

    def join(self, mechanism, rows):
        super().join(mechanism, rows)
        self.taken.append(id(rows[0]) in mechanism._prepared)


def test_sites_that_are_prepared_for_together_still_make_noise_of_their_own(tmp_path):
    """Sites with the same rows, one after the other: no update comes twice, and later rounds are prepared."""
    sites = {name: frame(20, 7) for name in "abcd"}
    federation, charter = simulation._set_up(CHARTER, sites, None, tmp_path, "1000", "memory")
    simulation.join_all(federation.homes, federation.coordinator)
    workshop = Watched(taken := [])
    notes = OpenedNotes(federation.homes["a"].policy())
    agents = {name: home.agent(workshop, notes) for name, home in federation.homes.items()}
    author = federation.scientist
    person = Principal(id="p", role="scientist", key=author.public)
    train(
        federation.coordinator, person, LocalOwner(), TrainRequest(charter=charter), author.key,
        inprocess_launch(agents, workers=0),
    )  # fmt: skip
    updates = [body.update for _, body in federation.coordinator.bodies(SiteStatement)]
    federation.close()
    assert len(updates) == len(set(updates)) == 12
    assert taken == [False] * 4 + [True] * 8


def test_an_entry_that_all_sites_are_shown_is_proved_once_and_no_other_is_taken_for_it(hundred):
    log = hundred.federation.coordinator
    note = log.ledger.latest_checkpoint()
    size = parse_checkpoint_note(note).tree_size
    index = max(stored.leaf_index for stored, _ in log.bodies(RoundCompleted))
    leaf = log.ledger.entry(index)
    hashes = tuple(log.ledger.inclusion_proof(index, size))
    notes = OpenedNotes(hundred.federation.homes["s000"].policy())
    history = History(notes, (), lambda: datetime.now(UTC))
    proof = TlogProof(leaf_index=index, hashes=hashes, checkpoint_note=note)
    shown = LoggedEntry(leaf=leaf, proof=proof)
    first = history.witnessed(shown)
    assert History(notes, (), lambda: datetime.now(UTC)).witnessed(shown) is first
    for other in (
        LoggedEntry(leaf=leaf, proof=dataclasses.replace(proof, leaf_index=index - 1)),
        LoggedEntry(leaf=leaf, proof=dataclasses.replace(proof, hashes=hashes[::-1])),
        LoggedEntry(leaf=leaf.replace(b'"round":3', b'"round":2'), proof=proof),
        LoggedEntry(leaf=leaf, proof=dataclasses.replace(proof, checkpoint_note=b"x")),
    ):
        with pytest.raises(RefusedError) as caught:
            history.witnessed(other)
        assert caught.value.refusal == "unwitnessed_history"
        assert history.witnessed(shown) == first
    assert OpenedNotes(hundred.federation.homes["s001"].policy()).shown is None  # nobody else's is believed
