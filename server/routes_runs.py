"""What an officer asks about a run: how its sites' updates agree, and who stands apart."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response

from audit.canonical import canonical_bytes
from federation.anomaly import views_of_run
from server.context import Caller, context_of, require_whole_log
from server.schemas import NAME_PATTERN, problems

router = APIRouter(prefix="/v1/audit/runs", tags=["audit"])

RunName = Annotated[str, Path(pattern=NAME_PATTERN, description="The run's name in the log.")]


@router.get(
    "/{run}/updates",
    summary="Show how a run's updates agree",
    response_class=JSONResponse,
    responses={**problems(401, 403, 404, 422), 200: {"content": {"image/png": {}}}},
)
async def updates(
    request: Request,
    principal: Caller,
    run: RunName,
    format: Annotated[Literal["json", "png"], Query()] = "json",
) -> Response:
    """For each round: the cosines between the sites' updates, each one's length relative to the charter's
    norm bound, its distance from the others relative to noise, and the sites that stand apart.

    Made from released, noised updates, so that looking costs no privacy; the reading is an entry. With
    `format=png` a picture of the last round's cosines and of all distances.
    """
    context = context_of(request)
    await require_whole_log(request, principal)
    views = await to_thread.run_sync(lambda: list(views_of_run(context.coordinator, run)))
    await context.reading.record(principal, "updates", canonical_bytes({"run": run}), len(views))
    headers = {"Cache-Control": "no-store"}
    if format == "png":
        picture = await to_thread.run_sync(_picture, views)
        return Response(picture, media_type="image/png", headers=headers)
    return JSONResponse({"run": run, "rounds": views}, headers=headers)


def _picture(views: list[dict[str, Any]]) -> bytes:
    from federation.plots import png_of, updates_figure

    return png_of(updates_figure(views))
