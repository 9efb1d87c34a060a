"""The protocol over gRPC: the six calls, behind the same keys, policies and log as the REST routes.

The caller's key travels in the metadata as `authorization: Bearer …`, what the answer is for in the
parameter `purpose` or the metadata `affidavit-purpose`. Errors are gRPC statuses; the trailing metadata
`affidavit-code` holds the stable code, `affidavit-entry` the leaf that records a refusal.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import grpc
from anyio import to_thread

from audit.principal import AccessDeniedError, Principal, Question, require
from federation.errors import FederationError
from server.context import Context, record_denial
from server.errors import STATUS, MalformedRequestError, SettingsError, UnauthenticatedError
from server.oip.codec import asked_as_binary
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

_logger = logging.getLogger(__name__)

_STATUS: Final = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
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
Handler = Callable[[Any, Any], Awaitable[Any]]


class InferenceServer:
    """One gRPC server of one process; `start`, then `stop`."""

    def __init__(self, context: Context, version: str) -> None:
        self._context, self._version = context, version
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
                self._guarded(rpc, getattr(self, f"_{_snake(rpc)}")),
                request_deserializer=message(f"{rpc}Request").FromString,
                response_serializer=message(f"{rpc}Response").SerializeToString,
            )
            for rpc in RPCS
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise SettingsError(f"gRPC cannot listen on {address}; choose another grpc_port") from error
        await self._server.start()
        return self.port

    async def stop(self, grace_s: float) -> None:
        """Take nothing new, and finish what is under way within `grace_s`."""
        if self._server is not None:
            await self._server.stop(grace_s)

    def _guarded(self, rpc: str, handler: Handler) -> Handler:
        async def call(request: Any, call_context: Any) -> Any:
            begun, status = time.perf_counter(), "OK"
            try:
                async with asyncio.timeout(self._context.settings.request_timeout_s):
                    return await handler(request, call_context)
            except Exception as error:  # noqa: BLE001 - the one place where errors become gRPC statuses
                code, kind, detail, entry = _status_of(error)
                status = kind.name
                trailing = [("affidavit-code", code)]
                if entry is not None:
                    trailing.append(("affidavit-entry", str(entry["leaf_index"])))
                call_context.set_trailing_metadata(trailing)
                await call_context.abort(kind, detail)
            finally:
                route = f"/{SERVICE}/{rpc}"
                self._context.monitoring.requests.labels("gRPC", route, status).inc()
                self._context.monitoring.seconds.labels(route).observe(time.perf_counter() - begun)

        return call

    async def _principal(self, call_context: Any) -> Principal:
        given = _metadata(call_context).get("authorization", "")
        scheme, _, key = given.partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise UnauthenticatedError("an API key is needed: send the metadata `authorization: Bearer …`")
        return await self._context.identities.holder(key)

    async def _reader(self, call_context: Any) -> None:
        principal = await self._principal(call_context)
        try:
            require(self._context.authorizer, principal, Question(action="models.read", resource="service"))
        except AccessDeniedError as denied:
            await record_denial(self._context, denied, secrets.token_hex(16))
            raise

    async def _server_live(self, request: Any, call_context: Any) -> Any:
        return message("ServerLiveResponse")(live=True)

    async def _server_ready(self, request: Any, call_context: Any) -> Any:
        problem = await to_thread.run_sync(self._context.readiness.problem)
        return message("ServerReadyResponse")(ready=not problem)

    async def _model_ready(self, request: Any, call_context: Any) -> Any:
        await self._reader(call_context)
        self._context.live.refresh()
        served = served_version(self._context, request.name, request.version)
        good = await to_thread.run_sync(is_ready, self._context, served)
        return message("ModelReadyResponse")(ready=good)

    async def _server_metadata(self, request: Any, call_context: Any) -> Any:
        return message("ServerMetadataResponse")(
            name="affidavit", version=self._version, extensions=EXTENSIONS
        )

    async def _model_metadata(self, request: Any, call_context: Any) -> Any:
        await self._reader(call_context)
        self._context.live.refresh()
        served = served_version(self._context, request.name, request.version)
        return message("ModelMetadataResponse")(**metadata(self._context, served))

    async def _model_infer(self, request: Any, call_context: Any) -> Any:
        principal = await self._principal(call_context)
        inference = Inference(
            self._context,
            request.model_name,
            request.model_version,
            lambda: read_ask(request),
            purpose=_metadata(call_context).get(PURPOSE, ""),
            request_id=secrets.token_hex(16),
        )
        return await infer(self._context, principal, inference, _reply)


def _reply(answer: Inferred) -> Any:
    reply = message("ModelInferResponse")(
        model_name=answer.model, model_version=answer.version, id=answer.ask.id
    )
    for name, value in answer.parameters.items():
        if isinstance(value, int):
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


def _status_of(error: Exception) -> tuple[str, Any, str, Mapping[str, int | str] | None]:
    if isinstance(error, TimeoutError):
        return "server.busy", grpc.StatusCode.UNAVAILABLE, "no answer in time; try again", None
    code = str(getattr(error, "code", "server.internal"))
    status = STATUS.get(code)
    if status is None:
        _logger.error("gRPC code=%s: %s", code, error, exc_info=error)
        return "server.internal", grpc.StatusCode.INTERNAL, "the server failed; its log has the reason", None
    kind = _STATUS.get(status, grpc.StatusCode.FAILED_PRECONDITION)
    detail = str(error)
    if isinstance(error, FederationError):
        detail = f"{code}: {detail}"
    return code, kind, detail, error.entry if isinstance(error, AccessDeniedError) else None


def _snake(name: str) -> str:
    return "".join(f"_{char.lower()}" if char.isupper() else char for char in name).lstrip("_")
