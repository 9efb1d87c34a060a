"""What a caller over quota is told: 429 with Retry-After, whatever else stands against it, and one entry."""

from __future__ import annotations

import asyncio
from importlib.resources import files

import httpx
from starlette.testclient import TestClient

from server.app import create_app

PREDICT = "/v1/models/toy/predict"


def ask(client, headers, row, count=1):
    return client.post(PREDICT, headers=headers, json={"purpose": "triage", "rows": [row] * count})


def test_exhausted_quota_is_429_with_retry_after_and_one_entry(lab, as_role, row):
    settings = lab.settings(quota_rows_per_minute=3)
    lab.clock.moment = lab.clock.moment.replace(second=15, microsecond=0)
    with TestClient(create_app(settings, clock=lab.clock)) as client:
        assert ask(client, as_role("consumer"), row, 3).status_code == 200
        replies = [ask(client, as_role("consumer"), row) for _ in range(4)]
        assert [reply.status_code for reply in replies] == [429] * 4
        assert {reply.headers["retry-after"] for reply in replies} == {"45"}
        first = replies[0].json()
        assert (first["code"], first["policies"]) == ("predict.quota", ["quota-exhausted"])
        (denied,) = lab.entries("prediction.denied")
        assert (denied["leaf_index"], denied["body"]["reason"]) == (first["entry"]["leaf_index"], "quota")
        assert "entry" not in replies[1].json()
        assert ask(client, as_role("tester"), row).status_code == 200, "another principal"
        lab.clock.forward(seconds=45)
        assert ask(client, as_role("consumer"), row).status_code == 200


def test_quota_hides_no_other_reason_and_only_the_first_refusal_is_an_entry(lab, as_role, row):
    lab.clock.moment = lab.clock.moment.replace(second=15, microsecond=0)
    with TestClient(create_app(lab.settings(quota_rows_per_minute=2), clock=lab.clock)) as client:
        body = {"purpose": "marketing", "rows": [row]}
        within = [client.post(PREDICT, headers=as_role("consumer"), json=body) for _ in range(2)]
        assert {(reply.status_code, reply.json()["code"]) for reply in within} == {(403, "predict.denied")}
        over = [client.post(PREDICT, headers=as_role("consumer"), json=body) for _ in range(6)]
        assert {(reply.status_code, reply.json()["code"]) for reply in over} == {(429, "predict.quota")}
        assert {reply.headers["retry-after"] for reply in over} == {"45"}
        reasons = ["purpose-outside-charter", "quota-exhausted"]
        assert all(reply.json()["policies"] == reasons for reply in over)
        assert ["entry" in reply.json() for reply in over] == [True] + [False] * 5
        denied = [entry["body"] for entry in lab.entries("prediction.denied")]
        assert [(body["reason"], body["policies"]) for body in denied] == [
            ("policy", ["purpose-outside-charter"]),
            ("policy", ["purpose-outside-charter"]),
            ("quota", reasons),
        ]
        metrics = client.get("/metrics", headers=as_role("operator")).text
        assert 'affidavit_denials_total{action="predict",policy="quota-exhausted"} 6.0' in metrics


def test_request_that_no_window_has_room_for_is_told_to_send_fewer_rows(lab, as_role, row):
    """Waiting would never help it, so it is not told to; and it takes nothing from the window."""
    settings = lab.settings(quota_rows_per_minute=5, quota_rows_per_day=3)
    with TestClient(create_app(settings, clock=lab.clock)) as client:
        for _ in range(3):
            reply = ask(client, as_role("consumer"), row, 4)
            assert (reply.status_code, reply.json()["code"]) == (422, "request.malformed")
            assert "retry-after" not in reply.headers
            assert "send fewer" in reply.json()["fields"][0]["problem"]
        inputs = [
            {"name": "age", "datatype": "INT64", "shape": [4], "data": [50] * 4},
            {"name": "fever", "datatype": "BOOL", "shape": [4], "data": [True] * 4},
            {"name": "ward", "datatype": "BYTES", "shape": [4], "data": ["north"] * 4},
        ]
        body = {"inputs": inputs, "parameters": {"purpose": "triage"}}
        reply = client.post("/v2/models/toy/infer", headers=as_role("consumer"), json=body)
        assert (reply.status_code, reply.headers["affidavit-code"]) == (422, "request.malformed")
        assert lab.entries("prediction.denied") == []
        assert ask(client, as_role("consumer"), row, 3).status_code == 200


def test_policy_that_names_the_quota_without_a_count_behind_it_is_an_entry_each_time(lab, as_role, row):
    """Rules are the officers' to write: what they call `quota-exhausted` hides no refusal from the log."""
    shipped = files("server.policies").joinpath("access.cedar").read_text(encoding="utf-8")
    rules = lab.folder / "rules.cedar"
    rules.write_text(shipped.replace("when { context.over_quota }", "when { !context.over_quota }"))
    with TestClient(create_app(lab.settings(policies=rules), clock=lab.clock)) as client:
        assert [ask(client, as_role("consumer"), row).status_code for _ in range(3)] == [429] * 3
    assert len(lab.entries("prediction.denied")) == 3


def test_two_servers_share_one_quota(lab, as_role, row):
    settings = lab.settings(quota_rows_per_day=5)
    with (
        TestClient(create_app(settings, clock=lab.clock)) as one,
        TestClient(create_app(settings, clock=lab.clock)) as two,
    ):
        codes = [ask(client, as_role("consumer"), row).status_code for client in (one, two) * 4]
    assert codes == [200] * 5 + [429] * 3


# counted together


def test_crowd_under_a_quota_is_answered_as_far_as_it_goes(lab, as_role, row):
    with TestClient(create_app(lab.settings(quota_rows_per_day=7), clock=lab.clock)) as client:

        async def ask() -> list[int]:
            transport = httpx.ASGITransport(client.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as caller:
                body = {"purpose": "triage", "rows": [row]}
                replies = await asyncio.gather(
                    *(caller.post(PREDICT, headers=as_role("consumer"), json=body) for _ in range(12))
                )
            return [reply.status_code for reply in replies]

        codes = client.portal.call(ask)
    assert sorted(codes) == [200] * 7 + [429] * 5
    assert len(lab.entries("prediction")) == 7
    assert len(lab.entries("prediction.denied")) == 1
