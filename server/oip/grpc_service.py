"""The protocol over gRPC: the six calls, behind the same keys, policies and log as the REST routes.

The caller's key travels in the metadata as `authorization: Bearer …`, what the answer is for in the
parameter `purpose` or the metadata `affidavit-purpose`. Errors are gRPC statuses; the trailing metadata
`affidavit-code` holds the stable code, `affidavit-entry` the leaf that records a refusal, `retry-after` the
seconds after which another try may do, `x-request-id` the id of the entry and the log lines.

What the outermost layer does for HTTP (`server.guard`) is done here for each call: an id, a place among the
worker's requests, a time limit that the caller's deadline shortens, a measurement and a line. A message is
read before its call is known, so a call is told to come back after it was read, not before.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from anyio import to_thread

from audit.principal import AccessDeniedError, Principal, Question, require
from federation.errors import FederationError
from server.context import Context
from server.errors import (
    STATUS,
    DeadlineError,
    MalformedRequestError,
    OverloadedError,
    SettingsError,
    TooBusyError,
    UnauthenticatedError,
)
from server.logs import is_logged, log_request, marked
from server.marks import Marks
from server.oip.codec import asked_as_binary
from server.oip.health import HEALTH, Health, HealthCheckRequest, HealthCheckResponse
from server.oip.inference import (
    EXTENSIONS,
    PURPOSE,
    Inference,
    Inferred,
    infer,
    is_ready,
    metadata,
    served_version,
)
from server.oip.messages import RPCS, SERVICE, message
from server.oip.tensors import MAX_TENSORS, InferAsk, Tensor, TensorError, from_raw, size_of, to_raw
from server.shedding import Shedder

_logger = logging.getLogger(__name__)

_STATUS: Final = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_ALWAYS: Final = frozenset({"ServerLive", "ServerReady"})  # answered however many requests there are
_GONE: Final = 499  # in the log, of a caller that ended its call
_CONTENTS: Final = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


@dataclass(slots=True)
class _Call:
    """One call, as its handler sees it."""

    metadata: Mapping[str, str]
    marks: Marks
    principal: str = field(default="")


Handler = Callable[[Any, _Call], Awaitable[Any]]


class InferenceServer:
    """One gRPC server of one process; `start`, then `stop`."""

    def __init__(self, context: Context, version: str, shedder: Shedder) -> None:
        """`shedder` is the worker's, which counts what comes over HTTP too."""
        self._context, self._version, self._shedder = context, version, shedder
        self._health = Health(context.readiness.problem, frozenset({SERVICE}))
        self._server: Any = None
        self.port = 0

    async def start(self, address: str) -> int:
        """Listen on `address` ("host:port", port 0 for a free one); return the port.

        Raises:
            SettingsError: the address is taken.
        """
        limit = self._context.settings.max_body_bytes
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.so_reuseport", int(self._context.settings.workers > 1)),
            ]
        )
        handlers = {
            rpc: grpc.unary_unary_rpc_method_handler(
                self._guarded(f"/{SERVICE}/{rpc}", getattr(self, f"_{_snake(rpc)}"), rpc in _ALWAYS),
                request_deserializer=message(f"{rpc}Request").FromString,
                response_serializer=message(f"{rpc}Response").SerializeToString,
            )
            for rpc in RPCS
        }
        forms = {
            "request_deserializer": HealthCheckRequest.FromString,
            "response_serializer": HealthCheckResponse.SerializeToString,
        }
        health = {
            "Check": grpc.unary_unary_rpc_method_handler(
                self._guarded(f"/{HEALTH}/Check", self._check, True), **forms
            ),
            "Watch": grpc.unary_stream_rpc_method_handler(self._health.watch, **forms),
        }
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(SERVICE, handlers),
                grpc.method_handlers_generic_handler(HEALTH, health),
            )
        )
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise SettingsError(f"gRPC cannot listen on {address}; choose another grpc_port") from error
        await self._server.start()
        return self.port

    async def stop(self, grace_s: float) -> None:
        """Take nothing new, and finish what is under way within `grace_s`."""
        self._health.stop()
        if self._server is not None:
            await self._server.stop(grace_s)

    def _guarded(self, route: str, handler: Handler, always: bool) -> Callable[[Any, Any], Awaitable[Any]]:
        monitoring = self._context.monitoring

        async def call(request: Any, call_context: Any) -> Any:
            metadata = _metadata(call_context)
            marks = Marks.of_headers((name.encode(), value.encode()) for name, value in metadata.items())
            made = _Call(metadata, marks)
            begun, entered, kind, status = time.perf_counter(), False, grpc.StatusCode.OK, 200
            trailing = [("x-request-id", marks.request_id)]
            monitoring.tallies.enter()
            with marked(marks.logged):
                try:
                    if not always:
                        self._shedder.enter()
                        entered = True
                    answer = await self._in_time(handler, request, made, call_context.time_remaining())
                    call_context.set_trailing_metadata(trailing)
                    return answer
                except asyncio.CancelledError:  # the caller ended the call, or its deadline did
                    kind, status = grpc.StatusCode.CANCELLED, _GONE
                    raise
                except Exception as error:  # noqa: BLE001 - the one place where errors become gRPC statuses
                    if isinstance(error, OverloadedError):
                        monitoring.shed.labels("in_flight").inc()
                    status, kind, detail, said = _told(error)
                    trailing += said
                finally:
                    seconds = time.perf_counter() - begun
                    monitoring.tallies.leave()
                    if entered:
                        self._shedder.leave(seconds if _tells_load(request) else None)
                    monitoring.requests.labels("gRPC", route, kind.name).inc()
                    monitoring.seconds.labels(route).observe(seconds)
                    if self._context.settings.access_log and (status >= 400 or not always) and is_logged():
                        log_request(
                            method="gRPC",
                            route=route,
                            status=status,
                            seconds=seconds,
                            principal=made.principal,
                            marks=marks.logged,
                        )
            call_context.set_trailing_metadata(trailing)
            return await call_context.abort(kind, detail)

        return call

    async def _in_time(self, handler: Handler, request: Any, made: _Call, left_s: float | None) -> Any:
        """Answer within the server's limit, or the caller's deadline where that is sooner.

        Raises:
            DeadlineError: the caller's deadline passed.
            TooBusyError: the server's limit did.
        """
        most_s = self._context.settings.request_timeout_s
        limit_s = min(made.marks.timeout_s(most_s), most_s if left_s is None else left_s)
        try:
            async with asyncio.timeout(limit_s) as limit:
                return await handler(request, made)
        except TimeoutError as error:
            if limit.expired() and limit_s < most_s:
                raise DeadlineError(f"no answer within {limit_s:g} s") from error
            raise TooBusyError("no answer in time; try again") from error

    async def _principal(self, made: _Call) -> Principal:
        scheme, _, key = made.metadata.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise UnauthenticatedError("an API key is needed: send the metadata `authorization: Bearer …`")
        principal = await self._context.identities.holder(key)
        made.principal = principal.id
        return principal

    async def _reader(self, made: _Call) -> None:
        principal = await self._principal(made)
        try:
            require(self._context.authorizer, principal, Question(action="models.read", resource="service"))
        except AccessDeniedError as denied:
            await self._context.denials.record(denied, made.marks.request_id)
            raise

    async def _check(self, request: Any, made: _Call) -> Any:
        return await self._health.check(request)

    async def _server_live(self, request: Any, made: _Call) -> Any:
        return message("ServerLiveResponse")(live=True)

    async def _server_ready(self, request: Any, made: _Call) -> Any:
        problem = await to_thread.run_sync(self._context.readiness.problem)
        return message("ServerReadyResponse")(ready=not problem)

    async def _model_ready(self, request: Any, made: _Call) -> Any:
        await self._reader(made)
        self._context.live.refresh()
        served = served_version(self._context, request.name, request.version)
        good = await to_thread.run_sync(is_ready, self._context, served)
        return message("ModelReadyResponse")(ready=good)

    async def _server_metadata(self, request: Any, made: _Call) -> Any:
        return message("ServerMetadataResponse")(
            name="affidavit", version=self._version, extensions=EXTENSIONS
        )

    async def _model_metadata(self, request: Any, made: _Call) -> Any:
        await self._reader(made)
        self._context.live.refresh()
        served = served_version(self._context, request.name, request.version)
        return message("ModelMetadataResponse")(**metadata(self._context, served))

    async def _model_infer(self, request: Any, made: _Call) -> Any:
        principal = await self._principal(made)
        inference = Inference(
            self._context,
            request.model_name,
            request.model_version,
            lambda: read_ask(request),
            purpose=made.metadata.get(PURPOSE, ""),
            request_id=made.marks.request_id,
        )
        return await infer(self._context, principal, inference, _reply)


def _reply(answer: Inferred) -> Any:
    reply = message("ModelInferResponse")(
        model_name=answer.model, model_version=answer.version, id=answer.ask.id
    )
    for name, value in answer.parameters.items():
        if isinstance(value, bool):  # which is an int too
            reply.parameters[name].bool_param = value
        elif isinstance(value, int):
            reply.parameters[name].int64_param = value
        else:
            reply.parameters[name].string_param = value
    for tensor in answer.outputs:
        line = reply.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        if answer.ask.binary:
            reply.raw_output_contents.append(to_raw(tensor))
        elif tensor.datatype == "BYTES":
            line.contents.bytes_contents.extend(str(value).encode() for value in tensor.values)
        else:
            getattr(line.contents, _CONTENTS[tensor.datatype]).extend(tensor.values)
    return reply


def read_ask(request: Any) -> InferAsk:
    """Read a `ModelInferRequest`. Where its inputs are raw, so are the answer's outputs.

    Raises:
        MalformedRequestError: its tensors do not add up.
    """
    raw = list(request.raw_input_contents)
    if len(request.inputs) > MAX_TENSORS:
        raise MalformedRequestError(f"inputs: more than {MAX_TENSORS} tensors")
    if raw and len(raw) != len(request.inputs):
        raise MalformedRequestError(f"{len(request.inputs)} inputs, and raw contents of {len(raw)}")
    tensors = []
    for number, item in enumerate(request.inputs):
        shape = tuple(item.shape)
        if raw:
            if item.HasField("contents"):
                raise TensorError(item.name, "has contents and raw contents; give one of them")
            values: Any = from_raw(item.name, item.datatype, shape, raw[number])
        else:
            values = _contents(item, shape)
        tensors.append(Tensor(name=item.name, datatype=item.datatype, shape=shape, values=values))
    return InferAsk(
        id=request.id,
        parameters=_parameters(request.parameters),
        inputs=tuple(tensors),
        outputs={
            item.name: asked_as_binary(item.name, _parameters(item.parameters)) for item in request.outputs
        },
        binary=bool(raw),
    )


def _contents(item: Any, shape: tuple[int, ...]) -> list[Any]:
    field = _CONTENTS.get(item.datatype)
    if field is None:
        raise TensorError(item.name, f"datatype {item.datatype[:20]!r} has no contents; send it raw")
    values = list(getattr(item.contents, field))
    size = size_of(item.name, shape)
    if len(values) != size:
        raise TensorError(item.name, f"{field} has {len(values)} values, its shape {size}")
    if item.datatype == "BYTES":
        try:
            return [value.decode() for value in values]
        except UnicodeDecodeError as error:
            raise TensorError(item.name, "holds BYTES that are no UTF-8 text") from error
    return values


def _parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in given.items():
        chosen = value.WhichOneof("parameter_choice")
        found[name] = getattr(value, chosen) if chosen else None
    return found


def _metadata(call_context: Any) -> dict[str, str]:
    pairs = call_context.invocation_metadata() or ()
    return {key: value for key, value in pairs if isinstance(value, str)}


def _tells_load(request: Any) -> bool:
    """Whether how long a call took says how busy the worker is: not of one that waits for witnesses."""
    return isinstance(request, message("ModelInferRequest")) and "wait" not in request.parameters


def _told(error: Exception) -> tuple[int, Any, str, list[tuple[str, str]]]:
    """The status that HTTP would have, gRPC's, what is said, and the trailing metadata that belongs to it."""
    code = str(getattr(error, "code", "server.internal"))
    status = STATUS.get(code)
    if status is None:
        # its text may quote what the caller sent, so type and places alone are logged
        _logger.error("gRPC code=%s: %s", code, type(error).__name__, exc_info=error)
        said = [("affidavit-code", "server.internal")]
        return 500, _STATUS[500], "the server failed; its log has the reason", said
    trailing = [("affidavit-code", code)]
    if isinstance(error, AccessDeniedError) and error.entry is not None:
        trailing.append(("affidavit-entry", str(error.entry["leaf_index"])))
    if status in (429, 503):
        extra = getattr(error, "extra", {})
        retry_s = int(extra.get("retry_after_s", getattr(error, "retry_after_s", 1)))
        trailing.append(("retry-after", str(max(1, retry_s))))
    detail = f"{code}: {error}" if isinstance(error, FederationError) else str(error)
    return status, _STATUS.get(status, grpc.StatusCode.FAILED_PRECONDITION), detail, trailing


def _snake(name: str) -> str:
    return "".join(f"_{char.lower()}" if char.isupper() else char for char in name).lstrip("_")
