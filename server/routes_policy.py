"""The rules over HTTP: what decides now, who put it there, and a change signed by an officer's own key."""

from __future__ import annotations

from functools import partial
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request

from audit.serving_bodies import PolicyChanged
from server import policy_service
from server.context import Caller, context_of, denials_recorded, parsed_body
from server.schemas import PolicyRequest, body_of, problems

router = APIRouter(prefix="/v1/policy", tags=["policy"])


@router.get("", summary="Read the rules in force", responses=problems(401, 403))
async def show_rules(request: Request, principal: Caller) -> dict[str, Any]:
    """The Cedar text, its digest, the policies' names and the entry that put it in force.

    `change` is null while the rules that the server was started with decide.
    """
    context = context_of(request)
    async with denials_recorded(request):
        return await to_thread.run_sync(
            policy_service.rules_document,
            context.rules,
            principal,
            context.authorizer,
            context.first_policies,
        )


@router.post(
    "",
    summary="Change the rules",
    status_code=201,
    responses=problems(401, 403, 409, 422, 503),
    openapi_extra=body_of(PolicyRequest),
)
async def change_rules(request: Request, principal: Caller) -> dict[str, Any]:
    """A change signed by an officer of every charter that has a live version; `affidavit policy apply` makes
    it.

    It is one entry, which holds the text. Every worker decides by it within seconds. What does not hold
    together, or does not continue the chain of changes, is refused, and the rules in force stay. So are rules
    under which no officer could read or change them (`access.policy_lock_out`), unless `lock_out` is true.
    """
    asked = await parsed_body(request, PolicyRequest)
    body = PolicyChanged(**asked.model_dump(exclude={"lock_out"}))
    context = context_of(request)
    async with denials_recorded(request):
        change = await to_thread.run_sync(
            partial(policy_service.apply_change, lock_out=asked.lock_out),
            context.rules,
            context.journal,
            principal,
            context.authorizer,
            body,
        )
    await context.rules_follower.step()
    return {
        "policy_set": body.policy_set,
        "entry": {"leaf_index": change.leaf_index, "leaf_hash": change.leaf_hash},
    }
