"""The runtime: exports checked at load, swaps without a failed request, canaries, shadows, batches."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import pickle
import threading
import time

import pytest
from starlette.testclient import TestClient

from audit.entries import VersionTransition, signing_payload
from audit.models import model_file
from audit.runtime_bodies import VersionExported
from federation.onnx_export import export_onnx
from server.app import create_app
from server.batching import WORTH_S, Batching
from server.errors import RowContractError
from tests.server.conftest import LAYERS, WEIGHTS
from tests.waiting import took_at_best, wait_until

URL = "/v1/models/toy/predict"
OTHER = [0.5, 1.0, -0.25, 0.75, -0.5, 0.5, 0.5]


def ask(client, headers, row, **extra):
    return client.post(URL, headers=headers, json={"purpose": "triage", "rows": [row], **extra})


def exported(lab, version, data, **changed):
    """Enter an export of `version`, whatever `data` is."""
    body = VersionExported(
        model="toy", version=version, charter=lab.charter, format="onnx",
        digest=lab.coordinator.blobs.put(data), size_bytes=len(data), opset=17, precision="float64",
        tolerance="0.0000005", difference="0", rows=16, runtime="test",
    )  # fmt: skip
    body = dataclasses.replace(body, **changed)
    lab.coordinator.append(body, "coordinator")
    return body


def second(lab, weights=OTHER):
    """Register and approve another version; return its digest."""
    version = lab.register(lab.charter, weights=weights)
    lab.move(version, lab.charter, "candidate", "approved")
    return version


def swap(lab, out, into, from_state="retired"):
    """As `federation.service` does: the new one becomes live, then the old one is retired."""
    lab.move(into, lab.charter, from_state, "live")
    lab.move(out, lab.charter, "live", "retired")


def trial(lab, version, before, after, share=0):
    """Move a version into or out of a trial, with its share under the signature."""
    unsigned = VersionTransition(
        version=version, model="toy", charter=lab.charter, from_state=before, to_state=after,
        gate_results=lab.registered, previous_transition=lab.previous["toy"], officer=lab.officer.text,
        reason="trial", signature="", share=share,
    )  # fmt: skip
    import base64

    domain, payload = signing_payload(unsigned)
    signature = base64.b64encode(lab.officer.sign(domain, payload)).decode()
    body = dataclasses.replace(unsigned, signature=signature)
    lab.previous["toy"] = lab.coordinator.append(body, "officer").leaf_hash.hex()


# exports


def test_export_named_by_the_log_is_what_answers(client, lab, as_role, row):
    before = ask(client, as_role("consumer"), row).json()["answers"]
    exported(lab, lab.version, export_onnx(LAYERS, WEIGHTS, 4))
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as fresh:
        assert ask(fresh, as_role("consumer"), row).json()["answers"] == before


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(print),
        b"",
        export_onnx(LAYERS, OTHER, 4),
        export_onnx(LAYERS, WEIGHTS, 4)[:-5],
        export_onnx(LAYERS, WEIGHTS, 4) + b"\0" * (2 << 20),
    ],
    ids=["pickle", "nothing", "another version's", "cut short", "huge"],
)
def test_any_other_file_than_the_export_answers_nobody(lab, as_role, row, data):
    exported(lab, lab.version, data)
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        reply = ask(client, as_role("consumer"), row)
        assert (reply.status_code, reply.json()["code"]) == (503, "models.artefact_unusable")
        assert lab.entries("prediction") == []
        assert client.get("/readyz").status_code == 503


def test_altered_weights_answer_nobody(lab, as_role, row):
    path = lab.folder / "coordinator" / "blobs" / lab.version[:2] / lab.version
    path.write_bytes(model_file(LAYERS, OTHER))
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        assert ask(client, as_role("consumer"), row).json()["code"] == "models.artefact_unusable"


# swapping


def test_swap_under_load_fails_no_request_and_every_answer_is_its_versions(lab, as_role, row):
    versions = {lab.version: "0.296817"}
    other = second(lab)
    stop, replies = threading.Event(), []
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:

        def work():
            while not stop.is_set():
                replies.append(ask(client, as_role("consumer"), row))

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()

        def served():
            """Wait until all three were told something since now."""
            at = len(replies)
            wait_until(lambda: len(replies) >= at + 6)

        swap(lab, lab.version, other, from_state="approved")
        for _ in range(5):
            served()
            swap(lab, other, lab.version)
            served()
            swap(lab, lab.version, other)
        served()
        stop.set()
        for thread in threads:
            thread.join()
    assert {reply.status_code for reply in replies} == {200}
    answers = [reply.json() for reply in replies]
    seen = {(answer["version"], str(answer["answers"][0]["probability"])) for answer in answers}
    assert len(seen) == 2
    assert (lab.version, versions[lab.version]) in seen
    entries = {entry["leaf_index"]: entry for entry in lab.entries()}
    for answer in answers:
        body = entries[answer["entry"]["leaf_index"]]["body"]
        assert body["version"] == answer["version"]
        made_live = [
            entry["body"]["version"]
            for index, entry in entries.items()
            if entry["type"] == "version.transition"
            and entry["body"]["to_state"] == "live"
            and index < answer["entry"]["leaf_index"]
        ]
        assert made_live[-1] == answer["version"]
    assert len([entry for entry in entries.values() if entry["type"] == "prediction"]) == len(answers)


def test_roll_back_counts_for_the_next_entry_within_a_second(client, lab, as_role, row):
    other = second(lab)
    swap(lab, lab.version, other, from_state="approved")
    assert ask(client, as_role("consumer"), row).json()["version"] == other
    versions = itertools.cycle([(other, lab.version), (lab.version, other)])

    def roll_back():
        out, into = next(versions)
        swap(lab, out, into)
        assert ask(client, as_role("consumer"), row).json()["version"] == into

    assert took_at_best(roll_back, 1.0) < 1.0


def test_aliases_name_versions(client, lab, as_role, row):
    other = second(lab)
    assert ask(client, as_role("consumer"), row, version="live").json()["version"] == lab.version
    reply = ask(client, as_role("consumer"), row, version="candidate")
    assert reply.status_code == 403
    assert lab.entries("prediction.denied")[-1]["body"]["policies"] == ["version-not-live"]
    swap(lab, lab.version, other, from_state="approved")
    assert ask(client, as_role("consumer"), row, version="live").json()["version"] == other


# trials


def test_canary_answers_its_share(client, lab, as_role, row):
    other = second(lab)
    trial(lab, other, "approved", "canary", share=40)
    got = [ask(client, as_role("consumer"), row).json()["version"] for _ in range(60)]
    assert 8 <= got.count(other) <= 45
    assert got.count(other) + got.count(lab.version) == 60
    body = next(entry["body"] for entry in lab.entries("prediction") if entry["body"]["version"] == other)
    assert body["transition"] == lab.previous["toy"]
    trial(lab, other, "canary", "approved")
    assert {ask(client, as_role("consumer"), row).json()["version"] for _ in range(9)} == {lab.version}


def test_caller_cannot_choose_the_version_by_a_request_id(client, lab, as_role, row):
    other = second(lab)
    trial(lab, other, "approved", "canary", share=50)
    headers = {**as_role("consumer"), "X-Request-ID": "ab" * 16}
    got = [ask(client, headers, row).json()["version"] for _ in range(40)]
    assert {other, lab.version} == set(got), "an id that met the canary once does not meet it always"


@pytest.mark.parametrize(("state", "share"), [("canary", 0), ("canary", 100), ("canary", -1), ("shadow", 5)])
def test_share_that_fits_no_state_does_not_count(client, lab, as_role, row, state, share):
    other = second(lab)
    trial(lab, other, "approved", state, share=share)
    versions = client.get("/v1/models/toy", headers=as_role("officer")).json()["versions"]
    assert {found["version"]: found["state"] for found in versions}[other] == "approved"


def test_shadow_is_logged_sealed_and_told_to_nobody(lab, as_role, row):
    other = second(lab)
    trial(lab, other, "approved", "shadow")
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        answer = ask(client, as_role("consumer"), row)
        named = ask(client, as_role("consumer"), row, subject="MRN-7")
        assert {answer.json()["version"], named.json()["version"]} == {lab.version}
        assert other not in answer.text + named.text
    shadowed = lab.entries("prediction.shadowed")
    assert [entry["body"]["version"] for entry in shadowed] == [other, other]
    assert [entry["body"]["answered"] for entry in shadowed] == [
        reply.json()["entry"]["leaf_hash"] for reply in (answer, named)
    ]
    assert shadowed[1]["body"]["subject"] == named.json()["sealed"]["subject"]
    assert shadowed[0]["body"]["subject"] != shadowed[1]["body"]["subject"]
    assert not {"probability", "well", "ill"} & set(json.dumps(shadowed).replace('"', " ").split())


# batching


class Slow:
    """A model whose runs take long, and that counts them."""

    def __init__(self):
        self.runs = []

    def forward(self, rows, site):
        self.runs.append(len(rows))
        time.sleep(4 * WORTH_S)
        if any(row[0] < 0 for row in rows):
            raise RowContractError("negative")
        return [[row[0] * 2] for row in rows]


def test_rows_that_arrive_together_share_a_run_and_a_lone_row_has_its_own():
    async def main():
        batching, slow = Batching(), Slow()
        batching.in_flight = 1
        assert await batching.run(slow, [[1.0]], None) == [[2.0]]
        batching.in_flight = 20
        found = await asyncio.gather(*(batching.run(slow, [[float(k)]], None) for k in range(20)))
        assert found == [[[2.0 * k]] for k in range(20)]
        assert slow.runs == [1, 20]
        assert batching.shared_runs == 1
        outcome = await asyncio.gather(
            batching.run(slow, [[1.0]], None), batching.run(slow, [[-1.0]], None), return_exceptions=True
        )
        assert all(isinstance(each, RowContractError) for each in outcome)

    asyncio.run(main())


def test_rows_of_two_event_loops_share_no_run():
    batching, slow = Batching(), Slow()
    batching._cost_s[id(slow)] = 1.0
    batching.in_flight = 20
    loops = [asyncio.new_event_loop() for _ in range(2)]
    try:
        asked = [loop.create_task(batching.run(slow, [[1.0]], None)) for loop in loops for _ in range(2)]
        for loop in loops:  # each goes one turn: its rows gather, and are not run yet
            loop.call_soon(loop.stop)
            loop.run_forever()
        assert slow.runs == []
        loops[0].run_until_complete(asyncio.wait(asked[:2]))
        assert slow.runs == [2]
        loops[1].run_until_complete(asyncio.wait(asked[2:]))
        assert [each.result() for each in asked] == [[[2.0]]] * 4
    finally:
        for loop in loops:
            loop.close()


class Ticking:
    """A clock that a model moves."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


class Timed:
    """A model whose run takes what the test says, by that clock."""

    def __init__(self, clock, *takes_s):
        self.clock = clock
        self.takes_s = list(takes_s)

    def forward(self, rows, site):
        self.clock.now_s += self.takes_s.pop(0) if len(self.takes_s) > 1 else self.takes_s[0]
        return [[0.0]] * len(rows)


def test_cheap_model_is_never_kept_waiting():
    async def main():
        clock = Ticking()
        batching = Batching(clock=clock)
        batching.in_flight = 20
        cheap = Timed(clock, WORTH_S / 2)
        await asyncio.gather(*(batching.run(cheap, [[1.0]], None) for _ in range(20)))
        assert batching.shared_runs == 0

    asyncio.run(main())


def test_one_hiccup_does_not_have_a_cheap_model_shared_for_ever():
    async def main():
        clock = Ticking()
        batching = Batching(clock=clock)
        batching.in_flight = 20
        cheap = Timed(clock, 10 * WORTH_S, WORTH_S / 10)
        for _ in range(40):
            await asyncio.gather(*(batching.run(cheap, [[1.0]], None) for _ in range(4)))
        shared = batching.shared_runs
        assert shared > 0
        await asyncio.gather(*(batching.run(cheap, [[1.0]], None) for _ in range(20)))
        assert batching.shared_runs == shared

    asyncio.run(main())
