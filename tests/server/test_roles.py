"""Every route against every kind of caller: one table, and no route outside it."""

from __future__ import annotations

from datetime import timedelta

import pytest

from audit.evidence import read_evidence
from audit.principal import ROLES
from tests.server.test_rules import STRICTER, change, document

CALLERS = ("anonymous", *ROLES)
ALL, NOBODY = frozenset(CALLERS), frozenset[str]()
MEMBERS = frozenset({"scientist", "officer", "operator"})  # who may read the whole log
KEYED = ALL - {"anonymous"}

INFER = {
    "inputs": [
        {"name": "age", "shape": [1], "datatype": "INT64", "data": [5]},
        {"name": "ward", "shape": [1], "datatype": "BYTES", "data": ["north"]},
    ],
    "parameters": {"purpose": "triage"},
}
# method and path -> what is asked of it, and who is let in; all others get 401 or 403. Index 5 is a public
# entry (a transition), PRIVATE a prediction of another consumer than the one who asks.
TABLE = {
    "GET /healthz": ({}, ALL),
    "GET /readyz": ({}, ALL),
    "GET /v2": ({}, ALL),
    "GET /v2/health/live": ({}, ALL),
    "GET /v2/health/ready": ({}, ALL),
    "GET /v2/models/{model}": ({"model": "toy"}, KEYED),
    "GET /v2/models/{model}/ready": ({"model": "toy"}, KEYED),
    "GET /v2/models/{model}/versions/{version}": ({"model": "toy", "version": "live"}, KEYED),
    "GET /v2/models/{model}/versions/{version}/ready": ({"model": "toy", "version": "live"}, KEYED),
    "POST /v2/models/{model}/infer": ({"model": "toy", "json": INFER}, {"consumer", "tester"}),
    "POST /v2/models/{model}/versions/{version}/infer": (
        {"model": "toy", "version": "VERSION", "json": INFER},
        {"consumer", "tester"},
    ),
    "GET /v1/receipts/{receipt_id}": ({"receipt_id": "PUBLIC_ID"}, MEMBERS | {"node"}),
    "GET /metrics": ({}, {"operator"}),
    "GET /v1/audit/checkpoint": ({}, ALL),
    "GET /v1/audit/policy": ({}, ALL),
    "GET /v1/audit/consistency": ({"params": {"old": 1, "new": 2}}, ALL),
    "POST /v1/audit/cosignatures": ({"json": {"note_signature": "x", "site": "alpha"}}, ALL),  # judged by key
    "GET /v1/audit/entries": ({}, KEYED),
    "GET /v1/audit/entries/{index}": ({"index": "PUBLIC"}, MEMBERS | {"node"}),
    "GET /v1/audit/entries/{index}/proof": ({"index": "PUBLIC"}, MEMBERS | {"node"}),
    "GET /v1/audit/entries/{index}/proof.tlog-proof": ({"index": "PUBLIC"}, MEMBERS | {"node"}),
    "GET /v1/audit/entries/{index}/receipt.cose": ({"index": "PUBLIC"}, MEMBERS | {"node"}),
    "GET /v1/audit/evidence/{index}": ({"index": "ALONE"}, {"scientist", "officer", "node"}),
    "GET /v1/audit/entries/{index}/opened": ({"index": "SEALED"}, {"officer"}),
    "GET /v1/audit/entries/{index}/disclosed": ({"index": "SEALED"}, {"officer"}),
    "POST /v1/subjects/find": ({"json": {"subject": "MRN-1"}}, {"officer"}),
    "POST /v1/subjects/export": ({"json": {"subject": "MRN-1"}}, {"officer"}),
    "POST /v1/subjects/erase": ({"json": {"subject": "nobody"}}, {"officer"}),
    "GET /v1/audit/count": ({}, MEMBERS),
    "GET /v1/audit/runs/{run}/updates": ({"run": "no-such-run"}, MEMBERS),
    "GET /v1/audit/export": ({}, MEMBERS),
    "GET /v1/audit/evidence": ({"params": {"type": "log.created"}}, KEYED - {"operator"}),  # of what it sees
    "GET /v1/audit/tile/{place:path}": ({"place": "0/000.p/1"}, MEMBERS | {"node"}),
    "GET /v1/keys": ({}, {"operator"}),
    "POST /v1/keys/{key_id}/rotate": ({"key_id": "aaaaaaaaaaaaaaaa", "json": {}}, {"operator"}),
    "GET /v1/reviews/{decision}": ({"decision": "DECISION"}, {"officer"}),  # another consumer's
    "POST /v1/reviews/{decision}": ({"decision": "DECISION", "json": {"outcome": "confirmed"}}, {"officer"}),
    "GET /v1/alarms": ({}, MEMBERS),
    "POST /v1/alarms": (
        {"json": {"model": "none", "measure": "psi", "value": "0.3", "threshold": "0.2", "window_s": 60}},
        MEMBERS,
    ),
    "POST /v1/alarms/{alarm}/close": ({"alarm": "ab" * 16, "json": {"reason": "x"}}, {"officer"}),
    "GET /v1/policy": ({}, MEMBERS),
    "POST /v1/policy": ({"json": "CHANGE"}, {"officer"}),
    "POST /v1/keys": ({"json": {"role": "consumer"}}, {"operator"}),
    "DELETE /v1/keys/{key_id}": ({"key_id": "aaaaaaaaaaaaaaaa"}, {"operator"}),
    "GET /v1/models": ({}, KEYED),
    "GET /v1/models/{name}": ({"name": "toy"}, KEYED),
    "GET /v1/models/{name}/versions/{digest}": ({"name": "toy", "digest": "VERSION"}, KEYED),
    "GET /v1/models/{name}/versions/{digest}/card": ({"name": "toy", "digest": "VERSION"}, KEYED),
    "POST /v1/models/{name}/predict": (
        {"name": "toy", "json": {"purpose": "triage", "rows": [{"age": 5, "fever": True, "ward": "north"}]}},
        {"consumer", "tester"},
    ),
}
# the same routes, asked for what is private: another consumer's prediction, and the entries themselves
PRIVATE = {
    "GET /v1/audit/entries/{index}": ({"index": "PRIVATE"}, MEMBERS),
    "GET /v1/audit/entries/{index}/proof": ({"index": "PRIVATE"}, MEMBERS),
    "GET /v1/audit/entries/{index}/proof.tlog-proof": ({"index": "PRIVATE"}, MEMBERS),
    "GET /v1/audit/entries/{index}/receipt.cose": ({"index": "PRIVATE"}, MEMBERS),
    "GET /v1/audit/tile/{place:path}": ({"place": "entries/000.p/1"}, MEMBERS),
}


def caller_headers(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def asked(client, lab, as_role):
    """Ask a row of the table as somebody; return the answer."""
    stranger = {"Authorization": f"Bearer {lab.key('consumer')}"}
    body = TABLE["POST /v1/models/{name}/predict"][0]["json"]
    private, sealed = (
        client.post("/v1/models/toy/predict", headers=stranger, json=made).json()["entry"]["leaf_index"]
        for made in (body, {**body, "subject": "MRN-1"})
    )
    decision = lab.coordinator.ledger.stored_entry(private).event_id
    changed = document(change(lab, STRICTER, previous="ab" * 32))  # signed, and of no chain: 409 for officers
    public = lab.entries("version.transition")[0]["leaf_index"]
    public_id = lab.entries("version.transition")[0]["event_id"]
    named = {
        "PUBLIC": public,
        "PUBLIC_ID": public_id,
        "PRIVATE": private,
        "SEALED": sealed,
        "ALONE": 0,
        "VERSION": lab.version,
        "DECISION": decision,
    }

    def ask(route, given, caller):
        method, path = route.split(" ")
        parts = {**given, "json": changed} if given.get("json") == "CHANGE" else dict(given)
        request = {name: parts.pop(name) for name in ("params", "json") if name in parts}
        for name, value in parts.items():
            path = path.replace(f"{{{name}}}", str(named.get(value, value)))
            path = path.replace(f"{{{name}:path}}", str(value))
        headers = (
            {} if caller == "anonymous" else as_role(caller) if caller in ROLES else caller_headers(caller)
        )
        return client.request(method, path, headers=headers, **request)

    return ask


def test_no_route_is_missing_from_the_table(client):
    described = client.app.openapi()["paths"]
    routes = {f"{method.upper()} {path}" for path, methods in described.items() for method in methods}
    assert routes == {route.replace(":path", "") for route in TABLE}


def test_every_route_lets_in_whom_the_table_names_and_nobody_else(asked, lab):
    wrong = []
    for name, table in (("public", TABLE), ("private", PRIVATE)):
        for route, (given, allowed) in table.items():
            for caller in CALLERS:
                answer = asked(route, given, caller)
                refused = answer.status_code in (401, 403)
                if route == "POST /v1/audit/cosignatures":
                    refused = answer.json()["code"].startswith("access.")
                if refused == (caller in allowed) or answer.status_code >= 500:
                    wrong.append((name, route, caller, answer.status_code, answer.text[:80]))
                if refused:
                    assert (answer.status_code == 401) == (caller == "anonymous"), (route, caller)
    assert not wrong, "\n".join(map(str, wrong))


@pytest.fixture
def bad_keys(lab):
    """For every role a key of each way to be no good any more, or never."""
    found = {}
    for role in ROLES:
        expired = lab.key(role, expires=lab.clock.now() + timedelta(seconds=1))
        revoked = lab.key(role)
        store = lab.keys()
        store.revoke(revoked.split("_")[1])
        store.close()
        prefix, secret = lab.tokens[role].split("_", 2)[1:]
        found[role] = {
            "expired": expired,
            "revoked": revoked,
            "foreign": f"affidavit_{prefix[::-1]}_{secret}",
            "other secret": f"affidavit_{prefix}_{secret[::-1]}",
        }
    lab.clock.forward(seconds=2)
    return found


def test_no_route_lets_anybody_in_by_a_bad_key_whatever_its_role(client, lab, bad_keys, asked):
    """Every route, every role, every way to be no good: 401, except where no key is needed; and no entry."""
    size, wrong, seen = lab.coordinator.ledger.tree_size, [], 0
    for route, (given, allowed) in TABLE.items():
        if "anonymous" in allowed:
            continue
        for role, keys in bad_keys.items():
            for kind, key in keys.items():
                if kind == "other secret" and route != "GET /v1/keys":
                    continue  # argon2 each time: one route shows it
                seen += 1
                answer = asked(route, given, key)
                code = answer.headers.get("affidavit-code") or answer.json()["code"]
                if (answer.status_code, code) != (401, "access.unauthenticated"):
                    wrong.append((route, role, kind, answer.status_code))
    assert not wrong, "\n".join(map(str, wrong))
    assert seen > 3 * len(ROLES) * 25
    assert lab.coordinator.ledger.tree_size == size, "a bad key writes nothing"


def test_evidence_by_terms_holds_only_what_its_caller_sees(asked, lab):
    own = asked("POST /v1/models/{name}/predict", TABLE["POST /v1/models/{name}/predict"][0], "consumer")
    mine = own.json()["entry"]["leaf_index"]
    given = {"params": {"type": "prediction"}}
    assert set(read_evidence(asked("GET /v1/audit/evidence", given, "consumer").content).entries) == {0, mine}
    assert asked("GET /v1/audit/evidence", given, "node").status_code == 404
    everybodys = read_evidence(asked("GET /v1/audit/evidence", given, "officer").content).entries
    assert set(everybodys) == {0} | {item["leaf_index"] for item in lab.entries("prediction")}
    assert len(everybodys) == 4


def test_every_refusal_of_a_known_caller_is_an_entry_and_of_a_stranger_is_none(asked, lab):
    before = len(lab.entries("access.denied"))
    answer = asked("GET /v1/keys", {}, "consumer")
    assert answer.json()["entry"]["leaf_index"] == lab.entries("access.denied")[-1]["leaf_index"]
    asked("GET /v1/keys", {}, "anonymous")
    assert len(lab.entries("access.denied")) == before + 1, "an anonymous flood writes nothing"


@pytest.mark.parametrize("header", ["Bearer", "Bearer ", "Basic eA==", "Bearer affidavit_x", "bearer \u00e9"])
def test_key_that_is_none_is_401_everywhere_and_writes_nothing(client, lab, header):
    size = lab.coordinator.ledger.tree_size
    for route, (_, allowed) in TABLE.items():
        method, path = route.split(" ")
        if "anonymous" in allowed or "{" in path:
            continue
        answer = client.request(method, path, headers={"Authorization": header.encode()})
        assert answer.status_code == 401, (route, answer.status_code)
    assert lab.coordinator.ledger.tree_size == size
