"""The two calls that models are asked by, without the router: the same functions, the same errors, less CPU.

A request takes this way when it is exactly `POST …/infer` or `POST …/predict` with well-formed names and no
query; anything else goes on to FastAPI, whose routes call the same functions and describe them. So nothing is
decided here: who asks says `server.identity`, the answer comes from `server.oip.routes` and
`server.routes_models`, and errors become documents in `server.errors`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

from starlette.requests import Request
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from audit.errors import AuditError
from federation.errors import FederationError
from server import routes_models
from server.context import Context, identified
from server.errors import ServerError, render
from server.identity import bearer_credentials
from server.marks import note_principal
from server.oip import routes as routes_oip
from server.schemas import NAME_PATTERN, VERSION_PATTERN

_NAME: Final = NAME_PATTERN.strip("^$")
_VERSION: Final = VERSION_PATTERN.strip("^$")
_READ: Final = frozenset({b"authorization", *(name.encode() for name in routes_oip.HEADERS)})
_fits: Final = re.compile(
    f"/v2/models/(?P<model>{_NAME})(?:/versions/(?P<version>{_VERSION}))?/infer"
    f"|/v1/models/(?P<name>{_NAME})/predict"
).fullmatch


@lru_cache(maxsize=256)
def _names_in(path: str) -> tuple[str | None, str | None, str | None] | None:
    """The names of model, version and friendly model in a path that goes this way; else None."""
    found = _fits(path)
    return None if found is None else (found["model"], found["version"], found["name"])


class Direct:
    """ASGI middleware, the innermost of ours: `server.guard` has read the body."""

    def __init__(self, app: ASGIApp, *, routes: Sequence[BaseRoute], state: Any) -> None:
        """`routes` are the application's: log lines, metrics and spans name them as FastAPI would."""
        self._app, self._state = app, state
        self._infer = _route_of(routes, routes_oip.infer_live)
        self._infer_version = _route_of(routes, routes_oip.infer_version)
        self._predict = _route_of(routes, routes_models.predict)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] != "http"
            or scope["method"] != "POST"
            or scope["query_string"]
            or scope.get("root_path")
            or (found := _names_in(scope["path"])) is None
        ):
            await self._app(scope, receive, send)
            return
        model, version, name = found
        scope["route"] = self._predict if name else self._infer_version if version else self._infer
        context: Context = self._state.context
        body, request_id = scope["affidavit.body"], scope["affidavit.request_id"]
        try:
            given = _headers(scope)
            credentials = bearer_credentials(given.get("authorization", ""))
            principal = None if credentials is None else context.identities.recalled(credentials)
            if principal is None:
                principal = await identified(context, Request(scope, receive), credentials)
            else:
                note_principal(scope, principal.id)
            if name:
                data = await routes_models.answer_predict(
                    context, given, body, principal, name, "sequenced", request_id
                )
                headers = {"content-type": "application/json"}
            else:
                data, headers = await routes_oip.answer_infer(
                    context, given, body, principal, model or "", version or "", request_id, scope
                )
        except (ServerError, AuditError, FederationError) as error:
            await render(Request(scope, receive), error)(scope, receive, send)
            return
        sent = [(b"content-length", b"%d" % len(data))]
        sent += [(key.encode("latin-1"), value.encode("latin-1")) for key, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": sent})
        await send({"type": "http.response.body", "body": data})


def _headers(scope: Scope) -> dict[str, str]:
    """Those of the request's headers that count here; of several with one name the first, as in Starlette."""
    return {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in reversed(list(scope["headers"]))
        if name in _READ
    }


def _route_of(routes: Sequence[BaseRoute], endpoint: object) -> BaseRoute:
    return next(route for route in routes if getattr(route, "endpoint", None) is endpoint)
