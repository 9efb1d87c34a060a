"""Models: what is registered, who approved it, and answers from the live version."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Annotated, Any, Final, Literal

from anyio import to_thread
from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import PlainTextResponse, Response
from pydantic import ValidationError

from audit.entries import body_document
from audit.errors import AuditError
from audit.principal import Principal
from server.answers import Answered, Asked
from server.context import Caller, Context, authorise, context_of
from server.errors import MalformedRequestError, request_id_of
from server.fast_json import parse_request, write_json
from server.live import ServedVersion
from server.marks import note_waiting
from server.oip.codec import decompressed
from server.proving import answer
from server.schemas import DIGEST_PATTERN, NAME_PATTERN, PredictRequest, PredictResponse, body_of, problems
from server.watching import Level

_MEMBERS: Final = frozenset(PredictRequest.model_fields)
_VALUES: Final = frozenset({str, int, float, bool, type(None)})  # of `server.schemas.Value`
_SHOWN: Final = 50
_CARD_TYPES: Final = {"markdown": "text/markdown", "json": "application/json", "html": "text/html"}

router = APIRouter(prefix="/v1/models", tags=["models"])

ModelName = Annotated[str, Path(pattern=NAME_PATTERN, description="The charter's name.")]
Digest = Annotated[str, Path(pattern=DIGEST_PATTERN, description="SHA-256 of the version's weights file.")]


@router.post(
    "/{name}/predict",
    summary="Answer rows with the live version",
    response_model=PredictResponse,
    responses=problems(401, 403, 404, 422, 429, 501, 503, 504),
    openapi_extra=body_of(PredictRequest),
)
async def predict(
    request: Request,
    principal: Caller,
    name: ModelName,
    wait: Annotated[
        Level, Query(description="Answer only once the entry is in a signed, or in a witnessed, checkpoint.")
    ] = "sequenced",
) -> Response:
    """Send named features, get answers, the policies that allowed them, and a signed receipt.

    The decision and salted commitments to each row and each answer are one entry of the log, durable before
    you see the answer. Keep `receipt` and `opened`: with them and the evidence file anybody can later prove
    what was answered, by which version, trained how. A refusal (`predict.denied`) names the policies and
    its own entry.

    With `wait` the answer brings a proof as well. `level` says how far the entry came within ten seconds: an
    answer whose level is less than you asked for has its receipt, and its proof comes later from
    `/v1/audit/entries/{index}/proof?wait=…`.

    With `subject`, the entry holds a random pseudonym in place of the person, and the row, the answer, the
    purpose and the salts are kept in the vault, where an officer can export them or erase them for good.
    """
    if wait != "sequenced":
        note_waiting(request.scope)
    body = await answer_predict(
        context_of(request),
        request.headers,
        await request.body(),
        principal,
        name,
        wait,
        request_id_of(request),
    )
    return Response(body, media_type="application/json")


async def answer_predict(
    context: Context,
    headers: Mapping[str, str],
    body: bytes,
    principal: Principal,
    name: str,
    wait: Level,
    request_id: str,
) -> bytes:
    """Answer `predict`, by whichever way it came; errors as `PredictService.predict`.

    `headers` are the request's, their names in lower case.
    """
    encoding = headers.get("content-encoding", "")
    if encoding:
        body = decompressed(body, encoding, limit=context.settings.max_body_bytes)

    def read() -> Asked:
        asked = _parse(body, max_rows=context.settings.max_rows)
        return Asked(
            model=name,
            purpose=asked.purpose,
            rows=asked.rows,
            site=asked.site,
            version=asked.version,
            subject=asked.subject,
            legal_basis=asked.legal_basis,
            consent=asked.consent,
            explain=asked.explain,
            request_id=request_id,
        )

    return await answer(context, principal, read, render_answer, lambda: wait)


@router.get("", summary="List the models", responses=problems(401, 403))
async def list_models(request: Request, principal: Caller) -> dict[str, Any]:
    """Every model that the log registers, with its live version, if any."""
    await authorise(request, principal, "models.read")
    live = context_of(request).live
    listed = []
    for name in live.models():
        versions = live.versions(name)
        answering = next((version.version for version in versions if version.state == "live"), None)
        listed.append({"name": name, "live": answering, "versions": len(versions)})
    return {"models": listed}


@router.get("/{name}", summary="Show a model's versions and contract", responses=problems(401, 403, 404))
async def show_model(request: Request, principal: Caller, name: ModelName) -> dict[str, Any]:
    """The versions, newest first, and what a row must hold: the features of the charter that would answer."""
    await authorise(request, principal, "models.read")
    live = context_of(request).live
    versions, answering = live.versions(name), live.answering(name)
    return {
        "name": name,
        "live": answering.version if answering.state == "live" else None,
        "task": answering.charter["task"],
        "features": answering.charter["features"],
        "label": answering.charter["label"],
        "purposes": answering.charter["purposes"],
        "versions": [_summary(version) for version in versions],
    }


@router.get("/{name}/versions/{digest}", summary="Show a version", responses=problems(401, 403, 404))
async def show_version(
    request: Request, principal: Caller, name: ModelName, digest: Digest
) -> dict[str, Any]:
    """The version's registration as it is in the log: gates, epsilon per site, run, charter, state."""
    await authorise(request, principal, "models.read")
    version = context_of(request).live.version(name, digest)
    return {
        **_summary(version),
        "registration": body_document(version.registered),
        "charter": version.charter,
    }


@router.get(
    "/{name}/versions/{digest}/card",
    summary="Read the model card",
    response_class=PlainTextResponse,
    responses={
        **problems(401, 403, 404, 422),
        200: {"content": {"text/markdown": {}, "application/json": {}, "text/html": {}}},
    },
)
async def show_card(
    request: Request,
    principal: Caller,
    name: ModelName,
    digest: Digest,
    form: Annotated[
        Literal["markdown", "json", "html"], Query(description="html is a page to print.")
    ] = "markdown",
) -> PlainTextResponse:
    """Made from the log and the registry's files, under the headings of the EU AI Act's Annex IV.

    What nothing proves reads NO EVIDENCE.
    """
    await authorise(request, principal, "models.read")
    context = context_of(request)
    context.live.version(name, digest)
    from federation.model_card import card_of

    coordinator = context.coordinator
    card = await to_thread.run_sync(card_of, coordinator.ledger, digest, coordinator.blobs.find)
    text = await to_thread.run_sync(getattr(card, form))
    return PlainTextResponse(text, media_type=_CARD_TYPES[form])


def render_answer(answered: Answered) -> bytes:
    """Render the answers as a `PredictResponse`: probabilities and values as JSON numbers, `opened` as the
    exact committed text.
    """
    document = {
        "model": answered.model,
        "version": answered.version,
        "answers": [numbers(answer) for answer in answered.answers],
        "decision": {
            "id": answered.request_id,
            "policies": answered.decision.policies,
            "policy_set": answered.decision.policy_set,
        },
        "entry": {
            "leaf_index": answered.leaf_index,
            "leaf_hash": answered.leaf_hash,
            "id": answered.entry_id,
        },
        "receipt": answered.receipt,
        "level": answered.level,
        "proof": answered.proof,
        "opened": answered.opened,
        "sealed": answered.sealed,
        "review_required": bool(answered.review),
        "review": _review(answered.review, answered.never_final),
        "annotations": dict(answered.annotations),
    }
    return write_json(document)


def _review(decision: str, never_final: str) -> dict[str, Any] | None:
    if not decision:
        return None
    return {"id": decision, "url": f"/v1/reviews/{decision}", "final": False, "reason": never_final}


def numbers(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return an answer with its numbers as numbers."""
    shown = dict(answer)
    for key in ("probability", "value"):
        if key in shown:
            shown[key] = json.loads(shown[key])
    if "probabilities" in shown:
        shown["probabilities"] = [json.loads(text) for text in shown["probabilities"]]
    return shown


def _parse(body: bytes, *, max_rows: int) -> PredictRequest:
    try:
        return PredictRequest.model_validate(parse_request(body, partial(_check_size, max_rows)))
    except AuditError as error:
        raise MalformedRequestError(f"the body is not strict JSON: {error}") from error
    except ValidationError as error:
        raise _malformed(
            (".".join(map(str, found["loc"])), found["msg"])
            for found in error.errors(include_url=False, include_input=False)
        ) from error


def _check_size(max_rows: int, document: object) -> None:
    """Refuse at once what would be many problems to describe, or no row; the schema says the rest.

    Raises:
        MalformedRequestError: more rows than fit, a member that the schema does not have, or a value that is
            no text, number, boolean or null.
    """
    if not isinstance(document, dict):
        return
    if not document.keys() <= _MEMBERS:
        unknown = (name for name in document if name not in _MEMBERS)
        raise _malformed((name[:80], "is not a member of the request; leave it out") for name in unknown)
    rows = document.get("rows")
    if not isinstance(rows, list):
        return
    if len(rows) > max_rows:
        problem = f"{len(rows)} rows; at most {max_rows} fit in one entry, send several requests"
        raise _malformed([("rows", problem)])
    if set(map(type, rows)) <= {dict} and all(_VALUES.issuperset(map(type, row.values())) for row in rows):
        return
    raise _malformed(_problems(rows))


def _problems(rows: list[Any]) -> Iterator[tuple[str, str]]:
    for number, row in enumerate(rows):
        if type(row) is not dict:
            yield f"rows.{number}", "is not an object of features"
            continue
        for name, value in row.items():
            if type(value) not in _VALUES:
                yield f"rows.{number}.{name[:80]}", "is not a number, a text, true, false or null"


def _malformed(problems: Iterable[tuple[str, str]]) -> MalformedRequestError:
    """The error of the first problems; the others are not even looked for."""
    fields = [{"field": field, "problem": problem} for field, problem in islice(problems, _SHOWN)]
    return MalformedRequestError(f"{fields[0]['field']}: {fields[0]['problem']}", fields=fields)


def _summary(version: ServedVersion) -> dict[str, Any]:
    return {
        "version": version.version,
        "state": version.state,
        "registered": version.registered_at,
        "leaf_index": version.registered_index,
        "run": version.registered.run,
        "charter": version.charter_digest,
        "approved_by": list(version.approved_by),
        "gates_passed": all(gate.passed for gate in version.registered.gates),
        "epsilon": max((site.run_epsilon for site in version.registered.costs), key=float, default=None),
    }
