"""API keys over HTTP, for operators. The key's text is in one answer, once."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Path, Request
from pydantic import ValidationError

from audit.canonical import parse_strict
from audit.errors import AuditError
from server.context import Caller, authorise, context_of, parsed_body
from server.errors import MalformedRequestError
from server.key_service import create_key, revoke_key, rotate_key
from server.schemas import KeyRequest, RotateRequest, body_of, problems

router = APIRouter(prefix="/v1/keys", tags=["keys"])

KeyId = Annotated[str, Path(pattern=r"^[a-z2-7]{16}$", description="The middle part of the key's text.")]


@router.get("", summary="List the keys", responses=problems(401, 403))
async def list_keys(request: Request, principal: Caller) -> dict[str, Any]:
    """Every key's id, role, pseudonym and dates; never a secret."""
    await authorise(request, principal, "keys.list")
    keys = await to_thread.run_sync(context_of(request).keys.list)
    return {"keys": [asdict(key) for key in keys]}


@router.post(
    "",
    summary="Make a key",
    status_code=201,
    responses=problems(401, 403, 422),
    openapi_extra=body_of(KeyRequest),
)
async def new_key(request: Request, principal: Caller) -> dict[str, Any]:
    """Make a key for a role. Its making is an entry; its text is only in this answer."""
    await authorise(request, principal, "keys.create")
    try:
        asked = KeyRequest.model_validate(parse_strict(await request.body()))
    except (AuditError, ValidationError) as error:
        raise MalformedRequestError(
            f"send role, and optionally expires, note and a node's site: {error}"
        ) from error
    context = context_of(request)
    made = await to_thread.run_sync(
        lambda: create_key(
            context.keys,
            context.journal,
            role=asked.role,
            expires=asked.expires,
            note=asked.note,
            site=asked.site,
            region=asked.region,
            models=tuple(asked.models),
            certificate=asked.certificate,
        )
    )
    return {"key": made.text, **asdict(made.view), "entry": made.entry}


@router.post(
    "/{key_id}/rotate",
    summary="Replace a key",
    status_code=201,
    responses=problems(401, 403, 404, 422),
    openapi_extra=body_of(RotateRequest),
)
async def rotate(request: Request, principal: Caller, key_id: KeyId) -> dict[str, Any]:
    """Make a successor for the same principal, role and terms; the old key ends after `overlap_s`."""
    await authorise(request, principal, "keys.rotate")
    asked = await parsed_body(request, RotateRequest)
    context = context_of(request)
    made = await to_thread.run_sync(
        lambda: rotate_key(context.keys, context.journal, key_id, overlap_s=asked.overlap_s)
    )
    return {"key": made.text, **asdict(made.view), "entry": made.entry}


@router.delete("/{key_id}", summary="Revoke a key", responses=problems(401, 403, 404))
async def delete_key(request: Request, principal: Caller, key_id: KeyId) -> dict[str, Any]:
    """Revoke at once and for good; the revocation is an entry."""
    await authorise(request, principal, "keys.revoke")
    context = context_of(request)
    view = await to_thread.run_sync(lambda: revoke_key(context.keys, context.journal, key_id))
    return asdict(view)
