"""The log over HTTP: entries, proofs, checkpoints, cosignatures, evidence."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Annotated, Any, Final

from anyio import to_thread
from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import ValidationError

from audit import service
from audit.canonical import parse_strict
from audit.checkpoints import parse_checkpoint_note
from audit.entries import TYPES, EvidenceExported
from audit.errors import AuditError
from audit.merkle import hash_leaf
from audit.service import SearchRequest
from server.context import Caller, context_of, denials_recorded
from server.errors import MalformedRequestError
from server.schemas import DIGEST_PATTERN, CosignatureRequest, body_of, problems

router = APIRouter(prefix="/v1/audit", tags=["audit"])

Index = Annotated[int, Path(ge=0, le=2**53 - 1, description="The entry's place in the log, from 0.")]
Name = Annotated[str | None, Query(pattern=r"^[a-z0-9][a-z0-9.:_-]{0,95}$")]
_TIME: Final = r"^[0-9]{4}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-5][0-9]Z$"
_MAX_PAGE: Final = 500


@router.get("/entries", summary="Search the log", responses=problems(401, 403, 422))
async def search(
    request: Request,
    principal: Caller,
    type: Annotated[str | None, Query(description="One of: " + ", ".join(TYPES))] = None,
    actor: Name = None,
    version: Annotated[str | None, Query(pattern=DIGEST_PATTERN)] = None,
    run: Name = None,
    site: Name = None,
    since: Annotated[str | None, Query(pattern=_TIME, description="RFC 3339, UTC, inclusive.")] = None,
    until: Annotated[str | None, Query(pattern=_TIME, description="RFC 3339, UTC, exclusive.")] = None,
    after: Annotated[
        int | None, Query(ge=-1, le=2**53 - 1, description="Leaf index of the last entry you have.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=_MAX_PAGE)] = 100,
) -> dict[str, Any]:
    """Entries in log order that match every filter. Page on with `after` = `next`, until `next` is null."""
    if type is not None and type not in TYPES:
        raise MalformedRequestError(
            f"type {type!r} is unknown",
            fields=[{"field": "type", "problem": f"use one of {', '.join(TYPES)}"}],
        )
    asked = SearchRequest(
        type=type, actor=actor, version=version, run=run, site=site,
        since=since, until=until, after=after, limit=limit,
    )  # fmt: skip
    context = context_of(request)
    async with denials_recorded(request):
        rows = await to_thread.run_sync(
            service.search_entries, context.coordinator.ledger, principal, context.authorizer, asked
        )
    listed = [{"leaf_index": row.leaf_index, "entry": json.loads(row.body)} for row in rows]
    return {"entries": listed, "next": rows[-1].leaf_index if len(rows) == limit else None}


@router.get("/entries/{index}", summary="Read an entry", responses=problems(401, 403, 404))
async def read_entry(request: Request, principal: Caller, index: Index) -> dict[str, Any]:
    """The entry, its leaf hash, and its exact bytes in base64: hash those, not the JSON shown."""
    context = context_of(request)
    async with denials_recorded(request):
        data = await to_thread.run_sync(
            service.read_entry, context.coordinator.ledger, principal, context.authorizer, index
        )
    return {
        "leaf_index": index,
        "leaf_hash": hash_leaf(data).hex(),
        "entry": json.loads(data),
        "bytes": base64.b64encode(data).decode(),
    }


@router.get(
    "/entries/{index}/proof",
    summary="Prove an entry (JSON or tlog-proof)",
    responses={**problems(401, 403, 404), 200: {"content": {"text/plain": {}}}},
)
async def prove_entry(request: Request, principal: Caller, index: Index) -> Response:
    """An inclusion proof under the newest checkpoint. `Accept: text/plain` gives a C2SP tlog-proof file."""
    text = "text/plain" in request.headers.get("accept", "")
    return await _proof(request, principal, index, as_text=text)


@router.get(
    "/entries/{index}/proof.tlog-proof",
    summary="Prove an entry (tlog-proof file)",
    response_class=PlainTextResponse,
    responses=problems(401, 403, 404),
)
async def prove_entry_file(request: Request, principal: Caller, index: Index) -> Response:
    """The same as a C2SP tlog-proof file."""
    return await _proof(request, principal, index, as_text=True)


@router.get(
    "/checkpoint",
    summary="Read the newest checkpoint",
    response_class=PlainTextResponse,
    responses=problems(404),
)
async def read_checkpoint(
    request: Request,
    meeting: Annotated[
        bool, Query(description="The one on which witnesses meet: it stays for five seconds.")
    ] = False,
) -> PlainTextResponse:
    """The newest signed checkpoint with the cosignatures that have come in (C2SP signed note). No key
    needed.
    """
    publisher = context_of(request).publisher
    note = await (publisher.meeting() if meeting else publisher.current())
    return PlainTextResponse(note.decode(), media_type="text/plain; charset=utf-8")


@router.get("/consistency", summary="Prove that the log only grew", responses=problems(404, 422))
async def prove_consistency(
    request: Request,
    old: Annotated[int, Query(ge=0, le=2**53 - 1)],
    new: Annotated[int, Query(ge=0, le=2**53 - 1)],
) -> dict[str, Any]:
    """An RFC 6962 consistency proof between two tree sizes, base64 hashes. No key needed."""
    ledger = context_of(request).coordinator.ledger
    if not 0 <= old <= new:
        raise MalformedRequestError(
            "old must not exceed new", fields=[{"field": "old", "problem": "exceeds new"}]
        )
    proof = await to_thread.run_sync(lambda: ledger.consistency_proof(old, new) if old else [])
    return {"old": old, "new": new, "proof": [base64.b64encode(node).decode() for node in proof]}


@router.post(
    "/cosignatures",
    summary="Add a witness's cosignature",
    responses=problems(403, 422),
    openapi_extra=body_of(CosignatureRequest),
)
async def add_cosignature(request: Request) -> dict[str, Any]:
    """One signature line, made by an enrolled site's witness key over a recent checkpoint.

    The line is its own proof of who sends it; no API key is needed.
    """
    try:
        asked = CosignatureRequest.model_validate(parse_strict(await request.body()))
    except (AuditError, ValidationError) as error:
        raise MalformedRequestError(f"send note_signature and site: {error}") from error
    size, have = await context_of(request).publisher.add_cosignature(asked.site, asked.note_signature)
    context_of(request).monitoring.cosignatures.inc()
    return {"tree_size": size, "cosignatures": have}


@router.get(
    "/evidence/{index}",
    summary="Export an evidence file",
    response_class=Response,
    responses={**problems(401, 403, 404), 200: {"content": {"application/zip": {}}}},
)
async def export_evidence(request: Request, principal: Caller, index: Index) -> Response:
    """A zip that proves the entry offline: `affidavit verify FILE --policy POLICY`.

    It holds the entries that led to this one, their proofs, the newest checkpoint and the artefacts by
    digest. Put your own `receipt` and `opened` beside it with `affidavit evidence export --answer`.
    """
    context = context_of(request)
    coordinator = context.coordinator
    await context.publisher.cover(index)
    async with denials_recorded(request):
        data = await to_thread.run_sync(
            service.export_entry,
            coordinator.ledger,
            coordinator.blobs.find,
            principal,
            context.authorizer,
            index,
        )
    digest = hashlib.sha256(data).hexdigest()
    await context.journal.append(
        EvidenceExported(leaf_index=index, scope="entry", principal=principal.id, digest=digest)
    )
    name = f"evidence-{index}.zip"
    return Response(
        data,
        media_type="application/zip",
        headers={"Content-Disposition": f'attachment; filename="{name}"', "Digest": f"sha-256={digest}"},
    )


async def _proof(request: Request, principal: Caller, index: int, *, as_text: bool) -> Response:
    context = context_of(request)
    await context.publisher.cover(index)
    async with denials_recorded(request):
        proof = await to_thread.run_sync(
            service.prove_entry, context.coordinator.ledger, principal, context.authorizer, index
        )
    if as_text:
        return Response(proof.format(), media_type="text/plain; charset=utf-8")
    return JSONResponse(
        {
            "leaf_index": index,
            "leaf_hash": hash_leaf(context.coordinator.ledger.entry(index)).hex(),
            "tree_size": parse_checkpoint_note(proof.checkpoint_note).tree_size,
            "proof": [base64.b64encode(node).decode() for node in proof.hashes],
            "checkpoint": proof.checkpoint_note.decode(),
        }
    )
