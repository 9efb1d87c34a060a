"""The edges of HTTP: sizes, times, checkpoints, cosignatures, evidence, and what a stranger is told."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json

import pytest
from starlette.testclient import TestClient

from audit.checkpoints import cosign, open_checkpoint, parse_checkpoint_note
from audit.evidence import read_evidence
from audit.keys import SigningKey
from audit.merkle import hash_leaf, verify_consistency, verify_inclusion
from audit.notes import KeyType, NoteSigner, NoteVerifier
from audit.principal import Principal
from audit.tlog_proof import TlogProof
from audit.verify import verify_evidence
from server.app import create_app
from server.errors import STATUS, TITLES, MalformedRequestError

PREDICT = "/v1/models/toy/predict"


def asgi(app, *, headers, chunks, delay_s=0.0):
    """Send a body in chunks, without a client's help; return status and problem."""
    sent, queue = [], list(chunks)

    async def receive():
        await asyncio.sleep(delay_s)
        if queue:
            return {"type": "http.request", "body": queue.pop(0), "more_body": True}
        await asyncio.sleep(60)
        raise AssertionError("the server waited for more")

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "path": PREDICT, "raw_path": PREDICT.encode(), "query_string": b"", "root_path": "",
        "scheme": "http", "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], json.loads(b"".join(m.get("body", b"") for m in sent))


@pytest.fixture
def guarded_app(lab):
    return create_app(lab.settings(max_body_bytes=2_048), clock=lab.clock)


def test_declared_huge_body_is_refused_before_it_is_read(guarded_app):
    status, problem = asgi(guarded_app, headers=[(b"content-length", b"99999999999")], chunks=[])
    assert (status, problem["code"]) == (413, "request.too_large")


def test_undeclared_huge_body_is_cut_off_at_the_limit(guarded_app):
    status, problem = asgi(guarded_app, headers=[], chunks=[b"x" * 1_000] * 50)
    assert (status, problem["code"]) == (413, "request.too_large")


def test_slow_body_does_not_hold_the_server(lab):
    app = create_app(lab.settings(max_body_bytes=2_048, body_timeout_s=0.2), clock=lab.clock)
    status, problem = asgi(app, headers=[], chunks=[b"{"] * 1_000, delay_s=0.05)
    assert (status, problem["code"]) == (408, "request.timeout")


def test_internal_error_tells_a_stranger_nothing(client, lab, as_role, row):
    def explode(*_: object) -> None:
        raise RuntimeError("secret path /etc/keys")

    client.app.state.context.predicting.warm.ready = explode
    reply = client.post(PREDICT, headers=as_role("consumer"), json={"purpose": "triage", "rows": [row]})
    assert (reply.status_code, reply.json()["code"]) == (500, "server.internal")
    assert "secret" not in reply.text
    assert lab.entries("prediction") == []


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=501",
        "limit=ten",
        "after=-2",
        "after=99999999999999999999",
        "type=nothing",
        "version=abc",
        "since=yesterday",
        "since=2026-01-01",
        "actor=%27%20OR%201=1",
        "site=..%2F..",
    ],
)
def test_malformed_search_names_the_parameter(client, as_role, query):
    reply = client.get(f"/v1/audit/entries?{query}", headers=as_role("officer"))
    assert (reply.status_code, reply.json()["code"]) == (422, "request.malformed")
    assert query.split("=")[0] in json.dumps(reply.json()["fields"])


def test_search_pages_through_everything_once(client, lab, as_role):
    seen, after, size = [], None, lab.coordinator.ledger.tree_size
    while True:
        more = f"&after={after}" if after is not None else ""
        page = client.get(f"/v1/audit/entries?limit=3{more}", headers=as_role("officer")).json()
        seen += [item["leaf_index"] for item in page["entries"]]
        after = page["next"]
        if after is None:
            break
    assert seen == list(range(len(seen))), "a gap would show"
    assert len(seen) >= size, "what was there before is there; reading added what follows"


def test_search_filters_by_type_and_version(client, lab, as_role):
    url = f"/v1/audit/entries?type=version.transition&version={lab.version}"
    found = client.get(url, headers=as_role("officer")).json()["entries"]
    assert [item["entry"]["body"]["to_state"] for item in found] == ["approved", "live"]


@pytest.mark.parametrize("index", ["-1", "999999", "x", "9007199254740993"])
def test_entry_that_is_not_there(client, as_role, index):
    for tail in ("", "/proof"):
        reply = client.get(f"/v1/audit/entries/{index}{tail}", headers=as_role("officer"))
        assert reply.status_code in (404, 422)


def test_entry_bytes_hash_to_the_stated_leaf(client, as_role):
    entry = client.get("/v1/audit/entries/2", headers=as_role("officer")).json()
    assert hash_leaf(base64.b64decode(entry["bytes"])).hex() == entry["leaf_hash"]


def test_proof_leads_to_a_checkpoint_that_the_log_signed(client, lab, as_role):
    proof = client.get("/v1/audit/entries/2/proof", headers=as_role("officer")).json()
    log = NoteVerifier.parse(lab.coordinator.log_key)
    opened = open_checkpoint(proof["checkpoint"].encode(), log=log, now=int(lab.clock.now().timestamp()))
    verify_inclusion(
        leaf_index=2,
        tree_size=proof["tree_size"],
        leaf_hash=bytes.fromhex(proof["leaf_hash"]),
        proof=[base64.b64decode(node) for node in proof["proof"]],
        root_hash=opened.checkpoint.root_hash,
    )


def test_proof_of_an_answer_covers_it_at_once(client, as_role, row):
    answer = client.post(
        PREDICT, headers=as_role("consumer"), json={"purpose": "triage", "rows": [row]}
    ).json()
    path = f"/v1/audit/entries/{answer['entry']['leaf_index']}/proof"
    assert client.get(path, headers=as_role("consumer")).json()["leaf_hash"] == answer["entry"]["leaf_hash"]


@pytest.mark.parametrize(
    ("path", "headers"),
    [("/v1/audit/entries/2/proof", {"Accept": "text/plain"}), ("/v1/audit/entries/2/proof.tlog-proof", {})],
)
def test_proof_as_a_file_by_header_or_by_name(client, as_role, path, headers):
    reply = client.get(path, headers={**as_role("officer"), **headers})
    assert TlogProof.parse(reply.content).leaf_index == 2


def test_consistency_proof_holds_and_bad_ranges_are_refused(client, lab):
    ledger = lab.coordinator.ledger
    proof = client.get("/v1/audit/consistency?old=2&new=5").json()["proof"]
    verify_consistency(
        size1=2, size2=5, root1=ledger.root_at(2), root2=ledger.root_at(5),
        proof=[base64.b64decode(node) for node in proof],
    )  # fmt: skip
    assert client.get("/v1/audit/consistency?old=5&new=2").status_code == 422
    assert client.get("/v1/audit/consistency?old=1&new=99999").status_code == 404
    assert client.get("/v1/audit/consistency?old=1").status_code == 422


class TestCosignatures:
    def line(self, lab, note, *, site="alpha", key=None, ahead_s=0):
        signer = NoteSigner(site, key or lab.site_witness, KeyType.COSIGNATURE)
        return cosign(note, signer, int(lab.clock.now().timestamp()) + ahead_s).decode()

    def post(self, client, line, site="alpha"):
        return client.post("/v1/audit/cosignatures", json={"note_signature": line, "site": site})

    def test_enrolled_witness_is_kept_with_the_checkpoint(self, client, lab):
        note = client.get("/v1/audit/checkpoint").content
        reply = self.post(client, self.line(lab, note))
        assert reply.json() == {"tree_size": parse_checkpoint_note(note).tree_size, "cosignatures": 1}
        witness = NoteSigner("alpha", lab.site_witness, KeyType.COSIGNATURE).verifier
        opened = open_checkpoint(
            client.get("/v1/audit/checkpoint").content,
            log=NoteVerifier.parse(lab.coordinator.log_key),
            witnesses=[witness],
            now=int(lab.clock.now().timestamp()),
        )
        assert [cosignature.name for cosignature in opened.cosignatures] == ["alpha"]

    def test_earlier_checkpoint_can_still_be_cosigned(self, client, lab, as_role, row):
        note = client.get("/v1/audit/checkpoint").content
        client.post(PREDICT, headers=as_role("consumer"), json={"purpose": "triage", "rows": [row]})
        client.get("/v1/audit/entries/7/proof", headers=as_role("officer"))
        assert client.get("/v1/audit/checkpoint").content != note
        assert self.post(client, self.line(lab, note)).status_code == 200

    @pytest.mark.parametrize("how", ["stranger", "other_name", "not_enrolled", "future", "other_tree"])
    def test_anything_else_is_refused(self, client, lab, how):
        note = client.get("/v1/audit/checkpoint").content
        site = "alpha"
        if how == "stranger":
            line = self.line(lab, note, key=SigningKey.generate())
        elif how == "other_name":
            line = self.line(lab, note, site="beta")
        elif how == "not_enrolled":
            site, line = "beta", self.line(lab, note, site="beta")
        elif how == "future":
            line = self.line(lab, note, ahead_s=3_600)
        else:
            text = b"\n".join(
                [note.split(b"\n")[0], b"3", base64.b64encode(bytes(32)), b"", note.split(b"\n")[4], b""]
            )
            line = self.line(lab, text)
        reply = self.post(client, line, site)
        assert (reply.status_code, reply.json()["code"]) == (403, "audit.bad_signature")
        assert client.get("/v1/audit/checkpoint").content == note

    @pytest.mark.parametrize(
        "body",
        [
            b"{}",
            b"[]",
            b'{"note_signature":"x","site":"alpha"}',
            b'{"note_signature":1,"site":"alpha"}',
            b"\xff",
        ],
    )
    def test_what_is_no_signature_line_is_malformed(self, client, body):
        assert client.post("/v1/audit/cosignatures", content=body).status_code == 422


def test_evidence_of_an_entry_is_a_file_that_the_verifier_reads(client, lab, as_role):
    reply = client.get("/v1/audit/evidence/3", headers=as_role("officer"))
    evidence = read_evidence(reply.content)
    assert reply.headers["content-type"] == "application/zip"
    assert evidence.entries[3] == lab.coordinator.ledger.entry(3)
    report = verify_evidence(reply.content, policy_text=None)
    assert not report.failures
    (exported,) = lab.entries("evidence.exported")
    assert exported["body"]["leaf_index"] == 3


def test_evidence_that_the_log_cannot_support_is_a_refusal_not_a_crash(client, lab, as_role):
    index = lab.entries("version.registered")[0]["leaf_index"]
    reply = client.get(f"/v1/audit/evidence/{index}", headers=as_role("officer"))
    assert reply.status_code in (200, 404)
    assert reply.status_code == 200 or reply.json()["code"] == "evidence.gap"


def test_metrics_count_answers_and_denials_by_policy(client, as_role, row):
    for purpose in ("triage", "marketing"):
        client.post(PREDICT, headers=as_role("consumer"), json={"purpose": purpose, "rows": [row]})
    text = client.get("/metrics", headers=as_role("operator")).text
    assert 'affidavit_predicted_rows_total{model="toy"} 1.0' in text
    assert 'affidavit_denials_total{action="predict",policy="purpose-outside-charter"} 1.0' in text
    assert 'route="/v1/models/{name}/predict"' in text
    assert "affidavit_ledger_append_seconds_bucket" in text


def test_labels_never_hold_a_callers_words(client, as_role):
    client.get("/v1/models/some-very-odd-name", headers=as_role("consumer"))
    client.get("/no/such/thing/some-very-odd-name")
    assert "odd-name" not in client.get("/metrics", headers=as_role("operator")).text


def test_openapi_describes_every_route_its_errors_and_an_example(client):
    document = client.get("/openapi.json").json()
    routes = [(p, m, o) for p, item in document["paths"].items() for m, o in item.items()]
    assert len(routes) >= 15
    for path, method, operation in routes:
        assert operation["summary"], (path, method)
        assert operation["description"], (path, method)
    predict = document["paths"]["/v1/models/{name}/predict"]["post"]
    assert {"401", "403", "404", "422", "503"} <= set(predict["responses"])
    schema = predict["requestBody"]["content"]["application/json"]["schema"]
    assert schema["examples"][0]["rows"]
    assert "503" in document["info"]["description"]


def test_every_status_that_an_error_maps_to_has_a_title():
    assert set(STATUS.values()) <= set(TITLES)


def test_start_records_the_rules_again_only_when_they_changed(lab, tmp_path):
    for _ in range(2):
        with TestClient(create_app(lab.settings(), clock=lab.clock)):
            pass
    assert len(lab.entries("policy.applied")) == 1
    own = tmp_path / "own.cedar"
    own.write_text('@id("nobody") forbid (principal, action, resource);')
    with TestClient(create_app(lab.settings(policies=own), clock=lab.clock)) as client:
        reply = client.get("/v1/models", headers={"Authorization": f"Bearer {lab.tokens['officer']}"})
    assert reply.json()["policies"] == ["nobody"]
    assert len(lab.entries("policy.applied")) == 2


@pytest.mark.parametrize("answers", [{"decimals": 0, "label_only": 0}, {"decimals": 6, "label_only": 1}])
def test_one_answer_does_not_buy_a_model_whose_answers_are_restricted(lab, as_role, row, answers):
    version, _ = lab.live(name="kept", answers={**answers, "cache": 0})
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        for role in ("consumer", "tester"):
            body = {"purpose": "triage", "rows": [row]}
            answer = client.post("/v1/models/kept/predict", headers=as_role(role), json=body).json()
            path = f"/v1/audit/evidence/{answer['entry']['leaf_index']}"
            mine = client.get(path, headers=as_role(role))
            assert mine.status_code == 200
            assert read_evidence(mine.content).artefacts == {}
            whole = client.get(path, headers=as_role("officer"))
            assert version in read_evidence(whole.content).artefacts


def test_an_exact_answers_evidence_holds_the_model(client, lab, as_role, row):
    body = {"purpose": "triage", "rows": [row]}
    answer = client.post(PREDICT, headers=as_role("consumer"), json=body).json()
    path = f"/v1/audit/evidence/{answer['entry']['leaf_index']}"
    assert lab.version in read_evidence(client.get(path, headers=as_role("consumer")).content).artefacts


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/healthz", "GET, HEAD"), ("/v2", "GET, HEAD"), ("/v2/models/toy/infer", "POST"), (PREDICT, "POST"),
        ("/v1/keys", "GET, HEAD, POST"), ("/v1/models/toy", "GET, HEAD"),
    ],
)  # fmt: skip
def test_method_that_no_route_takes_is_told_which_do(client, path, allowed):
    for method in ("PATCH", "TRACE", "PROPFIND"):
        reply = client.request(method, path)
        assert (reply.status_code, reply.headers["allow"]) == (405, allowed)


def test_head_is_get_without_its_body(client, as_role):
    for path in ("/healthz", "/readyz", "/v2", "/v2/health/live", "/v2/health/ready", "/openapi.json"):
        head, whole = client.head(path), client.get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == whole.headers["content-length"]
    headers = as_role("consumer")
    assert client.head("/v2/models/toy", headers=headers).status_code == 200
    assert client.head("/v2/models/toy").status_code == 401
    assert client.head("/v2/models/toy/infer", headers=headers).headers["allow"] == "POST"
    assert client.head("/nothing").status_code == 404


@pytest.mark.parametrize("query", ["", "?as=a-stranger"])
def test_compressed_rows_are_read_under_the_same_limit(guarded_app, lab, as_role, row, query):
    headers = {**as_role("consumer"), "Content-Encoding": "gzip"}
    body = json.dumps({"purpose": "triage", "rows": [row]}).encode()
    with TestClient(guarded_app) as client:
        sent = {"good": gzip.compress(body), "bomb": gzip.compress(b" " * 1_000_000), "plain": body}
        found = {
            name: client.post(PREDICT + query, headers=headers, content=data) for name, data in sent.items()
        }
    assert {name: reply.status_code for name, reply in found.items()} == {
        "good": 200, "bomb": 413, "plain": 422,
    }  # fmt: skip
    assert len(lab.entries("prediction")) == 1


FLOODS = {
    "rows": ({"rows": [{"": []}] * 3_000}, "rows", 1),
    "values": ({"rows": [{"": []}] * 1_000}, "rows.0.", 50),
    "features": ({"rows": [{str(k): [] for k in range(3_000)}]}, "rows.0.0", 50),
    "members": ({"rows": [{}], **{f"x{k}": 0 for k in range(3_000)}}, "x0", 50),
    "no rows at all": ({"rows": [1] * 1_000}, "rows.0", 50),
    "long names": ({"rows": [{"n" * 50_000: {}}]}, "rows.0." + "n" * 80, 1),
}


@pytest.mark.parametrize("flood", FLOODS)
def test_flood_of_problems_is_named_in_part_and_looked_at_once(client, as_role, flood, monkeypatch):
    """Neither the schema nor the strict parser ever sees it, and nobody reads it a second time."""
    more, first, count = FLOODS[flood]
    body = json.dumps({"purpose": "tri:age", **more})  # the colon makes the quick parser doubt

    def never(*_: object, **__: object) -> None:
        raise AssertionError("looked at by the slow way")

    monkeypatch.setattr("server.fast_json.parse_strict", never)
    monkeypatch.setattr("server.schemas.PredictRequest.model_validate", never)
    reply = client.post(PREDICT, headers=as_role("consumer"), content=body)
    assert (reply.status_code, reply.json()["code"]) == (422, "request.malformed")
    fields = reply.json()["fields"]
    assert (fields[0]["field"], len(fields)) == (first, count)


def test_row_of_far_too_many_features_is_refused_before_it_is_encoded(client, as_role, row, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("was encoded")

    monkeypatch.setattr("server.answers.plain_row", never)
    wide = {**row, **{f"k{number}": 1.5 for number in range(3_000)}}
    body = {"purpose": "triage", "rows": [wide]}
    problem = client.post(PREDICT, headers=as_role("consumer"), json=body).json()
    assert problem["code"] == "predict.row_outside_contract"
    assert problem["detail"] == "row 0, k0: is not in the charter; leave it out"
    assert [field["field"] for field in problem["fields"]] == [f"k{number}" for number in range(50)]


def test_rows_outside_the_contract_are_encoded_once(client, as_role, row, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("was encoded again")

    monkeypatch.setattr("server.service.encode", never)
    body = {"purpose": "triage", "rows": [row, {**row, "age": 500}]}
    problem = client.post(PREDICT, headers=as_role("consumer"), json=body).json()
    assert (problem["code"], problem["fields"][0]["row"]) == ("predict.row_outside_contract", 1)


def test_problems_of_many_rows_are_named_in_part(client, as_role):
    body = {"purpose": "triage", "rows": [{"a": 1, "b": 2, "c": 3}] * 1_000}
    problem = client.post(PREDICT, headers=as_role("consumer"), json=body).json()
    assert (problem["code"], len(problem["fields"])) == ("predict.row_outside_contract", 100)


def test_malformed_request_is_read_once(client, lab):
    reads = []

    def read():
        reads.append(None)
        raise MalformedRequestError("no request")

    async def ask():
        with pytest.raises(MalformedRequestError, match="no request"):
            await client.app.state.context.predicting.answer(
                Principal(id="p", role="consumer"), read, lambda answered: answered
            )

    client.portal.call(ask)
    assert len(reads) == 1


def test_schema_refuses_what_the_first_look_lets_through(client, as_role):
    for body, field in (
        ({"purpose": 1, "rows": [{}]}, "purpose"), ({"purpose": "triage", "rows": []}, "rows"),
        ({"purpose": "triage", "rows": {}}, "rows"), ({"rows": [{}]}, "purpose"),
        ({"purpose": "triage", "rows": [{}], "subject": ""}, "subject"),
    ):  # fmt: skip
        reply = client.post(PREDICT, headers=as_role("consumer"), json=body)
        assert (reply.status_code, reply.json()["fields"][0]["field"]) == (422, field)
    assert client.post(PREDICT, headers=as_role("consumer"), json=[]).status_code == 422
