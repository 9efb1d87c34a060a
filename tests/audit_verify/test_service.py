"""The use cases, over a real ledger with its own signer and witnesses."""

from __future__ import annotations

import pytest

from audit.checkpoints import add_signatures, parse_checkpoint_note
from audit.entries import columns_of, decode_entry
from audit.evidence import EvidenceError, read_evidence
from audit.ledger import Ledger
from audit.merkle import hash_leaf
from audit.notes import NoteVerifier
from audit.principal import AccessDeniedError, Decision, LocalOwner, Principal
from audit.service import (
    EvidenceGapError,
    NoCheckpointError,
    SearchRequest,
    add_answer,
    export_entry,
    export_evidence,
    prove_entry,
    search_entries,
)
from audit.signer import Signer, publish
from audit.tlog_policy import Policy
from audit.tlog_proof import verify_tlog_proof
from audit.verify import Verdict
from audit.witness import Witness

OWNER = Principal(id="owner", role="operator")


class Nobody:
    def decide(self, principal, question):
        return Decision(allowed=False, policies=("default-deny",), policy_set="0" * 64)


@pytest.fixture(scope="module")
def real(make_world, now, tmp_path_factory):
    """The honest federation's entries in a real ledger, signed and witnessed by the real parts."""
    folder = tmp_path_factory.mktemp("real")
    signer = Signer.create(folder / "signer", "log.example/tiny")
    world = make_world(log_key=signer.key)
    index, opened = world.whole()
    ledger = Ledger.create(folder / "log.db", "log.example/tiny")
    for leaf in world.log.leaves:
        ledger.append_wait(leaf, event_id=decode_entry(leaf).event_id, index_columns=columns_of(leaf))
    note = publish(ledger, signer)
    log = NoteVerifier.parse(world.log_signer.vkey)
    lines = [
        Witness.create(folder / f"{h.name}.json", h.note_signer, log).cosign(
            note, 0, [], now=int(now.timestamp())
        )
        for h in world.hospitals
    ]
    ledger.store_checkpoint(add_signatures(note, lines))
    yield world, ledger, index, opened
    ledger.close()


def test_what_is_exported_from_a_real_ledger_is_valid(real):
    world, ledger, index, opened = real
    data = export_evidence(
        ledger, world.blobs.get, leaf_index=index, opened=opened, receipt=world.receipt(index)
    )
    assert world.report(data).verdict is Verdict.VALID


def test_the_answer_can_be_added_later(real):
    world, ledger, index, opened = real
    data = export_evidence(ledger, world.blobs.get, leaf_index=index)
    later = add_answer(data, receipt=world.receipt(index), opened=opened)
    assert later == export_evidence(
        ledger, world.blobs.get, leaf_index=index, opened=opened, receipt=world.receipt(index)
    )
    assert world.report(later).step("The answer").code == "ok"
    with pytest.raises(EvidenceError):
        add_answer(b"no zip", opened=opened)


def test_of_several_checkpoints_the_best_witnessed_one_is_used(real):
    world, ledger, index, _ = real
    size = ledger.tree_size
    bare = read_evidence(export_evidence(ledger, world.blobs.get, leaf_index=index)).checkpoint
    assert parse_checkpoint_note(bare).tree_size == size
    assert bare.count("\N{EM DASH}".encode()) == 4


def test_an_export_of_an_entry_beyond_every_checkpoint_says_so(make_world):
    world = make_world()
    with pytest.raises(NoCheckpointError, match="publish"):
        export_evidence(world.log, world.blobs.get, leaf_index=0)


def test_a_log_that_lacks_what_an_entry_names_says_so(make_world):
    world = make_world()
    index, _ = world.whole()
    world.log.leaves[world.find("version.transition", 1)] = world.log.leaves[1]
    world.publish()
    with pytest.raises(EvidenceGapError, match=r"version\.transition"):
        export_evidence(world.log, world.blobs.get, leaf_index=index)


def test_a_proof_verifies_against_the_policy(real, now):
    world, ledger, index, _ = real
    proof = prove_entry(ledger, OWNER, LocalOwner(), index)
    accepted = verify_tlog_proof(
        proof,
        leaf_hash=hash_leaf(ledger.entry(index)),
        policy=Policy.parse(world.policy),
        now=int(now.timestamp()),
    )
    assert accepted.quorum.satisfied


def test_searching_pages_by_leaf_index(real):
    _, ledger, _, _ = real
    first = search_entries(ledger, OWNER, LocalOwner(), SearchRequest(type="site.statement", limit=5))
    rest = search_entries(
        ledger, OWNER, LocalOwner(), SearchRequest(type="site.statement", after=first[-1].leaf_index)
    )
    found = [stored.leaf_index for stored in (*first, *rest)]
    assert len(found) == 12
    assert found == sorted(set(found))


@pytest.mark.parametrize(
    "use",
    [
        lambda ledger, world: search_entries(ledger, OWNER, Nobody(), SearchRequest()),
        lambda ledger, world: prove_entry(ledger, OWNER, Nobody(), 0),
        lambda ledger, world: export_entry(ledger, world.blobs.get, OWNER, Nobody(), 0),
    ],
)
def test_every_use_case_asks_first(real, use):
    world, ledger, _, _ = real
    with pytest.raises(AccessDeniedError, match="default-deny"):
        use(ledger, world)


def test_an_authorised_export_is_the_same_file(real):
    world, ledger, index, _ = real
    data = export_entry(ledger, world.blobs.get, OWNER, LocalOwner(), index)
    assert data == export_evidence(ledger, world.blobs.get, leaf_index=index)
