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
from audit.canonical import canonical_bytes, parse_strict
from audit.checkpoints import parse_checkpoint_note
from audit.cose import MEDIA_TYPE as COSE
from audit.cose import issue_cose_receipt
from audit.entries import EvidenceExported, columns_of
from audit.errors import AuditError
from audit.merkle import hash_leaf
from audit.notes import open_note
from audit.reading import search_page, with_limit
from audit.tlog_proof import TlogProof
from federation.trust import log_policy
from server.context import Caller, context_of, denials_recorded
from server.errors import MalformedRequestError, NotYetError
from server.routes_officer import Terms
from server.schemas import CosignatureRequest, body_of, problems
from server.watching import MAX_WAIT_S, Level

router = APIRouter(prefix="/v1/audit", tags=["audit"])

Index = Annotated[int, Path(ge=0, le=2**53 - 1, description="The entry's place in the log, from 0.")]
Wait = Annotated[
    Level, Query(description="Wait, ten seconds at most, for a signed or for a witnessed checkpoint with it.")
]
_MAX_PAGE: Final = 500


@router.get("/entries", summary="Search the log", responses=problems(401, 403, 422))
async def search(
    request: Request,
    principal: Caller,
    terms: Terms,
    limit: Annotated[int, Query(ge=1, le=_MAX_PAGE)] = 100,
) -> dict[str, Any]:
    """Entries in log order that match every filter. Page on with `after` = `next`, until `next` is null.

    Officers see all; a site's key what is public or about the site; a consumer's what names it. That you
    looked is an entry too.
    """
    terms = with_limit(terms, limit)
    context = context_of(request)
    async with denials_recorded(request):
        page = await to_thread.run_sync(
            search_page, context.coordinator.ledger, principal, context.authorizer, terms
        )
    listed = [{"leaf_index": row.leaf_index, "entry": json.loads(row.body)} for row in page.rows]
    looped = {row.columns.type for row in page.rows} == {"audit.read"} or terms.type == "audit.read"
    await context.reading.record(principal, "search", terms.terms(), len(listed), only_reads=looped)
    return {"entries": listed, "next": page.next}


@router.get("/entries/{index}", summary="Read an entry", responses=problems(401, 403, 404))
async def read_entry(request: Request, principal: Caller, index: Index) -> dict[str, Any]:
    """The entry, its leaf hash, and its exact bytes in base64: hash those, not the JSON shown."""
    context = context_of(request)
    async with denials_recorded(request):
        data = await to_thread.run_sync(
            service.read_entry, context.coordinator.ledger, principal, context.authorizer, index
        )
    if principal.role != "consumer":  # a consumer sees only what names it: its own receipts
        looped = columns_of(data).type == "audit.read"
        terms = canonical_bytes({"leaf_index": index})
        await context.reading.record(principal, "entry", terms, 1, only_reads=looped)
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
async def prove_entry(
    request: Request, principal: Caller, index: Index, wait: Wait = "sequenced"
) -> Response:
    """An inclusion proof under the newest checkpoint. `Accept: text/plain` gives a C2SP tlog-proof file."""
    text = "text/plain" in request.headers.get("accept", "")
    return await proof_of(request, principal, index, wait, as_text=text)


@router.get(
    "/entries/{index}/proof.tlog-proof",
    summary="Prove an entry (tlog-proof file)",
    response_class=PlainTextResponse,
    responses=problems(401, 403, 404),
)
async def prove_entry_file(
    request: Request, principal: Caller, index: Index, wait: Wait = "sequenced"
) -> Response:
    """The same as a C2SP tlog-proof file."""
    return await proof_of(request, principal, index, wait, as_text=True)


@router.get(
    "/entries/{index}/receipt.cose",
    summary="Prove an entry (COSE receipt)",
    response_class=Response,
    responses={
        **problems(401, 403, 404),
        200: {"content": {COSE: {}}, "description": "A COSE_Sign1 receipt of inclusion."},
    },
)
async def prove_entry_cose(request: Request, principal: Caller, index: Index) -> Response:
    """RFC 9942: signed by the log's key alone; the tlog-proof carries the witnesses' cosignatures as well."""
    context = context_of(request)
    coordinator = context.coordinator
    await context.publisher.cover(index)
    async with denials_recorded(request):
        proof = await to_thread.run_sync(
            service.prove_entry, coordinator.ledger, principal, context.authorizer, index
        )
    open_note(proof.checkpoint_note, coordinator.signer.verifiers)
    receipt = issue_cose_receipt(
        coordinator.signer.key.unsafe_sign_raw,
        parse_checkpoint_note(proof.checkpoint_note),
        index,
        hash_leaf(coordinator.ledger.entry(index)),
        proof.hashes,
    )
    return Response(receipt, media_type=COSE, headers={"Cache-Control": "no-store"})


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
    return PlainTextResponse(
        note.decode(), media_type="text/plain; charset=utf-8", headers={"Cache-Control": "public, max-age=1"}
    )


@router.get(
    "/policy",
    summary="Read the policy that the log proposes",
    response_class=PlainTextResponse,
    responses=problems(404),
)
async def read_policy(request: Request) -> PlainTextResponse:
    """C2SP tlog-policy: the log's keys and its sites as witnesses. No key needed.

    A proposal: whoever runs this server wrote it. Compare it with what the members hold before believing it.
    """
    policy = await to_thread.run_sync(log_policy, context_of(request).coordinator.ledger)
    headers = {"Cache-Control": "public, max-age=60"}
    return PlainTextResponse(policy.format(), media_type="text/plain; charset=utf-8", headers=headers)


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


async def proof_of(
    request: Request, principal: Caller, index: int, wait: Level, *, as_text: bool
) -> Response:
    """Return the proof of an entry that the caller may read, once it is of the level asked for."""
    context = context_of(request)
    await context.publisher.cover(index)
    async with denials_recorded(request):
        proof = await to_thread.run_sync(
            service.prove_entry, context.coordinator.ledger, principal, context.authorizer, index
        )
    if wait != "sequenced":
        timeout_s = min(MAX_WAIT_S, context.settings.request_timeout_s / 2)
        note = await context.watching.wait(index, wait, timeout_s)
        if note is None:
            raise NotYetError(f"leaf {index} is not {wait} after {timeout_s:g} s; ask again")
        size = parse_checkpoint_note(note).tree_size
        hashes = await to_thread.run_sync(context.coordinator.ledger.inclusion_proof, index, size)
        proof = TlogProof(leaf_index=index, hashes=tuple(hashes), checkpoint_note=note)
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
