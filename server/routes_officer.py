"""What an officer asks of the log as a whole: counts, exports, evidence of a version, a run or a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Final, Literal

from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response, StreamingResponse

from audit import service
from audit.entries import TYPES, EvidenceExported
from audit.reading import (
    MAX_EXPORT,
    SearchRequest,
    count_entries,
    export_rows,
    export_text,
    with_limit,
)
from audit.subjects import NOBODY, find_subject
from audit.vault_records import SubjectUnknownError
from server.context import Caller, context_of, denials_recorded, require_whole_log
from server.errors import MalformedRequestError
from server.schemas import DIGEST_PATTERN, problems

router = APIRouter(prefix="/v1/audit", tags=["audit"])

Name = Annotated[str | None, Query(pattern=r"^[a-z0-9][a-z0-9.:_-]{0,95}$")]
_TIME: Final = r"^[0-9]{4}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-5][0-9]Z$"
_MEDIA: Final = {"jsonl": "application/jsonl", "csv": "text/csv; charset=utf-8"}
_BATCH_BYTES: Final = 1 << 16


def asked(
    type: Annotated[str | None, Query(description="One of: " + ", ".join(TYPES))] = None,
    actor: Name = None,
    model: Name = None,
    version: Annotated[str | None, Query(pattern=DIGEST_PATTERN)] = None,
    run: Name = None,
    site: Name = None,
    principal: Annotated[Name, Query(description="The pseudonym that an entry names.")] = None,
    pseudonym: Annotated[
        str | None, Query(pattern=r"^[0-9a-f]{32}$", description="Of the person that an entry is about.")
    ] = None,
    decision: Annotated[
        Literal["allowed", "denied"] | None, Query(description="What was decided: predictions and refusals.")
    ] = None,
    since: Annotated[str | None, Query(pattern=_TIME, description="RFC 3339, UTC, inclusive.")] = None,
    until: Annotated[str | None, Query(pattern=_TIME, description="RFC 3339, UTC, exclusive.")] = None,
    after: Annotated[
        int | None, Query(ge=-1, le=2**53 - 1, description="Leaf index of the last entry you have.")
    ] = None,
) -> SearchRequest:
    """The search terms that every route shares."""
    if type is not None and type not in TYPES:
        raise MalformedRequestError(
            f"type {type!r} is unknown",
            fields=[{"field": "type", "problem": f"use one of {', '.join(TYPES)}"}],
        )
    return SearchRequest(
        type=type, actor=actor, model=model, version=version, run=run, site=site, principal=principal,
        decision=decision, since=since, until=until, after=after, subject=pseudonym,
    )  # fmt: skip


async def resolved(
    request: Request,
    principal: Caller,
    terms: Annotated[SearchRequest, Depends(asked)],
    subject: Annotated[
        str | None,
        Query(
            max_length=256,
            description="A person's id, for officers. It stays in the logs of proxies: where there are any, "
            "ask `POST /v1/subjects/find` and search by `pseudonym`.",
        ),
    ] = None,
) -> SearchRequest:
    """The terms, with a person's id replaced by the pseudonym; nobody's, where none is known."""
    if subject is None:
        return terms
    context = context_of(request)
    async with denials_recorded(request):
        try:
            found = await to_thread.run_sync(
                find_subject, context.vault, principal, context.authorizer, subject
            )
        except SubjectUnknownError:
            found = NOBODY
    if terms.subject not in (None, found):
        raise MalformedRequestError("give subject or pseudonym, not both")
    return replace(terms, subject=found)


Terms = Annotated[SearchRequest, Depends(resolved)]


@router.get("/count", summary="Count entries", responses=problems(401, 403, 422))
async def count(request: Request, principal: Caller, terms: Terms) -> dict[str, Any]:
    """How many entries match, of how many; the size names the tree that was counted."""
    context = context_of(request)
    ledger = context.coordinator.ledger
    async with denials_recorded(request):
        size = await to_thread.run_sync(lambda: ledger.tree_size)
        found = await to_thread.run_sync(count_entries, ledger, principal, context.authorizer, terms)
    await context.reading.record(principal, "count", terms.terms(), found)
    return {"entries": found, "tree_size": size}


@router.get(
    "/export",
    summary="Export entries (JSON Lines or CSV)",
    response_class=StreamingResponse,
    responses={
        **problems(401, 403, 422),
        200: {"content": {"application/jsonl": {}, "text/csv": {}}, "description": "The entries."},
    },
)
async def export(
    request: Request,
    principal: Caller,
    terms: Terms,
    format: Annotated[Literal["jsonl", "csv"], Query()] = "jsonl",
    limit: Annotated[int, Query(ge=1, le=MAX_EXPORT)] = MAX_EXPORT,
) -> Response:
    """Every match in log order, streamed, with leaf indices so that gaps show.

    `X-Affidavit-Entries` says how many match after `after`, `X-Affidavit-Tree-Size` the log they were counted
    in. JSON Lines end in a line with `"end": true` and the cursor `next`; a file without it was cut off.
    """
    context = context_of(request)
    ledger = context.coordinator.ledger
    terms = with_limit(terms, limit)
    await require_whole_log(request, principal)
    async with denials_recorded(request):
        size = await to_thread.run_sync(lambda: ledger.tree_size)
        columns = terms.columns()
        found = await to_thread.run_sync(lambda: ledger.count(**columns, after=terms.after, before=size))
    await context.reading.record(principal, "export", terms.terms(), min(found, limit))
    pieces = export_text(export_rows(ledger, terms, before=size), format, tree_size=size, limit=limit)
    return StreamingResponse(
        _gathered(pieces),
        media_type=_MEDIA[format],
        headers={
            "Content-Disposition": f'attachment; filename="entries.{format}"',
            "Cache-Control": "no-store",
            "X-Affidavit-Entries": str(found),
            "X-Affidavit-Tree-Size": str(size),
        },
    )


@router.get(
    "/evidence",
    summary="Export evidence by version, run or terms",
    responses={**problems(401, 403, 404, 422), 200: {"content": {"application/zip": {}}}},
)
async def evidence(request: Request, principal: Caller, terms: Terms) -> Response:
    """A version's or a run's whole story, or every entry that matches the terms, proved under one checkpoint.

    `version` alone, or `run` alone: what `affidavit verify` walks to the charter. Anything else (a time, a
    principal, a type …): all matching entries, at most 999, each proved; indices show what is between.
    """
    context = context_of(request)
    coordinator, ledger = context.coordinator, context.coordinator.ledger
    if terms == SearchRequest():
        raise MalformedRequestError("say what to prove: version, run, since and until, principal …")

    def collect() -> tuple[bytes, int, str]:
        data = service.export_asked(ledger, coordinator.blobs.find, principal, context.authorizer, terms)
        found = service.read_evidence(data)
        return data, found.leaf_index, "matching" if found.scope == "entry" else found.scope

    await context.publisher.cover(await to_thread.run_sync(lambda: ledger.tree_size) - 1)
    async with denials_recorded(request):
        data, index, scope = await to_thread.run_sync(collect)
    digest = hashlib.sha256(data).hexdigest()
    await context.journal.append(
        EvidenceExported(leaf_index=index, scope=scope, principal=principal.id, digest=digest)
    )
    await context.reading.record(principal, "export", terms.terms(), len(service.read_evidence(data).entries))
    return Response(
        data,
        media_type="application/zip",
        headers={
            "Content-Disposition": f'attachment; filename="evidence-{scope}-{index}.zip"',
            "Digest": f"sha-256={digest}",
        },
    )


def _gathered(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Fewer, larger pieces: each costs a turn of the event loop."""
    waiting, size = [], 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= _BATCH_BYTES:
            yield b"".join(waiting)
            waiting, size = [], 0
    yield b"".join(waiting)
