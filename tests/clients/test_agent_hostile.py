"""A hostile coordinator: every trick is refused with its code, and the odometer moves by releases alone."""

from __future__ import annotations

import base64
import dataclasses
import hashlib

import pytest

from audit.canonical import canonical_bytes
from audit.entries import RoundCompleted, SiteStatement, body_document, decode_entry, event_hash, parse_body
from audit.keys import SigningKey

AUTHOR = b"ed25519:" + base64.b64encode(bytes(range(32)))


def heads(network):
    return {s: a.ledger.head(a.population).sequence for s, a in network.agents.items()}


def test_an_honest_run_debits_one_event_a_round(network):
    network.start()
    for number in (1, 2, 3):
        network.play(number)
    assert heads(network) == {"alpha": 3, "beta": 3, "gamma": 3}
    statements = [
        r.statement for r in network.agents["alpha"].ledger.releases(network.agents["alpha"].population)
    ]
    assert [s.sequence for s in statements] == [1, 2, 3]
    assert statements[2].previous_event == event_hash(statements[1])


def test_the_same_request_gets_the_same_bytes_and_no_second_debit(network):
    network.start()
    first, update = network.ask("alpha", 1)
    again, update_again = network.ask("alpha", 1)
    assert (first, update) == (again, update_again)
    assert heads(network)["alpha"] == 1


def test_the_same_request_with_a_fresher_proof_gets_the_same_bytes(network):
    network.start()
    network.play(1)
    first = network.ask("alpha", 2)
    network.coordinator.append(decode_entry(network.coordinator.ledger.entry(0)).body, "coordinator")
    assert network.ask("alpha", 2) == first
    assert heads(network)["alpha"] == 2


def test_a_second_release_of_a_round_from_another_base_is_refused(network, code_of):
    network.start()
    network.play(1)
    base = network.base
    assert "statement" in network.ask("alpha", 2)[0]
    network.theta[0] += 1.0
    other = base[:-8] + b"\0" * 8
    assert code_of(network.ask("alpha", 2, base=other)[0]) == "already_released"
    assert code_of(network.ask("alpha", 1, base=other)[0]) == "already_released"
    assert heads(network)["alpha"] == 2


def test_a_second_release_for_other_participants_is_refused(network, code_of):
    network.start()
    network.ask("alpha", 1)
    assert code_of(network.ask("alpha", 1, participants=["alpha", "beta"])[0]) == "already_released"
    assert heads(network)["alpha"] == 1


def test_an_old_round_is_not_replayed(network, code_of):
    network.start()
    for number in (1, 2):
        network.play(number)
    stale = network.round_header(2, "alpha")
    assert code_of(
        network.ask("alpha", 1, **{k: stale[k] for k in ("previous_round", "own_statement")})[0]
    ) == ("already_released")
    assert heads(network)["alpha"] == 2


def test_a_round_is_not_skipped(played, code_of):
    assert code_of(played.ask("alpha", 3)[0]) == "round_out_of_order"
    assert heads(played)["alpha"] == 1


def test_extra_rounds_beyond_the_charter_are_refused(network, code_of):
    network.start()
    for number in (1, 2, 3):
        network.play(number)
    assert code_of(network.ask("alpha", 4)[0]) == "round_out_of_order"
    assert heads(network)["alpha"] == 3


@pytest.mark.parametrize("changes", [{"max_grad_norm": "100"}, {"noise": "0.5"}, {"rounds": 30}])
def test_other_terms_than_the_signed_ones_are_refused(build_network, changes, code_of, request_of):
    network = build_network(auto_approve=False)
    for agent in network.agents.values():
        agent.admission.home = agent.home.approve(network.charter.digest)
    network.start()
    other = network.variant(**changes)
    header = {"run_started": network.run_started(other, run="run-2"), "charter": network.text(other)}
    answer, _ = request_of(network.agents["alpha"], "run.propose", header)
    assert code_of(answer) == "charter_not_approved"
    network.run_started()
    assert code_of(network.ask("alpha", 1, charter=other.digest)[0]) == "charter_not_approved"
    assert heads(network)["alpha"] == 0


def test_a_charter_is_not_signed_without_its_people(build_network, code_of, request_of):
    network = build_network(auto_approve=False)
    answer, _ = request_of(network.agents["alpha"], "charter.sign", network.to_sign())
    assert code_of(answer) == "charter_not_approved"


def test_a_charter_that_gives_the_site_another_key_is_not_signed(signed, code_of, request_of):
    text = signed.text().replace(signed.agents["alpha"].home.keys().identity.text, SigningKey.generate().text)
    answer, _ = request_of(signed.agents["alpha"], "charter.sign", signed.to_sign() | {"charter": text})
    assert code_of(answer) == "charter_not_approved"


def test_a_run_under_the_text_of_another_charter_is_refused(signed, code_of, request_of):
    other = signed.variant(noise="0.5")
    header = {"run_started": signed.run_started(), "charter": signed.text(other)}
    assert code_of(request_of(signed.agents["alpha"], "run.propose", header)[0]) == "charter_not_approved"


def test_a_round_of_a_run_nobody_accepted_is_refused(signed, code_of):
    signed.run_started()
    assert code_of(signed.ask("alpha", 1)[0]) == "run_not_accepted"
    assert heads(signed)["alpha"] == 0


def test_a_finished_run_gives_no_more_rounds(network, code_of, request_of):
    network.start()
    network.play(1)
    assert request_of(network.agents["alpha"], "run.finished", {"run": network.run})[0] == {}
    assert code_of(network.ask("alpha", 2)[0]) == "run_not_accepted"
    assert heads(network)["alpha"] == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 2},
        {"initial_model": "1" * 64},
        {"sites": ("beta", "gamma")},
        {"sites": ("gamma", "beta", "alpha")},
        {"sites": ("alpha",)},
        {"sites": ("alpha", "beta", "mallory")},
        {"signature": base64.b64encode(bytes(64)).decode()},
        {"author": "ed25519:nobody"},
        {"run": "../../etc"},
    ],
    ids=str,
)
def test_a_run_that_departs_from_the_charter_is_refused(signed, code_of, changes):
    answer = signed.propose(only="alpha", **changes)["alpha"]
    assert code_of(answer) in {"bad_request", "base_model_mismatch", "participants_not_allowed"}
    assert signed.agents["alpha"].ledger.reservation(signed.run) is None


@pytest.mark.parametrize(
    "names", [[], ["beta", "gamma"], ["alpha"], ["beta", "alpha"], ["alpha", "alpha", "beta"]]
)
def test_participants_that_are_not_the_charters_are_refused(accepted, code_of, names):
    assert code_of(accepted.ask("alpha", 1, participants=names)[0]) == "participants_not_allowed"
    assert heads(accepted)["alpha"] == 0


def test_a_first_round_that_does_not_start_from_the_charters_weights_is_refused(accepted, code_of):
    other = accepted.base[:-8] + b"\0\0\0\0\0\0\xf0?"
    assert code_of(accepted.ask("alpha", 1, base=other)[0]) == "base_model_mismatch"
    assert heads(accepted)["alpha"] == 0


@pytest.mark.parametrize("base", [b"", b"junk", b"\xff" * 100])
def test_a_base_model_that_is_no_model_is_refused(accepted, code_of, base):
    assert code_of(accepted.ask("alpha", 1, base=base)[0]) == "base_model_mismatch"


def test_a_base_model_that_is_not_the_rounds_output_is_refused(played, code_of):
    other = played.base[:-8] + b"\0\0\0\0\0\0\xf0?"
    assert code_of(played.ask("alpha", 2, base=other)[0]) == "base_model_mismatch"
    assert heads(played)["alpha"] == 1


@pytest.mark.parametrize("which", ["previous_round", "own_statement"])
def test_history_that_is_not_shown_is_refused(played, code_of, which):
    assert code_of(played.ask("alpha", 2, **{which: None})[0]) == "unwitnessed_history"
    assert heads(played)["alpha"] == 1


@pytest.mark.parametrize("witnesses", [0, 1])
def test_history_below_the_sites_own_quorum_is_refused(network, code_of, witnesses):
    network.start()
    network.play(1)
    leaf, statements = network.previous
    network.coordinator.append(decode_entry(network.coordinator.ledger.entry(0)).body, "coordinator")
    note = network.checkpoint(witnesses)
    thin = {
        "previous_round": network.logged(leaf, note=note),
        "own_statement": network.logged(statements["alpha"], note=note),
    }
    network.previous = None
    assert code_of(network.ask("alpha", 2, **thin)[0]) == "unwitnessed_history"
    assert heads(network)["alpha"] == 1


def test_a_checkpoint_forged_by_another_log_key_is_refused(network, code_of, tmp_path):
    from audit.ledger import Ledger
    from audit.signer import Signer
    from federation.coordinator import Coordinator

    network.start()
    network.play(1)
    leaf, statements = network.previous
    real = network.coordinator
    forged = Coordinator.create(tmp_path / "forged", tmp_path / "forged-signer", real.origin)
    for index in range(1, real.ledger.tree_size):
        forged.append(decode_entry(real.ledger.entry(index)).body, "coordinator")
    assert isinstance(forged.ledger, Ledger)
    assert isinstance(forged.signer, Signer)
    network.coordinator = forged
    note = forged.publish()
    thin = {
        "previous_round": network.logged(leaf, note=note),
        "own_statement": network.logged(statements["alpha"], note=note),
    }
    network.previous = None
    assert code_of(network.ask("alpha", 2, **thin)[0]) == "unwitnessed_history"
    network.coordinator = real
    forged.close()


def test_a_round_entry_invented_beside_the_log_is_refused(played, code_of):
    header = played.round_header(2, "alpha")
    entry = decode_entry(base64.b64decode(header["previous_round"]["entry"]))
    poisoned = played.base[:-8] + b"\0\0\0\0\0\0\xf0?"
    body = dataclasses.replace(entry.body, output_model=hashlib.sha256(poisoned).hexdigest())
    from audit.entries import encode_entry

    forged = encode_entry(dataclasses.replace(entry, body=body))
    header["previous_round"]["entry"] = base64.b64encode(forged).decode()
    answer, _ = played.ask("alpha", 2, base=poisoned, **header)
    assert code_of(answer) == "unwitnessed_history"


def test_a_round_that_leaves_the_sites_statement_out_is_refused(network, code_of):
    network.start()
    replies = {}
    for site in ("alpha", "beta", "gamma"):
        document, update = network.ask(site, 1)
        replies[site] = (parse_body(SiteStatement, document["statement"]), update)
    own = network.coordinator.append(replies["alpha"][0], "coordinator")
    network.complete(1, {site: replies[site] for site in ("beta", "gamma")})
    network.previous[1]["alpha"] = own.leaf_index
    assert code_of(network.ask("alpha", 2)[0]) == "unwitnessed_history"


def test_another_sites_statement_in_place_of_its_own_is_refused(played, code_of):
    _, statements = played.previous
    wrong = played.logged(statements["beta"])
    assert code_of(played.ask("alpha", 2, own_statement=wrong)[0]) == "unwitnessed_history"


def test_another_runs_round_is_not_this_runs_history(network, code_of, request_of):
    network.start()
    network.play(1)
    leaf, statements = network.previous
    for agent in network.agents.values():
        request_of(agent, "run.finished", {"run": network.run})
    network.run, network.previous = "run-2", None
    assert all("acceptance" in a for a in network.propose().values())
    network.ask("alpha", 1)
    changes = {"previous_round": network.logged(leaf), "own_statement": network.logged(statements["alpha"])}
    assert code_of(network.ask("alpha", 2, **changes)[0]) == "round_out_of_order"
    assert heads(network)["alpha"] == 2


def test_a_plan_beyond_the_sites_own_cap_is_refused_whole(build_network, code_of):
    network = build_network(lifetime_epsilon="3")
    network.sign()
    answers = network.propose()
    assert {code_of(answer) for answer in answers.values()} == {"budget_exhausted"}
    assert heads(network) == {"alpha": 0, "beta": 0, "gamma": 0}


def test_runs_draw_on_one_lifetime_budget(build_network, code_of, request_of):
    network = build_network(lifetime_epsilon="5")
    network.start()
    for number in (1, 2, 3):
        network.play(number)
    request_of(network.agents["alpha"], "run.finished", {"run": network.run})
    network.run, network.previous = "run-2", None
    assert code_of(network.propose()["alpha"]) == "budget_exhausted"
    assert heads(network)["alpha"] == 3


def test_an_accepted_run_reserves_its_whole_plan(build_network, code_of):
    network = build_network(lifetime_epsilon="5")
    network.start()
    agent = network.agents["alpha"]
    committed = agent.ledger.committed_events(agent.population)
    assert len(committed) == network.charter.plan.rounds
    assert not agent.admission.admits(committed, committed)
    network.run = "run-2"
    assert code_of(network.propose()["alpha"]) == "population_busy"


def test_a_closed_run_gives_its_unused_reservation_back(build_network, code_of, request_of):
    network = build_network(lifetime_epsilon="5")
    network.start()
    for agent in network.agents.values():
        request_of(agent, "run.finished", {"run": network.run})
    network.run = "run-2"
    assert "acceptance" in network.propose()["alpha"]


def test_a_run_proposed_twice_is_accepted_once_with_the_same_bytes(network):
    network.sign()
    assert network.propose()["alpha"] == network.propose()["alpha"]
    assert len(network.agents["alpha"].ledger.open_reservations(network.agents["alpha"].population)) == 1


def test_a_purpose_the_site_does_not_allow_is_refused(build_network, code_of, request_of):
    network = build_network()
    agent = network.agents["alpha"]
    rules = agent.home.config.rules.model_copy(update={"purposes": ("billing",)})
    config = agent.home.config.model_copy(update={"rules": rules})
    agent.admission.home = dataclasses.replace(agent.home, config=config)
    assert code_of(request_of(agent, "charter.sign", network.to_sign())[0]) == "purpose_not_allowed"


def test_a_refusal_is_signed_by_the_site(signed, code_of):
    from audit.entries import SiteRefused, decode_signature, signing_payload

    signed.run_started()
    document, _ = signed.ask("alpha", 1)
    body = parse_body(SiteRefused, document["refusal"])
    domain, payload = signing_payload(body)
    key = signed.agents["alpha"].home.keys().statement.verify_key
    key.verify(domain, payload, decode_signature(body.signature))
    assert (body.run, body.round, body.site) == (signed.run, 1, "alpha")


@pytest.mark.parametrize(
    ("kind", "header"),
    [
        ("round", b""),
        ("round", b"{}"),
        ("round", b'{"run":1}'),
        ("round", b"[1,2]"),
        ("round", b"\xff\xfe"),
        ("run.propose", b'{"charter":"x","run_started":{}}'),
        ("charter.sign", b'{"author":"ed25519:AAAA","charter":"{}"}'),
        ("charter.sign", b'{"author":7,"charter":"{}"}'),
        ("charter.sign", b'{"author":"%s","charter":"not json"}' % AUTHOR),
        ("charter.sign", b'{"author":"%s","charter":"{}"}' % AUTHOR),
        ("charter.sign", b'{"author":"%s","charter":7}' % AUTHOR),
        ("charter.sign", b'{"charter":"{}"}'),
        ("cosign", b'{"note":"x","old_size":-1,"proof":[]}'),
        ("cosign", b'{"note":"x","old_size":0,"proof":["!"]}'),
        ("hello", b'{"extra":1}'),
        ("run.finished", b"{}"),
        ("shell", b"{}"),
        ("", b""),
        ("round", b'{"run":"a" }'),
    ],
)
def test_malformed_requests_get_a_closed_code(signed, kind, header):
    import json

    answer, blobs = signed.agents["alpha"].handle(kind, header, {})
    assert json.loads(answer) == {"error": "bad_request"}
    assert blobs == {}


def test_an_unexpected_failure_leaves_as_one_code(network, code_of, caplog):
    network.start()
    (network.folder / "sites" / "alpha" / "keys").rename(network.folder / "keys-gone")
    network.agents["alpha"]._keys = None
    answer, _ = network.ask("alpha", 1)
    assert answer == {"error": "internal_error"}
    assert "Traceback" in caplog.text


def test_a_witness_does_not_cosign_a_rewritten_log(network, request_of, tmp_path):
    from federation.coordinator import Coordinator

    network.checkpoint()
    network.coordinator.close()
    import shutil

    # the operator, who holds the log key, starts the log over with other entries
    signer = tmp_path / "signer-rewound"
    shutil.copytree(network.folder / "signer", signer)
    (signer / "state.json").unlink()
    from audit.checkpoints import Checkpoint
    from audit.merkle import EMPTY_ROOT
    from audit.signer import SignerState

    origin = network.coordinator.origin
    (signer / "state.json").write_bytes(SignerState(Checkpoint(origin, 0, EMPTY_ROOT), None).encode())
    from audit.entries import LogCreated
    from audit.ledger import Ledger
    from audit.signer import Signer

    (tmp_path / "rewritten").mkdir()
    ledger = Ledger.create(tmp_path / "rewritten" / "log.db", origin)
    rewritten = Coordinator(tmp_path / "rewritten", signer, ledger, Signer.open(signer))
    for _ in range(6):
        rewritten.append(LogCreated(origin=origin, log_key=rewritten.log_key), "coordinator")
    note = rewritten.publish()
    seen = 4
    header = {
        "old_size": seen,
        "proof": [base64.b64encode(item).decode() for item in ledger.consistency_proof(seen, 6)],
        "note": note.decode(),
    }
    answer, _ = request_of(network.agents["alpha"], "cosign", header)
    assert answer["error"] == "audit.witness_proof"
    rewritten.close()


def test_a_completed_round_is_what_it_says(network):
    network.start()
    network.play(1)
    body = decode_entry(network.coordinator.ledger.entry(network.previous[0])).body
    assert isinstance(body, RoundCompleted)
    assert canonical_bytes(body_document(body))


def test_a_request_larger_than_any_is_refused_unread(signed):
    import json

    answer, _ = signed.agents["alpha"].handle("hello", b" " * (5 << 20), {})
    assert json.loads(answer) == {"error": "bad_request"}


def test_an_agent_whose_witness_state_is_gone_does_not_start(network):
    from clients.agent import Agent
    from clients.errors import HomeError

    agent = network.agents["alpha"]
    agent.close()
    agent.home.witness_path.unlink()
    with pytest.raises(HomeError, match="restore it"):
        Agent.open(agent.home)
