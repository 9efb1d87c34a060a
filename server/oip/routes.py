"""The protocol over REST: health, metadata, inference, for the live version or one that the path names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

from anyio import to_thread
from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Scope

from audit.principal import Principal
from server.context import Caller, Context, authorise, context_of
from server.errors import ArtefactError, NotReadyError, request_id_of
from server.marks import note_waiting
from server.oip.codec import HEADER_LENGTH, compressed, decompressed, read_ask, write_answer
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
from server.schemas import problems

router = APIRouter(prefix="/v2", tags=["inference protocol"])

Model = Annotated[str, Path(max_length=80, description="The model's name.")]
Version = Annotated[str, Path(max_length=80, description="A version's digest, or `live`, or `candidate`.")]
_HEADER_LENGTH: Final = HEADER_LENGTH.lower()
HEADERS: Final = ("content-encoding", "accept-encoding", _HEADER_LENGTH, PURPOSE)  # that `answer_infer` reads
_TENSOR: Final = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "datatype": {"type": "string"},
        "parameters": {"type": "object"},
        "data": {"type": "array", "items": {}},
    },
}
_ASK: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["inputs"],
                    "properties": {
                        "id": {"type": "string"},
                        "parameters": {"type": "object"},
                        "inputs": {"type": "array", "items": _TENSOR},
                        "outputs": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["name"],
                                "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}},
                            },
                        },
                    },
                },
                "example": {
                    "inputs": [{"name": "rows", "shape": [1, 2], "datatype": "FP64", "data": [14.2, 19.1]}],
                    "parameters": {"purpose": "triage"},
                },
            },
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
_INFER: Final[dict[str, Any]] = {
    "summary": "Answer an inference request",
    "response_class": Response,
    "responses": {
        **problems(401, 403, 404, 422, 503),
        200: {
            "description": "Named output tensors; `parameters` holds the entry, the receipt and the salts.",
            "content": {
                "application/json": {"schema": {"type": "object"}},
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            },
        },
    },
    "openapi_extra": _ASK,
}
_READY: Final[dict[str, Any]] = {"summary": "Is the model ready?", "responses": problems(401, 403, 404, 503)}
_METADATA: Final[dict[str, Any]] = {
    "summary": "Read a model's metadata",
    "responses": problems(401, 403, 404),
}


@router.get("", summary="Read the server's metadata")
async def server_metadata(request: Request) -> dict[str, Any]:
    """Name, version and extensions. No key needed."""
    return {"name": "affidavit", "version": request.app.version, "extensions": list(EXTENSIONS)}


@router.get("/", include_in_schema=False)
async def server_metadata_with_slash(request: Request) -> dict[str, Any]:
    return await server_metadata(request)


@router.get("/health/live", summary="Is the server alive?")
async def live(request: Request) -> dict[str, Any]:
    """200 while it can answer at all. No key needed."""
    return {"live": True}


@router.get("/health/ready", summary="Is the server ready?", responses=problems(503))
async def ready(request: Request) -> JSONResponse:
    """200 once the log can be read and every live model is loaded, until it drains. No key needed."""
    problem = await to_thread.run_sync(context_of(request).readiness.problem)
    if problem:
        raise NotReadyError(problem)
    return JSONResponse({"live": True, "ready": True})


@router.get("/models/{model}", **_METADATA)
async def model_metadata(request: Request, principal: Caller, model: Model) -> dict[str, Any]:
    """Inputs and outputs of the version that answers; `properties` names columns and purposes."""
    return await _metadata(request, principal, model, "")


@router.get("/models/{model}/versions/{version}", **_METADATA)
async def version_metadata(
    request: Request, principal: Caller, model: Model, version: Version
) -> dict[str, Any]:
    """The same of one version."""
    return await _metadata(request, principal, model, version)


@router.get("/models/{model}/ready", **_READY)
async def model_ready(request: Request, principal: Caller, model: Model) -> JSONResponse:
    """200 when the model answers requests."""
    return await _ready(request, principal, model, "")


@router.get("/models/{model}/versions/{version}/ready", **_READY)
async def version_ready(request: Request, principal: Caller, model: Model, version: Version) -> JSONResponse:
    """The same of one version."""
    return await _ready(request, principal, model, version)


@router.post("/models/{model}/infer", **_INFER)
async def infer_live(request: Request, principal: Caller, model: Model) -> Response:
    """Named tensors in, named tensors out; the request's parameter `purpose` says what the answer is for."""
    return await _infer(request, principal, model, "")


@router.post("/models/{model}/versions/{version}/infer", **_INFER)
async def infer_version(request: Request, principal: Caller, model: Model, version: Version) -> Response:
    """The same from one version, which must be answering."""
    return await _infer(request, principal, model, version)


async def _infer(request: Request, principal: Caller, model: str, version: str) -> Response:
    body, headers = await answer_infer(
        context_of(request),
        request.headers,
        await request.body(),
        principal,
        model,
        version,
        request_id_of(request),
        request.scope,
    )
    return Response(body, headers=headers)


async def answer_infer(
    context: Context,
    headers: Mapping[str, str],
    body: bytes,
    principal: Principal,
    model: str,
    version: str,
    request_id: str,
    scope: Scope,
) -> tuple[bytes, dict[str, str]]:
    """Answer `infer`, by whichever way it came: return the body and its headers; errors as `infer`.

    `headers` are the request's, their names in lower case; `scope` is told whether it waited for a proof.
    """
    encoding = headers.get("content-encoding", "")
    if encoding:
        body = decompressed(body, encoding, limit=context.settings.max_body_bytes)
    inference = Inference(
        context,
        model,
        version,
        lambda: read_ask(body, headers.get(_HEADER_LENGTH)),
        purpose=headers.get(PURPOSE, ""),
        request_id=request_id,
    )
    try:
        data, length = await infer(context, principal, inference, _written)
    finally:
        if inference.level != "sequenced":
            note_waiting(scope)
    sent = {"content-type": "application/json" if length is None else "application/octet-stream"}
    if length is not None:
        sent[HEADER_LENGTH] = str(length)
    accepted = headers.get("accept-encoding", "")
    if accepted:
        data, name = compressed(data, accepted)
        if name:
            sent["Content-Encoding"] = name
    return data, sent


def _written(answer: Inferred) -> tuple[bytes, int | None]:
    head: dict[str, Any] = {"model_name": answer.model, "model_version": answer.version}
    if answer.ask.id:
        head["id"] = answer.ask.id
    head["parameters"] = answer.parameters
    return write_answer(head, answer.outputs, answer.ask)


async def _metadata(request: Request, principal: Caller, model: str, version: str) -> dict[str, Any]:
    await authorise(request, principal, "models.read")
    context = context_of(request)
    context.live.refresh()
    return metadata(context, served_version(context, model, version))


async def _ready(request: Request, principal: Caller, model: str, version: str) -> JSONResponse:
    await authorise(request, principal, "models.read")
    context = context_of(request)
    context.live.refresh()
    served = served_version(context, model, version)
    try:
        good = await to_thread.run_sync(is_ready, context, served)
    except ArtefactError as error:
        raise NotReadyError(f"{model}: {error}") from error
    if not good:
        raise NotReadyError(f"version {served.version} of {model} is {served.state}; it answers nobody")
    return JSONResponse({"name": model, "ready": True})
