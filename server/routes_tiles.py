"""The log as tlog-tiles over HTTP, at the same paths as an export: `/v1/audit/tile/…` beside the checkpoint.

Only what the newest checkpoint covers is served: a cache keeps it, so it must be signed.
Full tiles never change and may be kept for good; partial ones are the widest a reader asks for and never
change either, but are soon out of use. Bundles hold entries and are for those who may read the whole log.
"""

from __future__ import annotations

from typing import Annotated, Final

from anyio import to_thread
from fastapi import APIRouter, Depends, Path, Request
from fastapi.responses import Response
from fastapi.security import HTTPAuthorizationCredentials

from audit.canonical import canonical_bytes
from audit.checkpoints import parse_checkpoint_note
from audit.principal import Principal
from audit.tiles import ENTRIES, Tile, TileError, level_width
from audit.tiles_export import tile_bytes
from server.context import authorise, bearer, context_of, principal_of, require_whole_log
from server.errors import NoSuchTileError
from server.schemas import problems

router = APIRouter(prefix="/v1/audit", tags=["audit"])

_FULL: Final = "max-age=31536000, immutable"
_PARTIAL: Final = "max-age=3600, immutable"


async def _reader(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)] = None
) -> Principal | None:
    """Whoever asks; nobody in particular when hashes are public and no key was sent."""
    if credentials is None and context_of(request).settings.public_tiles:
        return None
    return await principal_of(request, credentials)


Reader = Annotated[Principal | None, Depends(_reader)]


@router.get(
    "/tile/{place:path}",
    summary="Read a hash tile or an entry bundle (tlog-tiles)",
    response_class=Response,
    responses={
        **problems(401, 403, 404),
        200: {"content": {"application/octet-stream": {}}, "description": "The tile's bytes."},
    },
)
async def read_tile(
    request: Request,
    reader: Reader,
    place: Annotated[str, Path(max_length=80, description="`<L>/<N>[.p/<W>]` or `entries/<N>[.p/<W>]`.")],
) -> Response:
    """C2SP tlog-tiles. Hash tiles: witnesses and members, or anybody where the operator says so. Bundles:
    officers and whoever else may read the whole log; that they were read is an entry.
    """
    context = context_of(request)
    try:
        tile = Tile.parse(f"tile/{place}")
    except TileError as error:
        raise NoSuchTileError(str(error)) from error
    public = tile.level != ENTRIES and context.settings.public_tiles
    if tile.level == ENTRIES:
        reader = reader if reader is not None else await principal_of(request, None)
        await require_whole_log(request, reader)
    elif not public:
        assert reader is not None  # noqa: S101 - `_reader` refused it
        await authorise(request, reader, "tiles.read")
    ledger = context.coordinator.ledger
    size = parse_checkpoint_note(await context.publisher.current()).tree_size
    if tile.start + tile.width > level_width(tile.level, size):
        raise NoSuchTileError(f"{tile.path} is beyond the checkpoint of {size} entries")
    data = await to_thread.run_sync(tile_bytes, ledger, tile)
    if tile.level == ENTRIES and reader is not None:
        await context.reading.record(reader, "bundle", canonical_bytes({"tile": tile.path}), tile.width)
    scope = "public" if public else "private"
    cache = f"{scope}, {_FULL if tile.is_full else _PARTIAL}"
    return Response(
        data,
        media_type="application/octet-stream",
        headers={"Cache-Control": cache, **({} if public else {"Vary": "Authorization"})},
    )
