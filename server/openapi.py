"""The OpenAPI document, corrected where FastAPI's own says less than the truth about errors."""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from server.errors import MEDIA_TYPE, PROTOCOL_PATHS

_REFERENCE: Final = {"$ref": "#/components/schemas/Problem"}
_PROTOCOL_REFERENCE: Final = {"$ref": "#/components/schemas/ProtocolError"}
_PROTOCOL_ERROR: Final = {
    "title": "ProtocolError",
    "description": "The Open Inference Protocol's error; the header `Affidavit-Code` holds the stable code.",
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string"}},
}
_ALWAYS: Final = {
    "405": "`request.method_not_allowed`",
    "408": "`request.timeout`: the body took too long to arrive",
    "413": "`request.too_large`: send fewer rows a request",
    "431": "`request.head_too_large`: the request line and header fields are too large or too many",
    "422": "`request.malformed`: `fields` names each field and the fix",
    "500": "`server.internal`: a fault of ours; `instance` names the request for the operator",
    "503": "`server.busy`, or the log cannot record the request; come back after `Retry-After`",
}


def install(app: FastAPI) -> None:
    """Make the application describe every error as a problem document."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _corrected(
                get_openapi(
                    title=app.title,
                    version=app.version,
                    summary=app.summary,
                    description=app.description,
                    routes=app.routes,
                    tags=app.openapi_tags,
                )
            )
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]


def _corrected(document: dict[str, Any]) -> dict[str, Any]:
    for path, item in document["paths"].items():
        protocol = path.startswith(PROTOCOL_PATHS)
        for operation in item.values():
            responses = operation["responses"]
            for status, text in _ALWAYS.items():
                if status not in responses or _is_default(responses[status]):
                    responses[status] = {"description": text}
            for status, response in responses.items():
                if int(status) >= 400:
                    if protocol:
                        response["content"] = {"application/json": {"schema": _PROTOCOL_REFERENCE}}
                    else:
                        response["content"] = {MEDIA_TYPE: {"schema": _REFERENCE}}
    schemas = document["components"]["schemas"]
    schemas["ProtocolError"] = _PROTOCOL_ERROR
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    return document


def _is_default(response: dict[str, Any]) -> bool:
    return "HTTPValidationError" in str(response)
