"""What a call over gRPC shares with a request over HTTP: places, time limits, ids, lines, and a probe."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import threading

import grpc
import pytest
from starlette.testclient import TestClient

import server.oip.grpc_service as service
from server.app import create_app
from server.oip.health import HEALTH, MAX_WATCHERS, NOT_SERVING, SERVICE_UNKNOWN, SERVING, Health
from server.oip.health import HealthCheckRequest as Asked
from server.oip.inference import Inferred
from server.oip.messages import SERVICE, message
from server.oip.tensors import InferAsk
from server.shedding import Shedder
from tests.server.conftest import stocked_lab

WAIT_S = 120  # for what must come: a busy machine is no failure
ROWS = {"age": ("INT64", "int64_contents", 51), "fever": ("BOOL", "bool_contents", True),
        "ward": ("BYTES", "bytes_contents", b"north")}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    found = stocked_lab(tmp_path_factory.mktemp("grpc") / "homes")
    yield found
    found.close()


class Caller:
    """A client of the running server, with everything of the answer in view."""

    def __init__(self, client: TestClient, home) -> None:
        self.client, self.home = client, home
        self.context = client.app.state.context
        self.channel = grpc.insecure_channel(f"127.0.0.1:{client.app.state.grpc_port}")

    def rpc(self, name: str, of: str = SERVICE):
        if of == HEALTH:
            return self.channel.unary_unary(
                f"/{HEALTH}/{name}",
                request_serializer=Asked.SerializeToString,
                response_deserializer=service.HealthCheckResponse.FromString,
            )
        return self.channel.unary_unary(
            f"/{SERVICE}/{name}",
            request_serializer=message(f"{name}Request").SerializeToString,
            response_deserializer=message(f"{name}Response").FromString,
        )

    def key(self, role: str = "consumer") -> tuple[str, str]:
        return "authorization", f"Bearer {self.home.tokens[role]}"

    def ask(self, *metadata: tuple[str, str], role: str = "consumer", timeout=WAIT_S, rows=1, **changed):
        asked = infer_request(rows, **changed)
        return self.rpc("ModelInfer").future(asked, metadata=[self.key(role), *metadata], timeout=timeout)


def infer_request(rows: int = 1, purpose: str = "triage", **words: str):
    asked = message("ModelInferRequest")(model_name="toy")
    asked.parameters["purpose"].string_param = purpose
    for word, value in words.items():
        asked.parameters[word].string_param = value
    for name, (datatype, contents, value) in ROWS.items():
        tensor = asked.inputs.add(name=name, datatype=datatype, shape=[rows])
        getattr(tensor.contents, contents).extend([value] * rows)
    return asked


@pytest.fixture
def running(home):
    """Start a server with these settings."""
    stack = []

    def start(**settings) -> Caller:
        app = create_app(home.settings(grpc_port=0, request_timeout_s=600, **settings), clock=home.clock)
        client = TestClient(app, raise_server_exceptions=False)
        client.__enter__()
        caller = Caller(client, home)
        stack.append((client, caller))
        return caller

    yield start
    for client, caller in stack:
        caller.channel.close()
        client.__exit__(None, None, None)


class Gate:
    """Keeps every prediction until it is opened; `entered` counts those inside."""

    def __init__(self, monkeypatch, caller: Caller) -> None:
        self.entered, self.left = threading.Semaphore(0), threading.Semaphore(0)
        self._caller, self._opened, real = caller, None, service.infer

        async def infer(*args):
            self._opened = self._opened or asyncio.Event()
            self.entered.release()
            try:
                await self._opened.wait()
                return await real(*args)
            finally:
                self.left.release()

        monkeypatch.setattr(service, "infer", infer)

    def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert self.entered.acquire(timeout=WAIT_S)

    def open(self) -> None:
        async def set_it() -> None:
            self._opened.set()

        self._caller.client.portal.call(set_it)


def trailing(call) -> dict[str, str]:
    return dict(call.trailing_metadata())


def test_calls_take_the_places_of_requests_and_are_shed_with_them(running, monkeypatch, home):
    caller = running(max_in_flight=2)
    gate = Gate(monkeypatch, caller)
    under_way = [caller.ask() for _ in range(2)]
    gate.wait_for(2)
    before = len(home.entries())
    for call in (
        caller.ask(),
        caller.ask(role="operator"),
        caller.rpc("ModelReady").future(message("ModelReadyRequest")(name="toy"), metadata=[caller.key()]),
        caller.rpc("ServerMetadata").future(message("ServerMetadataRequest")()),
    ):
        assert call.code() == grpc.StatusCode.UNAVAILABLE
        said = trailing(call)
        assert (said["affidavit-code"], said["retry-after"]) == ("server.overloaded", "2")
    reply = caller.client.get("/v1/models", headers={"Authorization": caller.key()[1]})
    assert (reply.status_code, reply.json()["code"]) == (503, "server.overloaded"), "one number for both"
    assert reply.headers["retry-after"] == "2"
    assert caller.rpc("ServerLive")(message("ServerLiveRequest")()).live
    assert caller.rpc("ServerReady")(message("ServerReadyRequest")()).ready
    assert caller.rpc("Check", HEALTH)(Asked()).status == SERVING
    assert len(home.entries()) == before
    gate.open()
    assert [call.code() for call in under_way] == [grpc.StatusCode.OK] * 2
    assert caller.ask().code() == grpc.StatusCode.OK, "and their places are free again"
    metrics = caller.client.get("/metrics", headers={"Authorization": caller.key("operator")[1]}).text
    assert 'affidavit_shed_requests_total{reason="in_flight"} 5.0' in metrics


def test_caller_that_goes_away_leaves_its_place_and_a_line(running, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="server.access_log")
    caller = running(max_in_flight=1)
    gate = Gate(monkeypatch, caller)
    call = caller.ask()
    gate.wait_for(1)
    assert caller.ask().code() == grpc.StatusCode.UNAVAILABLE
    call.cancel()
    assert gate.left.acquire(timeout=WAIT_S), "the server's half of it ends too"
    assert caller.client.portal.call(asyncio.sleep, 0, "a turn later") == "a turn later"
    assert [line["http.response.status_code"] for line in lines(caplog)] == [503, 499]
    gate.open()
    assert caller.ask().code() == grpc.StatusCode.OK


def test_time_limit_in_the_metadata_is_a_deadline_as_over_http(running, monkeypatch):
    caller = running()
    Gate(monkeypatch, caller)
    call = caller.ask(("x-request-timeout", "0.05"))
    assert call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert trailing(call)["affidavit-code"] == "request.deadline"
    call = caller.ask(("x-request-timeout", "soon"))
    assert call.code() == grpc.StatusCode.INVALID_ARGUMENT


class AbortedError(Exception):
    """A stub's `abort`."""


class Stub:
    """A call whose deadline a test sets."""

    def __init__(self, left_s: float | None) -> None:
        self._left_s, self.trailing = left_s, ()

    def invocation_metadata(self):
        return ()

    def time_remaining(self):
        return self._left_s

    def set_trailing_metadata(self, trailing):
        self.trailing = dict(trailing)

    async def abort(self, kind, detail):
        raise AbortedError(kind, detail)


@pytest.mark.parametrize(
    ("left_s", "limit_s", "kind", "code"),
    [
        (0.0, 600, grpc.StatusCode.DEADLINE_EXCEEDED, "request.deadline"),
        (0.02, 600, grpc.StatusCode.DEADLINE_EXCEEDED, "request.deadline"),
        (None, 0.02, grpc.StatusCode.UNAVAILABLE, "server.busy"),
        (600.0, 0.02, grpc.StatusCode.UNAVAILABLE, "server.busy"),
    ],
)
def test_callers_deadline_shortens_the_servers_limit_and_never_lengthens_it(
    running, left_s, limit_s, kind, code
):
    caller = running()
    context = caller.context
    settings = context.settings.model_copy(update={"request_timeout_s": limit_s})
    context = dataclasses.replace(context, settings=settings)
    made, call = service.InferenceServer(context, "1", Shedder(most=1, target_s=1.0)), Stub(left_s)

    async def never(request, call):
        await asyncio.Event().wait()

    with pytest.raises(AbortedError) as caught:
        caller.client.portal.call(made._guarded("/x", never, False), None, call)
    assert caught.value.args[0] == kind
    assert call.trailing["affidavit-code"] == code
    assert ("retry-after" in call.trailing) == (code == "server.busy")
    assert made._shedder.in_flight == 0


def lines(caplog) -> list[dict]:
    return [record.ecs for record in caplog.records if record.name == "server.access_log"]


def test_call_is_a_line_under_the_callers_id_and_without_its_words(running, home, caplog):
    caplog.set_level(logging.INFO, logger="server.access_log")
    caller, given = running(), "0123456789abcdef" * 2
    good = caller.ask(("x-request-id", given), ("traceparent", f"00-{'ab' * 16}-{'cd' * 8}-01"))
    assert good.code() == grpc.StatusCode.OK
    bad = caller.ask(("x-request-id", "Dr Jekyll"), purpose="marketing")
    assert bad.code() == grpc.StatusCode.PERMISSION_DENIED
    nobody = caller.rpc("ModelReady").future(message("ModelReadyRequest")(name="toy"))
    assert nobody.code() == grpc.StatusCode.UNAUTHENTICATED
    caller.rpc("ServerLive")(message("ServerLiveRequest")())
    caller.rpc("Check", HEALTH)(Asked())
    found = lines(caplog)
    routes = [f"/{SERVICE}/ModelInfer"] * 2 + [f"/{SERVICE}/ModelReady"]
    assert [line["url.path"] for line in found] == routes, "probes that are answered are no lines"
    assert [line["http.response.status_code"] for line in found] == [200, 403, 401]
    assert [line["event.outcome"] for line in found] == ["success", "failure", "failure"]
    assert found[0]["http.request.id"] == given == trailing(good)["x-request-id"]
    assert found[0]["trace.id"] == "ab" * 16
    body = home.entries("prediction")[-1]["body"]
    assert body["request_id"] == given
    assert found[0]["user.id"] == found[1]["user.id"] == body["principal"]
    assert "user.id" not in found[2]
    assert found[1]["http.request.id"] == trailing(bad)["x-request-id"] != given
    assert home.entries("prediction.denied")[-1]["body"]["request_id"] == trailing(bad)["x-request-id"]
    assert "Jekyll" not in json.dumps(found)
    assert {line["http.request.method"] for line in found} == {"gRPC"}


def test_fault_of_ours_is_internal_and_its_text_stays_out_of_the_log(running, monkeypatch, caplog):
    async def breaks(*_):
        raise RuntimeError("row of Dr Jekyll")

    monkeypatch.setattr(service, "infer", breaks)
    call = running().ask()
    assert (call.code(), trailing(call)["affidavit-code"]) == (grpc.StatusCode.INTERNAL, "server.internal")
    assert "Jekyll" not in call.details()
    said = [record.getMessage() for record in caplog.records if record.name == "server.oip.grpc_service"]
    assert said == ["gRPC code=server.internal: RuntimeError"]


def test_quota_tells_when_to_come_back_and_too_many_rows_do_not(running, home):
    home.clock.moment = home.clock.moment.replace(second=15, microsecond=0)
    home.clock.forward(minutes=1)
    caller = running(quota_rows_per_minute=2)
    assert caller.ask(rows=2).code() == grpc.StatusCode.OK
    over = caller.ask()
    assert over.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (trailing(over)["affidavit-code"], trailing(over)["retry-after"]) == ("predict.quota", "45")
    assert int(trailing(over)["affidavit-entry"]) == home.entries("prediction.denied")[-1]["leaf_index"]
    assert "affidavit-entry" not in trailing(caller.ask())
    many = caller.ask(rows=3)
    assert many.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "retry-after" not in trailing(many)


def test_answers_parameters_keep_their_kinds():
    asked = InferAsk(id="", parameters={}, inputs=(), outputs={}, binary=False)
    values = {"review_required": True, "off": False, "leaf_index": 1, "model_digest": "ab"}
    made = service._reply(
        Inferred(ask=asked, model="toy", version="v", parameters=values, outputs=())
    ).parameters
    assert {name: value.WhichOneof("parameter_choice") for name, value in made.items()} == {
        "review_required": "bool_param",
        "off": "bool_param",
        "leaf_index": "int64_param",
        "model_digest": "string_param",
    }
    assert made["review_required"].bool_param is True


# grpc.health.v1


def test_probe_is_answered_as_readyz_is_and_needs_no_key(running):
    caller = running()
    check = caller.rpc("Check", HEALTH)
    for named in ("", SERVICE, HEALTH):
        assert check(Asked(service=named)).status == SERVING
    with pytest.raises(grpc.RpcError) as caught:
        check(Asked(service="other"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    caller.context.readiness.state = "draining"
    assert check(Asked()).status == NOT_SERVING
    assert caller.client.get("/readyz").status_code == 503
    caller.context.readiness.state = "ready"
    assert check(Asked(service=SERVICE)).status == SERVING


def test_messages_are_those_of_grpcs_own_package():
    """Against the messages of the package that everybody else uses, where it is installed."""
    theirs = pytest.importorskip("grpc_health.v1.health_pb2")
    request = theirs.HealthCheckRequest(service=SERVICE).SerializeToString()
    assert Asked.FromString(request).service == SERVICE
    named = {"SERVING": SERVING, "NOT_SERVING": NOT_SERVING, "SERVICE_UNKNOWN": SERVICE_UNKNOWN}
    for name, ours in named.items():
        told = service.HealthCheckResponse(status=ours).SerializeToString()
        assert theirs.HealthCheckResponse.FromString(told).status == getattr(theirs.HealthCheckResponse, name)


class Watcher:
    def __init__(self) -> None:
        self.told, self.changed, self.aborted = [], asyncio.Event(), None

    async def write(self, response) -> None:
        self.told.append(response.status)
        self.changed.set()

    async def abort(self, kind, detail) -> None:
        raise AbortedError(kind, detail)

    async def hears(self) -> list[int]:
        await asyncio.wait_for(self.changed.wait(), WAIT_S)
        self.changed.clear()
        return self.told


def test_who_watches_hears_of_each_change_once_and_is_let_go_at_the_end():
    async def watch() -> None:
        problems, watcher, stranger = [""], Watcher(), Watcher()
        health = Health(lambda: problems[0], frozenset({SERVICE}), every_s=0.001)
        tasks = [
            asyncio.ensure_future(health.watch(Asked(service=SERVICE), watcher)),
            asyncio.ensure_future(health.watch(Asked(service="other"), stranger)),
        ]
        assert await watcher.hears() == [SERVING]
        problems[0] = "the log cannot be read"
        assert await watcher.hears() == [SERVING, NOT_SERVING]
        problems[0] = ""
        assert await watcher.hears() == [SERVING, NOT_SERVING, SERVING]
        health.stop()
        await asyncio.wait_for(asyncio.gather(*tasks), WAIT_S)
        assert watcher.told == [SERVING, NOT_SERVING, SERVING, NOT_SERVING]
        assert stranger.told == [SERVICE_UNKNOWN]

    asyncio.run(watch())


def test_only_so_many_watch_and_who_goes_leaves_a_place():
    async def watch() -> None:
        health = Health(lambda: "", frozenset(), every_s=600.0)
        watchers = [Watcher() for _ in range(MAX_WATCHERS)]
        tasks = [asyncio.ensure_future(health.watch(Asked(), watcher)) for watcher in watchers]
        for watcher in watchers:
            await watcher.hears()
        with pytest.raises(AbortedError) as caught:
            await health.watch(Asked(), Watcher())
        assert caught.value.args[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
        tasks[0].cancel()
        await asyncio.gather(tasks[0], return_exceptions=True)
        last = Watcher()
        tasks[0] = asyncio.ensure_future(health.watch(Asked(), last))
        assert await last.hears() == [SERVING]
        health.stop()
        await asyncio.wait_for(asyncio.gather(*tasks), WAIT_S)

    asyncio.run(watch())


def test_server_that_stops_waits_for_no_watcher(home):
    app = create_app(home.settings(grpc_port=0, request_timeout_s=3_600), clock=home.clock)  # its grace
    with TestClient(app) as client:
        channel = grpc.insecure_channel(f"127.0.0.1:{client.app.state.grpc_port}")
        watch = channel.unary_stream(
            f"/{HEALTH}/Watch",
            request_serializer=Asked.SerializeToString,
            response_deserializer=service.HealthCheckResponse.FromString,
        )(Asked(), timeout=WAIT_S)
        assert next(watch).status == SERVING
    assert [reply.status for reply in watch] == [NOT_SERVING]
    channel.close()
