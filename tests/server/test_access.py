"""Who may do what: every route for every role, and policies that fail closed."""

from __future__ import annotations

from datetime import timedelta

import pytest

from audit.principal import ACTIONS, ROLES, Principal, Question
from server.access import CedarAuthorizer, PolicyText, SharedAttributes, read_policies, shipped_policies
from server.errors import PolicyLoadError

MEMBERS = {"node", "officer", "scientist", "operator"}
PREDICT = {"purpose": "triage", "rows": [{"age": 51, "fever": True, "ward": "north"}]}

ROUTES = [
    ("POST", "/v1/models/toy/predict", PREDICT, {"consumer", "tester"}),
    ("GET", "/v1/models", None, set(ROLES)),
    ("GET", "/v1/models/toy", None, set(ROLES)),
    ("GET", "/v1/models/toy/versions/VERSION", None, set(ROLES)),
    ("GET", "/v1/audit/entries", None, set(ROLES)),
    ("GET", "/v1/audit/entries?site=alpha", None, {"officer", "scientist", "operator", "consumer", "tester"}),
    ("GET", "/v1/audit/entries?principal=p-1", None, {"officer", "scientist", "operator"}),
    ("GET", "/v1/audit/count", None, {"officer", "scientist", "operator"}),
    ("GET", "/v1/audit/export", None, {"officer", "scientist", "operator"}),
    ("GET", "/v1/audit/export?format=csv", None, {"officer", "scientist", "operator"}),
    (
        "GET",
        "/v1/audit/evidence?type=log.created",
        None,
        {"node", "officer", "scientist", "consumer", "tester"},
    ),
    ("GET", "/v1/audit/tile/0/000.p/1", None, MEMBERS),
    ("GET", "/v1/audit/tile/entries/000.p/1", None, {"officer", "scientist", "operator"}),
    ("GET", "/v1/audit/entries/0/receipt.cose", None, MEMBERS),
    ("GET", "/v1/audit/entries/0", None, MEMBERS),
    ("GET", "/v1/audit/entries/0/proof", None, MEMBERS),
    ("GET", "/v1/audit/entries/0/proof.tlog-proof", None, MEMBERS),
    ("GET", "/v1/audit/evidence/0", None, {"node", "officer", "scientist"}),
    ("GET", "/v1/keys", None, {"operator"}),
    ("POST", "/v1/keys", {"role": "consumer"}, {"operator"}),
    ("DELETE", "/v1/keys/aaaaaaaaaaaaaaaa", None, {"operator"}),
    ("GET", "/metrics", None, {"operator"}),
]
OPEN = ["/healthz", "/v1/audit/checkpoint", "/v1/audit/consistency?old=1&new=2"]


def call(client, lab, method, path, body, headers=None):
    return client.request(method, path.replace("VERSION", lab.version), json=body, headers=headers or {})


@pytest.mark.parametrize("role", ROLES)
def test_every_route_for_a_role(client, lab, as_role, role):
    refused = []
    for method, path, body, allowed in ROUTES:
        reply = call(client, lab, method, path, body, as_role(role))
        if role in allowed:
            assert reply.status_code not in (401, 403), (path, reply.text)
        else:
            problem = reply.json()
            assert (reply.status_code, problem["policies"]) == (403, ["default-deny"]), path
            refused.append(problem["entry"]["leaf_index"])
    denied = lab.entries("prediction.denied") + lab.entries("access.denied")
    assert sorted(entry["leaf_index"] for entry in denied) == sorted(refused)
    assert {entry["body"]["role"] for entry in denied} == {role}


@pytest.mark.parametrize(
    "token",
    ["", "affidavit_", "affidavit_aaaaaaaaaaaaaaaa_" + "A" * 43, "x" * 5000, "affidavit_ä_" + "A" * 43],
    ids=["none", "cut", "foreign", "long", "umlaut"],
)
def test_every_route_without_a_good_key(client, lab, token):
    headers = {b"Authorization": b"Bearer " + token.encode()} if token else {}
    before = lab.coordinator.ledger.tree_size
    for method, path, body, _ in ROUTES:
        reply = call(client, lab, method, path, body, headers)
        assert (reply.status_code, reply.json()["code"]) == (401, "access.unauthenticated"), path
        assert reply.headers["www-authenticate"].startswith("Bearer")
    assert lab.coordinator.ledger.tree_size == before


@pytest.mark.parametrize("path", OPEN)
def test_what_witnesses_need_is_open(client, path):
    assert client.get(path).status_code == 200


def test_unknown_route_is_a_problem_document(client):
    reply = client.get("/v3/models")
    assert (reply.status_code, reply.json()["code"]) == (404, "request.no_such_route")
    assert list(client.get("/v2/models").json()) == ["error"], "the inference protocol's own form"


def test_revoked_key_stops_at_the_next_request(client, lab, as_role):
    assert client.get("/v1/models", headers=as_role("consumer")).status_code == 200
    key_id = lab.tokens["consumer"].split("_")[1]
    assert client.delete(f"/v1/keys/{key_id}", headers=as_role("operator")).status_code == 200
    assert client.get("/v1/models", headers=as_role("consumer")).status_code == 401
    assert lab.entries("key.revoked")[0]["body"]["key_id"] == key_id


def test_expired_key_stops_even_when_remembered(client, lab):
    token = lab.key("consumer", expires=lab.clock.now() + timedelta(minutes=5))
    headers = {"Authorization": f"Bearer {token}"}
    assert client.get("/v1/models", headers=headers).status_code == 200
    lab.clock.forward(minutes=6)
    assert client.get("/v1/models", headers=headers).status_code == 401


def test_secret_of_one_key_does_not_open_another(client, lab):
    first, second = lab.tokens["consumer"].split("_"), lab.tokens["operator"].split("_")
    mixed = f"affidavit_{second[1]}_{'_'.join(first[2:])}"
    assert client.get("/v1/keys", headers={"Authorization": f"Bearer {mixed}"}).status_code == 401


def test_key_store_holds_no_secret(lab):
    stored = (lab.folder / "coordinator" / "keys.db").read_bytes()
    for token in lab.tokens.values():
        assert token.split("_", 2)[2].encode() not in stored
    assert b"$argon2id$" in stored
    assert (lab.folder / "coordinator" / "keys.db").stat().st_mode & 0o077 == 0


def test_new_key_is_an_entry_and_works(client, lab, as_role):
    reply = client.post("/v1/keys", headers=as_role("operator"), json={"role": "officer", "note": "desk"})
    made = reply.json()
    assert reply.status_code == 201
    (entry,) = lab.entries("key.created")
    assert entry["body"]["principal"] == made["principal"]
    assert "desk" not in str(entry)
    assert (
        client.get("/v1/audit/entries", headers={"Authorization": f"Bearer {made['key']}"}).status_code == 200
    )


@pytest.mark.parametrize(
    "body",
    [
        {"role": "root"},
        {"role": "consumer", "expires": "tomorrow"},
        {"role": "consumer", "expires": "2001-01-01T00:00:00Z"},
        {"role": "consumer", "note": "x" * 81},
        {"role": "consumer", "note": "line\nbreak"},
        {"role": "consumer", "extra": 1},
        {},
    ],
    ids=str,
)
def test_bad_key_request_makes_no_key(client, lab, as_role, body):
    reply = client.post("/v1/keys", headers=as_role("operator"), json=body)
    assert reply.status_code == 422
    assert lab.entries("key.created") == []


def test_consumer_reads_and_proves_its_own_answer_and_nobody_elses(client, lab, as_role):
    mine = client.post("/v1/models/toy/predict", headers=as_role("consumer"), json=PREDICT).json()
    stranger = {"Authorization": f"Bearer {lab.key('consumer')}"}
    path = f"/v1/audit/entries/{mine['entry']['leaf_index']}"
    assert client.get(path, headers=as_role("consumer")).status_code == 200
    assert client.get(path + "/proof", headers=as_role("consumer")).status_code == 200
    assert client.get(path, headers=stranger).status_code == 403


ALLOWED_QUESTION = Question(
    action="predict",
    resource="m",
    attributes={
        "name": "m",
        "purposes": ("triage",),
        "state": "live",
        "epsilon_micro": 1,
        "epsilon_limit_micro": 2,
        "regions": (),
        "age_days": 0,
        "max_age_days": 0,
        "drift_alarms": 0,
        "legal_basis_required": False,
        "legal_effect": False,
    },
    context={"purpose": "triage", "legal_basis": "", "consent": False, "over_quota": False},
)
CONSUMER = Principal(id="p-1", role="consumer")


def with_policy(text: str) -> CedarAuthorizer:
    shipped = shipped_policies()
    return CedarAuthorizer(PolicyText(policies=shipped.policies + text, schema=shipped.schema))


def test_policy_that_fails_to_evaluate_denies():
    overflow = '@id("overflows") forbid (principal, action == Affidavit::Action::"predict", resource) '
    overflow += "when { resource.epsilon_micro * 9223372036854775807 + 9223372036854775807 > 0 };"
    decision = with_policy(overflow).decide(CONSUMER, ALLOWED_QUESTION)
    assert (decision.allowed, decision.policies) == (False, ("policy-evaluation-error",))


def test_missing_context_denies():
    question = Question(action="predict", resource="m", attributes=ALLOWED_QUESTION.attributes)
    decision = CedarAuthorizer(shipped_policies()).decide(CONSUMER, question)
    assert (decision.allowed, decision.policies) == (False, ("policy-evaluation-error",))


@pytest.mark.parametrize("role", ["root", "", "Consumer", "consumer "])
def test_unknown_role_is_allowed_nothing(role):
    authorizer = CedarAuthorizer(shipped_policies())
    for action in sorted(ACTIONS):
        question = Question(action=action, resource="m")
        assert not authorizer.decide(Principal(id="p", role=role), question).allowed


def test_unknown_action_is_denied():
    decision = CedarAuthorizer(shipped_policies()).decide(CONSUMER, Question(action="drop", resource="m"))
    assert not decision.allowed


def test_quotes_in_names_cannot_break_out_of_the_request():
    hostile = 'x", role: "operator'
    decision = CedarAuthorizer(shipped_policies()).decide(
        Principal(id=hostile, role="consumer"), Question(action="keys.create", resource=hostile)
    )
    assert decision.policies == ("default-deny",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('@id("x") permit (principal, action, resource) when { resource.stat == "live" };', "stat"),
        ('@id("x") permit (principal, action == Affidavit::Action::"preddict", resource);', "preddict"),
        ('@id("x") permit (principal in Affidavit::Role::"admin", action, resource);', "admin"),
        ("permit (principal, action, resource", "parse"),
        ("permit (principal, action == Affidavit::Action::\"predict\", resource);", "@id"),
        ('@id("version-not-live") permit (principal, action, resource);', "twice"),
        ('@id("default-deny") permit (principal, action, resource);', "reserved"),
    ],
)  # fmt: skip
def test_policy_with_a_mistake_is_refused_at_load(text, said):
    with pytest.raises(PolicyLoadError, match=said):
        with_policy(text)


def test_missing_policy_file_stops_the_start(tmp_path):
    with pytest.raises(PolicyLoadError, match=r"none\.cedar"):
        read_policies(tmp_path / "none.cedar")


def test_policies_in_force_are_an_entry_once(client, lab):
    (entry,) = lab.entries("policy.applied")
    assert entry["body"]["policy_set"] == CedarAuthorizer(shipped_policies()).policy_set


def test_shipped_hash_is_argon2id_with_owasps_cost(tmp_path, lab):
    from server.keys import KeyStore

    store = KeyStore(tmp_path, lab.clock)
    store.create(role="consumer")
    store.close()
    assert b"$argon2id$v=19$m=19456,t=2,p=1$" in (tmp_path / "keys.db").read_bytes()


def test_shared_attributes_are_told_apart_by_kind_and_decide_as_plain_ones():
    kinds = [SharedAttributes({"a": value}) for value in (1, True, "1")]
    assert len(dict.fromkeys(kinds, 0)) == 3
    assert SharedAttributes({"a": 1}) == SharedAttributes({"a": 1})
    assert hash(SharedAttributes({"a": 1})) == hash(SharedAttributes({"a": 1}))
    assert SharedAttributes({"a": 1}) != {"a": 1}
    with pytest.raises(TypeError):
        hash(SharedAttributes({"a": [1]}))


@pytest.mark.parametrize("purpose", ["triage", "marketing"])
def test_authoriser_remembers_shared_questions_as_it_does_others(purpose):
    authorizer = CedarAuthorizer(shipped_policies())
    principal = Principal(id="p-1", role="consumer", site="", region="", models=(), method="key")
    attributes = {
        "name": "toy", "purposes": ("triage",), "state": "live", "epsilon_micro": 1, "epsilon_limit_micro": 2,
        "regions": (), "max_age_days": 0, "legal_basis_required": False, "legal_effect": False, "age_days": 0,
        "drift_alarms": 0,
    }  # fmt: skip
    context = {"purpose": purpose, "legal_basis": "", "consent": False, "over_quota": False}
    asked = [
        Question(action="predict", resource="toy", attributes=kind(attributes), context=context)
        for kind in (dict, SharedAttributes, SharedAttributes)
    ]
    decisions = [authorizer.decide(principal, question) for question in asked]
    assert len(set(decisions)) == 1
    assert decisions[0].allowed is (purpose == "triage")
    odd = Question(
        action="predict", resource="toy", attributes=SharedAttributes({**attributes, "epsilon_micro": True}),
        context=context,
    )  # fmt: skip
    assert not authorizer.decide(principal, odd).allowed
