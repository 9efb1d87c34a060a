"""Decisions that a person must review, and alarms that a person closes; for officers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Path, Request

from server import alarm_service, review_service
from server.context import Caller, context_of, denials_recorded, parsed_body
from server.schemas import AlarmCloseRequest, AlarmRequest, ReviewRequest, body_of, problems

router = APIRouter(tags=["reviews"])

Decision = Annotated[
    str, Path(pattern=r"^[0-9a-f]{32}$", description="`review.id` of the answer: the entry's event id.")
]
Alarm = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$", description="The alarm's id.")]


@router.get("/v1/reviews/{decision}", summary="Is a decision final?", responses=problems(401, 403, 404))
async def show_review(request: Request, principal: Caller, decision: Decision) -> dict[str, Any]:
    """`final` is true where the charter asks for no review, or an officer confirmed the decision.

    For whoever got the answer, and for officers. `reviewer` is your own pseudonym: a signed review holds it.
    """
    context = context_of(request)
    async with denials_recorded(request):
        found = await to_thread.run_sync(
            review_service.read_review,
            context.coordinator.ledger,
            context.live,
            principal,
            context.authorizer,
            decision,
        )
    return {**found.to_json(), "reviewer": {"principal": principal.id, "role": principal.role}}


@router.post(
    "/v1/reviews/{decision}",
    summary="Review a decision",
    status_code=201,
    responses=problems(401, 403, 404, 409, 422, 503),
    openapi_extra=body_of(ReviewRequest),
)
async def review(request: Request, principal: Caller, decision: Decision) -> dict[str, Any]:
    """An officer's word on a decision with legal effect (GDPR Art. 22(3)): one entry, and the last.

    `signature`, base64, is by the officer's own key over the entry's body without it, in the domain `review`;
    `affidavit review record --officer` makes it. Without one the log's operator vouches for who you are.
    """
    asked = await parsed_body(request, ReviewRequest)
    context = context_of(request)

    def run() -> review_service.Review:
        return review_service.record_review(
            context.coordinator.ledger,
            context.journal,
            context.live,
            principal,
            context.authorizer,
            decision,
            outcome=asked.outcome,
            reason=asked.reason,
            officer=asked.officer,
            signature=asked.signature,
        )

    async with denials_recorded(request):
        done = await to_thread.run_sync(run)
    return done.to_json()


@router.get("/v1/alarms", summary="List the open alarms", responses=problems(401, 403))
async def list_alarms(request: Request, principal: Caller) -> dict[str, Any]:
    """Alarms that nobody closed, oldest first. One of kind `drift` keeps its model from answering."""
    context = context_of(request)
    async with denials_recorded(request):
        found = await to_thread.run_sync(
            alarm_service.open_alarms, context.rules, principal, context.authorizer
        )
    return {"alarms": [asdict(alarm) for alarm in found]}


@router.post(
    "/v1/alarms",
    summary="Raise an alarm about drift",
    status_code=201,
    responses=problems(401, 403, 404, 422, 503),
    openapi_extra=body_of(AlarmRequest),
)
async def raise_alarm(request: Request, principal: Caller) -> dict[str, Any]:
    """For a drift job of your own. The model answers nobody but testers until an officer closes the alarm."""
    asked = await parsed_body(request, AlarmRequest)
    context = context_of(request)

    def run() -> tuple[str, int]:
        return alarm_service.raise_alarm(
            context.live, context.journal, principal, context.authorizer, **asked.model_dump()
        )

    async with denials_recorded(request):
        alarm, index = await to_thread.run_sync(run)
    return {"alarm": alarm, "entry": index}


@router.post(
    "/v1/alarms/{alarm}/close",
    summary="Close an alarm",
    responses=problems(401, 403, 404, 422, 503),
    openapi_extra=body_of(AlarmCloseRequest),
)
async def close_alarm(request: Request, principal: Caller, alarm: Alarm) -> dict[str, Any]:
    """An officer looked into it. The reason goes into the log, so it must name nobody."""
    asked = await parsed_body(request, AlarmCloseRequest)
    context = context_of(request)
    async with denials_recorded(request):
        index = await to_thread.run_sync(
            alarm_service.close_alarm,
            context.rules,
            context.journal,
            principal,
            context.authorizer,
            alarm,
            asked.reason,
        )
    return {"alarm": alarm, "entry": index}
