"""One person over HTTP: who they are in the log, everything about them, and their erasure; for officers."""

from __future__ import annotations

import base64
import hashlib
from typing import Annotated, Any, TypeVar

from anyio import to_thread
from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError

from audit import service, subjects
from audit.canonical import canonical_bytes, parse_strict
from audit.checkpoints import parse_checkpoint_note
from audit.disclosure import disclosed_document
from audit.entries import EvidenceExported
from audit.errors import AuditError
from audit.merkle import hash_leaf
from audit.principal import Principal
from server.context import Caller, Context, context_of, denials_recorded
from server.errors import MalformedRequestError, ServerError, request_id_of
from server.schemas import ErasureRequest, SubjectRequest, body_of, problems

router = APIRouter(tags=["subjects"])

Index = Annotated[int, Path(ge=0, le=2**53 - 1, description="The entry's place in the log, from 0.")]
Fields = Annotated[
    list[str] | None,
    Query(alias="field", description="Such as `age` or `row.0.output.label`; none given opens all."),
]
Parsed = TypeVar("Parsed", bound=BaseModel)


class GoneError(ServerError):
    """Erased: the entry, its proof and the erasure's entry stay."""

    code = "vault.erased"


@router.post(
    "/v1/subjects/find",
    summary="Find a person's pseudonym",
    responses=problems(401, 403, 404, 422),
    openapi_extra=body_of(SubjectRequest),
)
async def find(request: Request, principal: Caller) -> dict[str, Any]:
    """The pseudonym under which entries speak of the person; 404 also after an erasure."""
    asked = await _parse(request, SubjectRequest)
    context = context_of(request)
    async with denials_recorded(request):
        found = await to_thread.run_sync(
            subjects.find_subject, context.vault, principal, context.authorizer, asked.subject
        )
    await context.reading.record(principal, "opened", canonical_bytes({"found": found}), 0)
    return {"pseudonym": found}


@router.post(
    "/v1/subjects/export",
    summary="Export everything about a person",
    response_class=Response,
    responses={**problems(401, 403, 404, 422, 503), 200: {"content": {"application/zip": {}}}},
    openapi_extra=body_of(SubjectRequest),
)
async def export(request: Request, principal: Caller) -> Response:
    """GDPR Art. 15: an evidence file with every entry about the person, opened, each proved.

    `affidavit verify FILE --policy POLICY` checks it offline. That it was handed out is an entry.
    """
    asked = await _parse(request, SubjectRequest)
    context = context_of(request)
    ledger = context.coordinator.ledger

    def begin() -> Any:
        return subjects.begin_export(
            ledger,
            context.vault,
            principal,
            context.authorizer,
            asked.subject,
            request_id=request_id_of(request),
        )

    async with denials_recorded(request):
        body = await to_thread.run_sync(begin)
    sequenced = await context.journal.append(body)
    await context.publisher.cover(sequenced.leaf_index)
    data = await to_thread.run_sync(subjects.build_export, ledger, context.vault, sequenced.leaf_index)
    return _zip(data, f"subject-{body.subject[:8]}.zip")


@router.post(
    "/v1/subjects/erase",
    summary="Erase a person",
    responses=problems(401, 403, 404, 422, 503),
    openapi_extra=body_of(ErasureRequest),
)
async def erase(request: Request, principal: Caller) -> dict[str, Any]:
    """GDPR Art. 17: the person's key, records and pseudonym go from the vault for good; an entry says so.

    Entries and proofs stay, and say nothing of anybody any more. The same `request_id` again gives the same
    answer; without it a second call is 404, because nobody can tell any more who that was.
    """
    asked = await _parse(request, ErasureRequest)
    context = context_of(request)

    def run() -> subjects.Erased:
        return subjects.erase_subject(
            context.coordinator.ledger,
            context.vault,
            principal,
            context.authorizer,
            asked.subject,
            request_id=asked.request_id or request_id_of(request),
            time=context.journal.now_text(),
        )

    async with denials_recorded(request):
        done = await to_thread.run_sync(run)
    return {
        "pseudonym": done.subject,
        "records": done.records,
        "entry": {"leaf_index": done.leaf_index, "leaf_hash": done.leaf_hash},
        "scrubbed": not done.left,
        "left": done.left,
    }


@router.get(
    "/v1/audit/entries/{index}/opened",
    summary="Open what an entry stands for",
    responses=problems(401, 403, 404, 410, 422, 503),
)
async def opened(request: Request, principal: Caller, index: Index, field: Fields = None) -> dict[str, Any]:
    """The named fields with their salts, and the commitments of those that stay closed.

    410 after an erasure, with the entry's own proof and the place of the entry that records the erasure.
    """
    context = context_of(request)
    found = await _opened(request, context, principal, index, field or [])
    names = [f"{part}.{name}" for part, values in found.parts.items() for name in values.opened]
    terms = canonical_bytes({"leaf_index": index, "fields": sorted(names)})
    await context.reading.record(principal, "opened", terms, 1)
    return {"leaf_index": index, "parts": disclosed_document({index: found.parts})[str(index)]}


@router.get(
    "/v1/audit/entries/{index}/disclosed",
    summary="Export an evidence file with chosen fields opened",
    response_class=Response,
    responses={**problems(401, 403, 404, 410, 422, 503), 200: {"content": {"application/zip": {}}}},
)
async def disclosed(request: Request, principal: Caller, index: Index, field: Fields = None) -> Response:
    """For a third party: the entry's whole story, these fields opened, every other one closed."""
    context = context_of(request)
    coordinator = context.coordinator
    fields = field or []
    await _opened(request, context, principal, index, fields)
    await context.publisher.cover(index)

    def build() -> bytes:
        return subjects.disclose(
            coordinator.ledger,
            context.vault,
            coordinator.blobs.find,
            principal,
            context.authorizer,
            index,
            fields,
        )

    data = await to_thread.run_sync(build)
    digest = hashlib.sha256(data).hexdigest()
    await context.journal.append(
        EvidenceExported(leaf_index=index, scope="disclosed", principal=principal.id, digest=digest)
    )
    return _zip(data, f"disclosed-{index}.zip")


async def _opened(
    request: Request, context: Context, principal: Principal, index: int, fields: list[str]
) -> subjects.Opened:
    def run() -> subjects.Opened:
        ledger = context.coordinator.ledger
        return subjects.open_entry(ledger, context.vault, principal, context.authorizer, index, fields)

    try:
        async with denials_recorded(request):
            return await to_thread.run_sync(run)
    except subjects.ErasedError as gone:
        proof = await _proof(context, principal, index)
        raise GoneError(str(gone), erasure=gone.erasure, proof=proof) from gone


async def _proof(context: Context, principal: Principal, index: int) -> dict[str, Any]:
    ledger = context.coordinator.ledger
    await context.publisher.cover(index)
    found = await to_thread.run_sync(service.prove_entry, ledger, principal, context.authorizer, index)
    return {
        "leaf_index": index,
        "leaf_hash": hash_leaf(ledger.entry(index)).hex(),
        "tree_size": parse_checkpoint_note(found.checkpoint_note).tree_size,
        "proof": [base64.b64encode(node).decode() for node in found.hashes],
        "checkpoint": found.checkpoint_note.decode(),
    }


async def _parse(request: Request, kind: type[Parsed]) -> Parsed:
    try:
        return kind.model_validate(parse_strict(await request.body()))
    except AuditError as error:
        raise MalformedRequestError(f"the body is not strict JSON: {error}") from error
    except ValidationError as error:
        fields = [
            {"field": ".".join(map(str, found["loc"])), "problem": found["msg"]}
            for found in error.errors(include_url=False, include_input=False)
        ]
        raise MalformedRequestError(f"{fields[0]['field']}: {fields[0]['problem']}", fields=fields) from error


def _zip(data: bytes, name: str) -> Response:
    return Response(
        data,
        media_type="application/zip",
        headers={
            "Content-Disposition": f'attachment; filename="{name}"',
            "Cache-Control": "no-store",
            "Digest": f"sha-256={hashlib.sha256(data).hexdigest()}",
        },
    )
