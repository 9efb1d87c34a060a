"""The round loop against bad networks and bad sites: it ends in time, names who failed, logs the truth."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from audit.checkpoints import open_checkpoint
from audit.entries import (
    TYPE_OF,
    CharterPublished,
    CharterSigned,
    RoundAbandoned,
    RoundCompleted,
    RunCompleted,
    RunFailed,
    SiteEnrolled,
    SiteRefused,
    SiteStatement,
    SiteUndelivered,
    body_document,
    decode_entry,
    parse_body,
)
from audit.models import weights_of_file
from audit.notes import NoteVerifier
from audit.replay import AggregationPlan, Aggregator, SiteUpdate, average
from audit.weights import decode_update
from federation import service
from federation.charter import Charter
from federation.errors import HomeError, RunFailedError


def types_in(coordinator):
    ledger = coordinator.ledger
    return [TYPE_OF[type(decode_entry(leaf).body)] for leaf in ledger.entries(0, ledger.tree_size)]


def test_an_honest_run_is_written_down_in_order(federation):
    events = []
    run = federation.train(on_event=events.append)
    per_round = ["site.statement"] * 3 + ["round.completed"]
    assert types_in(federation.coordinator) == [
        "log.created",
        *["site.enrolled"] * 3,
        "charter.published",
        *["charter.signed"] * 3,
        "run.started",
        *["run.accepted"] * 3,
        *per_round * 3,
        "run.completed",
    ]
    one_round = ["asked", *["answered"] * 3, "round"]
    assert [event.kind for event in events] == [
        "enrolled", "charter_signed", "accepted", *one_round * 3, "completed",
    ]  # fmt: skip
    assert [event.witnesses for event in events if event.kind == "round"] == [3, 3, 3]
    assert federation.bodies(RunCompleted)[0].weights == run.weights


def test_what_the_log_says_replays_to_the_registered_weights(federation):
    run = federation.train()
    coordinator, charter = federation.coordinator, federation.charter
    aggregator = Aggregator(AggregationPlan.of_charter(charter.document))
    weights = [0.0] * charter.dimension
    outputs = []
    by_round = {}
    for statement in federation.bodies(SiteStatement):
        by_round.setdefault(statement.round, {})[statement.site] = statement
    for completed in federation.bodies(RoundCompleted):
        updates = [
            SiteUpdate(
                site=site["name"],
                nominal_rows=site["nominal_rows"],
                weight=float(site["weight"]),
                values=decode_update(coordinator.blobs.get(by_round[completed.round][site["name"]].update)),
            )
            for site in charter.document["sites"]
        ]
        weights = aggregator.step(completed.round, weights, updates)
        assert weights == weights_of_file(charter.layers, coordinator.blobs.get(completed.output_model))
        outputs.append(weights)
    final = weights_of_file(charter.layers, coordinator.blobs.get(run.weights))
    assert final == average(outputs[-charter.average_last :])


def test_rounds_and_statements_are_chained(federation):
    federation.train()
    rounds = list(federation.coordinator.bodies(RoundCompleted))
    for (_, before), (stored, after) in pairwise(rounds):
        assert after.base_model == before.output_model
        assert stored.leaf_index > 0
    previous = {stored.leaf_hash.hex(): body for stored, body in rounds}
    for statement in federation.bodies(SiteStatement):
        if statement.round > 1:
            assert previous[statement.previous_round].round == statement.round - 1


def test_every_round_is_cosigned_by_every_site(federation):
    federation.train()
    coordinator = federation.coordinator
    note = coordinator.ledger.latest_checkpoint()
    opened = open_checkpoint(
        note,
        log=NoteVerifier.parse(coordinator.log_key),
        witnesses=list(coordinator.witness_keys().values()),
        now=2_000_000_000,
    )
    assert opened.checkpoint.tree_size == coordinator.ledger.tree_size
    assert len(opened.cosignatures) == 3


@pytest.mark.parametrize("direction", ["request", "reply"])
def test_a_lost_message_is_repeated_and_costs_nothing(federation, direction):
    lost = []

    def fault(site, message):
        is_reply = bool(message.metadata.reply_to_message_id)
        if (
            site == "west"
            and message.metadata.group_id == "2"
            and is_reply == (direction == "reply")
            and not lost
        ):
            lost.append(message)
            return None
        return 0.0

    federation.train(fault=fault)
    assert lost
    assert 2 <= federation.waited() < 4, "at half time, and no longer than the round may take"
    assert [completed.missing for completed in federation.bodies(RoundCompleted)] == [(), (), ()]
    assert federation.sites["west"].sequence == 3  # asked twice, released once


def test_a_site_that_goes_silent_cannot_hang_a_round_and_is_out(federation, charter_text):
    charter = Charter.parse(charter_text.replace("round_timeout_s: 4", "round_timeout_s: 1"))
    silent_from = []

    def fault(site, message):
        if site == "west" and message.metadata.group_id == "2":
            silent_from.append(federation.waited())
            return None
        return 0.0

    federation.train(charter=charter, fault=fault)
    assert federation.waited() - silent_from[0] < 2
    assert [completed.missing for completed in federation.bodies(RoundCompleted)] == [(), ("west",), ()]
    assert [len(completed.statements) for completed in federation.bodies(RoundCompleted)] == [3, 2, 2]
    assert {s.participants for s in federation.bodies(SiteStatement) if s.round == 3} == {("north", "south")}


def test_too_few_sites_abandon_the_round_and_fail_the_run(federation, charter_text):
    text = charter_text.replace("round_timeout_s: 4", "round_timeout_s: 1")
    charter = Charter.parse(text.replace("minimum_sites: 2", "minimum_sites: 3"))

    def fault(site, message):
        return None if site == "west" and message.metadata.group_id == "2" else 0.0

    with pytest.raises(RunFailedError) as caught:
        federation.train(charter=charter, fault=fault)
    assert (caught.value.round, caught.value.reason) == (2, "not_enough_sites")
    assert "west" in caught.value.detail
    assert federation.bodies(RoundAbandoned)[0].missing == ("west",)
    assert federation.bodies(RunFailed)[0].reason == "not_enough_sites"
    assert {body.statement.site for body in federation.bodies(SiteUndelivered)} == {"north", "south"}
    assert not federation.bodies(RunCompleted)


def test_a_late_release_is_reported_in_the_next_run_and_stays_on_the_odometer(federation, charter_text):
    charter = Charter.parse(charter_text.replace("round_timeout_s: 4", "round_timeout_s: 1"))

    def fault(site, message):
        is_reply = bool(message.metadata.reply_to_message_id)
        return None if site == "west" and message.metadata.group_id == "2" and is_reply else 0.0

    federation.train(charter=charter, fault=fault)
    west = federation.sites["west"]
    assert west.sequence == 2  # it answered round 2; nobody heard
    west.undelivered = [
        parse_body(SiteStatement, header["statement"])
        for (_, number), (header, _) in west.answered.items()
        if number == 2
    ]
    federation.train(charter=charter)
    (body,) = federation.bodies(SiteUndelivered)
    assert (body.statement.site, body.statement.sequence) == ("west", 2)
    sequences = [s.sequence for s in federation.bodies(SiteStatement) if s.site == "west"]
    assert sequences == [1, 3, 4, 5]


def test_a_rewound_odometer_is_refused_by_name(federation):
    federation.train()
    west = federation.sites["west"]
    west.sequence, west.head = 1, "0" * 64
    with pytest.raises(RunFailedError, match="site west: next_sequence") as caught:
        federation.train(
            charter=Charter.parse(
                federation.charter.to_yaml().replace("minimum_sites: 2", "minimum_sites: 3")
            )
        )
    assert caught.value.reason == "site_refused"


def test_a_gap_in_the_odometer_is_refused_by_name(federation):
    federation.sites["west"].sequence = 4
    federation.train()
    assert {statement.site for statement in federation.bodies(SiteStatement)} == {"north", "south"}


def test_a_member_that_lies_is_named_and_left_out(federation):
    west = federation.sites["west"]

    def tamper(kind, header, blobs):
        if kind == "round":
            blobs["update"] = blobs["update"][::-1]

    west.tamper = tamper
    events = []
    federation.train(on_event=events.append)
    refused = [event for event in events if event.kind == "refused"]
    assert [event.sites for event in refused] == [("west",)]
    assert "update" in refused[0].detail
    assert federation.bodies(RoundCompleted)[0].missing == ("west",)


def test_a_signed_refusal_becomes_an_entry(federation):
    west = federation.sites["west"]

    def tamper(kind, header, blobs):
        if kind == "run.propose":
            run, charter = header["acceptance"]["run"], header["acceptance"]["charter"]
            header.clear()
            header.update(west.refusal(run, charter, 0, "budget_exhausted"))

    west.tamper = tamper
    federation.train()
    (refusal,) = federation.bodies(SiteRefused)
    assert (refusal.site, refusal.reason, refusal.round) == ("west", "budget_exhausted", 0)
    assert federation.bodies(RoundCompleted)[0].missing == ()
    assert {s.participants for s in federation.bodies(SiteStatement)} == {("north", "south")}


def test_a_refusal_in_another_name_is_no_entry(federation):
    west, north = federation.sites["west"], federation.sites["north"]

    def tamper(kind, header, blobs):
        if kind == "round":
            statement = header["statement"]
            header.clear()
            header.update(
                north.refusal(statement["run"], statement["charter"], statement["round"], "site_closed")
            )

    west.tamper = tamper
    federation.train()
    assert federation.bodies(SiteRefused) == []
    assert federation.bodies(RoundCompleted)[0].missing == ("west",)


def test_every_member_must_sign_the_charter(federation):
    def tamper(kind, header, blobs):
        if kind == "charter.sign":
            header.clear()
            header["error"] = "charter_not_approved"

    federation.sites["south"].tamper = tamper
    with pytest.raises(RunFailedError, match="south refused: charter_not_approved"):
        federation.train()
    assert "run.accepted" not in types_in(federation.coordinator)


def test_a_signature_by_another_key_signs_no_charter(federation):
    south = federation.sites["south"]

    def tamper(kind, header, blobs):
        if kind == "charter.sign":
            body = replace(parse_body(CharterSigned, header["signature"]), signature="")
            header["signature"] = body_document(south.signed(body, south.statement))

    south.tamper = tamper
    with pytest.raises(RunFailedError, match="south: signature"):
        federation.train()
    assert {body.site for body in federation.bodies(CharterSigned)} == {"north"}


@pytest.mark.parametrize("proof", ["signature", "statement_proof", "witness_proof"])
def test_an_enrolment_lacking_one_of_its_proofs_is_refused(federation, proof):
    def tamper(kind, header, blobs):
        if kind == "hello":
            header["enrolment"][proof] = header["enrolment"][
                "signature" if proof != "signature" else "witness_proof"
            ]

    federation.sites["north"].tamper = tamper
    with pytest.raises(RunFailedError, match=f"north: {proof}"):
        federation.train()
    assert {body.site for body in federation.bodies(SiteEnrolled)} == {"south", "west"}


def test_an_impostor_with_keys_of_its_own_is_no_member(federation):
    federation.sites["north"] = type(federation.sites["north"])("north")
    with pytest.raises(RunFailedError, match="north: identity_key: is not the one in the charter"):
        federation.train()


def test_a_cosignature_by_a_stranger_is_not_kept(federation):
    stranger = type(federation.sites["north"])("north")
    honest = federation.sites["north"]

    def tamper(kind, header, blobs):
        if kind == "cosign":
            header["cosignature"] = header["cosignature"].replace(
                header["cosignature"].split(" ")[2],
                honest.cosigner().line(b"something else\n", 1).decode().split(" ")[2],
            )

    honest.tamper = tamper
    events = []
    federation.train(on_event=events.append)
    assert [event.witnesses for event in events if event.kind == "round"] == [2, 2, 2]
    assert stranger.name == "north"


def test_a_member_away_from_the_start_does_not_stop_those_who_signed_with_it(federation):
    federation.train()
    federation.train(connected=("north", "west"))
    second = federation.bodies(RoundCompleted)[3:]
    assert [len(completed.statements) for completed in second] == [2, 2, 2]
    assert {s.participants for s in federation.bodies(SiteStatement)[9:]} == {("north", "west")}


def test_a_member_that_never_signed_cannot_be_done_without(federation):
    with pytest.raises(RunFailedError, match="south: is not connected"):
        federation.train(connected=("north", "west"))


def test_a_run_that_was_not_prepared_does_not_start(federation):
    from federation.server_app import carry_out

    with pytest.raises(HomeError, match="no such run"):
        carry_out(None, federation.coordinator, "0" * 32)


def test_a_run_resumed_after_a_crash_gives_the_same_log_entries(federation):
    """The coordinator dies after two rounds; started again, it asks the same and gets the same."""

    class CrashError(Exception):
        pass

    def crash_in_round_3(site, message):
        if message.metadata.group_id == "3":
            raise CrashError
        return 0.0

    with pytest.raises(CrashError):
        federation.train(fault=crash_in_round_3)
    before = types_in(federation.coordinator)
    assert before.count("round.completed") == 2
    run = federation.bodies(RoundCompleted)[0].run
    federation.resume(run)
    after = types_in(federation.coordinator)
    assert after[: len(before)] == before
    assert after.count("round.completed") == 3
    assert after.count("site.statement") == 9
    assert service.trained_run(federation.coordinator, run).run == run


def test_a_second_charter_on_the_same_odometers_continues_them(federation, charter_text):
    federation.train()
    federation.train(charter=Charter.parse(charter_text.replace("rounds: 3", "rounds: 2")))
    assert len(federation.bodies(CharterPublished)) == 2
    assert len(federation.bodies(SiteEnrolled)) == 3  # the same keys are enrolled once
    for name in federation.sites:
        sequences = [s.sequence for s in federation.bodies(SiteStatement) if s.site == name]
        assert sequences == [1, 2, 3, 4, 5]
