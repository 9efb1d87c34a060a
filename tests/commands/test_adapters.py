"""Each use case over HTTP, by command (here and with --url) and in Python: one result, code and entry."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest

from audit.evidence import read_evidence
from audit.principal import Principal
from audit.service import SearchRequest, prove_entry, read_entry, search_entries
from server.access import CedarAuthorizer, shipped_policies
from server.journal import Journal, utc_now
from server.key_service import create_key, revoke_key
from server.keys import KeyStore
from server.monitoring import Monitoring
from tests.commands.serving import Served


def principal_of(served: Served, role: str) -> Principal:
    return served.context.keys.authenticate(served.keys[role])


@contextlib.contextmanager
def key_parts(served: Served):
    store = KeyStore(served.own.homes / "coordinator", utc_now)
    try:
        yield store, Journal(served.context.coordinator.ledger, utc_now, Monitoring(), timeout_s=10)
    finally:
        store.close()


def test_search_is_the_same_from_every_side(served):
    ledger, authorizer = served.context.coordinator.ledger, served.context.authorizer
    asked = SearchRequest(type="version.transition", limit=10)
    outcomes = {
        "http": served.http("officer", "GET", "/v1/audit/entries?type=version.transition&limit=10"),
        "command": served.command("log", "list", "--type", "version.transition", "--limit", "10"),
        "remote": served.remote("officer", "log", "list", "--type", "version.transition", "--limit", "10"),
        "python": served.python(
            lambda: search_entries(ledger, principal_of(served, "officer"), authorizer, asked)
        ),
    }
    found = {
        side: [row.leaf_index for row in result]
        if side == "python"
        else [item["leaf_index"] for item in result["entries"]]
        for side, (_, result) in outcomes.items()
    }
    assert {code for code, _ in outcomes.values()} == {"ok"}
    assert len(found["http"]) == 2
    assert len({str(indices) for indices in found.values()}) == 1


@pytest.mark.parametrize(("index", "code"), [(0, "ok"), (3, "ok"), (99_999, "audit.entry_not_found")])
def test_reading_and_proving_an_entry_is_the_same_from_every_side(served, index, code):
    ledger, authorizer = served.context.coordinator.ledger, served.context.authorizer
    officer = principal_of(served, "officer")
    served.http("officer", "GET", "/v1/audit/entries/0/proof")
    reads = [
        served.http("officer", "GET", f"/v1/audit/entries/{index}"),
        served.command("log", "show", index),
        served.remote("officer", "log", "show", index),
    ]
    proofs = [
        served.http("officer", "GET", f"/v1/audit/entries/{index}/proof"),
        served.command("log", "proof", index),
        served.remote("officer", "log", "proof", index),
    ]
    direct = served.python(lambda: read_entry(ledger, officer, authorizer, index))
    proved = served.python(lambda: prove_entry(ledger, officer, authorizer, index))
    assert {outcome[0] for outcome in [*reads, *proofs, direct, proved]} == {code}
    if code == "ok":
        assert len({document["bytes"] for _, document in reads}) == 1
        assert len({json.dumps(document, sort_keys=True) for _, document in proofs}) == 1
        assert [node.hex() for node in proved[1].hashes]


@pytest.mark.parametrize(
    ("model", "code"), [("own", "ok"), ("other", "models.not_found")], ids=["known", "unknown"]
)
def test_showing_a_model_is_the_same_from_every_side(served, model, code):
    live = served.context.live
    outcomes = [
        served.http("officer", "GET", f"/v1/models/{model}"),
        served.command("models", "show", model),
        served.remote("officer", "models", "show", model),
    ]
    direct = served.python(lambda: live.versions(model))
    assert {outcome[0] for outcome in [*outcomes, direct]} == {code}
    if code == "ok":
        shown = {
            json.dumps(
                [(v["version"], v["state"], v["epsilon"], v["gates_passed"]) for v in document["versions"]]
            )
            for _, document in outcomes
        }
        assert len(shown) == 1
        assert direct[1][0].version == served.own.version


def test_listing_models_is_the_same_from_every_side(served):
    outcomes = [
        served.http("officer", "GET", "/v1/models"),
        served.command("models", "list"),
        served.remote("officer", "models", "list"),
    ]
    assert [code for code, _ in outcomes] == ["ok"] * 3
    assert len({json.dumps(document, sort_keys=True) for _, document in outcomes}) == 1


def test_a_runs_updates_are_the_same_from_every_side(served, tmp_path):
    (stored,) = served.context.coordinator.ledger.search(type="run.completed", limit=1)
    run = json.loads(stored.body)["body"]["run"]
    picture = tmp_path / "updates.png"
    outcomes = [
        served.http("officer", "GET", f"/v1/audit/runs/{run}/updates"),
        served.command("runs", "updates", run),
        served.remote("officer", "runs", "updates", run, "--plot", str(picture)),
    ]
    assert [code for code, _ in outcomes] == ["ok"] * 3
    assert len({json.dumps(document, sort_keys=True) for _, document in outcomes}) == 1
    assert outcomes[0][1]["rounds"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    unknown = [
        served.http("officer", "GET", "/v1/audit/runs/no-such-run/updates"),
        served.command("runs", "updates", "no-such-run"),
        served.remote("officer", "runs", "updates", "no-such-run"),
    ]
    assert len({code for code, _ in unknown}) == 1
    assert served.command("runs", "updates", run[:12]) == outcomes[1]  # as `runs list` names it


@pytest.mark.parametrize(
    ("role", "expires", "code"),
    [
        ("consumer", None, "ok"),
        ("emperor", None, "keys.bad_request"),
        ("consumer", "2001-01-01T00:00:00Z", "keys.bad_request"),
    ],
)
def test_making_a_key_is_the_same_from_every_side(served, role, expires, code):
    body = {"role": role, **({"expires": expires} if expires else {})}
    options = ["--role", role, *(["--expires", expires] if expires else [])]
    ledger = served.context.coordinator.ledger
    before = len(ledger.search(type="key.created", limit=1000))
    outcomes = [
        served.http("operator", "POST", "/v1/keys", body),
        served.command("keys", "create", *options),
        served.remote("operator", "keys", "create", *options),
    ]
    with key_parts(served) as (store, journal):
        direct = served.python(lambda: create_key(store, journal, role=role, expires=expires))
    assert {outcome[0] for outcome in [*outcomes, direct]} == {code}
    entries = ledger.search(type="key.created", limit=1000)[before:]
    if code != "ok":
        assert entries == []
        return
    made = [document["principal"] for _, document in outcomes] + [direct[1].view.principal]
    assert [json.loads(entry.body)["body"]["principal"] for entry in entries] == made


def test_revoking_a_key_is_the_same_from_every_side(served):
    with key_parts(served) as (store, journal):
        before = len(served.context.coordinator.ledger.search(type="key.revoked", limit=1000))
        made = [create_key(store, journal, role="node").view.key_id for _ in range(4)]
        outcomes = [
            served.http("operator", "DELETE", f"/v1/keys/{made[0]}"),
            served.command("keys", "revoke", made[1]),
            served.remote("operator", "keys", "revoke", made[2]),
            served.python(lambda: revoke_key(store, journal, made[3])),
        ]
        assert [code for code, _ in outcomes] == ["ok"] * 4
        assert all(store.get(key_id).revoked for key_id in made)
        unknown = "aaaaaaaaaaaaaaaa"
        refused = [
            served.http("operator", "DELETE", f"/v1/keys/{unknown}"),
            served.command("keys", "revoke", unknown),
            served.remote("operator", "keys", "revoke", unknown),
            served.python(lambda: revoke_key(store, journal, unknown)),
        ]
    assert {code for code, _ in refused} == {"keys.not_found"}
    entries = served.context.coordinator.ledger.search(type="key.revoked", limit=1000)[before:]
    assert [json.loads(entry.body)["body"]["key_id"] for entry in entries] == made


@pytest.mark.parametrize(
    ("role", "method", "path", "arguments"),
    [
        ("consumer", "GET", "/v1/audit/entries?principal=p-1", ("log", "list", "--principal", "p-1")),
        ("node", "GET", "/v1/audit/entries?site=beta", ("log", "list", "--site", "beta")),
        ("consumer", "GET", "/v1/audit/entries/0", ("log", "show", 0)),
        ("consumer", "GET", "/v1/audit/evidence/0", ("evidence", "export", 0)),
        ("node", "GET", "/v1/keys", ("keys", "list")),
        ("consumer", "GET", "/v1/audit/runs/no-such-run/updates", ("runs", "updates", "no-such-run")),
        ("officer", "DELETE", "/v1/keys/aaaaaaaaaaaaaaaa", ("keys", "revoke", "a" * 16)),
    ],
    ids=lambda value: None if not isinstance(value, tuple) else " ".join(map(str, value)),
)
def test_refusal_is_the_same_with_and_without_the_command_and_is_logged_each_time(
    served, role, method, path, arguments
):
    before = len(served.context.coordinator.ledger.search(type="access.denied", limit=1000))
    outcomes = [served.http(role, method, path), served.remote(role, *arguments)]
    assert [code for code, _ in outcomes] == ["access.denied"] * 2
    entries = served.context.coordinator.ledger.search(type="access.denied", limit=1000)[before:]
    assert [json.loads(entry.body)["body"]["role"] for entry in entries] == [role, role]
    assert outcomes[0][1]["entry"]["leaf_index"] == entries[0].leaf_index


def test_python_asks_the_same_policies(served):
    authorizer = CedarAuthorizer(shipped_policies())
    consumer = principal_of(served, "consumer")
    code, error = served.python(
        lambda: search_entries(
            served.context.coordinator.ledger, consumer, authorizer, SearchRequest(principal="p-" + "0" * 32)
        )
    )
    assert code == "access.denied"
    assert error.decision.policies == ("default-deny",)


def test_one_persons_story_is_the_same_from_every_side(served, tmp_path):
    body = {"purpose": "triage", "rows": [{"age": 40, "dose": 4.5}], "subject": "MRN-1"}
    code, answer = served.http("consumer", "POST", "/v1/models/own/predict", body)
    assert code == "ok", answer
    index, asked = answer["entry"]["leaf_index"], {"subject": "MRN-1"}

    def found() -> list[tuple[str, Any]]:
        sides = [
            served.http("officer", "POST", "/v1/subjects/find", asked),
            served.command("subject", "find", "MRN-1"),
            served.remote("officer", "subject", "find", "MRN-1"),
        ]
        return [(code, document.get("pseudonym")) for code, document in sides]

    assert found() == [("ok", answer["sealed"]["subject"])] * 3
    for side in (served.command, lambda *a: served.remote("officer", *a)):
        code, listed = side("log", "list", "--subject", "MRN-1", "--type", "prediction")
        assert (code, [item["leaf_index"] for item in listed["entries"]]) == ("ok", [index])
        for number, arguments in enumerate(
            (("subject", "export", "MRN-1"), ("evidence", "disclose", index, "--field", "age"))
        ):
            file = tmp_path / f"{number}.zip"
            assert side(*arguments, "-o", file)[0] == "ok"
            assert list(read_evidence(file.read_bytes()).disclosed) == [index]
    for refused in ("find", "export", "erase"):
        assert served.remote("consumer", "subject", refused, "MRN-1")[0] == "access.denied"
    code, erased = served.remote("officer", "subject", "erase", "MRN-1", "--request-id", "case-1")
    assert (code, erased["records"]) == ("ok", 1)
    assert served.command("subject", "erase", "MRN-1", "--request-id", "case-1") == ("ok", erased)
    assert found() == [("vault.subject_unknown", None)] * 3
    codes = {
        served.http("officer", "GET", f"/v1/audit/entries/{index}/opened")[0],
        served.command("evidence", "disclose", index, "--all")[0],
        served.remote("officer", "evidence", "disclose", index, "--all")[0],
    }
    assert codes == {"vault.erased"}
    code, listed = served.remote("officer", "log", "list", "--subject", "MRN-1")
    assert (code, listed["entries"]) == ("ok", [])
