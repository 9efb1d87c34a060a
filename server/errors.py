"""What the server refuses, and the one place where errors of every package become HTTP answers (RFC 9457)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from audit.errors import AuditError
from audit.principal import AccessDeniedError
from federation.errors import FederationError

if TYPE_CHECKING:  # commands raise these errors too, and serve nobody
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse

_logger = logging.getLogger(__name__)

MEDIA_TYPE: Final = "application/problem+json"
PROTOCOL_PATHS: Final = ("/v2/", "/v2")


class ServerError(Exception):
    """Base of every error `server` raises on purpose."""

    code = "server.error"

    def __init__(self, detail: str, **extra: Any) -> None:
        super().__init__(detail)
        self.extra = extra  # further members of the problem document


class SettingsError(ServerError):
    """A setting is unknown or out of range; the message names it and where it came from."""

    code = "server.settings"


class PolicyLoadError(ServerError):
    """The access policies do not hold together; the server does not start on them."""

    code = "access.policy_invalid"


class UnauthenticatedError(ServerError):
    """No key, or a key that is unknown, revoked or expired: the answer never says which."""

    code = "access.unauthenticated"


class IssuerUnreachableError(ServerError):
    """The issuer's keys are neither at hand nor to be had: no token can be judged, so none counts."""

    code = "access.issuer_unreachable"


class PolicyRefusedError(ServerError):
    """The rules hold together, and this change of them does not count; the message says why."""

    code = "access.policy_refused"


class PolicyLockOutError(ServerError):
    """Under these rules no officer could read or change them; that must be asked for."""

    code = "access.policy_lock_out"


class AlarmNotFoundError(ServerError):
    code = "alarms.not_found"


class ReviewNotFoundError(ServerError):
    """No decision of that id is in the log."""

    code = "reviews.not_found"


class ReviewNotNeededError(ServerError):
    """The decision's charter gives its answers no legal effect, or the answer was a test."""

    code = "reviews.not_needed"


class ReviewDoneError(ServerError):
    """Somebody reviewed the decision before; `review` says what they found."""

    code = "reviews.done"


class ReviewSignatureError(ServerError):
    """The signature is not the officer's over this review, or the officer is none of the charter's."""

    code = "reviews.signature"


class KeyNotFoundError(ServerError):
    code = "keys.not_found"


class KeyRequestError(ServerError):
    code = "keys.bad_request"


class TooBusyError(ServerError):
    code = "server.busy"


class OverloadedError(ServerError):
    """The worker has as many requests as it can answer in time; nothing of this one was read."""

    code = "server.overloaded"


class DeadlineError(ServerError):
    """The caller's own time limit passed; whatever became of the request, this is no answer to it."""

    code = "request.deadline"


class ReceiptNotFoundError(ServerError):
    code = "receipts.not_found"


class NotReadyError(ServerError):
    """This process, or one of its models, should get no requests now."""

    code = "server.not_ready"


class NoSuchRouteError(ServerError):
    code = "request.no_such_route"


class NotYetError(ServerError):
    """The entry is durable, and not yet in a checkpoint of the level that was asked for."""

    code = "audit.not_yet"


class BodyTooLargeError(ServerError):
    code = "request.too_large"


class HeadTooLargeError(ServerError):
    """The request line and the header fields are larger, or more, than the server reads."""

    code = "request.head_too_large"


class BodyTimeoutError(ServerError):
    code = "request.timeout"


class IncompleteBodyError(ServerError):
    """The connection ended before the body that the head had announced."""

    code = "request.incomplete"


class MalformedRequestError(ServerError):
    """The body is not what the route reads; `fields` in `extra` names each field and the fix."""

    code = "request.malformed"


class NoSuchTileError(ServerError):
    """The path is no tile's, or the log does not reach that far."""

    code = "audit.no_such_tile"


class ModelNotFoundError(ServerError):
    code = "models.not_found"


class VersionNotFoundError(ServerError):
    code = "models.version_not_found"


class RowContractError(ServerError):
    """A row is outside the charter's data contract; `fields` names row, field, problem and fix."""

    code = "predict.row_outside_contract"


class ArtefactError(ServerError):
    """The registry's copy of a version is absent, or its bytes are not the ones the log names."""

    code = "models.artefact_unusable"


class CheckpointLateError(ServerError):
    """Entries wait for a checkpoint for so long that a receipt's deadline may not be kept."""

    code = "audit.checkpoint_late"


class LedgerUnavailableError(ServerError):
    """The decision could not be made durable, so there is no answer."""

    code = "audit.ledger_unavailable"


STATUS: Final[dict[str, int]] = {
    "access.unauthenticated": 401,
    "access.denied": 403,
    "predict.denied": 403,
    "predict.quota": 429,
    "access.issuer_unreachable": 503,
    "access.policy_invalid": 422,
    "access.policy_refused": 409,
    "access.policy_lock_out": 409,
    "alarms.not_found": 404,
    "reviews.not_found": 404,
    "reviews.not_needed": 409,
    "reviews.done": 409,
    "reviews.signature": 422,
    "request.malformed": 422,
    "request.no_such_route": 404,
    "request.too_large": 413,
    "request.timeout": 408,
    "request.head_too_large": 431,
    "request.incomplete": 400,
    "predict.row_outside_contract": 422,
    "keys.bad_request": 422,
    "keys.not_found": 404,
    "models.not_found": 404,
    "models.version_not_found": 404,
    "models.artefact_unusable": 503,
    "explain.not_available": 501,
    "explain.not_allowed": 422,
    "server.busy": 503,
    "server.overloaded": 503,
    "request.deadline": 504,
    "server.not_ready": 503,
    "receipts.not_found": 404,
    "audit.stale_view": 503,
    "audit.ledger_unavailable": 503,
    "audit.checkpoint_late": 503,
    "audit.ledger_busy": 503,
    "audit.ledger_closed": 503,
    "audit.ledger_write": 503,
    "audit.ledger_corrupt": 503,
    "audit.ledger_unreachable": 503,
    "audit.signer_busy": 503,
    "audit.signer_elsewhere": 503,
    "audit.signer_missing": 503,
    "audit.signer_rewrite": 503,
    "audit.signer_rollback": 503,
    "audit.signer_split": 503,
    "audit.signer_state": 503,
    "audit.witnesses_unreachable": 503,
    "audit.lease_lost": 503,
    "audit.malformed_policy": 503,
    "audit.not_yet": 503,
    "audit.entry_not_found": 404,
    "audit.tree_range": 404,
    "audit.no_such_tile": 404,
    "audit.search_term": 422,
    "audit.cose": 404,
    "audit.tile": 503,
    "vault.request": 422,
    "vault.subject_unknown": 404,
    "vault.not_sealed": 404,
    "vault.record_missing": 503,
    "vault.erased": 410,
    "vault.key": 503,
    "vault.missing": 503,
    "vault.seal_broken": 503,
    "disclosure.mismatch": 422,
    "evidence.nothing_matches": 404,
    "evidence.no_checkpoint": 503,
    "evidence.gap": 404,
    "evidence.too_large": 413,
    "federation.not_found": 404,
    "federation.masked_run": 409,
    "federation.blob_missing": 503,
    "federation.blob_altered": 503,
    "audit.entry_malformed": 422,
    "audit.malformed_json": 422,
    "audit.not_canonical": 422,
    "audit.canonical": 422,
    "audit.malformed_note": 422,
    "audit.malformed_checkpoint": 422,
    "audit.bad_signature": 403,
    "audit.no_known_signature": 403,
}
"""Stable code to status, for the errors of all four packages. A code that is not here is a fault of ours:
500.
"""

TITLES: Final[dict[int, str]] = {
    400: "Bad request",
    401: "A valid API key is needed",
    403: "Refused by policy",
    404: "Not found",
    405: "Method not allowed",
    410: "Erased",
    408: "The request took too long to arrive",
    409: "Not in this state",
    413: "The body is too large",
    415: "Unsupported media type",
    422: "The request cannot be processed",
    429: "Too much in this time",
    431: "The request's head is too large",
    500: "Internal error",
    501: "Not available on this server",
    503: "Try again later",
    504: "The request's own time limit passed",
}


def problem(
    status: int, code: str, detail: str, *, request_id: str, retry_after_s: int = 1, **extra: Any
) -> JSONResponse:
    """Build a problem document; `code` is stable, `detail` is for people."""
    from fastapi.responses import JSONResponse

    document = {
        "type": f"urn:affidavit:problem:{code}",
        "title": TITLES.get(status, "Error"),
        "status": status,
        "code": code,
        "detail": detail,
        "instance": f"urn:affidavit:request:{request_id}",
        **extra,
    }
    headers = {"Cache-Control": "no-store"}
    if status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="affidavit"'
    if status in (429, 503):
        headers["Retry-After"] = str(retry_after_s)
    return JSONResponse(document, status_code=status, media_type=MEDIA_TYPE, headers=headers)


def _protocol_error(
    status: int, code: str, detail: str, extra: dict[str, Any], retry_after_s: int
) -> JSONResponse:
    """The Open Inference Protocol's own form: {"error": text}; the code and the entry stand in headers."""
    from fastapi.responses import JSONResponse

    headers = {"Cache-Control": "no-store", "Affidavit-Code": code}
    if status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="affidavit"'
    if status in (429, 503):
        headers["Retry-After"] = str(retry_after_s)
    if "entry" in extra:
        headers["Affidavit-Entry"] = str(extra["entry"]["leaf_index"])
    return JSONResponse({"error": detail}, status_code=status, headers=headers)


def _answer(request: Request, status: int, code: str, detail: str, **extra: Any) -> JSONResponse:
    retry_after_s = max(1, int(extra.pop("retry_after_s", 1)))
    if request.scope["path"].startswith(PROTOCOL_PATHS):
        return _protocol_error(status, code, detail, extra, retry_after_s)
    return problem(
        status, code, detail, request_id=request_id_of(request), retry_after_s=retry_after_s, **extra
    )


def request_id_of(request: Request) -> str:
    """Return the id that the outermost middleware gave this request."""
    return str(request.scope.get("affidavit.request_id", "0" * 32))


def render(request: Request, error: Exception) -> JSONResponse:
    """Turn any error into its problem document: the one mapping."""
    code = str(getattr(error, "code", "server.internal"))
    status = STATUS.get(code)
    if status is None:
        # its text may quote what the caller sent, so type and places alone are logged
        _logger.error("code=%s: %s", code, type(error).__name__, exc_info=error)
        return _answer(request, 500, "server.internal", "the server failed; its log has the reason")
    extra = dict(getattr(error, "extra", {}))
    if isinstance(error, AccessDeniedError):
        extra = {**extra, "policies": list(error.decision.policies), "policy_set": error.decision.policy_set}
        if error.entry is not None:
            extra["entry"] = dict(error.entry)
    extra.setdefault("retry_after_s", getattr(error, "retry_after_s", 1))
    return _answer(request, status, code, str(error), **extra)


def _allowed(request: Request) -> list[str]:
    """The methods that some route takes at the request's path; `server.guard` answers HEAD where GET is."""
    from starlette.routing import Match

    found: set[str] = set()
    for route in request.app.router.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            found |= route.methods or set()
    return sorted(found | {"HEAD"} if "GET" in found else found)


def install(app: FastAPI) -> None:
    """Register the handlers, so that no answer of the application is anything but a problem document."""
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    async def ours(request: Request, error: Exception) -> JSONResponse:
        return render(request, error)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for this class only
        fields = [{"field": ".".join(map(str, e["loc"])), "problem": e["msg"]} for e in error.errors()]
        return render(request, MalformedRequestError("a parameter is missing or malformed", fields=fields))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class only
        codes = {404: "request.no_such_route", 405: "request.method_not_allowed"}
        code = codes.get(error.status_code, "request.refused")
        answer = _answer(request, error.status_code, code, str(error.detail))
        if error.status_code == 405:
            answer.headers["Allow"] = ", ".join(_allowed(request))
        return answer

    app.add_exception_handler(ServerError, ours)
    app.add_exception_handler(AuditError, ours)
    app.add_exception_handler(FederationError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, ours)
